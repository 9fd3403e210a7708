"""What steps run on: a lane begins one step after the other, and says when each has ended.

On a CPU a step has ended when it returns. On a GPU it is only begun: a lane is a stream, so that its own steps follow
each other, and a step that reads what another lane's step makes waits for that one's event, on the device, without the
host. The host waits for a step's end before it counts what the step took and lets go of what it read; so memory is
given back to the stream that it came from when nobody reads it any more, and `record_stream` is not needed. A lane is
at most `depth` steps ahead, for what has begun no policy can put behind another query.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from api.runtime.graph import Step

_WARM = 3  # runs of an operator on inputs of the same shapes, after which it is a CUDA graph
_GRAPHS = 256  # of a lane, the newest


class Mark(Protocol):
    """Of a step that has begun."""

    def wait(self) -> float:
        """Until its end: the seconds that it took. Raises what it has raised."""


class Lane(Protocol):
    depth: int  # steps that may have begun before the first of them has ended

    def entered(self) -> AbstractContextManager[None]:
        """Of the one thread that drives it."""

    def begin(self, step: Step, slots: Sequence[Any], after: Sequence[Mark], /) -> tuple[tuple[Any, ...], Mark | None]:
        """What the step gives, which others may read after its mark; None: it has ended. `after`: of other lanes' steps
        that made what it reads."""

    def result(self, call: Callable[[], Any]) -> Any:
        """What it gives, of values whose steps have ended, for whoever has asked."""


class Device(Protocol):
    def lane(self) -> Lane:
        """A new one."""

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mark | None]:
        """A query's inputs as its steps read them, and the mark after which they are there."""


class Cpu:
    """A lane is its thread, with one thread inside of operations: as many lanes as cores use each of them once."""

    depth = 1

    def lane(self) -> Lane:
        return self

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mark | None]:
        return inputs, None

    @contextmanager
    def entered(self) -> Iterator[None]:
        torch.set_num_threads(1)
        with torch.inference_mode():
            yield

    def begin(self, step: Step, slots: Sequence[Any], _: Sequence[Mark]) -> tuple[tuple[Any, ...], Mark | None]:
        return step.run(slots), None

    def result(self, call: Callable[[], Any]) -> Any:
        return call()


class Cuda:
    """Lanes of a GPU. Models are captured with their module and example on it; a query's inputs may be anywhere, its
    answer is on the host. `graphs`: operators that are called again and again with inputs of the same shapes are CUDA
    graphs.
    """

    def __init__(self, device: torch.device | str = "cuda", graphs: bool = True) -> None:
        self._device, self._graphs = torch.device(device), graphs

    def lane(self) -> Lane:
        return _CudaLane(self._device, self._graphs)

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
    """On the stream of this thread."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class _CudaLane:
    depth = 2  # so that the device has the next step when one ends

    def __init__(self, device: torch.device, graphs: bool) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._replays = _Replays(self._stream) if graphs else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        torch.set_num_threads(1)
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def begin(self, step: Step, slots: Sequence[Any], after: Sequence[Mark]) -> tuple[tuple[Any, ...], Mark | None]:
        for mark in after:
            assert isinstance(mark, _CudaMark)
            self._stream.wait_event(mark.end)
        inputs = [slots[slot] for slot in step.inputs]
        start = _event()
        found = self._replays.run(step.call, inputs) if self._replays else step.call(*inputs)
        return step.made(found), _CudaMark(start, _event())

    def result(self, call: Callable[[], Any]) -> Any:
        found = call()
        return found.cpu() if isinstance(found, Tensor) else tuple(one.cpu() for one in found)


class _Replays:
    """Operators of one lane as CUDA graphs, one for each and the shapes of its inputs. A graph reads and writes memory
    of its own, which the stream keeps from two of its replays at once; inputs are copied there, results from there."""

    _capture = threading.Lock()  # of one lane at a time

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._seen: dict[Any, int] = {}
        self._made: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Any] | None] = {}

    def run(self, call: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        if not all(isinstance(one, Tensor) for one in inputs):
            return call(*inputs)
        key = call, tuple((one.shape, one.dtype) for one in inputs)
        if key not in self._made:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= _WARM:
                return call(*inputs)
            self._note(key, self._captured(call, inputs))
        replay = self._made[key]
        if replay is None:
            return call(*inputs)
        graph, places, found = replay
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return found.clone() if isinstance(found, Tensor) else tuple(one.clone() for one in found)

    def _captured(
        self, call: Callable[..., Any], inputs: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any] | None:
        """None where an operation cannot be in a graph, as one that the host waits for."""
        places, graph = [one.clone() for one in inputs], torch.cuda.CUDAGraph()
        try:
            with (
                self._capture,
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                found = call(*places)
        except RuntimeError:
            return None
        return graph, places, found

    def _note(self, key: Any, replay: tuple[torch.cuda.CUDAGraph, list[Tensor], Any] | None) -> None:
        self._made[key] = replay
        if len(self._made) > _GRAPHS:
            oldest = next(iter(self._made))
            self._stream.synchronize()  # it may still be running
            del self._made[oldest], self._seen[oldest]
