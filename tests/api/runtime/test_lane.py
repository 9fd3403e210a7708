"""What every kind of lane keeps: values are read when they are there and live until then, and errors are a query's own.

Beside lanes of cores and of a GPU there are late ones here, whose steps run on a thread of their own some time after
they have begun, as on a GPU: a value that is read too early, or by a lane that did not wait for it, is an error.
"""

from __future__ import annotations

import gc
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from api.runtime.graph import Operator
from api.runtime.lane import Cpu, Cuda, Device, Lane, Mark
from api.runtime.model import Model
from api.runtime.runtime import Runtime
from api.runtime.watch import Observer
from tests.api.runtime.graphs import chain, made
from tests.api.runtime.test_graph import captured, query
from tests.conftest import wait_until

NO_GPU = "" if torch.cuda.is_available() else "there is no GPU that torch can use"


class _Value:
    """What a late step will have made."""

    made: Any = None


class _LateMark:
    def __init__(self) -> None:
        self.ended, self.took = threading.Event(), 0.0
        self.error: Exception | None = None

    def wait(self) -> float:
        assert self.ended.wait(30)
        if self.error is not None:
            raise self.error
        return self.took


class _LateLane:
    depth = 2

    def __init__(self) -> None:
        self._work = queue.SimpleQueue[Callable[[], None] | None]()

    @contextmanager
    def entered(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        yield
        self._work.put(None)
        thread.join()

    def _run(self) -> None:
        while (one := self._work.get()) is not None:
            one()
            del one  # which holds what it has made

    def begin(self, one: Operator, values: Sequence[Any], after: Sequence[Mark]) -> tuple[tuple[Any, ...], Mark | None]:
        inputs = [weakref.ref(values[at]) for at in one.inputs]  # it holds none of them
        found, mark = tuple(_Value() for _ in one.outputs), _LateMark()

        def work() -> None:
            for before in after:
                assert isinstance(before, _LateMark)
                before.ended.wait(30)
            time.sleep(random.uniform(0, 1e-3))  # as long as it takes
            began = time.perf_counter()
            try:
                given = [held() for held in inputs]
                assert all(own is not None for own in given), "it was let go of too early"
                read = [own.made if isinstance(own, _Value) else own for own in given]
                assert all(own is not None for own in read), "it is read before it is there"
                for value, own in zip(found, one.made(one.run(*read)), strict=True):
                    value.made = own
            except Exception as error:
                mark.error = error
            mark.took = time.perf_counter() - began
            mark.ended.set()

        self._work.put(work)
        return found, mark

    def result(self, call: Callable[[], Any]) -> Any:
        return call().made


class Late:
    """Lanes that are ahead of what they have made."""

    def __init__(self, lane: Callable[[], Lane] = _LateLane) -> None:
        self._lane = lane

    def lanes(self, count: int) -> Sequence[Lane]:
        return [self._lane() for _ in range(count)]

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mark | None]:
        return inputs, None


KINDS = [
    pytest.param(Cpu, id="cpu"),
    pytest.param(Late, id="late"),
    pytest.param(Cuda, id="cuda", marks=pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)),
]
kinds = pytest.mark.parametrize("kind", KINDS)


def total(k: int, values: list[Any]) -> Tensor:
    found: Tensor = sum(values) * 0.5 + k
    return found


def a_graph(seed: int) -> tuple[Model, list[list[int]]]:
    chance = random.Random(seed)
    waits = [sorted(chance.sample(range(k), min(k, chance.randint(0, 3)))) for k in range(12)]
    waits.append([k for k in range(12) if not any(k in own for own in waits)])  # the last one reads what nobody has
    return made([0.1] * 13, waits, total), waits


@kinds
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_values_are_read_when_they_are_there(kind: type[Device], lanes: int) -> None:
    graphs = [a_graph(seed) for seed in range(8)]
    inputs = [torch.randn(16) for _ in range(64)]
    with Runtime(lanes, device=kind()) as runtime:
        answers = [runtime.submit(graphs[at % 8][0], one, rows=1) for at, one in enumerate(inputs)]
        for at, (one, answer) in enumerate(zip(inputs, answers, strict=True)):
            values: list[Tensor] = []
            for k, before in enumerate(graphs[at % 8][1]):
                values.append(total(k, [values[b] for b in before] or [one]))
            torch.testing.assert_close(answer.result(30).cpu(), values[-1])
        assert (len(runtime._backlog), runtime.bytes_held) == (0, 0)
        wait_until(lambda: runtime._free == sum(lane.depth for lane in kind().lanes(lanes)), "all lanes are free")


def test_a_step_that_cannot_begin_behind_another_one_ends_alone() -> None:
    """As figures and timelines see it: the lane is busy with the first one until that ends."""

    class Order(Observer):
        def begin(self, query: int, operator: int, lane: int) -> None:
            running.append(query)

        def end(self, lane: int, newest: bool, blocks: int) -> None:
            ended.append(running.pop() if newest else running.pop(0))

    class FailsLater(_LateLane):
        def begin(self, one: Operator, *given: Any) -> tuple[tuple[Any, ...], Mark | None]:
            if one is broken.graph.operators[0]:
                raise ValueError("cannot begin")
            return super().begin(one, *given)

    go, running, ended = threading.Event(), list[int](), list[int]()

    def waits(k: int, values: list[Any]) -> Tensor:
        assert go.wait(30)
        return total(k, values)

    slow, broken = chain(0.1, run=waits), chain(0.1, run=total)
    with Runtime(1, device=Late(FailsLater), observer=Order()) as runtime:
        first = runtime.submit(slow, torch.ones(4))
        wait_until(lambda: running == [0], "it has begun")
        second = runtime.submit(slow, torch.ones(4))
        third = runtime.submit(broken, torch.ones(4))
        go.set()
        assert first.result(30).shape == second.result(30).shape
        with pytest.raises(ValueError, match="cannot begin"):
            third.result(30)
        wait_until(lambda: not running, "all have ended")
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize("pinned", [True, False])
def test_as_many_lanes_as_cores_keep_to_one_each(pinned: bool) -> None:
    cores = os.sched_getaffinity(0)
    for count in (len(cores), len(cores) + 1):
        meet, found = threading.Barrier(count), list[frozenset[int]]()

        def run(k: int, values: list[Any], meet: Any = meet, found: list[frozenset[int]] = found) -> Tensor:
            meet.wait(30)  # so that each lane has one
            found.append(frozenset(os.sched_getaffinity(0)))
            return total(k, values)

        with Runtime(count, device=Cpu(pinned)) as runtime:
            for answer in [runtime.submit(chain(0.1, run=run), torch.ones(4)) for _ in range(count)]:
                answer.result(30)
        apart = pinned and count == len(cores)
        assert sorted(found, key=sorted) == ([frozenset({one}) for one in sorted(cores)] if apart else [cores] * count)
    assert os.sched_getaffinity(0) == cores


@kinds
def test_an_error_is_its_querys_alone(kind: type[Device]) -> None:
    def fails(k: int, values: list[Any]) -> Any:
        if k == 1:
            raise ValueError("no such row")
        return total(k, values)

    with Runtime(2, device=kind()) as runtime:
        broken = [runtime.submit(made([0.1] * 4, [[], [0], [0], [1, 2]], fails), torch.ones(4)) for _ in range(8)]
        fine = [runtime.submit(chain(0.1, 0.1, run=total), torch.ones(4)) for _ in range(8)]
        for answer in broken:
            with pytest.raises(ValueError, match="no such row"):
                answer.result(30)
        for answer in fine:
            torch.testing.assert_close(answer.result(30).cpu(), torch.full((4,), 1.25))
        wait_until(lambda: not len(runtime._backlog) and not runtime.bytes_held, "nothing is kept")


def test_what_fails_for_want_of_what_another_step_never_made_ends_with_that_ones_error() -> None:
    class HeardLast(_LateMark):
        def __init__(self, mark: Mark | None) -> None:
            assert isinstance(mark, _LateMark)
            self.ended, self._mark = mark.ended, mark

        def wait(self) -> float:
            try:
                return self._mark.wait()
            except ValueError:
                heard.wait(0.2)  # the other one first, if another lane has it
                raise
            except AssertionError:
                heard.set()
                raise

    class Hears(_LateLane):
        def begin(self, *given: Any) -> tuple[tuple[Any, ...], Mark | None]:
            found, mark = super().begin(*given)
            return found, HeardLast(mark)

    def fails(k: int, values: list[Any]) -> Any:
        if k == 1:
            raise ValueError("no such row")
        return total(k, values)

    heard, first = threading.Event(), 0
    with Runtime(2, device=Late(Hears)) as runtime:
        for _ in range(8):
            heard.clear()
            with pytest.raises(ValueError, match="no such row"):
                runtime.submit(made([0.1] * 4, [[], [0], [0], [1, 2]], fails), torch.ones(4)).result(30)
            first += heard.is_set()
    assert first, "it was heard first"


def test_an_error_waits_for_no_step_that_has_nothing_to_do_with_it() -> None:
    class OneEach(_LateLane):
        depth = 1

    def run(k: int, values: list[Any]) -> Any:
        if k == 1:
            raise ValueError("no such row")
        assert go.wait(30)
        return total(k, values)

    go = threading.Event()
    with Runtime(2, device=Late(OneEach)) as runtime:
        answer = runtime.submit(made([0.2, 0.1, 0.1], [[], [], [0, 1]], run), torch.ones(4))
        with pytest.raises(ValueError, match="no such row"):
            answer.result(10)
        go.set()


@kinds
def test_an_error_keeps_none_of_its_querys_values(kind: type[Device]) -> None:
    def fails(k: int, values: list[Any]) -> Any:
        raise ValueError("no such row")

    with Runtime(1, device=kind()) as runtime:
        given = torch.ones(4)
        held = weakref.ref(given)
        answer = runtime.submit(chain(0.1, run=fails), given)
        error = answer.exception(30)
        assert isinstance(error, ValueError)
        assert "in fails" in "".join(error.__notes__), "it says where"
        del given
        wait_until(lambda: held() is None, "it is let go of, though the error is kept")


@kinds
def test_what_is_cancelled_begins_no_more_than_a_lane_is_ahead(kind: type[Device]) -> None:
    began, ran = threading.Event(), list[int]()

    def run(k: int, values: list[Any]) -> Tensor:
        ran.append(k)
        began.set()
        assert gone.wait(30)
        return total(k, values)

    gone = threading.Event()
    with Runtime(1, device=kind()) as runtime:
        answer = runtime.submit(chain(*[0.1] * 9, run=run), torch.ones(4))
        assert began.wait(30)
        assert answer.cancel()
        gone.set()
        wait_until(lambda: not len(runtime._backlog), "it is dropped")
        torch.testing.assert_close(
            runtime.submit(chain(0.1, run=total), torch.ones(4)).result(30).cpu(), torch.full((4,), 0.5)
        )
    assert len(ran) <= kind().lanes(1)[0].depth
    with pytest.raises(CancelledError):
        answer.result(30)


@kinds
def test_nothing_of_a_query_is_left(kind: type[Device]) -> None:
    held = weakref.WeakSet[Any]()

    def run(k: int, values: list[Any]) -> Tensor:
        found = total(k, values)
        held.add(found)
        return found

    with Runtime(2, device=kind()) as runtime:
        for _ in range(20):
            answers = [runtime.submit(chain(0.1, 0.1, 0.1, run=run), torch.ones(4)) for _ in range(8)]
            for answer in answers:
                answer.result(30)
        del answers, answer
        wait_until(lambda: gc.collect() < 0 or not len(held), "no value is kept")


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["wnd", "din", "dlrm", "bst"])
def test_published_models_on_a_gpu(name: str, graphs: bool) -> None:
    """Often enough that operators are CUDA graphs, on three streams at once."""
    module, _ = captured(name)
    with torch.inference_mode():
        asked = [query(name, 2 + at % 40) for at in range(300)]
        wanted = [module(*inputs) for inputs in asked]
    from api.runtime.graph import capture

    example = tuple(one.cuda() for one in query(name, 40))
    model = Model(capture(module.cuda(), example, [None] * (len(example) - 1) + [0], blocks=(8,), grain_s=1e-4))
    with Runtime(3, device=Cuda(graphs=graphs)) as runtime:
        answers = [runtime.submit(model, *inputs) for inputs in asked]
        for answer, own in zip(answers, wanted, strict=True):
            torch.testing.assert_close(answer.result(60), own, atol=1e-4, rtol=1e-4)
        assert runtime.bytes_held == 0
