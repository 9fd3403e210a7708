"""Lanes of real threads: the same bits under every schedule, cancelled and late queries end, errors are the query's."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from api.runtime.model import Model
from api.runtime.policy import Policy
from api.runtime.runtime import FullError, LateError, Runtime
from tests.api.runtime.graphs import Gate, chain, in_blocks, made
from tests.api.runtime.test_graph import captured, query
from tests.conftest import wait_until


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in a lane: the number of threads inside of an operation may change its last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: Model(in_blocks(captured(name, grain_s=1e-5)[1], 8)) for name in ("wnd", "din", "dlrm", "bst")}


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("policy", [Policy(), Policy(fifo=True), Policy(ageing=0.0)])
def test_results_do_not_depend_on_the_schedule(lanes: int, policy: Policy, models: dict[str, Model]) -> None:
    with Runtime(lanes, policy) as runtime:
        asked = []
        for at in range(60):
            name = list(models)[at % 4]
            inputs = query(name, 2 + 3 * (at % 9))
            asked.append((models[name], inputs, runtime.submit(models[name], *inputs, priority=at % 2)))
        for one, inputs, answer in asked:
            with torch.inference_mode():
                assert torch.equal(answer.result(60), one.graph.run(*inputs))
        assert (len(runtime._backlog), runtime.bytes_held) == (0, 0)


def test_values_have_a_limit_of_bytes(models: dict[str, Model]) -> None:
    gate = Gate()
    inputs = query("wnd", 20)
    need = models["wnd"].graph.bytes_of(20)
    with Runtime(1, bytes_max=2.5 * need) as runtime:
        blocker = runtime.submit(chain(1.0, run=gate), torch.zeros(1))
        assert gate.began.wait(30)
        held = [runtime.submit(models["wnd"], *inputs) for _ in range(2)]
        with pytest.raises(FullError):
            runtime.submit(models["wnd"], *inputs)
        assert held[0].cancel()
        gate.go.set()
        assert blocker.result(30) == 0
        assert held[1].result(30).shape == (20,)
        wait_until(lambda: runtime.bytes_held == 0, "all is given back")
        runtime.submit(models["wnd"], *inputs).result(30)


def test_costs_are_learned_and_what_waits_decides_who_is_taken(models: dict[str, Model]) -> None:
    gate = Gate()
    one = torch.zeros(1)
    slow, quick = chain(5.0), chain(1e-3)
    with Runtime(1) as runtime:
        blocker = runtime.submit(chain(10.0, run=gate), one)
        assert gate.began.wait(30)
        urgent = runtime.submit(slow, one, priority=0)
        with pytest.raises(LateError, match="waits already"):
            runtime.submit(quick, one, priority=1, within_s=1.0)
        passed = runtime.submit(quick, one, priority=0, within_s=1.0)
        gate.go.set()
        assert blocker.result(30) == 0
        assert passed.result(30) is not None
        assert urgent.result(30) is not None
        assert slow.costs(1)[0] < 1.0, "what it took, not what was guessed"
        model = models["dlrm"]
        before = model.costs(8)
        runtime.submit(model, *query("dlrm", 8)).result(30)
        assert model.costs(8) != before


@pytest.mark.parametrize("policy", [Policy(), Policy(fifo=True)])
def test_queries_that_are_alike_wait_for_each_other_so_one_that_comes_last_may_be_refused(policy: Policy) -> None:
    gate, one = Gate(), torch.zeros(1)
    same = chain(0.1, run=lambda k, values: k)
    with Runtime(1, policy) as runtime:
        blocker = runtime.submit(chain(0.1, run=gate), one)
        assert gate.began.wait(30)
        waiting = [runtime.submit(same, one) for _ in range(20)]
        with pytest.raises(LateError, match="waits already"):
            runtime.submit(same, one, within_s=1.0)
        in_time = runtime.submit(same, one, within_s=30.0)
        gate.go.set()
        assert [answer.result(30) for answer in (blocker, *waiting, in_time)] == [0] * 22


def test_a_higher_class_goes_first_and_what_is_cancelled_begins_nothing_more() -> None:
    gate, ran = Gate(), list[tuple[str, int]]()

    def noted(name: str) -> Model:
        def run(k: int, values: list[Any]) -> Any:
            ran.append((name, k))
            return k

        return chain(0.1, 0.1, run=run)

    one = torch.zeros(1)
    with Runtime(1) as runtime:
        blocker = runtime.submit(chain(1.0, run=gate), one)
        assert gate.began.wait(30)
        low = runtime.submit(noted("low"), one, priority=1)
        high = runtime.submit(noted("high"), one)
        gone = runtime.submit(noted("gone"), one)
        assert gone.cancel()
        gate.go.set()
        assert (blocker.result(30), low.result(30), high.result(30)) == (0, 1, 1)
        assert ran == [("high", 0), ("high", 1), ("low", 0), ("low", 1)]
        wait_until(lambda: not len(runtime._backlog), "nothing is kept")


def test_an_operator_that_runs_is_the_last_one_of_a_cancelled_query() -> None:
    go, began, ran = threading.Event(), threading.Event(), list[int]()

    def run(k: int, values: list[Any]) -> Any:
        ran.append(k)
        began.set()
        assert go.wait(30)
        return k

    with Runtime(2) as runtime:
        answer = runtime.submit(chain(0.1, 0.1, 0.1, run=run), torch.zeros(1))
        assert began.wait(30)
        assert answer.cancel()
        go.set()
        wait_until(lambda: not len(runtime._backlog), "it is dropped")
    assert ran == [0]


def test_deadlines_that_cannot_be_met() -> None:
    gate = Gate()
    one, short = torch.zeros(1), chain(1e-6)
    with Runtime(1) as runtime:
        with pytest.raises(LateError, match="waits already"):
            runtime.submit(chain(1.0), one, within_s=0.5)
        blocker = runtime.submit(chain(1.0, run=gate), one)
        assert gate.began.wait(30)
        late, patient = runtime.submit(short, one, within_s=1e-3), runtime.submit(short, one, within_s=math.inf)
        threading.Event().wait(0.01)  # its deadline passes while the lane is busy
        gate.go.set()
        assert blocker.result(30) == 0
        assert patient.result(30) is not None
        with pytest.raises(LateError, match="any more"):
            late.result(30)


def test_a_lane_that_is_lent_runs_nothing() -> None:
    one, go = torch.zeros(1), threading.Event()

    def wait(k: int, values: list[Any]) -> Any:
        assert go.wait(30)
        return k

    with Runtime(2) as runtime:
        assert runtime.borrow()
        first = runtime.submit(chain(0.1, run=wait), one)
        second = runtime.submit(chain(0.1), one)
        assert not runtime.borrow()
        wait_until(lambda: runtime._free == 0, "one of both begins")
        assert not second.done()
        runtime.give_back()
        assert second.result(30)[0] == 0
        go.set()
        assert first.result(30) == 0
        wait_until(lambda: runtime._free == 2, "all lanes are free")
    assert not runtime.borrow()


def test_an_error_is_its_querys_alone_and_a_closed_runtime_takes_nothing() -> None:
    def fails(k: int, values: list[Any]) -> Any:
        raise ValueError("no such row")

    one = torch.zeros(1)
    with Runtime(2) as runtime:
        broken = runtime.submit(made([0.1] * 3, [[], [0], [0]], fails), one)
        fine = runtime.submit(chain(0.1, 0.1), one)
        with pytest.raises(ValueError, match="no such row"):
            broken.result(30)
        assert fine.result(30)[0] == 1
    with pytest.raises(CancelledError):
        runtime.submit(chain(0.1), one)
