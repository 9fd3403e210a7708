"""What a bit of the signatures is worth: accuracy, bytes per item and real-time cost of 16 to 512 bits, of one and of
two bits per projection, of random and of learned projections, and of the exact cosine that signatures stand for.

LSH-DIN and SimTier, the two that read signatures, are taken together and each without the other. Equal bits are equal
bytes: two bits per projection have half the projections. docs/experiments/lsh_bits.md says what was found.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from encoders import lsh
from encoders.config import ModelConfig
from encoders.data import synthetic
from encoders.evaluate import Sampling
from encoders.evaluation import compare, rows
from encoders.intervals import holm
from encoders.train import TrainOptions
from index import kernels
from index.layout import RowLayout, aligned_empty
from tests.bench.experiment import OutOfTimeError, Source, Variant, cells, of, stop_here, trials
from tests.bench.report import Report

SEEDS, QUICK_SEEDS = 3, 1
BITS, SOME_BITS = (16, 32, 64, 128, 256, 512), (16, 64, 256)
PARTS = {"both": (), "LSH-DIN": ("simtier",), "SimTier": ("lsh_din",)}
NEITHER = "neither"
FINE = 1_024  # places of a tier edge on the exact cosine's scale
TRAINED = ModelConfig(window=200, dots=0)  # L <= 200 in training; no other reader of the signatures
QUICK_WORLD = synthetic.Marketplace(users=300, items=800, examples=12_000)
SAMPLING = Sampling(requests=0, shortlists=0)
LENGTH, CANDIDATES = 1_000, 10_000


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table: a kind of signature, its bits, and the components that read it."""

    kind: str  # "random", "two bits", "learned", "cosine"
    bits: int
    part: str  # in PARTS, or NEITHER

    @property
    def name(self) -> str:
        if self.part == NEITHER:
            return NEITHER
        return f"{self.kind}, {self.part}" if self.kind == "cosine" else f"{self.kind} {self.bits}, {self.part}"

    @property
    def config(self) -> ModelConfig:
        config = exact(TRAINED) if self.kind == "cosine" else sized(TRAINED, self.bits)
        return dataclasses.replace(
            config,
            without=("lsh_din", "simtier") if self.part == NEITHER else PARTS[self.part],
            lsh="learned" if self.kind == "learned" else config.lsh,
            bits_per_projection=2 if self.kind == "two bits" else 1,
        )


def sized(config: ModelConfig, bits: int) -> ModelConfig:
    """The config with so many bits; the tier edges are placeholders, for training measures them."""
    if bits == config.bits:
        return config
    return dataclasses.replace(config, bits=bits, tier_edges=lsh.tier_edges(np.empty(0), config.tiers, bits))


def exact(config: ModelConfig) -> ModelConfig:
    """The config with exact cosines for the share of equal bits."""
    return dataclasses.replace(sized(config, FINE), lsh="cosine")


def lines(quick: bool) -> list[Line]:
    """Everything that is trained; where a grid would be too large, both parts together have the more bits."""
    if quick:
        kinds = [Line(kind, 64, "both") for kind in ("random", "two bits", "learned", "cosine")]
        return [*kinds, Line("random", 16, "both"), Line("random", 64, "LSH-DIN")]
    found = [Line("random", bits, "both") for bits in BITS]
    found += [Line("random", bits, part) for part in ("LSH-DIN", "SimTier") for bits in BITS]
    found += [Line("two bits", bits, "both") for bits in SOME_BITS]
    found += [Line("two bits", 64, part) for part in ("LSH-DIN", "SimTier")]
    found += [Line("learned", bits, "both") for bits in SOME_BITS]
    found += [Line("learned", 64, "LSH-DIN"), *(Line("cosine", 0, part) for part in PARTS)]
    return [*found, Line("random", 128, NEITHER)]


def run(seed: int, quick: bool) -> None:
    report = Report("lsh_bits", seed, quick)
    source = Source("marketplace", world=QUICK_WORLD if quick else synthetic.EXPERIMENT)
    options = TrainOptions(epochs=2) if quick else TrainOptions()
    wanted = lines(quick)
    variants = [Variant(line.name, dataclasses.replace(options, config=line.config)) for line in wanted]
    seeds = [seed + k for k in range(QUICK_SEEDS if quick else SEEDS)]
    try:
        found = trials(source, variants, seeds, SAMPLING)
    except OutOfTimeError as error:
        stop_here(error)
    bits = sorted({line.bits for line in wanted if line.kind != "cosine"})
    cases = {f"{b} {part}": Case(bits=b, window=0 if part == "LSH-DIN" else LENGTH) for b in bits for part in PARTS}
    costs = kernel_us(cases, repetitions=5 if quick else 30)

    runs = of(found)
    measured = {row.name: row for row in rows(runs)}
    table: list[dict[str, Any]] = []
    for line in wanted:
        row, cosine = measured[line.name], f"cosine, {line.part}"
        cells_of = cells(row.figures["gauc"], "gauc") | cells(row.figures["logloss"], "logloss")
        if cosine in runs and line.kind != "cosine":
            gap = compare(runs[line.name], runs[cosine])["gauc"]
            cells_of |= cells(gap.difference, "gauc_minus_cosine") | {"p": gap.p}
        costs_of: dict[str, Any] = {}
        if line.kind != "cosine" and line.part != NEITHER:
            costs_of = {
                "signature_bytes": line.bits // 8,
                "record_bytes": RowLayout(bits=line.bits).hot.itemsize,
                "us_per_candidate": statistics.median(costs[f"{line.bits} {line.part}"]),
            }
        named = {"kind": line.kind, "bits": line.bits or None, "part": line.part, "seeds": row.seeds}
        validated = {"validation_gauc": round(statistics.mean(one.validation_gauc for one in found[line.name]), 5)}
        table.append(named | cells_of | validated | costs_of)
        value = row.figures["gauc"]
        report.figure(f"gauc {line.name}", [value.low, value.high], "GAUC", value.value)
    compared = [cells_of for cells_of in table if "p" in cells_of]
    for cells_of, p in zip(compared, holm([cells_of["p"] for cells_of in compared]), strict=True):
        cells_of["p_holm"] = p
    for b in bits:
        report.figure(f"us_per_candidate_{b}_bits", costs[f"{b} both"], "us")
    report.table("variants", table)
    report.finish(lambda canvas: _draw(canvas, table))


# The kernel -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes that the kernel's time depends on."""

    bits: int = 128
    window: int = LENGTH  # behaviours that SimTier is about
    counted: int = lsh.COUNTED  # of a longer one
    crosses: int = 6  # kept per item
    met: int = 200  # crosses in the user's table


def kernel_us(cases: Mapping[str, Case], repetitions: int, candidates: int = CANDIDATES) -> dict[str, list[float]]:
    """CPU microseconds per candidate of `index.kernels.score` on one thread, one per repetition; cases interleaved."""
    random = np.random.default_rng(1)
    ready = {name: arrays_of(case, candidates, random) for name, case in cases.items()}
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(repetitions + 1):  # the first compiles
        for name, (hot, user, head) in ready.items():
            began = time.thread_time()
            kernels.score(hot, user, head)
            if repetition:
                spent[name].append((time.thread_time() - began) * 1e6 / candidates)
    return spent


def arrays_of(case: Case, candidates: int, random: np.random.Generator) -> tuple[Any, Any, Any]:
    """Random rows, user tables and head of the default sizes."""
    layout = RowLayout(bits=case.bits, crosses=case.crosses)
    h, tiers = layout.width, TRAINED.tiers
    hot = aligned_empty(candidates, layout.hot)
    for name in ("joint", "bridge"):
        hot[name] = random.standard_normal(hot[name].shape)
    hot["signature"] = random.integers(0, 256, hot["signature"].shape)
    slots = random.permutation(65_535)[: case.met].astype(np.uint16) + np.uint16(1)
    hot["crosses"] = random.choice(slots, hot["crosses"].shape)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape, dtype=np.float32)

    signatures = random.integers(0, 256, (case.window, case.bits // 8), dtype=np.uint8)
    window, weight = lsh.thinned(signatures, TRAINED.short_window, case.counted)
    lengths = len(window), min(len(window), TRAINED.short_window)
    C, D, G = normal(layout.bridges, h), normal(case.bits, h), normal(case.met + 1, h)
    user = kernels.user_tables(normal(h), C, D, G, np.sort(slots), window, lengths, weight, narrow=True)
    edges = np.array(lsh.tier_edges(random.binomial(case.bits, 0.5, 9_999), tiers, case.bits))
    sizes = [h, *TRAINED.head, 1]
    weights = [normal(b, a) for a, b in itertools.pairwise(sizes)]
    return hot, user, kernels.head_tables(normal(h, 2 * tiers), edges, weights, [normal(size) for size in sizes[1:]])


def _draw(canvas: Any, table: list[dict[str, Any]]) -> None:
    left, right = canvas.subplots(1, 2)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        groups.setdefault(f"{row['kind']}, {row['part']}", []).append(row)
    for name, group in groups.items():
        if group[0]["part"] == NEITHER or group[0]["kind"] == "cosine":
            style = {"both": "-", "LSH-DIN": "--", "SimTier": "-.", NEITHER: ":"}[group[0]["part"]]
            label = NEITHER if group[0]["part"] == NEITHER else name
            left.axhline(group[0]["gauc"], color="0.5", linestyle=style, linewidth=1, label=label)
            continue
        error = [[row["gauc"] - row["gauc_low"] for row in group], [row["gauc_high"] - row["gauc"] for row in group]]
        gauc = [row["gauc"] for row in group]
        left.errorbar([row["signature_bytes"] for row in group], gauc, yerr=error, marker="o", capsize=2, label=name)
        right.plot([row["us_per_candidate"] for row in group], gauc, marker="o", label=name)
    left.set_xscale("log", base=2)
    left.set_xlabel("bytes of the signature per item")
    right.set_xlabel(f"microseconds per candidate, kernel, L = {LENGTH:,}")
    for axes in (left, right):
        axes.set_ylabel("GAUC on the test slice")
    left.legend(fontsize=6)
