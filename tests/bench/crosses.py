"""What the table of a user's crosses should be: memory per user against accuracy, with crosses of high cardinality.

The marketplace's items get crosses made of their features (`more_crosses`), up to category x brand x price band, most
of which a user meets once. Tables: exact; the most frequent or the most recent `cross_rows` of the crosses met; all
crosses hashed into `cross_rows` slots; a count sketch of `cross_rows` rows. docs/experiments/crosses.md says what was
found.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encoders.config import CROSS_TABLES, ModelConfig
from encoders.data import synthetic
from encoders.data.dataset import Dataset
from encoders.evaluate import Sampling, split_of
from encoders.evaluation import compare, rows
from encoders.features import FeatureSpec, cross_slots
from encoders.fold import cross_bytes
from encoders.intervals import holm
from encoders.train import TrainOptions
from tests.bench.experiment import OutOfTimeError, Source, Trial, Variant, cells, of, stop_here, trials
from tests.bench.lsh_bits import LENGTH, QUICK_WORLD, Case, kernel_us
from tests.bench.report import Report

SEEDS, QUICK_SEEDS = 3, 1
ROWS = (16, 64, 512)
ITEM_CROSSES = 8  # of an item, all kept
TRAINED = ModelConfig(window=200, crosses=ITEM_CROSSES)  # L <= 200 in training
EXACT, NONE, FEW = "exact", "no crosses", "exact, low cardinality"
SAMPLING = Sampling(requests=0, shortlists=0)
COUNTED_USERS = 1_000


def more_crosses(data: Dataset) -> Dataset:
    """The data with crosses of category, brand, price band and style, as the items' features give them, added."""
    made = [[*own, *_made(features)] for own, features in zip(data.items.crosses, data.items.features, strict=True)]
    return dataclasses.replace(data, items=dataclasses.replace(data.items, crosses=made))


def _made(features: Mapping[str, Any]) -> list[str]:
    category, brand, band, style = (features[k] for k in ("category", "brand", "price_band", "words"))
    return [
        f"category_brand_price:{category}, {brand}, {band}",
        f"category_style:{category}, {style[0]}",
        f"category_style_price:{category}, {style[0]}, {band}",
        f"category_style_brand:{category}, {style[0]}, {brand}",
    ]


def variants_of(quick: bool) -> list[Variant]:
    """Those on the data with more crosses; the exact table first."""
    options = TrainOptions(epochs=2) if quick else TrainOptions()
    found = {EXACT: dataclasses.replace(TRAINED, cross_table="exact")}
    found[NONE] = dataclasses.replace(TRAINED, without=("sim",), cross_table="exact")
    for size in ROWS[:1] if quick else ROWS:
        for kind in CROSS_TABLES[1:]:
            found[f"{kind} {size}"] = dataclasses.replace(TRAINED, cross_table=kind, cross_rows=size)
    return [Variant(name, dataclasses.replace(options, config=config)) for name, config in found.items()]


def run(seed: int, quick: bool) -> None:
    report = Report("crosses", seed, quick)
    world = QUICK_WORLD if quick else synthetic.EXPERIMENT
    source = Source("marketplace, more crosses", world=world, change=more_crosses)
    variants = variants_of(quick)
    plain = Variant(FEW, variants[0].options)
    seeds = [seed + k for k in range(QUICK_SEEDS if quick else SEEDS)]
    try:
        found: dict[str, list[Trial]] = trials(source, variants, seeds, SAMPLING)
        if not quick:
            found |= trials(Source("marketplace", world=world), [plain], seeds, SAMPLING)
    except OutOfTimeError as error:
        stop_here(error)
    configs = {variant.name: variant.options.config for variant in (*variants, plain) if variant.name in found}
    met = {name: _met(source if name != FEW else Source("marketplace", world=world), config) for name, config in
           configs.items() if name in (EXACT, FEW) or config.cross_table == "hashed"}  # fmt: skip
    sizes = {name: _bytes(config, met.get(name, met[EXACT])) for name, config in configs.items()}
    costs = kernel_us(
        {str(size): Case(crosses=ITEM_CROSSES, met=size) for size in sorted({1, *ROWS, int(max(met[EXACT]))})},
        repetitions=5 if quick else 30,
    )

    runs = of(found)
    table: list[dict[str, Any]] = []
    for row in rows(runs):
        config, own = configs[row.name], sizes[row.name]
        gap = compare(runs[row.name], runs[EXACT])["gauc"]
        table.append(
            {"table": row.name, "rows": config.cross_rows if config.cross_table != "exact" else None}
            | {"seeds": row.seeds}
            | cells(row.figures["gauc"], "gauc")
            | cells(gap.difference, "gauc_minus_exact")
            | {"p": gap.p}
            | {"validation_gauc": round(statistics.mean(one.validation_gauc for one in found[row.name]), 5)}
            | {"bytes_per_user_p50": own[0], "bytes_per_user_most": own[1], "bytes_bound": own[2]}
        )
        value = row.figures["gauc"]
        report.figure(f"gauc {row.name}", [value.low, value.high], "GAUC", value.value)
    others = [row for row in table if row["table"] != EXACT]
    for line, p in zip(others, holm([line["p"] for line in others]), strict=True):
        line["p_holm"] = p
    report.table("variants", table)
    report.table("kernel", [{"rows": int(size), "us_per_candidate": statistics.median(costs[size])} for size in costs])
    for size, samples in costs.items():
        report.figure(f"us_per_candidate_{size}_rows", samples, "us")
    report.figure("crosses_met_per_user", met[EXACT], "crosses")
    report.figure("default_bytes_per_user_bound", cross_bytes(ModelConfig(), 65_535), "bytes")
    report.finish(lambda canvas: _draw(canvas, table))


# Memory ---------------------------------------------------------------------------------------------------------------


def _met(source: Source, config: ModelConfig) -> list[int]:
    """How many rows the crosses of each of some users would have in an unbounded table: of the newest `LENGTH`
    behaviours before the test slice.
    """
    data, _ = source.open()
    before = data.log.time < split_of(data).test
    users, start = np.unique(data.log.user[before], return_index=True)
    of_users = np.split(data.log.item[before], start[1:])
    slots = _slots(data, config)
    picked = np.random.default_rng(0).permutation(len(users))[:COUNTED_USERS]
    return [len(np.unique(np.concatenate([slots[item] for item in of_users[k][-LENGTH:]]))) for k in picked]


def _slots(data: Dataset, config: ModelConfig) -> list[Sequence[int]]:
    """Slots of every item's crosses; as many as there are crosses, unless they are hashed."""
    crosses = [names[: config.crosses] for names in data.items.crosses]
    distinct = sorted({name for names in crosses for name in names})
    pooled = FeatureSpec(crosses=(), cross_slots=config.cross_rows + 1)
    codes = cross_slots(pooled, distinct).tolist() if config.cross_table == "hashed" else range(len(distinct))
    code = dict(zip(distinct, codes, strict=True))
    return [[code[name] for name in names] for names in crosses]


def _bytes(config: ModelConfig, met: Sequence[int]) -> tuple[int, int, int]:
    """Bytes of the table: of the median user, of the largest, and what no user exceeds."""
    if not config.has("sim"):
        only = cross_bytes(config, 0)  # the row of an absent cross
        return only, only, only
    each = [cross_bytes(config, count) for count in met]
    return int(statistics.median(each)), max(each), cross_bytes(config, 65_535)


def _draw(canvas: Any, table: list[dict[str, Any]]) -> None:
    axes = canvas.subplots()
    for kind in CROSS_TABLES[1:]:
        group = [row for row in table if row["table"].startswith(kind) and row["rows"]]
        gauc = [row["gauc"] for row in group]
        error = [[row["gauc"] - row["gauc_low"] for row in group], [row["gauc_high"] - row["gauc"] for row in group]]
        sizes = [row["bytes_per_user_p50"] for row in group]
        axes.errorbar(sizes, gauc, yerr=error, marker="o", capsize=2, label=kind)
    for row in (row for row in table if row["rows"] is None):
        if row["table"] == NONE:
            axes.axhline(row["gauc"], color="0.5", linestyle=":", linewidth=1, label=NONE)
        else:
            error = [[row["gauc"] - row["gauc_low"]], [row["gauc_high"] - row["gauc"]]]
            axes.errorbar(
                [row["bytes_per_user_p50"]], [row["gauc"]], yerr=error, marker="*", capsize=2, label=row["table"]
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of the table, median user")
    axes.set_ylabel("GAUC on the test slice")
    axes.legend(fontsize=8)
