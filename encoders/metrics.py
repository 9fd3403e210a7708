"""Ranking metrics: pure functions on arrays. `encoders.evaluate` applies them, `encoders.intervals` says how sure.

Higher scores rank first. Ties are never broken by place: every metric is its expected value over all orders of the
tied, so a constant score earns what chance earns. A score of NaN is an error (ValueError), since it has no rank;
infinite scores are ranked. What the labels do not define (a class or a query without positives) is NaN, never 0.

Most metrics are ratios of sums over users. `Table` keeps those sums per user, so that a bootstrap over users is a
change of weights. Letters: n examples, U users, Q queries, M candidates of a query, R resamples.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating]
Labels = npt.NDArray[np.bool_]
Users = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class Table:
    """A metric sum(total) / sum(weight) by user; a user whose weight is 0 does not count."""

    users: I8  # [U], ascending, distinct
    total: F8  # [U]
    weight: F8  # [U]

    @property
    def value(self) -> float:
        """NaN where no user counts."""
        weight = self.weight.sum()
        return float(self.total.sum() / weight) if weight > 0 else float("nan")

    def take(self, places: I8) -> Table:
        return Table(self.users[places], self.total[places], self.weight[places])

    def under(self, weights: F8) -> F8:
        """The metric [R] where user u is there weights[r, u] times; NaN where no user counts then."""
        with np.errstate(invalid="ignore"):
            found: F8 = (weights @ self.total) / (weights @ self.weight)
        return found


@dataclasses.dataclass(frozen=True)
class AucTable:
    """AUC over all examples, in the form that weights of users can be put on: R resamples cost O(R n)."""

    users: I8  # [U], ascending, distinct
    bad: I8  # place in `users` of each negative, ascending in the score
    good: I8  # place in `users` of each positive
    below: I8  # per positive: negatives with a lower score
    upto: I8  # per positive: negatives with no higher score

    @property
    def value(self) -> float:
        """NaN where a class is empty."""
        return float(self.under(np.ones((1, len(self.users))))[0])

    @property
    def weight(self) -> F8:
        """[U]: a user's examples."""
        return np.bincount(np.concatenate([self.good, self.bad]), minlength=len(self.users)).astype(np.float64)

    def under(self, weights: F8) -> F8:
        """The metric [R] where user u is there weights[r, u] times; NaN where a class is empty then."""
        found = np.full(len(weights), np.nan)
        for row, of_users in enumerate(weights):
            passed = np.concatenate([[0.0], np.cumsum(of_users[self.bad])])
            good = of_users[self.good]
            pairs = good.sum() * passed[-1]
            if pairs > 0:
                found[row] = good @ (passed[self.below] + passed[self.upto]) / 2 / pairs
        return found


def table_of(users: Users, values: npt.ArrayLike, weights: npt.ArrayLike = 1.0) -> Table:
    """Weighted mean of `values` [n] by user. A value of NaN (not defined) counts for nothing."""
    distinct, place = np.unique(np.asarray(users, dtype=np.int64), return_inverse=True)
    value: F8 = np.asarray(values, dtype=np.float64)
    weight: F8 = np.where(np.isnan(value), 0.0, np.asarray(weights, dtype=np.float64))
    return Table(distinct, _sums(place, weight * np.nan_to_num(value), distinct), _sums(place, weight, distinct))


# Impressions ----------------------------------------------------------------------------------------------------------


def auc_by_user(scores: Scores, labels: Labels, users: Users) -> tuple[I8, F8, I8]:
    """Users [U], ascending; their AUC [U], NaN where they have one class only; their numbers of examples [U].

    AUC is the share of (positive, negative) pairs that are in order, ties counting half (Mann-Whitney; Hanley & McNeil
    1982), computed from mean ranks.
    """
    scores = _ranked(scores)
    order = np.lexsort((scores, users))
    user, score, label = np.asarray(users, dtype=np.int64)[order], scores[order], np.asarray(labels)[order]
    new_user = _changes(user)
    start = np.flatnonzero(new_user)
    ties = np.flatnonzero(new_user | _changes(score))
    length = np.diff(ties, append=len(user))
    group = np.cumsum(new_user) - 1
    rank = np.repeat(ties + (length - 1) / 2, length) - start[group] + 1  # mean rank within the user
    size = np.diff(start, append=len(user))
    positive = np.bincount(group, weights=label, minlength=len(size))
    rank_sum = np.bincount(group, weights=rank * label, minlength=len(size))
    pairs = positive * (size - positive)
    value = np.full(len(size), np.nan)
    np.divide(rank_sum - positive * (positive + 1) / 2, pairs, out=value, where=pairs > 0)
    return user[start], value, size


def gauc_table(scores: Scores, labels: Labels, users: Users) -> Table:
    """GAUC (Zhu et al. 2017, 'Optimized Cost per Click in Taobao Display Advertising'): the users' AUC weighted by
    their examples. Users with one class are in the table and count for nothing.
    """
    user, value, size = auc_by_user(scores, labels, users)
    return table_of(user, value, size)


def gauc(scores: Scores, labels: Labels, users: Users) -> float:
    """As `gauc_table`; NaN where no user has both classes."""
    return gauc_table(scores, labels, users).value


def auc_table(scores: Scores, labels: Labels, users: Users) -> AucTable:
    """As `auc`, to be weighted by user."""
    scores, labels = _ranked(scores), np.asarray(labels, dtype=bool)
    distinct, place = np.unique(np.asarray(users, dtype=np.int64), return_inverse=True)
    order = np.argsort(scores[~labels], kind="stable")
    negatives = scores[~labels][order]
    below, upto = (np.searchsorted(negatives, scores[labels], side=side) for side in ("left", "right"))
    return AucTable(distinct, place[~labels][order], place[labels], below, upto)


def auc(scores: Scores, labels: Labels) -> float:
    """Share of (positive, negative) pairs that are in order, ties counting half; NaN where a class is empty."""
    return gauc(scores, labels, np.zeros(len(scores), dtype=np.int64))


def losses(logits: Scores, labels: Labels) -> F8:
    """Negative log-likelihood [n] of the labels under sigmoid(logits), in nats; exact for large logits."""
    logits = np.asarray(logits, dtype=np.float64)
    found: F8 = np.logaddexp(0, logits) - logits * labels
    return found


def log_loss(logits: Scores, labels: Labels) -> float:
    """Mean of `losses`; NaN where there is no example."""
    return float(np.mean(losses(logits, labels))) if len(logits) else float("nan")


def calibration_error(logits: Scores, labels: Labels, bins: int = 10) -> float:
    """Expected calibration error: mean |click rate - predicted rate| over bins of (nearly) equal size in the order of
    the prediction (adaptive bins of Nguyen & O'Connor 2015; equal predictions may fall into two bins). NaN where there
    is no example.
    """
    if not len(logits):
        return float("nan")
    order = np.argsort(_ranked(logits), kind="stable")
    predicted = 1 / (1 + np.exp(-np.clip(np.asarray(logits, dtype=np.float64)[order], -700, 700)))
    starts = np.unique(np.linspace(0, len(order), min(bins, len(order)), endpoint=False).astype(np.int64))
    gap = np.add.reduceat(predicted - np.asarray(labels)[order], starts)
    return float(np.abs(gap).sum() / len(order))


# Rankings of candidates -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the positives of queries stand among all candidates: P positives of Q queries."""

    queries: int  # Q; some may have no positive
    query: I8  # [P], 0..Q-1
    above: I8  # [P], candidates with a higher score
    tied: I8  # [P], candidates with the same score, the positive among them


def ranks(scores: Scores, positive: Labels) -> Ranks:
    """Ranks of the positives, bool [Q, M], under scores [Q, M]. A candidate with score -inf counts as the last, not as
    absent.
    """
    scores = _ranked(scores)
    ascending = np.sort(scores, axis=1)
    query, place = np.nonzero(positive)
    of = scores[query, place]
    low, high = np.empty(len(query), dtype=np.int64), np.empty(len(query), dtype=np.int64)
    for q in np.unique(query):
        here = query == q
        low[here] = np.searchsorted(ascending[q], of[here], side="left")
        high[here] = np.searchsorted(ascending[q], of[here], side="right")
    return Ranks(len(scores), query.astype(np.int64), scores.shape[1] - high, high - low)


def hit_rate(found: Ranks, k: int) -> F8:
    """HR@k [Q]: probability that at least one positive is among the first k; NaN for a query without positives.

    With one positive this is the usual hit rate (recall@k); with several it is the `success@k` of trec_eval. Of g tied
    candidates of which p are positive and r fit, at least one fits with 1 - C(g - p, r) / C(g, r).
    """
    value = np.zeros(found.queries)
    value[found.query[found.above + found.tied <= k]] = 1.0
    across = (found.above < k) & (found.above + found.tied > k)  # of a query's runs of ties, one at most
    query, p = np.unique(found.query[across], return_counts=True)
    first = np.zeros(found.queries, dtype=np.int64)
    first[found.query[across]] = np.flatnonzero(across)
    g, r = found.tied[first[query]], k - found.above[first[query]]
    none = np.ones(len(query))
    for j in range(int(p.max(initial=0))):
        none *= np.where(j < p, np.maximum(g - r - j, 0) / np.maximum(g - j, 1), 1.0)
    value[query] = np.maximum(value[query], 1 - none)
    return np.where(_positives(found) > 0, value, np.nan)


def ndcg(found: Ranks, k: int) -> F8:
    """NDCG@k [Q] with gains 0 and 1 and discount 1 / log2(1 + rank) (Järvelin & Kekäläinen 2002), ties at their mean
    discount (McSherry & Najork 2008, as scikit-learn does); NaN for a query without positives.
    """
    reached = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # DCG of 0..k hits
    low, high = np.minimum(found.above, k), np.minimum(found.above + found.tied, k)
    gain = np.bincount(found.query, weights=(reached[high] - reached[low]) / found.tied, minlength=found.queries)
    count = _positives(found)
    value = np.full(found.queries, np.nan)
    np.divide(gain, reached[np.minimum(count, k)], out=value, where=count > 0)
    return value


def membership(scores: Scores, k: int) -> F8:
    """Probability [Q, M] that a candidate is among the first k under scores [Q, M]; rows add up to min(k, M)."""
    scores = _ranked(scores)
    k = min(k, scores.shape[1])
    edge = np.partition(scores, -k, axis=1)[:, -k, None]  # the k-th highest
    above, tied = scores > edge, scores == edge
    share = (k - above.sum(axis=1)) / tied.sum(axis=1)
    found: F8 = above + tied * share[:, None]
    return found


def overlap(scores: Scores, bound: Scores, k: int, of: int) -> F8:
    """Share [Q] of the bound's first `of` that are among the first k of `scores`; both [Q, M], the same candidates.

    The hit rate in the sense of pre-ranking (COPR, Zhao et al. 2023; HR@K of AIF): what the stages behind would have
    chosen must survive this one. Ties are broken independently on both sides.
    """
    share: F8 = np.einsum("qm,qm->q", membership(scores, k), membership(bound, of)) / min(of, bound.shape[1])
    return share


def regret(scores: Scores, probability: Scores, k: int) -> tuple[F8, F8]:
    """Expected clicks [Q] lost by showing the first k under `scores` instead of the k likeliest, and the clicks [Q]
    expected of those; both inputs [Q, M]. Needs the true probabilities, which only a generator knows.
    """
    truth = np.asarray(probability, dtype=np.float64)
    best = np.sort(truth, axis=1)[:, -min(k, truth.shape[1]) :].sum(axis=1)
    return best - np.einsum("qm,qm->q", membership(scores, k), truth), best


def _sums(place: I8, values: F8, distinct: I8) -> F8:
    found: F8 = np.bincount(place, weights=values, minlength=len(distinct)).astype(np.float64)
    return found


def _positives(found: Ranks) -> I8:
    return np.bincount(found.query, minlength=found.queries)


def _changes(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Where a value differs from the one before; the first does."""
    changed = np.ones(len(values), dtype=bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def _ranked(scores: Scores) -> Scores:
    scores = np.asarray(scores)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN, which has no rank")
    return scores
