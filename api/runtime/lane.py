"""What operators run on: a lane begins one after the other, and says when each has ended.

On a CPU an operator has ended when it returns. On a GPU it is only begun: a lane is a stream, so that its own operators
follow each other, and one that reads what another lane's makes waits for that one's event, on the device, without the
host. The host waits for an operator's end before it counts what it took and lets go of what it read; so memory is given
back to the stream that it came from when nobody reads it any more, and `record_stream` is not needed. A lane is at most
`depth` operators ahead, for what has begun no policy can put behind another query.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from api.runtime.graph import Operator

_WARM = 3  # runs of an operator on inputs of the same shapes, after which it is a CUDA graph
_GRAPHS = 64  # of an operator, on each lane: the shapes that came first


class Mark(Protocol):
    """Of an operator that has begun."""

    def wait(self) -> float:
        """Until its end: the seconds that it took. Raises what it has raised."""


class Lane(Protocol):
    depth: int  # operators that may have begun before the first of them has ended

    def entered(self) -> AbstractContextManager[None]:
        """Of the one thread that drives it."""

    def begin(
        self, one: Operator, values: Sequence[Any], after: Sequence[Mark], /
    ) -> tuple[tuple[Any, ...], Mark | None]:
        """What the operator gives, which others may read after its mark; None: it has ended. `after`: of other lanes'
        operators that made what it reads."""

    def result(self, call: Callable[[], Any]) -> Any:
        """What it gives, of values whose operators have ended, for whoever has asked."""


class Device(Protocol):
    def lanes(self, count: int) -> Sequence[Lane]:
        """New ones."""

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mark | None]:
        """A query's inputs as its operators read them, and the mark after which they are there."""


class Cpu:
    """Cores. `pinned`: where there are as many lanes as this process has cores, each keeps to its own, whose caches
    have what it used last; not where others work in the place of lanes (`Runtime.borrow`), for those may be on any.
    """

    def __init__(self, pinned: bool = True) -> None:
        self._pinned = pinned

    def lanes(self, count: int) -> Sequence[Lane]:
        cores = sorted(os.sched_getaffinity(0))
        return [_CpuLane(core) for core in (cores if self._pinned and len(cores) == count else [None] * count)]

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mark | None]:
        return inputs, None


class _CpuLane:
    """A thread, with one thread inside of operations: as many lanes as cores use each of them once."""

    depth = 1

    def __init__(self, core: int | None) -> None:
        self._core = core

    @contextmanager
    def entered(self) -> Iterator[None]:
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})  # of this thread
        torch.set_num_threads(1)
        with torch.inference_mode():
            yield

    def begin(self, one: Operator, values: Sequence[Any], _: Sequence[Mark]) -> tuple[tuple[Any, ...], Mark | None]:
        return one.made(one.run(*[values[at] for at in one.inputs])), None

    def result(self, call: Callable[[], Any]) -> Any:
        return call()


class Cuda:
    """Lanes of a GPU. Models are captured with their module and example on it; a query's inputs may be anywhere, its
    answer is on the host. `graphs`: operators that are called again and again with inputs of the same shapes are CUDA
    graphs.
    """

    def __init__(self, device: torch.device | str = "cuda", graphs: bool = True) -> None:
        self._device, self._graphs = torch.device(device), graphs

    def lanes(self, count: int) -> Sequence[Lane]:
        return [_CudaLane(self._device, self._graphs) for _ in range(count)]

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mark | None]:
        with torch.cuda.device(self._device):
            start = _event()
            moved = [one.to(self._device, non_blocking=True) if isinstance(one, Tensor) else one for one in inputs]
            return moved, _CudaMark(start, _event(), inputs)


class _CudaMark:
    def __init__(self, start: torch.cuda.Event, end: torch.cuda.Event, held: Sequence[Any] = ()) -> None:
        self.start, self.end = start, end
        self._held = held  # memory of the host that is read until the end

    def wait(self) -> float:
        self.end.synchronize()
        milliseconds: float = self.start.elapsed_time(self.end)
        return milliseconds / 1e3


def _event() -> torch.cuda.Event:
    """On the stream of this thread; who waits for it takes no core."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class _CudaLane:
    depth = 2  # so that the device has the next operator when one ends

    def __init__(self, device: torch.device, graphs: bool) -> None:
        self._device = device
        self._stream, self._results = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._replays = _Replays() if graphs else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        torch.set_num_threads(1)
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def begin(
        self, one: Operator, values: Sequence[Any], after: Sequence[Mark], /
    ) -> tuple[tuple[Any, ...], Mark | None]:
        for mark in after:
            assert isinstance(mark, _CudaMark)
            self._stream.wait_event(mark.end)
        inputs = [values[at] for at in one.inputs]
        try:
            call = self._replays.of(one.run, inputs) if self._replays else one.run
            start = _event()
            return one.made(call(*inputs)), _CudaMark(start, _event())
        except Exception:
            self._stream.synchronize()  # what it has begun reads what is now let go of
            raise

    def result(self, call: Callable[[], Any]) -> Any:
        with torch.cuda.stream(
            self._results
        ):  # so that it waits for no operator that has begun behind the query's last
            found = call()
            return found.cpu() if isinstance(found, Tensor) else tuple(one.cpu() for one in found)


class _Replay:
    """An operator as a CUDA graph, for inputs of some shapes. It reads and writes memory of its own, which its stream
    keeps from two replays at once; inputs are copied there, results from there."""

    def __init__(self, call: Callable[..., Any], inputs: Sequence[Tensor], pool: Any) -> None:
        """Raises RuntimeError where an operation cannot be in a graph, as one that the host waits for."""
        self._inputs, self._graph = [one.clone() for one in inputs], torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        self._graph.capture_begin(pool, "thread_local")  # others go on meanwhile
        try:
            self._found = call(*self._inputs)
        finally:
            self._graph.capture_end()
        many = self._found if isinstance(self._found, tuple | list) else (self._found,)
        if not all(isinstance(one, Tensor) for one in many):
            raise RuntimeError("a graph gives tensors alone")

    def __call__(self, *inputs: Tensor) -> Any:
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._graph.replay()
        found = self._found
        return found.clone() if isinstance(found, Tensor) else tuple(one.clone() for one in found)


class _Replays:
    """Of one lane: they run one after the other, so all share one pool of memory. Those of an operator go with it."""

    _recording = threading.Lock()  # one lane at a time

    def __init__(self) -> None:
        self._pool: Any = None
        self._of: WeakKeyDictionary[Callable[..., Any], dict[Any, int | _Replay | None]] = WeakKeyDictionary()

    def of(self, call: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        """What gives what the call gives."""
        if not all(isinstance(one, Tensor) for one in inputs):
            return call
        known = self._of.setdefault(call, {})
        shapes = tuple((one.shape, one.dtype) for one in inputs)
        if shapes not in known and len(known) >= _GRAPHS:
            return call
        found = known.get(shapes, 0)
        if isinstance(found, int):
            if found < _WARM:
                known[shapes] = found + 1
                return call
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                with self._recording:
                    found = _Replay(call, inputs, self._pool)
            except RuntimeError:
                found = None
            known[shapes] = found
        return found or call
