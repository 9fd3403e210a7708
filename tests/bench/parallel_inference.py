"""Benchmark `parallel_inference`: the user is inferred beside retrieval, or in its thread, for the same request.

The product's Merger in process, 10,000 candidates of a remote retrieval that takes 0 to 30 ms (it sleeps, as a thread
does that waits for the network), users of 50 to 10,000 behaviours all of which enter, no block is kept. Both ways run
the same code with the same results; sequential has lanes that work in the caller's thread. Repetitions are
interleaved.

- `gain_ms` = sequential - parallel, medians of the pairs; `possible_ms` = what parallel can hide at most: the least of
  the user's time and that of retrieval with the gather.
- The gain vanishes where there is nothing to hide behind (no retrieval) or nothing to hide (a short history).
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from api.generations import Generation, Generations, load
from api.lanes import Lanes, Step
from api.prerank import Candidates, Merger, Retrieved
from api.runtime.lane import Cpu
from api.runtime.runtime import Runtime
from api.schemas import ScoreOptions, Stages
from api.users import Users
from encoders.config import ModelConfig
from index import kernels
from infra.settings import Settings
from tests.bench.report import Report
from tests.host import HOUR, NOW, Host, Seen, catalogue

ITEMS, CANDIDATES, K = 12_000, 10_000, 100
LENGTHS = (50, 200, 1_000, 3_000, 10_000)
RETRIEVALS_MS = (0, 1, 2, 5, 10, 20, 30)
COLOURS = ("#bcd2ea", "#8fb4dc", "#5f93cb", "#2f6db3", "#173a63")
GENERATION = "g1"


class _Inline(Lanes):
    """Works in the caller's thread."""

    def submit(self, step: Step, size: int, work: Callable[[], Any], *_: object, **__: object) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work())
        return done

    def run(self, step: Step, size: int, work: Callable[[], Any], *_: object, **__: object) -> Any:
        return work()


class _Pinned(Generations):
    """Always the same generation."""

    def __init__(self, generation: Generation) -> None:
        self._active = generation


def run(seed: int, quick: bool) -> None:
    report = Report("parallel_inference", seed, quick)
    repetitions = 12 if quick else 60
    sys.setswitchinterval(1e-4)  # as the API does
    with (
        tempfile.TemporaryDirectory(prefix="forerank-bench-") as folder,
        Runtime(2, device=Cpu(pinned=False)) as runtime,
    ):
        host = _host(Path(folder), seed)
        generation = load(host.settings, GENERATION, host.bundles[GENERATION].sha256)
        kernels.warm_up(generation.layout, generation.head_tables)
        reader = host.reader()
        ways = {
            way: Merger(host.settings, _Pinned(generation), Users(host.settings, lambda: reader, own), own)
            for way, own in (("parallel", Lanes(runtime)), ("sequential", _Inline(runtime)))
        }
        ids = np.random.default_rng(seed).permutation(ITEMS)[:CANDIDATES].astype(np.uint64)
        rows = [
            _point(ways, ids, length, retrieval_ms, repetitions) for length in LENGTHS for retrieval_ms in RETRIEVALS_MS
        ]
        host.close()
    report.table("points", [row for row, _ in rows])
    for (row, gains), key in ((one, (one[0]["length"], one[0]["retrieval_ms"])) for one in rows):
        if key in ((50, 0), (50, 10), (1_000, 0), (1_000, 10), (10_000, 0), (10_000, 10), (10_000, 30)):
            report.figure(f"gain_ms_L{row['length']}_retrieval{row['retrieval_ms']}", gains, "ms")
    report.finish(lambda canvas: _draw(canvas, [row for row, _ in rows]))


def _host(state: Path, seed: int) -> Host:
    """Rows of the catalogue, and a user of each length, named by it."""
    host = Host(Settings(state=state, prefetch_bytes=0))  # every request infers its user
    host.bundle(GENERATION, seed, "fp16", ModelConfig(length=max(LENGTHS)))
    items = [dataclasses.replace(item, item_id=str(at)) for at, item in enumerate(catalogue(ITEMS, seed))]
    host.write(GENERATION, items)
    random = np.random.default_rng(seed)
    for length in LENGTHS:
        seen = random.integers(0, ITEMS, length).tolist()
        host.behave(
            [Seen(f"u{length}", str(item), NOW - (length - at) * HOUR // 10) for at, item in enumerate(seen)],
            {f"u{length}": {"segment": "s1", "age": 34}},
        )
    host.activate(GENERATION)
    return host


def _point(
    ways: dict[str, Merger], ids: np.ndarray, length: int, retrieval_ms: int, repetitions: int
) -> tuple[dict[str, object], list[float]]:
    """One row of the table, and the gains of the pairs."""
    query = ScoreOptions(user_id=f"u{length}", as_of=NOW, k=K)

    def retrieve(*_: object) -> Callable[[], Retrieved]:
        if retrieval_ms:
            time.sleep(retrieval_ms / 1e3)
        return lambda: (Candidates.of_integers(ids), [])

    spent: dict[str, list[float]] = {way: [] for way in ways}
    stages: list[Stages] = []
    places = []
    for repetition in range(repetitions + 2):  # the first two do not count
        for way in (list(ways), list(ways)[::-1])[repetition % 2]:
            began = time.perf_counter()
            answer = ways[way].prerank(query, K, CANDIDATES, retrieve)
            took = (time.perf_counter() - began) * 1e3
            places.append(answer.places)
            if repetition >= 2:
                spent[way].append(took)
                if way == "sequential":
                    stages.append(answer.stages)
    assert all(np.array_equal(one, places[0]) for one in places)
    gains = np.array(spent["sequential"]) - np.array(spent["parallel"])
    possible = [min(one.user, one.retrieval + one.gather) for one in stages]
    row: dict[str, object] = {"length": length, "retrieval_ms": retrieval_ms}
    for name, values in (*spent.items(), ("gain", gains), ("possible", possible)):
        row |= {f"{name}_ms": round(float(np.median(values)), 3)}
        row |= {f"{name}_low": round(float(np.min(values)), 3), f"{name}_high": round(float(np.max(values)), 3)}
    row |= {f"gain_p{part}": round(float(np.percentile(gains, part)), 3) for part in (25, 75)}
    row["user_ms"] = round(float(np.median([one.user for one in stages])), 3)
    print("  " + "  ".join(f"{name} {row[name]}" for name in _SHOWN), flush=True)
    return row, gains.tolist()


_SHOWN = (
    "length",
    "retrieval_ms",
    "user_ms",
    "sequential_ms",
    "parallel_ms",
    "gain_ms",
    "gain_p25",
    "gain_p75",
    "possible_ms",
)


def _draw(canvas: Any, rows: list[dict[str, Any]]) -> None:
    left, right = canvas.subplots(1, 2)
    for length, colour in zip(LENGTHS, COLOURS, strict=True):
        own = [row for row in rows if row["length"] == length]
        at = [row["retrieval_ms"] for row in own]
        left.plot(at, [row["gain_ms"] for row in own], color=colour, marker="o", label=f"L = {length}")
        left.fill_between(
            at, [row["gain_p25"] for row in own], [row["gain_p75"] for row in own], color=colour, alpha=0.25
        )
        left.plot(at, [row["possible_ms"] for row in own], color=colour, linestyle=":")
        right.plot(at, [row["gain_ms"] / row["sequential_ms"] * 100 for row in own], color=colour, marker="o")
    left.axhline(0, color="grey", linewidth=0.5)
    left.set(xlabel="retrieval, ms", ylabel="ms", title="Gain (quartiles shaded; dotted: possible)")
    left.legend()
    right.axhline(0, color="grey", linewidth=0.5)
    right.set(xlabel="retrieval, ms", ylabel="% of sequential", title="Share of the request that is saved")
