"""The user phase alone: behaviours whose rows are there become a user block and the tables of `score`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from encoders import user_ir
from encoders.bundle import seeded_bundle
from encoders.config import ModelConfig
from encoders.fold import Behaviours, UserFold
from encoders.ranker import RECENCY_EDGES
from index.kernels import user_tables
from infra.codegen import F32, Matrix
from tests.bench.report import Report
from tests.bench.rtp.common import interleaved

_AS_OF = 1_780_000_000_000
_SIZES = ((50, 1_000), (200, 1_000), (200, 10_000), (1_000, 10_000))  # recent, long-term


def measure(report: Report, folder: Path, seed: int, rounds: int) -> None:
    """CPU time by (recent, long-term) behaviours, whose rows are there; in turns."""
    made = {sizes: _phases(folder, *sizes, seed) for sizes in _SIZES}
    work = {f"{name}_{recent}_{length}": do for (recent, length), two in made.items() for name, do in two.items()}
    for name, spent in interleaved(rounds, work, time.thread_time).items():
        report.figure(f"user_{name}_cpu_ms", [float(np.median(part)) for part in np.array_split(spent, 5)], "ms")


def _phases(folder: Path, recent: int, length: int, seed: int) -> dict[str, Callable[[int], object]]:
    """By name: `block`, all that a user block of so many recent and long-term behaviours takes, tables included, and
    `D`, what LSH-DIN does of it over all of them."""
    config = dataclasses.replace(ModelConfig(), recent=recent, length=length)
    fold = UserFold(seeded_bundle(folder / f"user-{recent}-{length}", config, seed))
    past, profile = _behaviours(config, length, np.random.default_rng(seed)), {"segment": "s1", "age": 30.0}

    def block(_: int) -> None:
        user_tables(*fold.block(profile, past, _AS_OF).arrays, narrow=True)

    return {"block": block, "D": _din(fold, past, fold.block(profile, past, _AS_OF).D)}


def _behaviours(config: ModelConfig, length: int, random: np.random.Generator) -> Behaviours:
    """An item has four crosses of 400 on average, as in the catalogue of `rtp`."""
    crosses = random.integers(1, 401, (length, config.crosses)) * (random.random((length, config.crosses)) < 0.7)
    return Behaviours(
        vectors=random.standard_normal((length, config.dim)).astype(np.float16),
        signatures=random.integers(0, 256, (length, config.bits // 8), dtype=np.uint8),
        crosses=crosses.astype(np.uint16),
        actions=random.integers(0, 3, length).astype(np.uint8),
        times=_AS_OF - np.sort(random.integers(0, 30 * 86_400_000, length))[::-1],
    )


class _Din(user_ir._User):
    """The code of D alone, on tokens and a user vector that are in scratch."""

    def emit(self) -> None:
        sum_of_tokens = ir.Constant(ir.VectorType(F32, self.sizes.dim), None)
        self._din(sum_of_tokens, Matrix(self.S["user"], self.sizes.dim))


def _din(fold: UserFold, past: Behaviours, wanted: NDArray[np.float32]) -> Callable[[int], object]:
    """Of the user whose block `fold` has just made, with D as `wanted`."""
    sizes, config = fold._sizes[True], fold._config
    scratch = user_ir.scratch(sizes).memory()
    scratch[:] = fold._room().scratch
    P, D = np.zeros(config.width, np.float32), np.empty((config.bits, config.width), np.float32)
    code, signatures = _Din(sizes, RECENCY_EDGES).compiled(), past.signatures
    unread: list[Any] = [None] * 3  # pointers to what D does not need
    arguments = [fold._weights.ctypes.data, scratch.ctypes.data, len(past), None, 0]
    arguments += [signatures.ctypes.data, signatures.strides[0], None, 0, None, None, _AS_OF, None, None]
    arguments += [P.ctypes.data, None, D.ctypes.data, None, *unread, None]
    held = scratch, P, D, past, fold  # alive as long as their addresses

    def din(_: int, held: object = held) -> None:
        code(*arguments)

    din(0)
    assert np.array_equal(D, wanted), "the code of D alone makes another D"
    return din
