"""`python -m tests.bench.recos.worker KERNELS SEED`: runs cells in a process of its own, one a line of standard input.

A cell is JSON: {"runner", "model", "seconds", "seed", "clients", "peak", "shape", "within_s", "of_class", "grace_s",
"timeline"}; its answer is one line of JSON. Latencies are from the moment that a query was to come, and queries that
have not ended count at their age.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from api.runtime.runtime import RefusedError
from tests.bench.recos.load import MODELS, Query, arrivals, chosen, modules, pool, repeated
from tests.bench.recos.runners import RUNNERS, Kernels, Runner

_WARM_S = 0.15
_GRACE_S = 0.5  # after the last arrival of an open loop
_BINS = 40  # of a timeline


@dataclasses.dataclass
class Asked:
    """What became of queries. Times in s."""

    began: dict[int, tuple[float, int, int]] = dataclasses.field(default_factory=dict)  # when due, class, rows
    took: list[tuple[float, float, int, int]] = dataclasses.field(default_factory=list)  # due, latency, class, rows
    refused: int = 0
    count: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def submit(
        self, runner: Runner, one: Query, due: float, priority: int, within_s: float, then: Callable[[], None]
    ) -> None:
        """`then` is called when it has ended, in whatever way."""
        with self.lock:
            number = self.count = self.count + 1
            self.began[number] = due, priority, one.rows

        def ended(future: Future[Any] | None) -> None:
            now = time.monotonic()
            with self.lock:
                self.began.pop(number)
                if future is None or future.cancelled() or isinstance(future.exception(), RefusedError):
                    self.refused += 1
                else:
                    future.result()
                    self.took.append((due, now - due, priority, one.rows))
            then()

        try:
            answer = runner.submit(one, priority, within_s - (time.monotonic() - due))
        except RefusedError:
            ended(None)
        else:
            answer.add_done_callback(ended)

    def summary(self, seconds: float, within_s: float, of_class: int | None) -> dict[str, float]:
        """Milliseconds, and rates a second; of one class, or of all."""
        now = time.monotonic()
        with self.lock:
            ended = [one for one in self.took if of_class in (None, one[2])]
            waits = [now - due for due, own, _ in self.began.values() if of_class in (None, own)]
            refused = self.refused
        times = np.array([took for _, took, *_ in ended] + waits or [math.nan]) * 1e3
        return {
            "mean": float(times.mean()),
            **{f"p{at}": float(np.percentile(times, at)) for at in (50, 95, 99)},
            "queries_per_s": len(ended) / seconds,
            "items_per_s": sum(rows for *_, rows in ended) / seconds,
            "goodput": sum(took <= within_s for _, took, *_ in ended) / seconds,
            "refused": refused,
            "unfinished": len(waits),
        }

    def timeline(self, began: float, seconds: float) -> list[float]:
        """Mean latency (ms) of queries by when they were due: _BINS equal times; NaN where there were none."""
        now = time.monotonic()
        with self.lock:
            points = [(due, took) for due, took, *_ in self.took]
            points += [(due, now - due) for due, _, _ in self.began.values()]
        due, took = np.array(points).reshape(-1, 2).T
        at = np.clip(((due - began) / seconds * _BINS).astype(int), 0, _BINS - 1)
        count = np.bincount(at, minlength=_BINS)
        total = np.bincount(at, took, minlength=_BINS)
        means: list[float] = np.where(count > 0, 1e3 * total / np.maximum(count, 1), np.nan).tolist()
        return means


def run(runner: Runner, queries: dict[str, list[Query]], cell: dict[str, Any], seconds: float) -> Asked:
    """`clients`, each of which asks again as soon as it is answered, and arrivals of `shape` up to `peak` a second;
    where there are both, the clients are of the lower class."""
    asked, within_s, peak = Asked(), cell.get("within_s", math.inf), cell.get("peak", 0)
    moments = arrivals(cell["shape"], peak, seconds, cell["seed"]) if peak else []
    due = chosen(cell["model"], len(moments), cell["seed"] + 1)
    order, lock = iter(chosen(cell["model"], int(seconds * 20_000), cell["seed"])), threading.Lock()
    began = time.monotonic()

    def ask() -> None:
        with lock:
            name, place = next(order)
        now = time.monotonic()
        if now < began + seconds:
            asked.submit(runner, queries[name][place], now, int(peak > 0), math.inf, ask)

    for _ in range(cell.get("clients", 0)):
        ask()
    for at, (name, place) in zip(moments, due, strict=True):
        while (left := began + at - time.monotonic()) > 0:
            time.sleep(left)
        asked.submit(runner, queries[name][place], began + at, 0, within_s, lambda: None)
    while time.monotonic() < began + seconds:
        time.sleep(max(0.0, began + seconds - time.monotonic()))
    grace_s = cell.get("grace_s", _GRACE_S)
    while moments and asked.began and time.monotonic() < began + seconds + grace_s:
        time.sleep(0.01)
    return asked


def answer(kernels: Kernels, queries: dict[str, list[Query]], cell: dict[str, Any]) -> dict[str, Any]:
    runner = RUNNERS[cell["runner"]][1](kernels)
    try:
        run(runner, queries, {**cell, "clients": 2, "peak": 0}, _WARM_S)
        gc.collect()
        gc.freeze()
        cpu, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = time.monotonic()
        asked = run(runner, queries, cell, cell["seconds"])
        found: dict[str, Any] = asked.summary(cell["seconds"], cell.get("within_s", math.inf), cell.get("of_class"))
        if cell.get("timeline"):
            found["timeline"] = asked.timeline(began, cell["seconds"])
        found["cores"] = (time.process_time() - cpu) / cell["seconds"]
        found["cpu_ms"] = 1e3 * found["cores"] / max(1.0, found["queries_per_s"])  # of a query
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        found["faults_per_query"] = faults / max(1.0, found["queries_per_s"] * cell["seconds"])
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    finally:
        runner.close()
    return found


def errors(kernels: Kernels, queries: dict[str, list[Query]], seed: int) -> dict[str, float]:
    """Of each model the largest difference from the module, over some of its queries."""
    own = modules(seed)
    found = {}
    with torch.inference_mode():
        for name in MODELS:
            pairs = [(kernels.run(one), own[name](*one.inputs)) for one in queries[name][:8]]
            found[name] = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
    return found


def costs(kernels: Kernels, queries: dict[str, list[Query]]) -> dict[str, Any]:
    """What the simulation needs of each model: its operators, and what they are seen to cost in its queries, s."""
    found: dict[str, Any] = {}
    for name, model in kernels.models.items():
        graph = model.graph
        found[name] = {
            "inputs": graph.inputs,
            "operators": [[one.inputs, one.outputs, one.cost, one.rows, one.blocks] for one in graph.operators],
            "outputs": graph.outputs,
            "rows": graph.rows,
            "block": graph.block,
            "queries": [[one.rows, model.costs(one.rows)] for one in queries[name]],
        }
    return found


def growth(kernels: Kernels, queries: dict[str, list[Query]], count: int) -> dict[str, float]:
    """How many MiB the process grows by so many queries of few candidates, after as many as a tenth of them."""
    small = [Query(one.model, (*one.inputs[:-1], one.inputs[-1][:2])) for one in queries["dlrm"]]
    runner = RUNNERS["recos"][1](kernels)
    pages: list[int] = []
    room = threading.Semaphore(64)
    try:
        for part in (count // 10, count):
            for at in range(part):
                room.acquire()
                runner.submit(small[at % len(small)], 0, math.inf).add_done_callback(lambda _: room.release())
            for _ in range(64):
                room.acquire()
            room.release(64)
            gc.collect()
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    finally:
        runner.close()
    return {"mib": (pages[1] - pages[0]) * resource.getpagesize() / 2**20}


def main() -> int:
    name, seed = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    kernels, queries = Kernels(name, seed), pool(seed)
    if name == "repeated":
        queries = {model: [repeated(one) for one in own] for model, own in queries.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        cell = json.loads(line)
        if cell["runner"] == "errors":
            found = errors(kernels, queries, seed)
        elif cell["runner"] == "growth":
            found = growth(kernels, queries, cell["count"])
        elif cell["runner"] == "costs":
            found = costs(kernels, queries)
        else:
            found = answer(kernels, queries, cell)
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
