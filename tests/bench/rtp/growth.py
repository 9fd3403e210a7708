"""How scores and gathering grow with candidates, behaviours, bits and items."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders import lsh
from encoders.config import ModelConfig
from encoders.data.synthetic import LARGE, generate
from index import kernels
from index.arena import ArenaReader, Progress
from index.arena_writer import ArenaWriter
from index.keys import keys_of_ints
from index.layout import RowLayout, aligned_empty
from tests.bench.lsh_bits import Case, arrays_of
from tests.bench.report import Report
from tests.bench.rtp.common import CANDIDATES, PART, interleaved


def measure(report: Report, folder: Path, seed: int, quick: bool) -> None:
    random, rounds = np.random.default_rng(seed), 5 if quick else 30
    counts = (1_000, 2_000, 5_000, 10_000, 20_000)
    rows = [_scored(count, Case(), random, rounds) | {"candidates": count} for count in counts]
    report.table("candidates", rows)
    lengths = (100, 300, 1_000, 3_000, 10_000)
    cases = {length: arrays_of(Case(window=length), CANDIDATES, random) for length in lengths}
    whole = {length: arrays_of(Case(window=length, counted=length), CANDIDATES, random) for length in lengths}
    spent = interleaved(rounds, {str(length): _scoring(case) for length, case in cases.items()})
    counting = interleaved(rounds, {str(length): _scoring(case) for length, case in whole.items()})
    joins = interleaved(rounds, {str(length): joining(case) for length, case in cases.items()})
    report.table(
        "length",
        [
            {
                "length": length,
                "score_ms": float(np.median(spent[str(length)])),
                "counting_all_ms": float(np.median(counting[str(length)])),
                "without_simtier_ms": float(np.median(joins[str(length)])),
            }
            for length in lengths
        ],
    )
    report.figure(
        "din_growth_ratio", (np.array(joins[str(lengths[-1])]) / np.median(joins[str(lengths[0])])).tolist(), "x"
    )
    report.figure("simtier_sample_rms", _sample_errors(seed, quick), "in log1p(count)")
    report.table("bits", [_scored(CANDIDATES, Case(bits=b), random, rounds) | {"bits": b} for b in (64, 128, 256, 512)])
    sizes = (10_000, 50_000) if quick else (10_000, 100_000, 1_000_000, 5_000_000)
    report.table("items", [_gathered(folder, size, seed, rounds) for size in sizes])


def _sample_errors(seed: int, quick: bool) -> list[float]:
    """Of users of the marketplace with up to 10,000 behaviours, the root mean square over items and tiers of what
    counting a sample changes in log1p(count)."""
    world = dataclasses.replace(LARGE, users=20, items=10_000, examples=2_000, past=4_000 if quick else 8_000)
    data, random = generate(world, seed), np.random.default_rng(seed)
    centre = data.items.embeddings.mean(axis=0)
    own = lsh.signatures(data.items.embeddings, centre, lsh.projection(data.items.embeddings.shape[1], 128, seed))
    pairs = random.integers(0, len(own), (2, 200, 1))
    edges = lsh.tier_edges(lsh.matches(own[pairs[0, :, 0]], own[pairs[1, :, 0]]), ModelConfig().tiers, 128)
    candidates, errors = own[random.integers(0, len(own), 500)], []
    for user in range(world.users):
        window = own[data.log.item[data.log.user == user]]
        if len(window) < world.past // 2:
            continue
        sample, weight = lsh.thinned(window, 0)
        every, some = (lsh.tier_counts(lsh.matches(candidates, one), edges) for one in (window, sample))
        change = np.log1p(lsh.weighted(some, weight)) - np.log1p(every)
        errors.append(float(np.sqrt((change**2).mean())))
    return errors


def _scoring(arrays: tuple[Any, Any, Any]) -> Callable[[int], object]:
    hot, user, head = arrays
    return lambda _: kernels.score(hot, user, head)


def joining(arrays: tuple[Any, Any, Any], counts: NDArray[np.int32] | None = None) -> Callable[[int], object]:
    """All but SimTier's counts, which are given, or zero, as machine code alone."""
    hot, user, head = arrays
    given = np.zeros((len(hot), len(head.T)), np.int32) if counts is None else counts
    slots, out = np.zeros(kernels.CROSS_SLOTS, np.uint16), np.empty(len(hot), np.float32)
    kernels.place_crosses(slots, user)
    code, arguments = kernels.joining(hot, given, user, head, slots, out)
    held = (arrays, given, slots, out)  # alive as long as their addresses

    def join(_: int, held: object = held) -> None:
        code(*arguments)

    return join


def _scored(candidates: int, case: Case, random: np.random.Generator, rounds: int) -> dict[str, Any]:
    spent = interleaved(rounds, {"score": _scoring(arrays_of(case, candidates, random))})["score"]
    return {"score_ms": float(np.median(spent)), "low_ms": min(spent), "high_ms": max(spent)}


def _gathered(folder: Path, items: int, seed: int, rounds: int) -> dict[str, Any]:
    """Gathering from an arena of so many rows, whose ids are 0, 1, ..."""
    layout, path, random = RowLayout(), folder / f"items-{items}", np.random.default_rng(seed)
    writer = ArenaWriter.create(path, layout, 1, items)
    for at in range(0, items, PART):
        count = min(PART, items - at)
        hot, cold = _rows(layout, count, random)
        writer.apply(keys_of_ints(np.arange(at, at + count, dtype=np.uint64)), np.ones(count, np.uint8), hot, cold)
    writer.publish(1, 1, Progress.empty(1))
    reader = ArenaReader.open(path, layout)
    keys = [
        keys_of_ints(random.choice(items, min(items, CANDIDATES), replace=False).astype(np.uint64)) for _ in range(8)
    ]
    spent = interleaved(rounds, {"gather": lambda place: reader.gather(keys[place % 8])})["gather"]
    shutil.rmtree(path)
    return {"items": items, "gather_ms": float(np.median(spent)), "low_ms": min(spent), "high_ms": max(spent)}


def _rows(layout: RowLayout, count: int, random: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random hot and cold records; an item has four crosses of 400 on average."""
    hot, cold = aligned_empty(count, layout.hot), aligned_empty(count, layout.cold)
    hot.view(np.uint8)[:], cold.view(np.uint8)[:] = 0, 0
    hot["joint"] = 0.3 * random.standard_normal((count, layout.width), dtype=np.float32)
    weights = random.random((count, layout.bridges), dtype=np.float32)
    hot["bridge"] = weights / weights.sum(axis=1, keepdims=True)
    hot["signature"] = random.integers(0, 256, (count, layout.bits // 8), dtype=np.uint8)
    used = random.random((count, layout.crosses)) < 0.7
    hot["crosses"] = random.integers(1, 401, (count, layout.crosses)) * used
    cold["vector"] = random.standard_normal((count, layout.dim), dtype=np.float32)
    cold["attributes"] = 1
    return hot, cold
