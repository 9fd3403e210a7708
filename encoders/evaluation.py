"""What was measured of one trained model on a slice of time, kept as arrays; metrics and comparisons of it.

`encoders.evaluate.measure` gives an `Evaluation`; `tables` turns it into metrics by user, `rows` several of them into
figures with intervals, `compare` sets models side by side. Guarantee: only evaluations of the same impressions (users,
labels, items, times, requests), ranked requests with their candidates, and shortlists are compared; anything else is a
DataError. Of one saved before items, times and requests were kept, these alone are not compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from encoders import intervals
from encoders.data.dataset import DataError
from encoders.intervals import Difference, Interval
from encoders.metrics import (
    I8,
    AucTable,
    Labels,
    Ranks,
    Table,
    auc_table,
    gauc_table,
    hit_rate,
    losses,
    ndcg,
    overlap,
    regret,
    table_of,
)

F4 = npt.NDArray[np.float32]
I4 = npt.NDArray[np.int32]

CHANCE = {"gauc": 0.5, "auc": 0.5}  # what a metric gives without skill; 0 for the others
CATALOGUE_TOPS = (10, 100)  # K of HR@K and NDCG@K
SHORTLIST_TOP = 100  # what a pre-ranker passes on
REGRET_TOP = 10


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Ranks of clicked items among all items alive; Q sampled requests, P clicked items."""

    user: I8  # [Q]
    first: I8  # [Q], place of the request's first example
    size: I8  # [Q], candidates
    query: I8  # [P], 0..Q-1
    above: I8  # [P], as in metrics.Ranks
    tied: I8  # [P]
    gone: int  # clicks left out because the item was not alive at the request

    @property
    def ranks(self) -> Ranks:
        return Ranks(len(self.user), self.query, self.above, self.tied)


@dataclasses.dataclass(frozen=True)
class Shortlists:
    """Scores of Q sampled requests' common candidates."""

    user: I8  # [Q]
    first: I8  # [Q], place of the request's first example
    items: I4  # [Q, K]
    scores: F4  # [Q, K]
    probability: F4 | None = None  # [Q, K], of a click, where a generator knows it


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model's scores on a slice: n impressions in the order of the data, and what was sampled beyond them."""

    name: str  # of the model
    seed: int  # of its training
    users: I8  # [n]
    labels: Labels  # [n]
    scores: F4  # [n], logits
    catalogue: Catalogue | None = None
    shortlists: Shortlists | None = None
    shown: str = ""  # `shown_of` the impressions; empty where it was saved before evaluations kept it

    @property
    def counts(self) -> dict[str, int]:
        """What was measured and what had to be left out."""
        clicks = table_of(self.users, self.labels.astype(np.float64))
        mixed = (clicks.total > 0) & (clicks.total < clicks.weight)
        found = {
            "examples": len(self.labels),
            "users": len(clicks.users),
            "users of one class": int((~mixed).sum()),  # which GAUC leaves out
            "users without a click": int((clicks.total == 0).sum()),
        }
        if self.catalogue is not None:
            found |= {"requests ranked": len(self.catalogue.user), "clicked items gone": self.catalogue.gone}
        return found

    def save(self, path: Path) -> None:
        """Write one .npz, whole or not at all."""
        columns = {"": self, "catalogue.": self.catalogue, "shortlists.": self.shortlists}
        arrays = {
            prefix + field.name: np.asarray(getattr(part, field.name))
            for prefix, part in columns.items()
            if part is not None
            for field in dataclasses.fields(part)
            if field.name not in ("catalogue", "shortlists") and getattr(part, field.name) is not None
        }
        staging = path.with_name(f".{path.name}.part")
        with staging.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        staging.replace(path)

    @staticmethod
    def load(path: Path) -> Evaluation:
        """Raises DataError where `path` is not a saved evaluation, OSError where it cannot be read."""
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                parts: dict[str, dict[str, npt.NDArray[np.generic]]] = {"": {}}
                for name, array in file.items():
                    part, _, field = name.rpartition(".")
                    parts.setdefault(part, {})[field] = array
            own = parts[""]
            catalogue, lists = parts.get("catalogue"), parts.get("shortlists")
            if catalogue is not None:
                catalogue["gone"] = catalogue["gone"].item()
            return Evaluation(
                **own  # type: ignore[arg-type]
                | {"name": str(own["name"]), "seed": int(own["seed"].item()), "shown": str(own.get("shown", ""))},
                catalogue=Catalogue(**catalogue) if catalogue is not None else None,  # type: ignore[arg-type]
                shortlists=Shortlists(**lists) if lists is not None else None,  # type: ignore[arg-type]
            )
        except (ValueError, KeyError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a saved evaluation: {error}") from error


# Comparing ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A model's line of a table of results."""

    name: str
    seeds: int
    counts: dict[str, int]
    figures: dict[str, Interval]


def tables(evaluation: Evaluation, bound: Evaluation | None = None) -> dict[str, Table | AucTable]:
    """Every metric that the evaluation (and the bound, for the overlap) can give, by user.

    Weighted by impressions: gauc, auc, logloss. By sampled requests: hr@K and ndcg@K over the catalogue; overlap@100
    and overlap10@100, the share of the bound's first 100 and first 10 of a shortlist that are among the model's first
    100; regret@10, the share of the clicks expected of a shortlist's best 10 that the model's first 10 lose. Raises
    DataError where the bound was measured on other shortlists.
    """
    scores, labels, users = evaluation.scores, evaluation.labels, evaluation.users
    found: dict[str, Table | AucTable] = {
        "gauc": gauc_table(scores, labels, users),
        "auc": auc_table(scores, labels, users),
        "logloss": table_of(users, losses(scores, labels)),
    }
    if (catalogue := evaluation.catalogue) is not None:
        for k in CATALOGUE_TOPS:
            found[f"hr@{k}"] = table_of(catalogue.user, hit_rate(catalogue.ranks, k))
            found[f"ndcg@{k}"] = table_of(catalogue.user, ndcg(catalogue.ranks, k))
    if (lists := evaluation.shortlists) is not None:
        if bound is not None and bound.shortlists is not None:
            _same(evaluation, bound)
            for of, name in ((SHORTLIST_TOP, f"overlap@{SHORTLIST_TOP}"), (10, f"overlap10@{SHORTLIST_TOP}")):
                share = overlap(lists.scores, bound.shortlists.scores, SHORTLIST_TOP, of)
                found[name] = table_of(lists.user, share)
        if lists.probability is not None:
            lost, best = regret(lists.scores, lists.probability, REGRET_TOP)
            found[f"regret@{REGRET_TOP}"] = table_of(lists.user, lost / best, best)
    return found


def rows(runs: Mapping[str, Sequence[Evaluation]], bound: str | None = None) -> list[Row]:
    """Figures with intervals of each model, whose runs are one per seed. `bound` names the model that the overlap is
    taken with. Raises DataError where the runs were not measured on the same slice.
    """
    of_bound = runs[bound] if bound is not None else None
    found = []
    for name, own in runs.items():
        by_metric = _by_metric(own, of_bound)
        figures_of = {metric: intervals.interval(seeds) for metric, seeds in by_metric.items()}
        found.append(Row(name, len(own), own[0].counts, figures_of))
    return found


def compare(
    a: Sequence[Evaluation], b: Sequence[Evaluation], bound: Sequence[Evaluation] | None = None
) -> dict[str, Difference]:
    """A minus B for every metric that both can give; one evaluation per seed on either side, of the same slice. Where
    they share several seeds, these alone are compared, so that seeds are paired. Raises DataError where they were not
    measured on the same slice.
    """
    _same(a[0], *a[1:], *b)
    shared = sorted({one.seed for one in a} & {one.seed for one in b})
    if len(shared) > 1:
        a, b = ([own for seed in shared for own in runs if own.seed == seed] for runs in (a, b))
    left, right = _by_metric(a, bound), _by_metric(b, bound)
    return {name: intervals.compare(left[name], right[name], CHANCE.get(name, 0.0)) for name in left if name in right}


def _by_metric(runs: Sequence[Evaluation], bound: Sequence[Evaluation] | None) -> dict[str, intervals.Tables]:
    """metric -> the seeds' tables; of the overlap those of the seeds that the bound has too."""
    if not runs:
        raise DataError("a model without a run cannot be compared")
    _same(*runs)
    each = [tables(run, other) for run, other in zip(runs, _partners(runs, bound or ()), strict=True)]
    names = dict.fromkeys(name for found in each for name in found)
    return {name: [found[name] for found in each if name in found] for name in names}  # type: ignore[misc]


def _partners(runs: Sequence[Evaluation], bound: Sequence[Evaluation]) -> list[Evaluation | None]:
    """What the overlap of each run is taken with: the bound's run of the same seed, since two seeds of one model agree
    less than two models of one seed do. Runs of other seeds have none, unless they share no seed with the bound.
    """
    by_seed = {one.seed: one for one in bound}
    if bound and not any(run.seed in by_seed for run in runs):
        return [bound[k % len(bound)] for k in range(len(runs))]
    return [by_seed.get(run.seed) for run in runs]


def shown_of(items: npt.NDArray[np.integer], times: npt.NDArray[np.integer], sizes: npt.NDArray[np.integer]) -> str:
    """SHA-256 of the items and times (ms) [n] of impressions, and of how many stand in each request after the other."""
    found = hashlib.sha256()
    for column in (items, times, sizes):
        found.update(np.ascontiguousarray(column, dtype="<i8").data)
    return found.hexdigest()


def _same(first: Evaluation, *others: Evaluation) -> None:
    """Raises DataError, saying what differs, unless all were measured on the same impressions and, where both have
    them, the same requests and candidates of the catalogue and the same shortlists.
    """
    for other in others:
        for what in _differences(first, other):
            raise DataError(
                f"{first.name} and {other.name} were not measured on the same slice and samples: they differ in {what}"
            )


def _differences(one: Evaluation, other: Evaluation) -> Iterator[str]:
    if not _equal(one, other, "users", "labels"):
        yield "the users and labels of the impressions"
    if one.shown and other.shown and one.shown != other.shown:
        yield "the items, times or requests of the impressions"
    catalogues = one.catalogue, other.catalogue
    if None not in catalogues and not _equal(*catalogues, "user", "first", "size", "query"):
        yield "the requests ranked, their candidates or their clicks"
    lists = one.shortlists, other.shortlists
    if None not in lists and not _equal(*lists, "user", "first", "items"):
        yield "the shortlists"


def _equal(one: object, other: object, *columns: str) -> bool:
    return all(np.array_equal(getattr(one, column), getattr(other, column)) for column in columns)
