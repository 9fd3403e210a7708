"""How sure a metric is: bootstrap intervals over users and seeds, and paired comparisons. Works on metrics' tables.

Resampling. A resample draws as many users as count, with replacement, the same for all seeds and all models, and then
as many seeds as there are. The percentile interval (Efron & Tibshirani 1993, ch. 13) of 2,000 resamples is given. A
plain bootstrap of S seeds has only (S - 1) / S of their variance, so the seeds' deviations from their mean are scaled
by sqrt(S / (S - 1)) (Rao & Wu 1988). With one seed the interval speaks of this one trained model alone.

Limits. The percentile interval is a little short for few users: with 100 of equal weight about 94 % of intervals
cover; `effective` says to how many users of equal weight the weighted ones amount (Kish 1965), and below about 50 an
interval is a hint, below 2 it is NaN. Resampling both users and seeds counts what varies with the two together up to
three times (Owen 2007, 'The pigeonhole bootstrap'), so with several seeds interval and `p` err on the careful side.
With three seeds the interval knows the seeds' variance, but not how badly three seeds measure it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from encoders.metrics import F8, I8, AucTable, Table

RESAMPLES = 2_000
_LEVEL = 95.0  # per cent
_CHUNK = 4_000_000  # weights drawn at a time


@dataclasses.dataclass(frozen=True)
class Interval:
    value: float
    low: float  # NaN where fewer than two users count
    high: float
    users: int  # that count
    effective: float  # users of equal weight that these amount to
    seeds: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A minus B, users and, where there are equally many, seeds paired."""

    difference: Interval
    ratio: Interval  # (A - chance) / (B - chance); NaN bounds where B is not above chance in every resample
    p: float  # two-sided, bootstrap over users and seeds: would the methods differ so by chance, trained anew?
    p_users: float  # two-sided, sign flips over users: would these models? NaN where users' weights differ (AUC)


Tables = Sequence[Table] | Sequence[AucTable]  # one per seed


def interval(tables: Tables, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % interval of the mean over seeds. Raises ValueError where the tables' users differ."""
    users = _users(tables)
    drawn = _Seeds(len(tables), resamples, seed).means(_values(tables, users, seed, resamples))
    return _interval(float(np.mean([table.value for table in tables])), drawn, tables, users)


def compare(a: Tables, b: Tables, chance: float = 0.0, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """A against B on the same users. `chance` is what a metric gives without skill (0.5 for AUC and GAUC).

    `p` is the share of resampled differences at least as far from the measured one as that is from 0 (Efron &
    Tibshirani 1993, ch. 16). `p_users` flips the sign of users' differences (Fisher's randomisation test; Smucker,
    Allan & Carterette 2007), exact for few users too, but it takes the trained models as given. Both count the measured
    outcome itself as one, so neither is 0. Raises ValueError where the tables' users differ.
    """
    users = _users([*a, *b])
    values = _values([*a, *b], users, seed, resamples)
    seeds = _Seeds(len(a), resamples, seed)
    left = seeds.means(values[:, : len(a)])
    right = (seeds if len(a) == len(b) else _Seeds(len(b), resamples, seed + 1)).means(values[:, len(a) :])
    mean_a, mean_b = (float(np.mean([table.value for table in tables])) for tables in (a, b))
    gap, drawn = mean_a - mean_b, left - right
    above = right - chance
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (left - chance) / above if (above > 0).all() else np.full(len(above), np.nan)
        ratio = float(np.float64(mean_a - chance) / (mean_b - chance))
    as_far = (np.abs(drawn - gap) >= abs(gap) - 1e-12).sum()
    return Difference(
        difference=_interval(gap, drawn, a, users),
        ratio=_interval(ratio, share, a, users),
        p=float((1 + as_far) / (1 + len(drawn))) if len(users) > 1 else float("nan"),
        p_users=_sign_flips(a, b, users, seed),
    )


def holm(ps: Sequence[float]) -> list[float]:
    """Each p of a family of comparisons, corrected for their number (Holm 1979); one that is NaN is none of them."""
    counted = sorted((p, place) for place, p in enumerate(ps) if not np.isnan(p))
    found, least = [float("nan")] * len(ps), 0.0
    for rank, (p, place) in enumerate(counted):
        least = max(least, min(1.0, p * (len(counted) - rank)))
        found[place] = least
    return found


class _Seeds:
    """The seeds of each resample, and the mean over them."""

    def __init__(self, count: int, resamples: int, seed: int) -> None:
        self._drawn = np.random.default_rng([seed, 1]).integers(0, count, (resamples, count))
        self._stretch = np.sqrt(count / (count - 1)) if count > 1 else 0.0

    def means(self, values: F8) -> F8:
        """values [R, S] -> [R]."""
        centre = values.mean(axis=1)
        found: F8 = centre + self._stretch * (np.take_along_axis(values, self._drawn, axis=1).mean(axis=1) - centre)
        return found


def _users(tables: Sequence[Table] | Sequence[AucTable] | Sequence[Table | AucTable]) -> I8:
    """Places of the users that count in any table."""
    if not tables:
        raise ValueError("there is nothing to compare")
    first = tables[0]
    if any(not np.array_equal(table.users, first.users) for table in tables):
        raise ValueError("these were measured on different users")
    counting: I8 = np.flatnonzero(np.any([table.weight > 0 for table in tables], axis=0))
    return counting


def _values(tables: Sequence[Table | AucTable], users: I8, seed: int, resamples: int) -> F8:
    """The metric of every resample and table [R, S]."""
    parts = [table.take(users) if isinstance(table, Table) else table for table in tables]  # all count for AUC
    drawn = [
        np.stack([part.under(weights) for part in parts], axis=1) for weights in _draws(len(users), resamples, seed)
    ]
    return np.concatenate(drawn) if drawn else np.full((resamples, len(tables)), np.nan)


def _draws(users: int, resamples: int, seed: int) -> Iterator[F8]:
    """How often each user is in each resample, [chunk, U] at a time; equal seeds draw equal users."""
    random = np.random.default_rng([seed, 0])
    size = max(1, _CHUNK // max(1, users)) if users > 1 else 0
    for begin in range(0, resamples, size) if size else ():
        rows = min(size, resamples - begin)
        chosen = random.integers(0, users, (rows, users)) + users * np.arange(rows)[:, None]
        yield np.bincount(chosen.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def _interval(value: float, drawn: F8, tables: Tables, users: I8) -> Interval:
    drawn = drawn[~np.isnan(drawn)]  # an AUC whose resample had one class
    edges = ((100 - _LEVEL) / 2, (100 + _LEVEL) / 2)
    low, high = np.percentile(drawn, edges) if len(drawn) else (np.nan, np.nan)
    weight = tables[0].weight[users]
    effective = float(weight.sum() ** 2 / (weight**2).sum()) if len(users) else 0.0
    return Interval(value, float(low), float(high), len(users), effective, len(tables))


def _sign_flips(a: Tables, b: Tables, users: I8, seed: int, flips: int = 10_000) -> float:
    tables = [table for table in (*a, *b) if isinstance(table, Table)]
    equal = all(np.array_equal(table.weight, tables[0].weight) for table in tables)
    if len(tables) < len(a) + len(b) or not equal or not len(users):
        return float("nan")
    gap = np.mean([t.total for t in tables[: len(a)]], axis=0) - np.mean([t.total for t in tables[len(a) :]], axis=0)
    gap = gap[users]
    random, reached = np.random.default_rng([seed, 2]), 0
    size = max(1, _CHUNK // len(users))
    for begin in range(0, flips, size):
        signs = random.integers(0, 2, (min(size, flips - begin), len(users))) * 2.0 - 1
        reached += int((np.abs(signs @ gap) >= abs(gap.sum()) - 1e-12).sum())
    return (1 + reached) / (1 + flips)
