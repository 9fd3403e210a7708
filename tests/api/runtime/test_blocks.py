"""Blocks of a query on several lanes: each once, whoever runs it; a lane that is wanted lets go after one."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from api.runtime import backlog as backlogs
from api.runtime.backlog import Backlog, Query
from api.runtime.blocks import Blocked, Cursor, Word
from api.runtime.forms import Form
from api.runtime.graph import Graph, GraphError, Operator, capture
from api.runtime.model import Model
from api.runtime.policy import Policy
from api.runtime.runtime import FullError, LateError, Runtime
from api.runtime.simulate import Arrival, simulate
from api.runtime.watch import Observer
from tests.api.runtime.graphs import chain, in_blocks
from tests.api.runtime.test_graph import captured, query
from tests.conftest import wait_until

ROWS, SIZE = 40, 10


def parted(call: Callable[[Tensor], Tensor], cost: float = 1e-3) -> Model:
    """A model of blocks that are given to `call`, as wide as the input."""
    blocked = Blocked(Form(call), (torch.zeros(2, 3),), (True,), SIZE)
    one = Operator(blocked, (0,), (1,), cost, SIZE, blocks=True)
    return Model(Graph(1, (one,), (1,), single=True, rows=(0,), block=SIZE), learns=False)


def parted_behind_another(call: Callable[[Tensor], Tensor]) -> Model:
    """Blocks of 5 ms that read what an operator of 1 ms makes, the input and 1."""
    before = Operator(lambda x: x + 1.0, (0,), (1,), 1e-3)
    blocks = dataclasses.replace(parted(call, cost=5e-3).graph.operators[0], inputs=(1,), outputs=(2,))
    return Model(Graph(1, (before, blocks), (2,), single=True, rows=(0,), block=SIZE), learns=False)


def numbered(rows: int) -> Tensor:
    return torch.arange(rows * 3.0).reshape(rows, 3)


class Steps:
    """Blocks that wait to be let go one by one. Each is known by its first number."""

    def __init__(self) -> None:
        self.began, self._go = list[float](), threading.Semaphore(0)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > 2:  # no example
            self.began.append(float(x[0, 0]) / 3)
            assert self._go.acquire(timeout=30)
        return x + 1.0

    def go(self, blocks: int = 1) -> None:
        self._go.release(blocks)


class _Scores(nn.Module):
    """Has a user's part, a layer, and a look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(3, 16), nn.Embedding(50, 16)

    def forward(self, user: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        found: Tensor = self.layer(x) * user.sigmoid().sum(1, keepdim=True) + self.table(ids)
        return found


def asked(rows: int) -> tuple[Tensor, ...]:
    return torch.linspace(-1, 1, 4)[None], numbered(rows) / 7, torch.arange(rows) % 50


MODULE = _Scores().eval()
GRAPH = capture(MODULE, asked(8), (None, 0, 0))
(ONE,) = GRAPH.operators
FORMS = {
    "generated": ONE.run._form,
    "plain": Form(lambda *given: MODULE(*(given[ONE.inputs.index(at)] for at in range(3)))),
}


def taken(rows: int) -> list[Tensor]:
    return [asked(rows)[at] for at in ONE.inputs]


def formed(form: str, size: int) -> Blocked:
    return Blocked(FORMS[form], taken(2), [GRAPH.rows[at] == 0 for at in ONE.inputs], size)


@given(
    st.integers(1, 60),
    st.sampled_from([1, 3, 8]),
    st.integers(1, 4),
    st.sampled_from([1, 2, 99]),
    st.sampled_from(list(FORMS)),
)
def test_blocks_are_the_whole_whoever_runs_them(rows: int, size: int, lanes: int, most: int, form: str) -> None:
    blocked = formed(form, size)
    inputs = taken(rows)
    outputs, cursor, stop = blocked.outputs(rows), Cursor(blocked.count(rows)), Word()

    def lane(_: int) -> int:
        done = 0
        with torch.inference_mode():
            while cursor.left():
                own = blocked.run(inputs, outputs, rows, cursor, stop, most)
                assert own <= most
                done += own
        return done

    with torch.inference_mode(), ThreadPoolExecutor(lanes) as pool:
        assert sum(pool.map(lane, range(lanes))) == cursor.blocks
        assert torch.equal(outputs[0], blocked(*inputs))
        torch.testing.assert_close(outputs[0], MODULE(*asked(rows)), atol=1e-5, rtol=1e-5)


def test_a_light_users_part_is_computed_with_the_blocks() -> None:
    assert set(ONE.inputs) == {0, 1, 2}
    assert ONE.run.once
    _, graph = captured("bst", grain_s=1e-9)
    assert len(graph.operators) > 1, "where one operation is more than an operator should be, it is not"


@pytest.mark.parametrize("form", FORMS)
def test_who_is_told_to_stop_has_run_one_block(form: str) -> None:
    blocked = formed(form, 10)
    inputs, outputs = taken(40), blocked.outputs(40)
    cursor, stop = Cursor(4), Word()
    stop.value = 1
    with torch.inference_mode():
        for left in (3, 2, 1, 0):
            assert blocked.run(inputs, outputs, 40, cursor, stop, 99) == 1
            assert cursor.left() == left
        assert blocked.run(inputs, outputs, 40, cursor, stop, 99) == 0


def test_an_index_outside_of_its_table_is_an_error_of_its_block() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x).sigmoid()

    graph = capture(Looks().eval(), (torch.zeros(90, 1, dtype=torch.int64),), (0,), blocks=(8,))
    model, ids = Model(graph), torch.arange(40)[:, None]
    with Runtime(2) as runtime:
        wrong = [runtime.submit(model, torch.where(ids == at, torch.tensor(99), ids)) for at in (0, 17, 39)]
        fine = [runtime.submit(model, ids) for _ in range(4)]
        for answer in wrong:
            with pytest.raises(IndexError):
                answer.result(30)
        assert all(answer.result(30).shape == (40, 1, 16) for answer in fine)
        wait_until(lambda: not len(runtime._backlog) and not runtime._shared, "nothing is kept")


def test_lanes_share_a_query() -> None:
    both = threading.Barrier(2)

    def call(x: Tensor) -> Tensor:
        if len(x) > 2:
            both.wait(30)  # two at once, or none goes on
        return x * 2.0

    with Runtime(2) as runtime:
        assert torch.equal(runtime.submit(parted(call), numbered(ROWS)).result(30), numbered(ROWS) * 2.0)


def test_lanes_share_no_query_while_others_wait() -> None:
    model = parted(torch.clone, cost=5e-3)  # four blocks
    one, many = (simulate([Arrival(0.0, model, ROWS)] * count, 2, Policy()).ended for count in (1, 6))
    assert one == pytest.approx((10e-3,))
    assert many == pytest.approx((20e-3, 20e-3, 40e-3, 40e-3, 50e-3, 60e-3))


def test_lanes_share_no_query_that_is_nearly_done() -> None:
    model = parted(torch.clone, cost=0.5e-3)
    assert simulate([Arrival(0.0, model, ROWS)], 2, Policy()).ended == pytest.approx((2e-3,))


def test_many_lanes_share_a_query_as_far_as_each_has_enough_of_it() -> None:
    model = Model(in_blocks(parted(torch.clone, 5e-3).graph, 2), learns=False)  # 20 blocks of 1 ms
    alone, shared = (simulate([Arrival(0.0, model, ROWS)], lanes, Policy(), place_s=1e-3) for lanes in (1, 64))
    assert alone.ended == pytest.approx((22e-3,))  # taken up again after 10 ms
    assert alone.busy == pytest.approx(22e-3)
    assert shared.ended == pytest.approx((3e-3,))  # ten lanes, each with two blocks
    assert shared.busy == pytest.approx(30e-3)
    path = Query(0, model.graph, model.costs(ROWS), 20, 0, 0.0, math.inf, 64).path
    assert path == pytest.approx(2e-3)


def test_blocks_that_take_long_are_a_lanes_each() -> None:
    model = parted(torch.clone, cost=2.9e-3)  # four blocks
    for lanes, took in ((1, 11.6e-3), (2, 5.8e-3), (64, 2.9e-3)):
        (ended,) = simulate([Arrival(0.0, model, ROWS)], lanes, Policy()).ended
        assert ended == pytest.approx(took)
        assert Query(0, model.graph, model.costs(ROWS), 4, 0, 0.0, math.inf, lanes).path == pytest.approx(took)
    one = Query(0, model.graph, model.costs(SIZE), 1, 0, 0.0, math.inf, 64)
    assert one.path == pytest.approx(2.9e-3)


def test_lanes_share_a_query_while_others_wait_that_are_of_a_lower_class() -> None:
    model = parted(torch.clone, cost=5e-3)
    many = [Arrival(0.0, model, ROWS, priority=1)] * 6
    *_, high = simulate([*many, Arrival(2e-3, model, ROWS)], 2, Policy()).ended
    assert high == pytest.approx(15e-3)  # when the blocks that run have ended


def test_a_query_that_goes_first_waits_for_one_block() -> None:
    steps, ran = Steps(), list[str]()

    def noted(k: int, values: list[Any]) -> Any:
        ran.append(f"urgent after {len(steps.began)}")
        return k

    with Runtime(1) as runtime:
        long = runtime.submit(parted(steps), numbered(ROWS), priority=1)
        wait_until(lambda: steps.began == [0.0], "the first block runs")
        urgent = runtime.submit(chain(1e-3, run=noted), torch.zeros(1), rows=1)
        steps.go()
        assert urgent.result(30) == 0
        steps.go(3)
        assert torch.equal(long.result(30), numbered(ROWS) + 1.0)
    assert ran == ["urgent after 1"]
    assert steps.began == [0.0, 10.0, 20.0, 30.0]


def test_a_query_that_goes_last_stops_nobody() -> None:
    steps, after = Steps(), list[int]()
    with Runtime(1) as runtime:
        long = runtime.submit(parted(steps), numbered(ROWS))
        wait_until(lambda: steps.began == [0.0], "the first block runs")
        low = runtime.submit(
            chain(1e-3, run=lambda k, values: after.append(len(steps.began))), torch.zeros(1), priority=1, rows=1
        )
        steps.go(4)
        assert long.result(30).shape == (ROWS, 3)
        assert low.result(30) is None
    assert after == [4]


@pytest.mark.parametrize("late", [False, True])
def test_what_is_cancelled_or_late_ends_after_a_block(late: bool) -> None:
    steps = Steps()
    with Runtime(1) as runtime:
        cost, within_s = (0.02, 1.0) if late else (1e-6, 30.0)  # after one block it asks, or it is told
        answer = runtime.submit(parted(steps, cost=cost), numbered(ROWS), within_s=within_s)
        wait_until(lambda: len(steps.began) == 1, "the first block runs")
        if late:
            threading.Event().wait(1.0)  # its deadline passes
        else:
            assert answer.cancel()
        steps.go(4)
        with pytest.raises(LateError if late else CancelledError):
            answer.result(30)
        wait_until(lambda: not len(runtime._backlog), "it has left")
        assert runtime.submit(chain(1e-3), torch.zeros(1), rows=1).result(30) is not None
    assert len(steps.began) == 1


def test_the_last_blocks_are_run_though_nobody_joins_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that is told to stop leaves blocks behind that are not worth another lane while it is at them."""
    steps = Steps()
    gate = threading.Event()
    with Runtime(2) as runtime:
        long = runtime.submit(parted(steps, cost=1e-9), numbered(ROWS), priority=1)
        wait_until(lambda: len(steps.began) == 1, "one lane runs a block")
        held = [
            runtime.submit(chain(1.0, run=lambda k, values: gate.wait(30)), torch.zeros(1), rows=1) for _ in range(2)
        ]
        steps.go()
        wait_until(lambda: runtime._free == 0, "both lanes are at what goes first")
        assert len(steps.began) < 4
        steps.go(3)
        gate.set()
        assert all(answer.result(30) for answer in held)
        assert torch.equal(long.result(30), numbered(ROWS) + 1.0)


def test_a_query_is_stopped_by_none_of_its_class() -> None:
    steps, after = Steps(), list[int]()
    with Runtime(1) as runtime:
        long = runtime.submit(parted(steps, cost=2e-3), numbered(ROWS))
        wait_until(lambda: steps.began == [0.0], "the first block runs")
        short = runtime.submit(
            chain(1e-9, run=lambda k, values: after.append(len(steps.began))), torch.zeros(1), rows=1
        )
        steps.go(4)
        assert long.result(30).shape == (ROWS, 3)
        assert short.result(30) is None
    assert after == [4]


def waits(number: int, left_s: float, priority: int = 0, deadline: float = math.inf) -> Query:
    model = parted(torch.clone, cost=left_s / 4)
    return Query(number, model.graph, model.costs(ROWS), 4, priority, 0.0, deadline, 2)


@pytest.mark.parametrize(
    ("running", "priority", "deadline", "stopped"),
    [
        ((0.02, 0.05), 0, math.inf, set()),  # of its own class
        ((0.02, 0.005), 1, math.inf, {0, 1}),  # of a lower one
        ((0.02, 0.005), 0, 0.003, {0, 1}),  # which can wait while the newest cannot
    ],
)
def test_who_is_stopped_for_the_newest(
    running: tuple[float, ...], priority: int, deadline: float, stopped: set[int]
) -> None:
    backlog = Backlog(Policy(), 2)
    lanes = {lane: waits(lane, left, priority) for lane, left in enumerate(running)}
    newest = waits(2, 0.002, deadline=deadline)
    for one in lanes.values():
        one.enter()
    for one in (*lanes.values(), newest):
        backlog.add(one, 0.0)
    assert set(backlog.behind(newest, lanes, 0.0)) == stopped


def test_a_query_has_as_long_a_path_as_its_blocks_take_on_all_lanes() -> None:
    one, light = waits(0, 0.02), waits(1, 0.001)
    assert (one.path, light.path) == pytest.approx((0.01, 0.001))  # which no second lane would join
    one.enter()
    assert one.cursor is not None
    one.cursor.take()
    assert one.path_of(one.ready[0]) == pytest.approx(0.0075)


def test_a_query_in_blocks_whose_deadline_is_near_goes_first() -> None:
    many = Model(in_blocks(parted(torch.clone, 5e-3).graph, 2), learns=False)  # 20 blocks of 1 ms
    short = [Arrival(at * 4e-3, chain(4e-3)) for at in range(20)]  # so that one always waits
    ended = simulate([short[0], Arrival(0.0, many, ROWS, within_s=0.06), *short[1:]], 1, Policy()).ended
    assert 0.03 < ended[1] <= 0.06
    assert not any(map(math.isnan, ended))


def test_who_has_ended_is_no_crowd() -> None:
    backlog = Backlog(Policy(), 2)
    for one in [waits(number, 0.01) for number in range(9)]:
        backlog.add(one, 0.0)
        backlog.end(one)
    last = waits(9, 0.01)
    backlog.add(last, 0.0)
    assert backlog.lanes_of(last) == 4


def test_a_lane_that_was_stopped_runs_all_blocks_of_the_next_query() -> None:
    class Ends(Observer):
        def end(self, lane: int, newest: bool, blocks: int) -> None:
            ran.append(blocks)

    steps, ran = Steps(), list[int]()
    with Runtime(1, observer=Ends()) as runtime:
        low = runtime.submit(parted(steps, cost=1e-6), numbered(ROWS), priority=1)
        wait_until(lambda: steps.began == [0.0], "the first block runs")
        high = runtime.submit(chain(1e-3), torch.zeros(1), rows=1)
        steps.go(4)
        for answer in (high, low):
            answer.result(30)
        runtime.submit(parted(torch.clone, cost=1e-6), numbered(ROWS)).result(30)
    assert ran == [1, 0, 3, 4]


def test_blocks_that_are_ready_later_stop_lanes_too() -> None:
    began, both, steps = threading.Event(), threading.Barrier(2), [Steps(), Steps()]

    def call(x: Tensor) -> Tensor:
        if len(x) > 2:
            began.set()
            both.wait(30)  # two at once, or none goes on
        return x * 2.0

    high = parted_behind_another(call)
    with Runtime(2) as runtime:
        low = [runtime.submit(parted(own, cost=1e-6), numbered(ROWS), priority=1) for own in steps]
        wait_until(lambda: all(own.began for own in steps), "both lanes are at what can wait")
        answer = runtime.submit(high, numbered(ROWS))
        steps[1].go(1)  # the one that came last is stopped at first, ...
        assert began.wait(30)
        steps[0].go(1)  # ... and the other one for the blocks
        assert torch.equal(answer.result(60), numbered(ROWS) * 2.0 + 2.0)
        for own in steps:
            own.go(3)
        assert all(torch.equal(one.result(30), numbered(ROWS) + 1.0) for one in low)


def test_blocks_that_are_ready_later_stop_lanes_in_simulated_time() -> None:
    low = Model(in_blocks(parted(torch.clone, 5e-3).graph, 2), learns=False)  # 20 blocks of 1 ms
    high = parted_behind_another(torch.clone)
    arrivals = [*[Arrival(0.0, low, ROWS, priority=1)] * 2, Arrival(0.5e-3, high, ROWS)]
    assert simulate(arrivals, 2, Policy()).ended[2] == pytest.approx(13e-3)  # from 2 ms and from 3 ms on


def test_a_lane_that_is_told_to_stop_is_for_one_query() -> None:
    low = Model(in_blocks(parted(torch.clone, 25e-3).graph, 2), learns=False)  # 20 blocks of 5 ms
    urgent = [Arrival(at, chain(1e-3)) for at in (1e-3, 2e-3)]
    *_, first, second = simulate([*[Arrival(0.0, low, ROWS, priority=1)] * 2, *urgent], 2, Policy()).ended
    assert (first, second) == pytest.approx((6e-3, 6e-3))
    steps = [Steps(), Steps()]
    with Runtime(2) as runtime:
        slow = [runtime.submit(parted(own, cost=1e-6), numbered(ROWS), priority=1) for own in steps]
        wait_until(lambda: all(own.began for own in steps), "both lanes are at what can wait")
        answers = [runtime.submit(chain(1e-6), torch.zeros(1), rows=1) for _ in range(2)]
        assert [stop.value for stop in runtime._stops] == [1, 1]
        for own in steps:
            own.go(4)
        for answer in (*answers, *slow):
            answer.result(30)


def test_what_cannot_begin_is_its_querys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Blocked, rows: int) -> tuple[Tensor, ...]:
        raise MemoryError("no more")

    with Runtime(1) as runtime:
        with monkeypatch.context() as patch:
            patch.setattr(Blocked, "outputs", none)
            with pytest.raises(MemoryError, match="no more"):
                runtime.submit(parted(torch.clone), numbered(ROWS)).result(30)
        assert torch.equal(runtime.submit(parted(torch.clone), numbered(ROWS)).result(30), numbered(ROWS))


def test_what_is_cancelled_while_it_waits_is_gone_at_once() -> None:
    steps = Steps()
    with Runtime(1) as runtime:
        first = runtime.submit(parted(steps), numbered(ROWS))
        wait_until(lambda: steps.began == [0.0], "the first block runs")
        held = runtime.bytes_held
        waiting = [runtime.submit(parted(steps), numbered(ROWS), priority=1) for _ in range(4)]
        assert all(one.cancel() for one in waiting)
        assert (runtime.bytes_held, len(runtime._backlog)) == (held, 1)
        steps.go(4)
        assert first.result(30).shape == (ROWS, 3)


def test_a_lane_may_come_between_a_cancelling_and_its_news() -> None:
    steps = Steps()
    with Runtime(1) as runtime:
        first = runtime.submit(parted(steps), numbered(ROWS))
        wait_until(lambda: steps.began == [0.0], "the first block runs")
        second = runtime.submit(parted(steps), numbered(ROWS))
        assert Future.cancel(second)  # and has not told the runtime yet
        steps.go(4)
        assert first.result(30).shape == (ROWS, 3)
        wait_until(lambda: not len(runtime._backlog), "it has left")
        assert torch.equal(runtime.submit(parted(torch.clone), numbered(ROWS)).result(30), numbered(ROWS))


@pytest.mark.parametrize("lent", [False, True])
def test_what_goes_first_waits_for_a_block_though_a_lane_seems_to_be_idle(lent: bool) -> None:
    """It is lent, or has been told of another query a moment ago."""
    steps, gate, after = Steps(), threading.Event(), list[int]()

    def noted(k: int, values: list[Any]) -> Any:
        after.append(len(steps.began))
        return gate.wait(30)

    with Runtime(2) as runtime:
        assert not lent or runtime.borrow()
        long = runtime.submit(parted(steps, cost=1e-6), numbered(ROWS), priority=1)
        wait_until(lambda: len(steps.began) == 1, "one lane runs a block")
        with runtime._wake:  # so that no lane comes between them
            urgent = [runtime.submit(chain(1.0, run=noted), torch.zeros(1), rows=1) for _ in range(2 - lent)]
        steps.go()
        wait_until(lambda: len(after) == 2 - lent, "all that goes first runs")
        steps.go(3)
        gate.set()
        assert all(answer.result(30) for answer in urgent)
        assert torch.equal(long.result(30), numbered(ROWS) + 1.0)
        if lent:
            runtime.give_back()
    assert max(after) == 1


def test_a_runtime_that_is_closed_ends_after_a_block() -> None:
    steps = Steps()
    with Runtime(1) as runtime:
        answer = runtime.submit(parted(steps), numbered(ROWS))
        wait_until(lambda: len(steps.began) == 1, "the first block runs")
        closing = threading.Thread(target=runtime.close)
        closing.start()
        wait_until(lambda: runtime._closed, "it is told")
        steps.go(4)
        closing.join(30)
    assert answer.cancelled()
    assert len(steps.began) == 1


def test_an_error_stops_all_lanes_of_its_query() -> None:
    steps, both = Steps(), threading.Barrier(2)

    def call(x: Tensor) -> Tensor:
        if len(x) > 2 and not len(steps.began):
            if not float(x[0, 0]):
                both.wait(30)
                raise ValueError("no such row")
            both.wait(30)
        return steps(x)

    with Runtime(2) as runtime:
        answer = runtime.submit(parted(call), numbered(ROWS))
        with pytest.raises(ValueError, match="no such row"):
            answer.result(30)
        steps.go(9)
        wait_until(lambda: runtime._free == 2, "all lanes are free")
    assert len(steps.began) <= 1


def test_what_is_refused_takes_no_memory_and_rows_are_those_of_the_inputs() -> None:
    with Runtime(1, bytes_max=1e6) as runtime:
        wide = torch.zeros(1, 3).expand(10**11, 3)  # its scores would take more than there is
        with pytest.raises(FullError):
            runtime.submit(Model(dataclasses.replace(parted(torch.exp).graph, bytes=(0.0, 12.0))), wide)
        assert runtime.submit(parted(lambda x: x + 1.0), numbered(ROWS), rows=4).result(30).shape == (ROWS, 3)


def test_another_operator_runs_beside_blocks_that_nobody_joins_for() -> None:
    steps, ran = Steps(), threading.Event()
    blocked = Operator(parted(steps).graph.operators[0].run, (0,), (1,), 1e-9, SIZE, blocks=True)
    other = Operator(lambda x: ran.set(), (0,), (2,), 1e-9)
    graph = Graph(1, (blocked, other), (1, 2), single=False, rows=(0,), block=SIZE)
    with Runtime(2) as runtime:
        answer = runtime.submit(Model(graph), numbered(ROWS))
        assert ran.wait(30)
        wait_until(lambda: runtime.idle(), "nothing is left that another lane would join for")
        assert runtime.borrow()
        runtime.give_back()
        steps.go(4)
        assert torch.equal(answer.result(30)[0], numbered(ROWS) + 1.0)


def test_a_changed_view_is_refused() -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = x * 2.0
            out[:, 0] = x[:, 1]
            return out

    with pytest.raises(GraphError, match="view"):
        capture(Changes(), (torch.ones(8, 3),), (0,))


@pytest.mark.parametrize("share_s", [1e-9, 1.0])
def test_published_models_in_blocks_of_few_rows(share_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes that ask after each block, and lanes that never do."""
    monkeypatch.setattr(backlogs, "_SHARE_S", share_s)
    models = {name: Model(in_blocks(captured(name)[1], 8)) for name in ("wnd", "dlrm")}
    with Runtime(3) as runtime:
        queries = []
        for at in range(80):
            name = ("wnd", "dlrm")[at % 2]
            inputs = query(name, 2 + 7 * (at % 12))
            queries.append((models[name], inputs, runtime.submit(models[name], *inputs, priority=at % 3)))
        for model, inputs, answer in queries:
            with torch.inference_mode():
                assert torch.equal(answer.result(60), model.graph.run(*inputs))
        assert (len(runtime._backlog), runtime.bytes_held, runtime._shared) == (0, 0, {})
