"""Ways to run concurrent queries: the baselines P0 to P5, and the runtime with parts of it switched off."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from api.runtime.graph import capture
from api.runtime.model import Model
from api.runtime.policy import Policy
from api.runtime.runtime import Runtime
from tests.bench.recos.load import MODELS, USUAL, Query, modules, query, repeated

LANES = 2
_SPLIT = 64  # candidates of a part, P5
_WAIT_S, _BATCH = 2e-3, 1_024  # P4: how long a batch waits, and candidates that it may have

Run = Callable[[Query], Tensor]


class Runner(Protocol):
    def submit(self, one: Query, priority: int, within_s: float) -> Future[Any]:
        """Raises RefusedError where it takes no more."""

    def close(self) -> None: ...


def eager(own: Mapping[str, nn.Module]) -> Run:
    def run(one: Query) -> Tensor:
        with torch.inference_mode():
            out: Tensor = own[one.model](*one.inputs)
            return out

    return run


def onnx(own: Mapping[str, nn.Module], seed: int) -> Run:
    """One session a model, one thread inside, called by all lanes."""
    from tests.bench.peers.runtime import Session

    sessions = {}
    for name, module in own.items():
        example = query(name, USUAL, torch.Generator().manual_seed(seed)).inputs
        named = {f"i{at}": value.numpy() for at, value in enumerate(example)}
        sessions[name] = Session(module, named, ["scores"], {f"i{len(example) - 1}": "rows"})

    def run(one: Query) -> Tensor:
        inputs = {f"i{at}": value.numpy() for at, value in enumerate(one.inputs)}
        return torch.from_numpy(sessions[one.model](inputs)["scores"])

    return run


def captured(own: Mapping[str, nn.Module], seed: int, repeats: bool = False, **options: Any) -> dict[str, Model]:
    """`repeats`: for queries with the user's inputs once for each candidate."""
    found = {}
    for name, module in own.items():
        example = query(name, USUAL, torch.Generator().manual_seed(seed))
        rows = [0 if repeats else None] * (len(example.inputs) - 1) + [0]
        found[name] = Model(capture(module, (repeated(example) if repeats else example).inputs, rows, **options))
    return found


def _pool() -> ThreadPoolExecutor:
    """As many lanes, with one thread inside of each."""
    return ThreadPoolExecutor(LANES, initializer=torch.set_num_threads, initargs=(1,))


class Threads:
    """P0 and P1: a thread for every query."""

    def __init__(self, run: Run, inside: int) -> None:
        self._run, self._inside = run, inside

    def submit(self, one: Query, priority: int, within_s: float) -> Future[Any]:
        answer: Future[Any] = Future()

        def work() -> None:
            torch.set_num_threads(self._inside)
            answer.set_result(self._run(one))

        threading.Thread(target=work).start()
        return answer

    def close(self) -> None: ...


class Lanes:
    """P2 and P3: first come, first served by a few lanes, a whole query at a time."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pool = _pool()

    def submit(self, one: Query, priority: int, within_s: float) -> Future[Any]:
        return self._pool.submit(self._run, one)

    def close(self) -> None:
        self._pool.shutdown()


class Split:
    """P5: a query's candidates are parted among the lanes, as in DeepRecSys; the last part joins them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pool = _pool()

    def submit(self, one: Query, priority: int, within_s: float) -> Future[Any]:
        answer: Future[Any] = Future()
        parts = torch.split(one.inputs[-1], _SPLIT)
        found: list[Tensor | None] = [None] * len(parts)
        left, lock = [len(parts)], threading.Lock()

        def work(place: int) -> None:
            found[place] = self._run(Query(one.model, (*one.inputs[:-1], parts[place])))
            with lock:
                left[0] -= 1
                last = not left[0]
            if last:
                answer.set_result(torch.cat([part for part in found if part is not None]))

        for place in range(len(parts)):
            self._pool.submit(work, place)
        return answer

    def close(self) -> None:
        self._pool.shutdown()


class Batcher:
    """P4: queries of one model that come within 2 ms are one batch, with each query's user repeated for its
    candidates."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pool = _pool()
        self._free = threading.Semaphore(LANES)
        self._waiting: dict[str, queue.SimpleQueue[tuple[Query, Future[Any]] | None]] = {
            name: queue.SimpleQueue() for name in MODELS
        }
        self._threads = [threading.Thread(target=self._gather, args=(name,)) for name in MODELS]
        for thread in self._threads:
            thread.start()

    def submit(self, one: Query, priority: int, within_s: float) -> Future[Any]:
        answer: Future[Any] = Future()
        self._waiting[one.model].put((one, answer))
        return answer

    def close(self) -> None:
        for waiting in self._waiting.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()

    def _gather(self, name: str) -> None:
        waiting = self._waiting[name]
        held: tuple[Query, Future[Any]] | None = None
        while True:
            first = held or waiting.get()
            held = None
            if first is None:
                return
            batch, rows = [first], first[0].rows
            self._free.acquire()  # while no lane is free the batch grows
            try:
                while rows < _BATCH:
                    more = waiting.get(timeout=_WAIT_S) if len(batch) == 1 else waiting.get_nowait()
                    if more is None:
                        waiting.put(None)
                        break
                    if rows + more[0].rows > _BATCH:
                        held = more
                        break
                    batch.append(more)
                    rows += more[0].rows
            except queue.Empty:
                pass
            self._pool.submit(self._answer, batch)

    def _answer(self, batch: Sequence[tuple[Query, Future[Any]]]) -> None:
        try:
            queries = [one for one, _ in batch]
            if len(queries) == 1:
                scores = self._run(queries[0])
            else:
                columns = zip(*(repeated(one).inputs for one in queries), strict=True)
                scores = self._run(Query(queries[0].model, tuple(torch.cat(column) for column in columns)))
            for part, (_, answer) in zip(torch.split(scores, [one.rows for one in queries]), batch, strict=True):
                answer.set_result(part)
        finally:
            self._free.release()


class RecOS:
    def __init__(self, models: Mapping[str, Model], policy: Policy) -> None:
        self._models, self._runtime = models, Runtime(LANES, policy)
        self._runtime.start()

    def submit(self, one: Query, priority: int, within_s: float) -> Future[Any]:
        return self._runtime.submit(self._models[one.model], *one.inputs, priority=priority, within_s=within_s)

    def close(self) -> None:
        self._runtime.close()


def whole(models: Mapping[str, Model]) -> Run:
    """The runtime's own kernels, a query at a time."""

    def run(one: Query) -> Tensor:
        with torch.inference_mode():
            out: Tensor = models[one.model].graph.run(*one.inputs)
            return out

    return run


class Kernels:
    """What runs a query, made once for all runners that share it."""

    def __init__(self, name: str, seed: int) -> None:
        own = modules(seed)
        self.models: dict[str, Model] = {}
        if name == "onnx":
            self.run = onnx(own, seed)
        elif name == "eager":
            self.run = eager(own)
        else:
            self.models = captured(own, seed, repeats=name == "repeated", exact=name == "exact")
            self.run = whole(self.models)


RUNNERS: dict[str, tuple[str, Callable[[Kernels], Runner]]] = {  # whose kernels it runs
    "p0": ("eager", lambda kernels: Threads(kernels.run, os.cpu_count() or 1)),
    "p1": ("eager", lambda kernels: Threads(kernels.run, 1)),
    "p2": ("eager", lambda kernels: Lanes(kernels.run)),
    "p3": ("onnx", lambda kernels: Lanes(kernels.run)),
    "p4": ("eager", lambda kernels: Batcher(kernels.run)),
    "p5": ("eager", lambda kernels: Split(kernels.run)),
    "recos": ("ours", lambda kernels: RecOS(kernels.models, Policy())),
    "same-p2": ("ours", lambda kernels: Lanes(kernels.run)),
    "recos-fifo": ("ours", lambda kernels: RecOS(kernels.models, Policy(fifo=True))),
    "recos-exact": ("exact", lambda kernels: RecOS(kernels.models, Policy())),
    "recos-repeated": ("repeated", lambda kernels: RecOS(kernels.models, Policy())),
}
