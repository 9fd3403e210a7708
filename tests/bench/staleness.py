"""What fresh item vectors are worth: the same models with the items as an index knew them 0 s to 24 h ago, or as
cycles of updates of 1 min to 24 h left them.

Worlds: the marketplace with items that change every three days, six hours or twenty minutes and items that arrive; and
MovieLens 100K replayed at three speeds, whose items have running counters. Models learn from items as they were at each
request; late items come in only when they are measured. docs/experiments/staleness.md has the equations and findings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders import intervals
from encoders.batches import Batches, Groups, groups_of
from encoders.config import ModelConfig
from encoders.data import oracle
from encoders.data.dataset import Dataset
from encoders.data.fingerprint import fingerprint
from encoders.data.oracle import Oracle
from encoders.data.source import open_dataset
from encoders.data.synthetic import Marketplace
from encoders.data.turnover import Lateness, Living, delayed, drifting, replayed, request_times
from encoders.evaluate import Sampling, Split, Truth, predict, score_items, split_of
from encoders.evaluation import CHANCE, REGRET_TOP
from encoders.metrics import Table, gauc_table, regret, table_of
from encoders.ranker import Ranker
from encoders.train import Fitted, TrainOptions
from encoders.trials import trained
from infra.settings import load
from tests.bench.experiment import OutOfTimeError, Source, Variant, cells, ml_100k, stop_here, trials
from tests.bench.marketplace import expected_gauc
from tests.bench.report import Report

SEEDS, QUICK_SEEDS = 3, 1
_MINUTE, _HOUR = 60_000, 3_600_000
TIMES = {"1m": _MINUTE, "10m": 10 * _MINUTE, "1h": _HOUR, "6h": 6 * _HOUR, "24h": 24 * _HOUR}
QUICK_TIMES = ("10m", "24h")
CHANGES = {"slow": 72 * _HOUR, "normal": 6 * _HOUR, "fast": 20 * _MINUTE}  # between changes of an item
REPLAY = {"slow": 1, "normal": 10, "fast": 200}  # times as fast as MovieLens was rated
WORLD = Marketplace(users=3_000, items=8_000, examples=200_000, days=14, past=150, page=(16, 32), restocked=True)
QUICK_WORLD = Marketplace(users=300, items=800, examples=12_000, days=14, restocked=True)
QUICK_USERS = 150  # of MovieLens
TRAINED = ModelConfig(window=200)  # L <= 200
REQUESTS, CANDIDATES = 150, 400  # of the shortlists, where the true probabilities are known
_TOGETHER = 8  # shortlists scored at a time
QUALITY = float(oracle.WEIGHTS[oracle.TERMS.index("quality")])
LATEST = Lateness(delay=TIMES["24h"])

F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Fresh(Source):
    """What the models learn from: the data with every item as it was at each request."""

    sizes: Marketplace | None = None
    every: int = 0  # ms between changes of a marketplace's item
    users: int | None = None  # only the first so many of a folder's

    def living(self) -> tuple[Living, Oracle | None]:
        if self.sizes is not None:
            return drifting(self.sizes, self.world_seed, self.every)
        return replayed(_first_users(open_dataset(self.folder), self.users)), None

    def open(self) -> tuple[Dataset, Truth | None]:
        return delayed(self.living()[0], Lateness())[0].data, None


@dataclasses.dataclass(frozen=True)
class Case:
    """A world at one speed of turnover."""

    data: str
    speed: str
    suffix: str  # of the figures
    source: Fresh
    replay: int = 1  # lateness counts so many times


def run(seed: int, quick: bool) -> None:
    report = Report("staleness", seed, quick)
    options = TrainOptions(config=TRAINED, epochs=2) if quick else TrainOptions(config=TRAINED)
    seeds = [seed + k for k in range(QUICK_SEEDS if quick else SEEDS)]
    cases = cases_of(quick)
    times = {name: time for name, time in TIMES.items() if not quick or name in QUICK_TIMES}
    table: list[dict[str, Any]] = []
    try:
        for source in dict.fromkeys(case.source for case in cases):
            trials(source, [Variant("aif", options)], seeds, Sampling(0, 0))
        for case in cases:
            table += _measured(case, [dataclasses.replace(options, seed=one) for one in seeds], times)
            print(f"  measured: {case.data}, {case.speed}", flush=True)
    except OutOfTimeError as error:
        stop_here(error)
    _figures(report, table)
    report.table("lateness", table)
    report.table("freshness_value_per_turnover", _values(table))
    report.finish(lambda canvas: _draw(canvas, table))


def cases_of(quick: bool) -> list[Case]:
    """The marketplace at each speed, then MovieLens replayed at each."""
    sizes = QUICK_WORLD if quick else WORLD
    films = Fresh("MovieLens 100K, replayed", folder=ml_100k(), users=QUICK_USERS if quick else None)
    return [
        *(
            Case("marketplace", speed, "", Fresh(f"marketplace, {speed}", sizes=sizes, every=every))
            for speed, every in CHANGES.items()
        ),
        *(Case("MovieLens 100K", speed, "_ml100k", films, replay) for speed, replay in REPLAY.items()),
    ]


def _first_users(data: Dataset, users: int | None) -> Dataset:
    """The data with the examples and behaviours of the first `users` alone; all where that is None."""
    if users is None:
        return data
    some, own = data.examples.user < users, data.log.user < users

    def cut(columns: Any, kept: Bools) -> Any:
        pairs = ((field.name, getattr(columns, field.name)) for field in dataclasses.fields(columns))
        return dataclasses.replace(columns, **{name: None if old is None else old[kept] for name, old in pairs})

    return dataclasses.replace(data, examples=cut(data.examples, some), log=cut(data.log, own))


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shown:
    """Items shown to users, by their places in the living data, and the truth about them where there is an oracle."""

    item: I8  # [..]
    as_of: I8  # [..], time of the request
    logits: F8 | None  # [..], of the true click probability
    drift: F8  # [..], part of them that changes with the item


@dataclasses.dataclass(frozen=True)
class Slice:
    """What is asked about: the test slice's n impressions, and shortlists [Q, K] of some of its requests."""

    split: Split
    users: I8  # [n]
    labels: Bools  # [n]
    impressions: Shown
    settled: Bools  # [n], items that every index compared here has
    which: I8  # [Q], places among the slice's groups
    short_users: I8  # [Q]
    shortlists: Shown


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a scorer says; an item without a row stands below all others."""

    impressions: F8  # [n]
    shortlists: F8  # [Q, K]


@dataclasses.dataclass(frozen=True)
class Seen:
    """The slice as one index shows it."""

    version: I8  # [n], of the items shown
    missing: Bools  # [n]
    missing_short: Bools  # [Q, K]
    models: list[Scored]  # one per seed
    truth: Scored | None  # the oracle, with what it sees of the items taken for what is
    aware: Scored | None  # the oracle that knows how likely what it sees is out of date


def _measured(case: Case, options: Sequence[TrainOptions], times: Mapping[str, int]) -> list[dict[str, Any]]:
    """The table's lines of a case."""
    living, known = case.source.living()
    asked = slice_of(living, known, case.replay)
    data = delayed(living, Lateness())[0].data
    name, cache = fingerprint(data), load().state / "trials"
    models = [trained(data, one, cache, name=name) for one in options]
    fresh = seen_at(living, asked, models, Lateness())
    lines: list[dict[str, Any]] = []
    for kind, label, lateness in _settings(times):
        late = Lateness(lateness.delay * case.replay, lateness.every * case.replay)
        found = fresh if late == Lateness() else seen_at(living, asked, models, late)
        line: dict[str, Any] = {"data": case.data, "suffix": case.suffix, "turnover": case.speed}
        line |= {"kind": kind, "late": label, "seconds": (lateness.delay + lateness.every) // 1000}
        lines.append(line | _line(asked, fresh, found))
    return lines


def _settings(times: Mapping[str, int]) -> Iterator[tuple[str, str, Lateness]]:
    yield "delay", "0s", Lateness()
    for label, time in times.items():
        yield "delay", label, Lateness(delay=time)
    for label, time in times.items():
        yield "batch", label, Lateness(every=time)


def slice_of(living: Living, known: Oracle | None, replay: int) -> Slice:
    """The test slice; with shortlists where there is an oracle."""
    data, split = living.data, split_of(living.data)
    examples, log, items = data.examples, data.log, data.items
    test = examples.time >= split.test
    shown, as_of = examples.item[test].astype(np.int64), request_times(data)[test]
    begin = data.begins()
    groups = groups_of(examples, log, begin, split.test, split.end)
    random = np.random.default_rng(0)
    which = np.sort(random.permutation(len(groups))[: REQUESTS if known else 0])
    times = examples.time[groups.first[which]]
    alive = [np.flatnonzero((items.added <= time) & (time < items.removed)) for time in times]
    K = min([CANDIDATES, *(len(row) for row in alive)])
    short = np.array([random.choice(row, K, replace=False) for row in alive], dtype=np.int64).reshape(len(which), K)
    short_times = np.repeat(times, K).reshape(short.shape)
    pasts = [log.item[begin[groups.user[g]] : groups.history[g]] for g in which]
    short_logits = _true_logits(living, known, groups.user[which], short, short_times, pasts) if known else None
    return Slice(
        split=split,
        users=examples.user[test].astype(np.int64),
        labels=examples.clicked[test],
        impressions=_shown(living, shown, as_of, known.logits()[test] if known else None),
        settled=Lateness(LATEST.delay * replay).seen(shown, as_of) >= items.added[shown],
        which=which,
        short_users=groups.user[which],
        shortlists=_shown(living, short, short_times, short_logits),
    )


def _shown(living: Living, item: I8, as_of: I8, logits: F8 | None) -> Shown:
    return Shown(item, as_of, logits, QUALITY * living.drift(item, as_of).astype(np.float64))


def _true_logits(
    living: Living, known: Oracle, users: I8, items: I8, times: I8, pasts: Sequence[npt.NDArray[np.int32]]
) -> F8:
    """The shortlists' [Q, K], by the users' behaviours before their requests."""
    rows = []
    for user, candidates, past in zip(users, items, pasts, strict=True):
        history = past[-oracle.WINDOW :] if len(past) else np.array([-1], dtype=np.int32)
        who = np.array([user], dtype=np.int32)
        rows.append(oracle.terms_of(known.hidden, who, candidates[None].astype(np.int32), history[None]))
    terms = np.concatenate(rows)
    terms[..., oracle.TERMS.index("quality")] += living.drift(items, times)
    return oracle.logits(terms)


def seen_at(living: Living, asked: Slice, models: Sequence[Fitted], lateness: Lateness) -> Seen:
    """Score the slice with the items as they are seen so late."""
    shown, short = asked.impressions, asked.shortlists
    found, rows = delayed(living, lateness, asked.split.test, (short.item, short.as_of))
    version, missing, missing_short = found.version[found.data.examples.item], found.missing, rows < 0
    scored = []
    batches = models[0].batches(found.data)  # the feature spec does not depend on the seed
    groups = batches.groups(asked.split.test, asked.split.end)
    for fitted in models:
        batches.sign_by(fitted.model)
        impressions = predict(fitted.model, batches, groups)[0]
        shortlists = _score(fitted.model, batches, groups.select(asked.which), np.maximum(rows, 0))
        scored.append(Scored(_last(impressions, missing), _last(shortlists, missing_short)))
    if shown.logits is None or short.logits is None:
        return Seen(version, missing, missing_short, scored, None, None)
    still = float((version == living.versions.at(shown.item, shown.as_of)).mean())
    truth, aware = (
        Scored(
            _last(_late_logits(living, shown, lateness, share), missing),
            _last(_late_logits(living, short, lateness, share), missing_short),
        )
        for share in (1.0, still)
    )
    return Seen(version, missing, missing_short, scored, truth, aware)


def _score(model: Ranker, batches: Batches, groups: Groups, rows: I8) -> F8:
    parts = [
        score_items(
            model, batches, groups.select(np.arange(at, min(at + _TOGETHER, len(rows)))), rows[at : at + _TOGETHER]
        )
        for at in range(0, len(rows), _TOGETHER)
    ]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(rows.shape)


def _late_logits(living: Living, shown: Shown, lateness: Lateness, share: float) -> F8:
    """The true logits with `share` of the drift that is seen in place of the one that is."""
    assert shown.logits is not None
    late = np.maximum(lateness.seen(shown.item, shown.as_of), living.data.items.added[shown.item])
    found: F8 = shown.logits - shown.drift + share * QUALITY * living.drift(shown.item, late)
    return found


def _last(scores: npt.NDArray[np.floating], missing: Bools) -> F8:
    """The scores with what is missing below all others."""
    return np.where(missing, scores.min(initial=0.0) - 1, scores).astype(np.float64)


# Figures --------------------------------------------------------------------------------------------------------------


def _line(asked: Slice, fresh: Seen, late: Seen) -> dict[str, Any]:
    """How much is late, and what that costs: `*_loss` is fresh minus late GAUC, `regret_more` late minus fresh."""
    settled = asked.settled
    gauc = intervals.interval(_gaucs(asked, late.models))
    loss = intervals.compare(_gaucs(asked, fresh.models), _gaucs(asked, late.models), CHANCE["gauc"])
    kept = intervals.compare(_gaucs(asked, fresh.models, settled), _gaucs(asked, late.models, settled), CHANCE["gauc"])
    line: dict[str, Any] = {
        "changed": round(float((late.version != fresh.version).mean()), 5),
        "missing": round(float(late.missing.mean()), 5),
        **cells(gauc, "gauc"),
        **cells(loss.difference, "gauc_loss"),
        "p": _finite(loss.p),
        **cells(kept.difference, "gauc_loss_settled"),
    }
    if late.truth is None or late.aware is None or fresh.truth is None:
        return line
    regrets = _regrets(asked, late.models)
    more = intervals.compare(regrets, _regrets(asked, fresh.models))
    best = intervals.compare(_gaucs(asked, [fresh.truth]), _gaucs(asked, [late.truth]), CHANCE["gauc"])
    expected, at_best = functools.partial(_expected, asked), _expected(asked, fresh.truth)
    line |= {"missing_short": round(float(late.missing_short.mean()), 5)}
    line |= cells(intervals.interval(regrets), f"regret@{REGRET_TOP}") | cells(more.difference, "regret_more")
    line |= cells(best.difference, "oracle_gauc_loss")
    line |= {
        "oracle_gauc_expected": round(expected(late.truth), 5),
        "oracle_loss_expected": round(at_best - expected(late.truth), 5),
        "oracle_loss_settled": round(expected(fresh.truth, settled) - expected(late.truth, settled), 5),
        "oracle_loss_aware": round(at_best - expected(late.aware), 5),
        "oracle_regret": round(_regrets(asked, [late.truth])[0].value, 5),
    }
    return line


def _gaucs(asked: Slice, scored: Sequence[Scored], kept: Bools | None = None) -> list[Table]:
    which = np.ones(len(asked.users), dtype=bool) if kept is None else kept
    return [gauc_table(one.impressions[which], asked.labels[which], asked.users[which]) for one in scored]


def _regrets(asked: Slice, scored: Sequence[Scored]) -> list[Table]:
    assert asked.shortlists.logits is not None
    found = []
    for one in scored:
        lost, best = regret(one.shortlists, oracle.sigmoid(asked.shortlists.logits), REGRET_TOP)
        found.append(table_of(asked.short_users, lost / best, best))
    return found


def _expected(asked: Slice, scored: Scored, kept: Bools | None = None) -> float:
    """GAUC with the labels' noise averaged out."""
    assert asked.impressions.logits is not None
    which = np.ones(len(asked.users), dtype=bool) if kept is None else kept
    probability = oracle.sigmoid(asked.impressions.logits[which]).astype(np.float32)
    return expected_gauc(scored.impressions[which], probability, asked.users[which])


def _figures(report: Report, table: Sequence[Mapping[str, Any]]) -> None:
    for line in table:
        if line["late"] == "0s" or line["gauc_loss"] is None:
            continue
        every = "every_" if line["kind"] == "batch" else ""
        value = line["gauc_loss"]
        ends = [end if end is not None else value for end in (line["gauc_loss_low"], line["gauc_loss_high"])]
        name = f"staleness_gauc_loss_{every}{line['late']}_{line['turnover']}{line['suffix']}"
        report.figure(name, ends, "GAUC", value)


def _values(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What freshness is worth, one line per world and speed."""
    lines: list[dict[str, Any]] = []
    for name, speed in dict.fromkeys((line["data"], line["turnover"]) for line in table):
        own = [line for line in table if (line["data"], line["turnover"]) == (name, speed)]
        delays = {line["late"]: line for line in own if line["kind"] == "delay"}
        batches = {line["late"]: line for line in own if line["kind"] == "batch"}
        loss = {late: line["gauc_loss"] for late, line in delays.items()}
        lines.append(
            {
                "data": name,
                "turnover": speed,
                "gauc_fresh": delays["0s"]["gauc"],
                "one_day_to_one_hour": _less(loss.get("24h"), loss.get("1h")),
                "one_hour_to_one_minute": _less(loss.get("1h"), loss.get("1m")),
                "one_minute_to_none": loss.get("1m"),
                "one_day_to_none": loss.get("24h"),
                "of_which_missing_items": _less(loss.get("24h"), delays["24h"]["gauc_loss_settled"]),
                "oracle_one_day_to_none": delays["24h"].get("oracle_loss_expected"),
                "longest_delay_without_loss": _longest(list(delays.values())),
                "longest_batch_without_loss": _longest(list(batches.values())),
            }
        )
    return lines


def _longest(lines: Sequence[Mapping[str, Any]]) -> str:
    """The last of the lines, in their order, before the first whose loss is surely above 0."""
    longest = "0s"
    for line in lines:
        if line["gauc_loss_low"] is not None and line["gauc_loss_low"] > 0:
            break
        longest = line["late"]
    return longest


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one - other, 5)


def _finite(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def _draw(canvas: Any, table: Sequence[Mapping[str, Any]]) -> None:
    panels = [(name, kind) for name in dict.fromkeys(line["data"] for line in table) for kind in ("delay", "batch")]
    for axes, (name, kind) in zip(canvas.subplots(1, len(panels)), panels, strict=True):
        for number, speed in enumerate(CHANGES):
            own = [
                line for line in table
                if (line["data"], line["kind"], line["turnover"]) == (name, kind, speed) and line["seconds"]
                and line["gauc_loss"] is not None
            ]  # fmt: skip
            x, y = [line["seconds"] for line in own], [line["gauc_loss"] for line in own]
            ends = [(line["gauc_loss_low"], line["gauc_loss_high"]) for line in own]
            error = [
                [y[k] - (low if low is not None else y[k]) for k, (low, _) in enumerate(ends)],
                [(high if high is not None else y[k]) - y[k] for k, (_, high) in enumerate(ends)],
            ]
            axes.errorbar(x, y, yerr=error, marker="o", capsize=2, color=f"C{number}", label=speed)
            if own and "oracle_loss_expected" in own[0]:
                axes.plot(x, [line["oracle_loss_expected"] for line in own], ":", color=f"C{number}")
        axes.set_xscale("log")
        axes.set_xlabel("delay, s" if kind == "delay" else "s between batches of updates")
        axes.set_title(name + (" (dotted: oracle)" if "market" in name else ""), fontsize=8)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.legend(fontsize=7)
    canvas.axes[0].set_ylabel("GAUC lost")
