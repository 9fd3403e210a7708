"""Accuracy against real-time cost: AIF, its parts and its rivals on the marketplace and on MovieLens 100K.

Every model is trained by the same trainer. `TUNED` ones have equal budgets of trials on the validation slice, the
others take the options of the model that they vary; ablations take AIF's and, on the marketplace, have more seeds,
because they differ by less. The bound is `din`: softmax target attention over the whole history, with the same counts,
crosses and dot products as AIF; `EXACT` has exact cosines in the counts' place too. Costs are of the serving form:
10,000 candidates, L = 1,000, d = 64.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encoders.baselines import MODELS, build
from encoders.batches import groups_of
from encoders.config import COMPONENTS, ModelConfig, Sizes
from encoders.data import synthetic
from encoders.data.dataset import NEVER, DataError, Dataset, Examples
from encoders.evaluate import Sampling, measure_popularity, split_of
from encoders.evaluation import Evaluation, Row, compare, rows, tables
from encoders.intervals import holm
from encoders.metrics import calibration_error, gauc
from encoders.train import TrainOptions
from tests.bench.experiment import OutOfTimeError, Source, Trial, Variant, cells, ml_100k, of, stop_here, trials
from tests.bench.lsh_bits import exact
from tests.bench.report import Report
from tests.bench.serving_forms import measure_all

SEEDS, QUICK_SEEDS = 3, 1
ABLATION_SEEDS = 5  # of AIF and its ablations on the marketplace, whose terms are known to matter
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # learning rates, tried first
DECAYS = (0.1, 0.5, 2.0)  # weight decays, tried at the rate that was chosen
NOISE = 2e-3  # validation GAUC: what seeds differ by, and an option must gain to be chosen before the default
BOUND, EXACT = "din", "din, exact cosines"
TUNED = ("aif", "dssm", "cold", "inttower", BOUND)
VARIED = {"din-plain": BOUND, "eta": "aif", "sdim": "aif", "aif-dots": "aif"}  # and the tuned model it varies
TRAINED = ModelConfig(window=200)  # L <= 200 in training
UNRATED = 1  # per rated film, of what is trained on
MORE = dataclasses.replace(synthetic.EXPERIMENT, examples=300_000)
ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"aif without {one}": {"without": (one,)} for one in COMPONENTS},
    "aif without dots": {"dots": 0},
    "aif without short window": {"short_window": 0},
    "aif without bea, lsh_din": {"without": ("bea", "lsh_din")},
}
# What costs nothing when removed: is it short of examples? Trained on MORE too.
SPARED = ("aif without bea", "aif without lsh_din", "aif without bea, lsh_din")
READERS = ("bea", "lsh_din", "simtier", "sim")  # what looks at history and item together, beside the dot products
# What parts are worth where none of the others stands in for them; on the marketplace.
GROUPS: dict[str, dict[str, Any]] = {
    "aif without bea, lsh_din, sim": {"without": ("bea", "lsh_din", "sim")},
    **{
        f"aif with {one} alone": {"without": tuple(other for other in READERS if other != one), "dots": 0}
        for one in READERS
    },
    "aif with dots alone": {"without": READERS},
    "aif with none of these": {"without": READERS, "dots": 0},
}
DRAWN = "aif with towers as drawn"  # not standardised before training
DISTILLED = "aif, distilled"  # from the bound, trained beside it
POPULARITY = "popularity"  # has no cost: one number per item
_DRAWS = 1_000  # of an unrated item, before a user is said to have none
QUICK_WORLD = synthetic.Marketplace(users=300, items=800, examples=12_000)
QUICK_MORE = dataclasses.replace(QUICK_WORLD, examples=18_000)


def run(seed: int, quick: bool) -> None:
    report = Report("quality", seed, quick)
    world = Source("marketplace", world=QUICK_WORLD if quick else synthetic.EXPERIMENT)
    real = Source("MovieLens 100K", folder=ml_100k())
    seeds = [seed + k for k in range(QUICK_SEEDS if quick else SEEDS)]
    larger = Source("marketplace, more examples", world=QUICK_MORE if quick else MORE)
    found: dict[str, tuple[Source, dict[str, list[Trial]]]] = {}
    tried: list[dict[str, object]] = []
    try:
        for suffix, source in {"": world, "_ml100k": real}.items():
            sampling = _sampling(source, quick)
            chosen, table = _tuned(source, seed, quick)
            tried += table
            models = _trained(source, chosen, seeds, quick, sampling)
            if source is world:
                more = trials(larger, _with_more(chosen, quick), seeds, Sampling(requests=0, shortlists=0))
            found[suffix] = source, models | _popularity(source, sampling)
        others = _with_unrated(real, found["_ml100k"][1], chosen, seeds, quick)
    except OutOfTimeError as error:
        stop_here(error)
    costs = _costs(3 if quick else 15)
    report.table("tuning", tried)
    for suffix, (source, results) in found.items():
        report.table(f"models{suffix}", _table(results, costs, source))
        report.table(f"seeds{suffix}", _seeds(results))
        _figures(report, results, suffix)
    report.table("unrated_ml100k", _table(others, {}, real, versus=POPULARITY))
    report.table("models_more_examples", _table(more, costs, larger))
    report.table("seeds_more_examples", _seeds(more))
    report.table("costs", [{"model": name, **cost} for name, cost in costs.items()])
    share = np.divide(*(np.array(costs[name]["samples"]) for name in ("aif", BOUND)))
    for suffix in found:  # the serving form costs the same whatever it was trained on
        report.figure(f"aif_cost_share_of_bound{suffix}", share.tolist(), "")
        report.figure(f"aif_flops_share_of_bound{suffix}", costs["aif"]["flops"] / costs[BOUND]["flops"], "")
    _oracle(report, *found[""])
    report.finish(lambda canvas: _draw(canvas, {suffix: results for suffix, (_, results) in found.items()}, costs))


def _sampling(source: Source, quick: bool) -> Sampling:
    """MovieLens has few requests and items, so all are ranked."""
    if quick:
        return Sampling(requests=20, shortlists=10, candidates=300)
    return Sampling(60 if source.world else 1_000, 100, 1_000)


# Training -------------------------------------------------------------------------------------------------------------


def _tuned(source: Source, seed: int, quick: bool) -> tuple[dict[str, TrainOptions], list[dict[str, object]]]:
    """The options of each model, chosen with one seed on the validation slice; and all that was tried."""

    def but(options: TrainOptions, option: str, value: float) -> TrainOptions:
        changed: dict[str, Any] = {option: value}
        return dataclasses.replace(options, **changed)

    base = TrainOptions(config=TRAINED, epochs=1) if quick else TrainOptions(config=TRAINED)
    names = ("aif", "dssm", "cold", BOUND) if quick else TUNED
    steps: dict[str, Sequence[float]] = {
        "learning_rate": RATES[-1:] if quick else RATES,
        "weight_decay": DECAYS[1:2] if quick else DECAYS,
    }
    best = {name: dataclasses.replace(base, model=name) for name in names}
    gauc: dict[TrainOptions, float] = {}
    for option, values in steps.items():
        wanted = [but(best[name], option, value) for name in names for value in values]
        variants = [Variant(_tried(options), options) for options in wanted]
        for variant, (trial,) in zip(
            variants, trials(source, variants, [seed], Sampling(requests=0, shortlists=0)).values(), strict=True
        ):
            gauc[variant.options] = trial.validation_gauc
        for name in names:
            own = {getattr(options, option): gauc[options] for options in wanted if options.model == name}
            best[name] = but(best[name], option, pick(own, getattr(base, option)))
    table: list[dict[str, object]] = [
        {
            "data": source.name,
            "model": options.model,
            "learning_rate": options.learning_rate,
            "weight_decay": options.weight_decay,
            "validation_gauc": found,
            "chosen": options == best[options.model],
        }
        for options, found in gauc.items()
    ]
    varied = {name: dataclasses.replace(best[of], model=name) for name, of in VARIED.items()}
    return (best if quick else best | varied), table


def pick(gauc: Mapping[float, float], default: float) -> float:
    """The value with the best validation GAUC, or the default where none is better by more than noise."""
    best = max(gauc, key=lambda value: gauc[value])
    return default if default in gauc and gauc[best] <= gauc[default] + NOISE else best


def _tried(options: TrainOptions) -> str:
    return f"{options.model} {options.learning_rate:g} {options.weight_decay:g}"


def _changed(aif: TrainOptions, several: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    """AIF with other values of its config, by name."""
    return [
        Variant(name, dataclasses.replace(aif, config=dataclasses.replace(aif.config, **changes)))
        for name, changes in several.items()
    ]


def _with_more(options: Mapping[str, TrainOptions], quick: bool) -> list[Variant]:
    """AIF, the bound, and AIF without the parts that cost nothing when removed where examples are fewer."""
    removed = SPARED[:1] if quick else SPARED
    models = [Variant(name, options[name]) for name in ("aif", BOUND)]
    return [*models, *_changed(options["aif"], {name: ABLATIONS[name] for name in removed})]


def _trained(
    source: Source, options: Mapping[str, TrainOptions], seeds: Sequence[int], quick: bool, sampling: Sampling
) -> dict[str, list[Trial]]:
    """The models with their chosen options, the ablations with AIF's."""
    known = source.world is not None
    models = [Variant(name, own) for name, own in options.items()]
    aif = options["aif"]

    if quick:
        return trials(source, [*models, *_changed(aif, ABLATIONS)[:2]], seeds, sampling)
    others = [
        Variant(EXACT, dataclasses.replace(options[BOUND], config=exact(TRAINED))),
        Variant(DISTILLED, dataclasses.replace(aif, distil=1.0)),
        Variant(DRAWN, dataclasses.replace(aif, towers_from_data=False)),
        *_changed(aif, GROUPS if known else {}),
    ]
    more = [seeds[0] + k for k in range(ABLATION_SEEDS)] if known else seeds
    found = trials(source, [*models, *others], seeds, sampling)
    return found | trials(source, [Variant("aif", aif), *_changed(aif, ABLATIONS)], more, sampling)


def _with_unrated(
    source: Source,
    found: Mapping[str, Sequence[Trial]],
    options: Mapping[str, TrainOptions],
    seeds: Sequence[int],
    quick: bool,
) -> dict[str, list[Trial]]:
    """What models rank that have been trained on films that nobody rated, too, beside those that have not."""
    names = ("aif",) if quick else ("aif", "dssm", "cold")
    changed = dataclasses.replace(source, learnt=with_unrated)
    variants = [Variant(f"{name}, unrated too", options[name]) for name in names]
    plain = {name: list(found[name]) for name in (*names, POPULARITY)}
    return plain | trials(changed, variants, seeds, _sampling(source, quick))


def with_unrated(data: Dataset) -> Dataset:
    """Beside every example `UNRATED` more of its user and time, not clicked: items that were there, drawn alike, of
    which the user had done nothing by then. The global split stays where it was. Raises DataError where a user has no
    such item.
    """
    examples, items = data.examples, len(data.items.ids)
    random = np.random.default_rng(0)
    user, time = np.repeat(examples.user, UNRATED), np.repeat(examples.time, UNRATED)
    known, place = np.unique(data.log.user.astype(np.int64) * items + data.log.item, return_index=True)
    first = np.append(data.log.time[place], NEVER)  # of a user's behaviours on an item: the log ascends in time
    item, wrong = np.zeros(len(user), np.int32), np.arange(len(user))
    for _ in range(_DRAWS):
        item[wrong] = random.integers(0, items, len(wrong))
        of, at = item[wrong], time[wrong]
        key = user[wrong].astype(np.int64) * items + of
        found = np.searchsorted(known, key)
        met = (np.append(known, -1)[found] == key) & (first[found] <= at)
        wrong = wrong[met | (data.items.added[of] > at) | (data.items.removed[of] <= at)]
        if not len(wrong):
            break
    else:
        raise DataError(f"user {data.profiles.ids[int(user[wrong[0]])]!r} has met nearly all items")
    columns = {
        "user": np.append(examples.user, user),
        "item": np.append(examples.item, item),
        "clicked": np.append(examples.clicked, np.zeros(len(user), bool)),
        "time": np.append(examples.time, time),
    }
    order = np.lexsort((columns["time"], columns["user"]))  # stable: the example itself comes first
    return dataclasses.replace(data, examples=Examples(**{name: column[order] for name, column in columns.items()}))


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
    against = {
        name: compare(runs["aif"], runs[name])["gauc"] for name in ("dssm", "cold", BOUND, EXACT) if name in runs
    }
    for figure, name in (("aif_gauc_share_of_bound", BOUND), ("aif_gauc_share_of_exact", EXACT)):
        if name in against:
            ratio = against[name].ratio
            report.figure(f"{figure}{suffix}", [ratio.low, ratio.high], "", ratio.value)
            report.figure(f"{figure}_low{suffix}", ratio.low, "")
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
    for name in ("aif", BOUND, EXACT):
        if name not in found:
            continue
        shares = [(gauc(e.scores, e.labels, e.users) - 0.5) / best for e in of(found)[name]]
        slug = name.replace(",", "").replace(" ", "_")
        report.figure(f"{slug}_gauc_share_of_oracle", shares, "", statistics.mean(shares))


def _table(
    found: Mapping[str, Sequence[Trial]],
    costs: Mapping[str, Mapping[str, Any]],
    source: Source,
    versus: str = "aif",
) -> list[dict[str, object]]:
    """One line per model. The p of GAUC stands beside one corrected for the number of lines (Holm)."""
    runs = of(found)
    lines: list[dict[str, object]] = []
    for row in rows(runs, BOUND if BOUND in runs else None):
        gaps = compare(runs[row.name], runs[versus])
        line: dict[str, object] = {"data": source.name, "model": row.name, "seeds": row.seeds, **row.counts}
        for metric, interval in row.figures.items():
            line |= cells(interval, metric)
        for metric, gap in gaps.items():
            line |= cells(gap.difference, f"{metric}_minus_{versus}") | {f"{metric}_p": _finite(gap.p)}
        line["gauc_p_users"] = _finite(gaps["gauc"].p_users)
        errors = [calibration_error(one.scores, one.labels) for one in runs[row.name]]
        line["calibration_error"] = round(statistics.mean(errors), 5)
        if cost := costs.get("aif" if row.name in (DRAWN, DISTILLED) else row.name):
            line |= {"us_per_candidate": cost["us"], "flops_per_candidate": cost["flops"]}
        lines.append(line)
    others = [line for line in lines if line["model"] != versus]
    for line, p in zip(others, holm([line["gauc_p"] for line in others]), strict=True):  # type: ignore[misc]
        line["gauc_p_holm"] = _finite(p)
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
