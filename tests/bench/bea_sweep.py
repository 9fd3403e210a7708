"""How many bridges BEA takes: accuracy and use of 1 to 64 bridges, of plain BEA and of remedies against its decline,
and a search for settings in which more bridges do harm.

The default model, and BEA *alone*, where nothing else looks at history and item together: there it has all the work.
Converged runs only: every run ends when `PATIENCE` epochs brought nothing, and one that met the limit of epochs first
is counted and flagged. A run that diverged counts as a model without skill. docs/experiments/bea_sweep.md says why
these remedies and what was found.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from encoders.batches import Batches
from encoders.config import ModelConfig
from encoders.data import synthetic
from encoders.data.dataset import Dataset
from encoders.evaluate import Sampling, split_of
from encoders.evaluation import CHANCE, Evaluation, compare, rows
from encoders.intervals import Difference, Interval, holm
from encoders.model import AIF
from encoders.train import Fitted, TrainOptions
from tests.bench.experiment import Failed, OutOfTimeError, Source, Trial, Variant, attempts, cells, ml_100k, stop_here
from tests.bench.report import Report

SEEDS, QUICK_SEEDS = 3, 1
BRIDGES, FEW, MANY = (1, 2, 4, 8, 16, 32, 64), 16, 64
PATIENCE, LIMIT = 6, 80  # epochs without a gain that mean convergence, and epochs at most
SOME_BRIDGES = (1, 4, 16, 64)
FULL = ModelConfig(window=200)  # L <= 200 in training
ALONE = dataclasses.replace(FULL, dots=0, without=("lsh_din", "simtier", "sim"))
SAMPLING = Sampling(requests=0, shortlists=0)
QUICK_WORLD = synthetic.Marketplace(users=150, items=400, examples=4_000)
EPOCH_SECONDS, EPOCHS, EXAMPLES = 4.0, 16, 120_000  # of one core, seen on so many examples; for the estimate

Runs = Sequence[Trial | Failed]


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Options of BEA that bear on what many bridges do; plain BEA has none."""

    temperature: float = 1.0
    top: int = 0
    dropout: float = 0.0
    diversity: float = 0.0
    from_data: bool = False

    def on(self, options: TrainOptions, bridges: int) -> TrainOptions:
        config = dataclasses.replace(
            options.config,
            bridges=bridges,
            bridge_temperature=self.temperature,
            bridge_top=self.top if self.top < bridges else 0,
            bridge_dropout=self.dropout,
            bridge_diversity=self.diversity,
        )
        return dataclasses.replace(options, config=config, bridges_from_data=self.from_data)


PLAIN, DEFAULT, NO_BEA = "plain", "temperature 2", "no BEA"
REMEDIES = {
    PLAIN: Remedy(),
    DEFAULT: Remedy(temperature=2.0),
    "k-means start": Remedy(from_data=True),
    "temperature 2, diversity": Remedy(temperature=2.0, diversity=0.1),
    "diversity": Remedy(diversity=0.1),
    "top 4": Remedy(top=4),
    "dropout": Remedy(dropout=0.2),
}
SWEPT = (PLAIN, DEFAULT)  # over all BRIDGES; the others at FEW and MANY


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where the failure of plain BEA is searched."""

    learning_rate: float = TrainOptions().learning_rate
    head: tuple[int, ...] = ModelConfig().head
    standardised: bool = True  # are the towers?

    @property
    def cells(self) -> dict[str, object]:
        """As columns of a table."""
        head = "-".join(map(str, self.head)) or "none"
        towers = "standardised" if self.standardised else "as drawn"
        return {"learning_rate": self.learning_rate, "head": head, "towers": towers}

    @property
    def name(self) -> str:
        return f"learning rate {self.learning_rate:g}, head {self.cells['head']}, towers {self.cells['towers']}"


USUAL = Setting()
SETTINGS = (
    USUAL,
    *(Setting(learning_rate=rate) for rate in (1e-3, 4e-3, 1e-2, 2e-2)),
    *(Setting(head=head) for head in ((), (128, 64, 32))),
    Setting(learning_rate=2e-2, head=(128, 64, 32)),
    Setting(standardised=False),
)
HARDEST = (USUAL, Setting(learning_rate=2e-2))  # on other data; and with a control that has no BEA
SIZES = (30_000,)  # examples of smaller marketplaces


@dataclasses.dataclass(frozen=True)
class Line:
    """What is trained with every seed."""

    remedy: str
    bridges: int
    setting: Setting = USUAL

    @property
    def name(self) -> str:
        return f"{self.remedy}, {self.bridges} bridges, {self.setting.name}"

    def variant(self, base: TrainOptions) -> Variant:
        without = (*base.config.without, "bea") if self.remedy == NO_BEA else base.config.without
        config = dataclasses.replace(base.config, head=self.setting.head, without=without)
        options = dataclasses.replace(
            base,
            config=config,
            learning_rate=self.setting.learning_rate,
            towers_from_data=self.setting.standardised,
        )
        return Variant(self.name, REMEDIES.get(self.remedy, Remedy()).on(options, self.bridges))


@dataclasses.dataclass(frozen=True)
class Part:
    """What is trained on one data set with one model around BEA."""

    source: Source
    model: ModelConfig
    sweep: tuple[Line, ...]
    search: tuple[Setting, ...]

    @property
    def lines(self) -> list[Line]:
        searched = [Line(PLAIN, bridges, setting) for setting in self.search for bridges in (FEW, MANY)]
        return list(dict.fromkeys([*self.sweep, *searched, *(Line(NO_BEA, 1, own) for own in self.controlled)]))

    @property
    def controlled(self) -> list[Setting]:
        """The settings searched that are also trained without BEA: what many bridges could fall to."""
        return [setting for setting in self.search if setting in HARDEST]


def parts(quick: bool) -> dict[str, Part]:
    """Suffix of the figures -> what is trained; a part that is searched only has a name that is no suffix."""
    others = [name for name in REMEDIES if name not in SWEPT]
    if quick:
        alone = tuple(Line(name, n) for name in SWEPT for n in (1, FEW, MANY))
        alone += tuple(Line(name, MANY) for name in others)
        source = Source("marketplace", world=QUICK_WORLD)
        return {
            "": Part(source, FULL, tuple(Line(DEFAULT, n) for n in (1, MANY)), ()),
            "_alone": Part(source, ALONE, alone, HARDEST),
        }
    world = synthetic.EXPERIMENT
    source = Source("marketplace", world=world)
    alone = tuple(Line(name, n) for n in BRIDGES for name in SWEPT)
    alone += tuple(Line(name, n) for n in (FEW, MANY) for name in others)
    real = Source("MovieLens 100K", folder=ml_100k())
    found = {
        "": Part(source, FULL, tuple(Line(DEFAULT, n) for n in BRIDGES), ()),
        "_alone": Part(source, ALONE, alone, SETTINGS),
        "_ml100k": Part(real, FULL, tuple(Line(DEFAULT, n) for n in SOME_BRIDGES), ()),
        "MovieLens 100K": Part(real, ALONE, (), HARDEST),
    }
    for size in SIZES:
        source = Source(f"marketplace, {size} examples", world=dataclasses.replace(world, examples=size))
        found[f"{size} examples"] = Part(source, ALONE, (), HARDEST)
    return found


def run(seed: int, quick: bool) -> None:
    report = Report("bea_sweep", seed, quick)
    base = TrainOptions(patience=PATIENCE, epochs=2 if quick else LIMIT)
    seeds = [seed + k for k in range(QUICK_SEEDS if quick else SEEDS)]
    wanted = parts(quick)
    _announce(wanted, len(seeds), base)
    found: dict[str, dict[Line, Runs]] = {}
    held: dict[str, dict[Line, Runs]] = {}
    try:
        for suffix, part in wanted.items():
            found[suffix] = _trained(part, part.lines, base, seeds)
        for suffix, part in wanted.items():
            held[suffix] = _trained(part, _to_hold(found[suffix], part.search), base, seeds)
    except OutOfTimeError as error:
        stop_here(error)

    searched: list[dict[str, object]] = []
    for suffix, part in wanted.items():
        own = found[suffix]
        if part.sweep:
            report.table(f"sweep{suffix}", _sweep(own, part.sweep))
            _figures(report, own, part.sweep, suffix)
        held_there = [line for line in held[suffix] if line.bridges == FEW]
        searched += [_gap(part.source, own, PLAIN, setting) for setting in part.search]
        searched += [_gap(part.source, held[suffix], line.remedy, line.setting) for line in held_there]
    _holm(searched)
    report.table("search", searched)
    report.table("seeds", [row for suffix, part in wanted.items() for row in _seeds(part, found[suffix])])
    _conclude(report, searched, [*found.values(), *held.values()])
    report.finish(lambda canvas: _draw(canvas, report.tables["sweep"], report.tables["sweep_alone"]))


# Training -------------------------------------------------------------------------------------------------------------


def _announce(wanted: Mapping[str, Part], seeds: int, base: TrainOptions) -> None:
    """Say how much is to be trained, before it starts."""
    count = seconds = 0.0
    for part in wanted.values():
        size = part.source.world.examples if part.source.world else 100_000
        count += seeds * len(part.lines)
        seconds += seeds * len(part.lines) * EPOCH_SECONDS * min(EPOCHS, base.epochs) * size / EXAMPLES
    print(
        f"{count:.0f} trials, about {seconds / 3600:.1f} hours of one core (less what is kept from before), "
        f"half of that by the clock on two free cores; where plain BEA fails, the default "
        f"({DEFAULT}) is trained too.",
        flush=True,
    )


def _trained(part: Part, lines: Sequence[Line], base: TrainOptions, seeds: Sequence[int]) -> dict[Line, Runs]:
    if not lines:
        return {}
    options = dataclasses.replace(base, config=part.model)
    found = attempts(part.source, [line.variant(options) for line in lines], seeds, SAMPLING, notes=usage)
    return {line: found[line.name] for line in lines}


def _to_hold(found: Mapping[Line, Runs], settings: Iterable[Setting]) -> list[Line]:
    """The settings in which plain BEA failed, with the remedy that is to hold there."""
    failed = [setting for setting in settings if _fails(*(found[Line(PLAIN, n, setting)] for n in (FEW, MANY)))]
    return [Line(DEFAULT, bridges, setting) for setting in failed for bridges in (FEW, MANY)]


def _fails(few: Runs, many: Runs) -> bool:
    """Does a run with many bridges diverge, or do they lose more than noise?"""
    gap = _difference(few, many)
    return any(isinstance(one, Failed) for one in many) or gap is None or gap.difference.low > 0


def usage(fitted: Fitted, batches: Batches, data: Dataset) -> dict[str, float]:
    """What a trained model's bridges do on the items of the test slice, each weighed by its impressions; and how the
    training ended.
    """
    model, examples, split = fitted.model, data.examples, split_of(data)
    assert isinstance(model, AIF)
    items, shown = np.unique(examples.item[examples.time >= split.test], return_counts=True)
    with torch.inference_mode():
        x = model.item_vectors(batches.candidates(items[None, :]).features)
        found = usage_of(model.bridge_weights(x), torch.from_numpy(shown / shown.sum()), model.bridges)
    gauc = [float(row["gauc"] or math.nan) for row in fitted.curve]
    converged = fitted.epochs < fitted.options.epochs
    return found | {"converged": float(converged), "gauc_lost_since_best": max(gauc) - gauc[-1]}


def usage_of(weights: Tensor, shares: Tensor, bridges: Tensor) -> dict[str, float]:
    """Of bridge weights w_i [M, n] of items with `shares` [M] of the impressions, and the bridges [n, d]; in nats.

    `entropy_of_mean` is that of the mean w_i: log n where all bridges have work. `mean_entropy` is the mean of w_i's
    own: log n where an item cannot tell the bridges apart, 0 where it takes one. `bridges_used` = exp(entropy_of_mean).
    `bridges_told_apart` = exp(entropy_of_mean - mean_entropy): 1 where all items have the same weights, whatever
    these are, n where each bridge has equally many items of its own. `cosine` is the mean over pairs of bridges, 0
    where there is no pair.
    """
    w = weights.to(torch.float64)
    each = -torch.special.xlogy(w, w).sum(dim=1)
    mean = shares @ w
    entropy_of_mean, mean_entropy = float(-torch.special.xlogy(mean, mean).sum()), float(shares @ each)
    unit = functional.normalize(bridges.to(torch.float64), dim=1)
    n = len(unit)
    cosine = float(((unit @ unit.T).sum() - n) / (n * (n - 1))) if n > 1 else 0.0
    return {
        "entropy_of_mean": entropy_of_mean,
        "mean_entropy": mean_entropy,
        "bridges_used": math.exp(entropy_of_mean),
        "bridges_told_apart": math.exp(max(0.0, entropy_of_mean - mean_entropy)),
        "cosine": cosine,
    }


# Tables and figures ---------------------------------------------------------------------------------------------------


def _evaluations(runs: Runs, others: Runs = ()) -> list[Evaluation]:
    """One per seed; a run that diverged has no skill. Empty where none of all these was measured."""
    like = next((one.evaluation for one in (*runs, *others) if isinstance(one, Trial)), None)
    if like is None:
        return []
    none = dataclasses.replace(like, scores=np.zeros_like(like.scores))
    return [one.evaluation if isinstance(one, Trial) else none for one in runs]


def _difference(a: Runs, b: Runs) -> Difference | None:
    left, right = _evaluations(a, b), _evaluations(b, a)
    return compare(left, right)["gauc"] if left else None


def _ended(runs: Runs) -> dict[str, object]:
    """How the runs of one line ended, and what their bridges do: means over those that did not diverge."""
    own = [one for one in runs if isinstance(one, Trial)]
    found: dict[str, object] = {
        "seeds": len(runs),
        "diverged": len(runs) - len(own),
        "not_converged": sum(not one.notes["converged"] for one in own),
    }
    if own:
        found["epochs_to_converge"] = statistics.mean(max(1, one.epochs - PATIENCE) for one in own)
        found |= {
            name: round(statistics.mean(one.notes[name] for one in own), 5)
            for name in own[0].notes
            if name != "converged"
        }
    return found


def _sweep(found: Mapping[Line, Runs], lines: Sequence[Line]) -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    for line in lines:
        row: dict[str, object] = {"remedy": line.remedy, "bridges": line.bridges}
        if evaluations := _evaluations(found[line]):
            (measured,) = rows({line.name: evaluations})
            row |= cells(measured.figures["gauc"], "gauc") | cells(measured.figures["logloss"], "logloss")
        plain = found.get(Line(PLAIN, line.bridges))
        if line.remedy != PLAIN and plain and (gap := _difference(found[line], plain)):
            row |= cells(gap.difference, "gauc_minus_plain") | {"p": gap.p}
        table.append(row | _ended(found[line]))
    return table


def _figures(report: Report, found: Mapping[Line, Runs], lines: Sequence[Line], suffix: str) -> None:
    """Plateau and drop of every remedy that was trained with all numbers of bridges.

    The plateau is the best mean of the test slice, which makes the drop look larger than it is, never smaller; beside
    it stands the drop from the plateau that the validation slice picks.
    """
    bridges = {line.bridges for line in lines}
    for name in dict.fromkeys(line.remedy for line in lines):
        runs = {line.bridges: found[line] for line in lines if line.remedy == name}
        own = {n: _evaluations(of, runs[MANY]) for n, of in runs.items()}
        if set(own) != bridges:
            continue
        if not all(own.values()):
            print(f"  {name}: all runs of some number of bridges and of {MANY} diverged, so there is no plateau")
            continue
        mean = {int(row.name): row.figures["gauc"].value for row in rows({str(n): each for n, each in own.items()})}
        plateau = max(mean, key=lambda n: mean[n])
        picked = max(runs, key=lambda n: statistics.mean(_validation(one) for one in runs[n]))
        drops = {"drop_at_64": plateau, "drop_at_64_by_validation": picked}
        for title in dict.fromkeys((f"bea_{_slug(name)}", *(["bea"] if name == DEFAULT else []))):
            for kind, n in drops.items():
                drop = compare(own[n], own[MANY])["gauc"].difference
                report.figure(f"{title}_{kind}{suffix}", _range(drop), "GAUC", drop.value)
            report.figure(f"{title}_plateau_bridges{suffix}", plateau, "bridges")


def _validation(run: Trial | Failed) -> float:
    return run.validation_gauc if isinstance(run, Trial) else CHANCE["gauc"]


def _range(interval: Interval) -> list[float]:
    return [edge for edge in (interval.low, interval.high) if math.isfinite(edge)] or [interval.value]


def _slug(name: str) -> str:
    return name.replace(",", "").replace("-", "_").replace(" ", "_")


def _gap(source: Source, found: Mapping[Line, Runs], remedy: str, setting: Setting) -> dict[str, object]:
    """One line of the search: what MANY bridges lose to FEW."""
    few, many = (found[Line(remedy, bridges, setting)] for bridges in (FEW, MANY))
    row: dict[str, object] = {"data": source.name, "remedy": remedy, **setting.cells, "seeds": len(many)}
    for bridges, runs, other in ((FEW, few, many), (MANY, many, few)):
        if evaluations := _evaluations(runs, other):
            row |= cells(rows({"": evaluations})[0].figures["gauc"], f"gauc_{bridges}")
        ended = _ended(runs)
        row |= {f"{name}_{bridges}": ended[name] for name in ("diverged", "not_converged")}
    if control := _evaluations(found.get(Line(NO_BEA, 1, setting), ()), many):
        row |= cells(rows({"": control})[0].figures["gauc"], "gauc_without")
    gap = _difference(few, many)
    row |= cells(gap.difference, "drop") | {"p": gap.p if math.isfinite(gap.p) else None} if gap else {}
    return row | {"fails": _fails(few, many)}


def _holm(searched: list[dict[str, object]]) -> None:
    """Add to each line of plain BEA its p, corrected for the number of settings searched."""
    plain = [row for row in searched if row["remedy"] == PLAIN and row.get("p") is not None]
    for row, p in zip(plain, holm([float(str(row["p"])) for row in plain]), strict=True):
        row["p_holm"] = round(p, 5)


def _conclude(report: Report, searched: Sequence[Mapping[str, Any]], found: Iterable[Mapping[Line, Runs]]) -> None:
    """Say whether a setting was found in which more bridges lose more than noise, and whether all runs converged."""
    failed = [row for row in searched if row["remedy"] == PLAIN and row["fails"]]
    sure = [row for row in failed if row["diverged_64"] or row.get("p_holm", 1.0) < 0.05]
    everything = [one for lines in found for runs in lines.values() for one in runs]
    limit = sum(isinstance(one, Trial) and not one.notes["converged"] for one in everything)
    report.figure("bea_settings_searched", sum(row["remedy"] == PLAIN for row in searched), "")
    report.figure("bea_settings_failed", len(failed), "")
    report.figure("bea_settings_failed_holm", len(sure), "")
    report.figure("bea_runs_diverged", sum(isinstance(one, Failed) for one in everything), "runs")
    report.figure("bea_runs_not_converged", limit, "runs")
    for row in failed:
        drop = f"{row['drop']:.4f} [{row['drop_low']:.4f}, {row['drop_high']:.4f}]" if "drop" in row else "all"
        print(
            f"  {row['data']}, learning rate {row['learning_rate']:g}, head {row['head']}, towers {row['towers']}: "
            f"{MANY} bridges lose {drop} "
            f"to {FEW}, {row['diverged_64']} runs diverged, p after Holm's correction {row.get('p_holm')}"
        )
    print(
        f"  {len(failed)} settings in which {MANY} plain bridges lose more than noise to {FEW}"
        if failed
        else f"  no setting was found in which {MANY} plain bridges lose more than noise to {FEW}, or diverge"
    )
    if limit:
        print(f"  NOT CONVERGED: {limit} runs met the limit of epochs; see not_converged in the tables")


def _seeds(part: Part, found: Mapping[Line, Runs]) -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    for line, runs in found.items():
        named: dict[str, object] = {
            "data": part.source.name,
            "model": "BEA alone" if part.model == ALONE else "default",
        }
        named |= {"remedy": line.remedy, "bridges": line.bridges, **line.setting.cells}
        for place, one in enumerate(runs):
            if isinstance(one, Failed):
                table.append({**named, "run": place, "diverged": one.message})
                continue
            gauc = rows({"": [one.evaluation]})[0].figures["gauc"].value
            table.append(
                {**named, "run": place, "gauc": round(gauc, 5), "validation_gauc": one.validation_gauc}
                | {"epochs": one.epochs, "seconds": round(one.seconds, 1)}
                | {name: round(value, 5) for name, value in one.notes.items()}
            )
    return table


def _draw(canvas: Any, full: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> None:
    accuracy, use = canvas.subplots(1, 2)
    named = [(f"default model, {row['remedy']}", row) for row in full]
    named += [(f"BEA alone, {row['remedy']}", row) for row in alone]
    for place, name in enumerate(dict.fromkeys(name for name, _ in named)):
        lines = sorted(
            (row for own, row in named if own == name and "gauc" in row and "bridges_used" in row),
            key=lambda row: row["bridges"],
        )
        if not lines:
            continue
        colour = f"C{place}"
        n = np.array([row["bridges"] for row in lines])
        gauc = np.array([row["gauc"] for row in lines])
        error = [gauc - [row["gauc_low"] for row in lines], [row["gauc_high"] for row in lines] - gauc]
        beside = 2 ** ((place - 3) / 25)  # the intervals stand beside each other
        accuracy.errorbar(n * beside, gauc, yerr=error, marker="o", markersize=3, capsize=2, color=colour, label=name)
        use.plot(n, [row["bridges_told_apart"] for row in lines], marker="o", markersize=3, color=colour)
        use.plot(n, [row["bridges_used"] for row in lines], linestyle=":", marker=".", markersize=3, color=colour)
    use.plot(BRIDGES, BRIDGES, color="0.7", linewidth=1)
    use.set_yscale("log", base=2)
    use.set_ylabel("bridges told apart (lines), used (dots)")
    accuracy.set_ylabel("GAUC on the test slice, 95 % interval")
    accuracy.legend(fontsize=6, loc="center left")
    for axes in (accuracy, use):
        axes.set_xscale("log", base=2)
        axes.set_xticks(BRIDGES, [str(n) for n in BRIDGES])
        axes.set_xlabel("bridges")
