"""Accuracy against real-time cost: AIF, its parts and its rivals on the marketplace and on MovieLens 100K.

Every model is trained by the same trainer with its learning rate chosen on the validation slice out of the same
`RATES`; ablations take AIF's and, on the marketplace, have more seeds, because they differ by less. The bound is
`din`: softmax target attention over the whole history, with the same counts, crosses and dot products as AIF. Costs
are of the serving form: 10,000 candidates, L = 1,000, d = 64.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encoders.baselines import MODELS, build
from encoders.batches import groups_of
from encoders.data import synthetic
from encoders.data.dataset import DataError
from encoders.evaluate import Sampling, measure_popularity, split_of
from encoders.evaluation import Evaluation, Row, compare, rows, tables
from encoders.metrics import calibration_error, gauc
from encoders.model import COMPONENTS, ModelConfig, Sizes
from encoders.train import TrainOptions
from tests.bench.experiment import OutOfTimeError, Source, Trial, Variant, cells, of, stop_here, trials
from tests.bench.report import Report
from tests.bench.serving_forms import measure_all

SEEDS, QUICK_SEEDS = 3, 1
ABLATION_SEEDS = 5  # of AIF and its ablations on the marketplace, whose terms are known to matter
RATES = (2e-3, 4e-3)
BOUND = "din"
TRAINED = ModelConfig(window=200)  # L <= 200 in training
ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"aif without {one}": {"without": (one,)} for one in COMPONENTS},
    "aif without dots": {"dots": 0},
    "aif without short window": {"short_window": 0},
}
READERS = ("bea", "lsh_din", "simtier", "sim")  # what looks at history and item together, beside the dot products
# What parts are worth where none of the others stands in for them; on the marketplace.
GROUPS: dict[str, dict[str, Any]] = {
    "aif without bea, lsh_din": {"without": ("bea", "lsh_din")},
    "aif without bea, lsh_din, sim": {"without": ("bea", "lsh_din", "sim")},
    **{
        f"aif with {one} alone": {"without": tuple(other for other in READERS if other != one), "dots": 0}
        for one in READERS
    },
    "aif with dots alone": {"without": READERS},
    "aif with none of these": {"without": READERS, "dots": 0},
}
DRAWN = "aif with towers as drawn"  # not standardised before training
POPULARITY = "popularity"  # has no cost: one number per item
QUICK_WORLD = synthetic.Marketplace(users=300, items=800, examples=12_000)
ML_100K = Path(os.environ.get("ML_100K", "../shared/data/ml-100k"))


def run(seed: int, quick: bool) -> None:
    report = Report("quality", seed, quick)
    worlds = {"": Source("marketplace", world=QUICK_WORLD if quick else synthetic.EXPERIMENT)}
    if not ML_100K.is_dir():
        raise DataError(f"{ML_100K} is not there; ML_100K= names the folder of MovieLens 100K")
    worlds["_ml100k"] = Source("MovieLens 100K", folder=str(ML_100K))
    sampling = Sampling(requests=20, shortlists=10, candidates=300) if quick else Sampling(60, 100, 1_000)
    try:
        results = {
            suffix: _trained(source, seed, quick, sampling) | _popularity(source, sampling)
            for suffix, source in worlds.items()
        }
    except OutOfTimeError as error:
        stop_here(error)
    costs = _costs(3 if quick else 15)
    for suffix, source in worlds.items():
        found = results[suffix]
        report.table(f"models{suffix}", _table(found, costs, source))
        report.table(f"seeds{suffix}", _seeds(found))
        _figures(report, found, suffix)
    report.table("costs", [{"model": name, **cost} for name, cost in costs.items()])
    share = np.divide(*(np.array(costs[name]["samples"]) for name in ("aif", BOUND)))
    for suffix in worlds:  # the serving form costs the same whatever it was trained on
        report.figure(f"aif_cost_share_of_bound{suffix}", share.tolist(), "")
        report.figure(f"aif_flops_share_of_bound{suffix}", costs["aif"]["flops"] / costs[BOUND]["flops"], "")
    _oracle(report, worlds[""], results[""])
    report.finish(lambda canvas: _draw(canvas, results, costs))


# Training -------------------------------------------------------------------------------------------------------------


def _trained(source: Source, seed: int, quick: bool, sampling: Sampling) -> dict[str, list[Trial]]:
    """The models with their chosen learning rates, the ablations with AIF's."""
    seeds = range(seed, seed + (QUICK_SEEDS if quick else SEEDS))
    known = source.world is not None
    more = range(seed, seed + ABLATION_SEEDS) if known else seeds
    base = TrainOptions(config=TRAINED, epochs=2) if quick else TrainOptions(config=TRAINED)
    rates = RATES[1:2] if quick else RATES
    names = ("aif", "dssm", "cold", BOUND) if quick else tuple(MODELS)
    tried = [
        Variant(f"{name} {rate:g}", dataclasses.replace(base, model=name, learning_rate=rate))
        for rate in rates
        for name in names
    ]
    tuned = trials(source, tried, seeds[:1], Sampling(requests=0, shortlists=0))
    best = {name: max(rates, key=lambda rate: tuned[f"{name} {rate:g}"][0].validation_gauc) for name in names}
    models = [Variant(name, dataclasses.replace(base, model=name, learning_rate=best[name])) for name in names]
    aif = models[0].options

    def changed(several: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
        return [
            Variant(name, dataclasses.replace(aif, config=dataclasses.replace(aif.config, **changes)))
            for name, changes in several.items()
        ]

    if quick:
        return trials(source, [*models, *changed(ABLATIONS)[:2]], seeds, sampling)
    others = [Variant(DRAWN, dataclasses.replace(aif, towers_from_data=False)), *changed(GROUPS if known else {})]
    found = trials(source, [*models, *others], seeds, sampling)
    return found | trials(source, [models[0], *changed(ABLATIONS)], more, sampling)


def _popularity(source: Source, sampling: Sampling) -> dict[str, list[Trial]]:
    """What knows no user at all: items by their click rate before the validation slice."""
    data, truth = source.open()
    split = split_of(data)
    begin = data.begins()
    before, test = (
        measure_popularity(data, groups_of(data.examples, data.log, begin, since, until), split.validation, own, truth)
        for since, until, own in (
            (split.validation, split.test, Sampling(requests=0, shortlists=0)),
            (split.test, split.end, sampling),
        )
    )
    return {POPULARITY: [Trial(test, gauc(before.scores, before.labels, before.users), epochs=0, seconds=0.0)]}


# Figures --------------------------------------------------------------------------------------------------------------


def _figures(report: Report, found: Mapping[str, Sequence[Trial]], suffix: str) -> None:
    runs = of(found)
    against = {name: compare(runs["aif"], runs[name])["gauc"] for name in ("dssm", "cold", BOUND)}
    ratio = against[BOUND].ratio
    report.figure(f"aif_gauc_share_of_bound{suffix}", [ratio.low, ratio.high], "", ratio.value)
    report.figure(f"aif_gauc_share_of_bound_low{suffix}", ratio.low, "")
    for name in ("dssm", "cold"):
        gap = against[name].difference
        report.figure(f"aif_minus_{name}_gauc{suffix}", [gap.low, gap.high], "GAUC", gap.value)
        report.figure(f"aif_minus_{name}_gauc_low{suffix}", gap.low, "GAUC")
    if len(runs[BOUND]) > 1:
        report.figure(f"bound_overlap_with_itself{suffix}", _agreement(runs[BOUND]), "")


def _agreement(runs: Sequence[Evaluation]) -> list[float]:
    """overlap@100 of each two seeds of one model: what an overlap of different models is to be held against."""
    return [tables(a, bound=b)["overlap@100"].value for a, b in itertools.combinations(runs, 2)]


def _oracle(report: Report, source: Source, found: Mapping[str, Sequence[Trial]]) -> None:
    """Shares of what the true click probabilities reach on the test slice."""
    data, _ = source.open()
    examples = data.examples
    assert examples.probability is not None
    test = examples.time >= split_of(data).test
    best = gauc(examples.probability[test], examples.clicked[test], examples.user[test]) - 0.5
    report.figure("oracle_gauc", best + 0.5, "GAUC")
    for name in ("aif", BOUND):
        shares = [(gauc(e.scores, e.labels, e.users) - 0.5) / best for e in of(found)[name]]
        report.figure(f"{name}_gauc_share_of_oracle", shares, "", statistics.mean(shares))


def _table(
    found: Mapping[str, Sequence[Trial]], costs: Mapping[str, Mapping[str, Any]], source: Source
) -> list[dict[str, object]]:
    runs = of(found)
    lines: list[dict[str, object]] = []
    for row in rows(runs, BOUND):
        gaps = compare(runs[row.name], runs["aif"])
        line: dict[str, object] = {"data": source.name, "model": row.name, "seeds": row.seeds, **row.counts}
        for metric, interval in row.figures.items():
            line |= cells(interval, metric)
        for metric, gap in gaps.items():
            line |= cells(gap.difference, f"{metric}_minus_aif") | {f"{metric}_p": _finite(gap.p)}
        line["gauc_p_users"] = _finite(gaps["gauc"].p_users)
        errors = [calibration_error(one.scores, one.labels) for one in runs[row.name]]
        line["calibration_error"] = round(statistics.mean(errors), 5)
        if cost := costs.get("aif" if row.name == DRAWN else row.name):
            line |= {"us_per_candidate": cost["us"], "flops_per_candidate": cost["flops"]}
        lines.append(line)
    return lines


def _seeds(found: Mapping[str, Sequence[Trial]]) -> list[dict[str, object]]:
    return [
        {
            "model": name,
            "seed": trial.evaluation.seed,
            **{metric: round(table.value, 5) for metric, table in tables(trial.evaluation).items()},
            "validation_gauc": trial.validation_gauc,
            "epochs": trial.epochs,
            "seconds": round(trial.seconds, 1),
        }
        for name, own in found.items()
        for trial in own
    ]


def _costs(repetitions: int) -> dict[str, dict[str, Any]]:
    """Microseconds (median of interleaved repetitions) and operations per candidate, by model and ablation."""
    contenders = {name: (name, ModelConfig()) for name in MODELS}
    contenders |= {name: ("aif", ModelConfig(**changes)) for name, changes in (ABLATIONS | GROUPS).items()}
    samples = measure_all(contenders, repetitions=repetitions)
    sizes = Sizes(item=(1, 1, 1), user=(1, 1, 1), actions=2)
    return {
        name: {
            "us": statistics.median(samples[name]),
            "samples": samples[name],
            "flops": build(model, config, sizes).serving_flops(1_000, 1_000),
        }
        for name, (model, config) in contenders.items()
    }


def _finite(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def _draw(canvas: Any, results: Mapping[str, Mapping[str, Sequence[Trial]]], costs: Mapping[str, Any]) -> None:
    for axes, (suffix, found) in zip(canvas.subplots(1, len(results)), results.items(), strict=True):
        lines: list[Row] = rows(of(found))
        for row in lines:
            if row.name not in MODELS:
                continue
            value, x = row.figures["gauc"], costs[row.name]["us"]
            error = [[value.value - value.low], [value.high - value.value]]
            axes.errorbar([x], [value.value], yerr=error, fmt="o", capsize=2)
            axes.annotate(row.name, (x, value.value), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("microseconds per candidate in real time (L = 1,000)")
        axes.set_ylabel("GAUC, 95 % interval")
        axes.set_title("MovieLens 100K" if suffix else "marketplace", fontsize=9)
