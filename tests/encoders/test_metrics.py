"""Metrics against scikit-learn, ranx and plain definitions; intervals against what they promise.

`ranx.json` holds what ranx 0.3.21 gave for 25 random queries without ties. ranx itself is no requirement: it brings
numba kernels that compile for a minute, global numba settings, and 14 packages for reading other people's data sets.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score

from encoders.intervals import compare, holm, interval
from encoders.metrics import (
    Table,
    auc,
    auc_by_user,
    auc_table,
    calibration_error,
    gauc,
    gauc_table,
    hit_rate,
    log_loss,
    membership,
    ndcg,
    overlap,
    ranks,
    regret,
    table_of,
)

examples = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-3, 3), st.booleans()), min_size=1, max_size=40
)  # user, score (often tied), label
# A query: scores, often tied, and positives.
query = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)


def columns(rows: list[tuple[int, int, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, scores, labels = zip(*rows, strict=True)
    return np.array(scores, dtype=np.float64) / 7, np.array(labels), np.array(users) * 1000 - 5


def one_query(rows: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = zip(*rows, strict=True)
    return np.array([scores], dtype=np.float64), np.array([positive])


@given(examples)
def test_auc_is_that_of_sklearn(rows: list[tuple[int, int, bool]]) -> None:
    scores, labels, _ = columns(rows)
    if labels.all() or not labels.any():
        assert math.isnan(auc(scores, labels))
        assert math.isnan(auc_table(scores, labels, labels).value)
    else:
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


@given(examples)
def test_gauc_weighs_sklearns_auc_of_users_by_their_examples(rows: list[tuple[int, int, bool]]) -> None:
    scores, labels, users = columns(rows)
    found_users, value, size = auc_by_user(scores, labels, users)
    total = weight = 0.0
    for user, found, count in zip(found_users, value, size, strict=True):
        own = users == user
        assert count == own.sum()
        if labels[own].all() or not labels[own].any():
            assert math.isnan(found)
        else:
            assert found == pytest.approx(roc_auc_score(labels[own], scores[own]))
            total, weight = total + found * count, weight + count
    wanted = total / weight if weight else math.nan
    assert gauc(scores, labels, users) == pytest.approx(wanted, nan_ok=True)


@given(examples)
def test_log_loss_is_that_of_sklearn(rows: list[tuple[int, int, bool]]) -> None:
    scores, labels, _ = columns(rows)
    assert log_loss(scores, labels) == pytest.approx(
        sklearn_log_loss(labels, 1 / (1 + np.exp(-scores)), labels=[False, True])
    )


@given(query, st.integers(1, 8))
def test_rankings_are_means_over_the_orders_of_the_tied(rows: list[tuple[int, bool]], k: int) -> None:
    scores, positive = one_query(rows)
    found = ranks(scores, positive)
    if not positive.any():
        assert math.isnan(hit_rate(found, k)[0])
        assert math.isnan(ndcg(found, k)[0])
        return
    orders = [
        order
        for order in itertools.permutations(range(len(rows)))
        if all(scores[0, a] >= scores[0, b] for a, b in itertools.pairwise(order))
    ]
    hits = [positive[0, list(order[:k])].any() for order in orders]
    assert hit_rate(found, k)[0] == pytest.approx(np.mean(hits))
    best = sum(1 / math.log2(2 + rank) for rank in range(min(k, int(positive.sum()))))
    gains = [sum(1 / math.log2(2 + r) for r, m in enumerate(order[:k]) if positive[0, m]) for order in orders]
    assert ndcg(found, k)[0] == pytest.approx(np.mean(gains) / best)
    inside = [[m in order[:k] for m in range(len(rows))] for order in orders]
    np.testing.assert_allclose(membership(scores, k)[0], np.mean(inside, axis=0))


@given(st.lists(query, min_size=1, max_size=5), st.integers(1, 8))
def test_ndcg_is_that_of_sklearn(rows: list[list[tuple[int, bool]]], k: int) -> None:
    length = max(2, *(len(row) for row in rows))  # sklearn wants two candidates or more
    scores = np.array([[s for s, _ in row] + [-1] * (length - len(row)) for row in rows], dtype=np.float64)
    positive = np.array([[p for _, p in row] + [False] * (length - len(row)) for row in rows])
    found = ndcg(ranks(scores, positive), k)
    for row in range(len(rows)):
        if positive[row].any():
            wanted = ndcg_score(positive[[row]].astype(int), scores[[row]], k=k)
            assert found[row] == pytest.approx(wanted)
        else:
            assert math.isnan(found[row])


def test_rankings_are_those_of_ranx() -> None:
    golden = json.loads(Path(__file__).with_name("ranx.json").read_text())
    for row in golden["queries"]:
        found = ranks(np.array([row["scores"]]), np.array([row["positive"]], dtype=bool))
        for k in (1, 3, 10):
            assert hit_rate(found, k)[0] == row[f"hit_rate@{k}"]
            assert ndcg(found, k)[0] == pytest.approx(row[f"ndcg@{k}"], abs=1e-11)


def test_a_constant_score_earns_what_chance_earns() -> None:
    positive = np.zeros((1, 50), dtype=bool)
    positive[0, 7] = True
    constant = np.zeros((1, 50))
    assert hit_rate(ranks(constant, positive), 10)[0] == pytest.approx(0.2)
    assert overlap(constant, np.arange(50.0)[None], k=10, of=5)[0] == pytest.approx(0.2)
    assert auc(constant[0], positive[0]) == 0.5


def test_overlap_and_regret_by_hand() -> None:
    bound = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    scores = np.array([[9.0, 1.0, 8.0, 7.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert overlap(scores, bound, k=3, of=2).tolist() == [0.5, 1.0]
    assert overlap(scores, bound, k=9, of=9).tolist() == [1.0, 1.0]
    lost, best = regret(scores, bound / 10, k=2)
    np.testing.assert_allclose(best, [0.9, 0.9])
    np.testing.assert_allclose(lost, [0.9 - 0.8, 0.0], atol=1e-15)


def test_calibration_error() -> None:
    random = np.random.default_rng(3)
    logits = random.normal(size=40_000)
    labels = random.random(len(logits)) < 1 / (1 + np.exp(-logits))
    assert calibration_error(logits, labels) < 0.01
    assert calibration_error(3 * logits, labels) > 0.1
    assert calibration_error(np.array([0.0, 0.0]), np.array([True, False]), bins=1) == 0.0
    assert math.isnan(calibration_error(np.empty(0), np.empty(0, dtype=bool)))


def test_nan_scores_are_refused_and_infinite_ones_ranked() -> None:
    labels, users = np.array([True, False]), np.array([1, 1])
    for metric in (lambda s: gauc(s, labels, users), lambda s: ranks(s[None], labels[None]), lambda s: auc(s, labels)):
        with pytest.raises(ValueError, match="NaN"):
            metric(np.array([math.nan, 1.0]))
    assert auc(np.array([math.inf, -math.inf]), labels) == 1.0
    assert math.isnan(log_loss(np.empty(0), np.empty(0, dtype=bool)))


def test_a_mean_that_is_not_defined_counts_for_nothing() -> None:
    table = table_of(np.array([3, 1, 3, 2]), [1.0, 0.0, math.nan, math.nan], [2.0, 1.0, 5.0, 5.0])
    assert table.users.tolist() == [1, 2, 3]
    assert table.weight.tolist() == [1.0, 0.0, 2.0]
    assert table.value == pytest.approx(2 / 3)
    assert math.isnan(table_of(np.array([3]), [math.nan]).value)


@given(examples, st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_weights_of_users_are_copies_of_them(rows: list[tuple[int, int, bool]], copies: list[int]) -> None:
    scores, labels, users = columns(rows)
    present = np.unique(users)
    weights = np.array(copies[: len(present)], dtype=np.float64)
    often = np.concatenate([np.flatnonzero(np.isin(users, present[weights > c])) for c in range(3)])
    rank = np.concatenate([np.full(np.isin(users, present[weights > c]).sum(), c) for c in range(3)])
    again = (scores[often], labels[often], users[often] + 100_000 * rank)  # a copy is another user
    found = gauc_table(scores, labels, users).under(weights[None])[0]
    assert found == pytest.approx(gauc(*again), nan_ok=True)
    found = auc_table(scores, labels, users).under(weights[None])[0]
    assert found == pytest.approx(auc(again[0], again[1]) if len(often) else math.nan, nan_ok=True)


# Intervals ------------------------------------------------------------------------------------------------------------


def some_table(values: np.ndarray, weight: float | np.ndarray = 1.0) -> Table:
    return table_of(np.arange(len(values)), values, np.broadcast_to(weight, values.shape))


def test_the_interval_is_as_wide_as_theory_says() -> None:
    random = np.random.default_rng(0)
    weight = random.integers(1, 30, 3_000).astype(float)
    table = some_table(random.normal(0.6, 0.2, 3_000), weight)
    found = interval([table])
    half = 1.96 * 0.2 * math.sqrt((weight**2).sum()) / weight.sum()
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)
    assert found.low < found.value == table.value < found.high
    assert found.effective == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert (found.users, found.seeds) == (3_000, 1)
    assert interval([table]) == found
    assert interval([table], seed=1) != found


def test_intervals_cover_the_truth_for_a_hundred_users() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        weight = random.integers(5, 15, 100).astype(float)
        found = interval([some_table(random.normal(0.7, 0.25, 100), weight)], resamples=500)
        covered += found.low <= 0.7 <= found.high
    assert 0.91 <= covered / 300 <= 0.975


def test_seeds_vary_by_their_own_variance() -> None:
    """Every user has the same value in a seed, so all variance is the seeds', and the resamples must have it whole."""
    values = [0.60, 0.61, 0.68]
    found = interval([some_table(np.full(50, value)) for value in values])
    assert found.value == pytest.approx(np.mean(values))
    spread = np.std(values, ddof=1) / math.sqrt(3)
    assert 3.5 * spread < found.high - found.low < 4.5 * spread  # plainly resampled it would be 3.2
    single = interval([some_table(np.full(50, 0.6))])
    assert single.high - single.low < 1e-12


def paired(gap: float, users: int, noise: float, seed: int, own: float = 0.0) -> tuple[list[Table], list[Table]]:
    """Three seeds of A and of B whose users have much in common; `noise` is every table's, `own` A's in all seeds."""
    random = np.random.default_rng(seed)
    common = random.normal(0.65, 0.2, users)
    weight = random.integers(1, 20, users).astype(float)
    shifts = (gap + own * random.normal(size=users), np.zeros(users))
    both = [[some_table(common + s + noise * random.normal(size=users), weight) for _ in range(3)] for s in shifts]
    return both[0], both[1]


def test_a_pair_shows_what_two_intervals_hide() -> None:
    a, b = paired(gap=0.02, users=300, noise=0.02, seed=4)
    found = compare(a, b, chance=0.5)
    assert interval(a).low < interval(b).high  # they overlap
    assert 0.015 < found.difference.low < 0.02 < found.difference.high < 0.026
    assert found.p < 0.001
    assert found.p_users < 0.001
    mean_a, mean_b = interval(a).value, interval(b).value
    assert found.difference.value == pytest.approx(mean_a - mean_b)
    assert found.ratio.value == pytest.approx((mean_a - 0.5) / (mean_b - 0.5))
    assert 1 < found.ratio.low < found.ratio.value < found.ratio.high
    other_way = compare(b, a, chance=0.5)
    assert other_way.difference.low == pytest.approx(-found.difference.high)
    assert (other_way.p, other_way.p_users) == (found.p, found.p_users)


@pytest.mark.parametrize(("noise", "own", "conservative"), [(0.0, 0.1, False), (0.1, 0.0, True)])
def test_p_values_without_a_difference(noise: float, own: float, conservative: bool) -> None:
    """Uniform; but that over seeds too is conservative where users' values vary from seed to seed."""
    found = [compare(*paired(0.0, 120, noise, seed, own), resamples=300) for seed in range(200)]
    p, p_users = np.array([row.p for row in found]), np.array([row.p_users for row in found])
    for values in [p_users] if conservative else [p_users, p]:
        assert 0.01 <= np.mean(values < 0.05) <= 0.1
        assert 0.38 <= np.mean(values < 0.5) <= 0.62
    assert np.mean(p < 0.05) <= 0.1
    if conservative:
        assert np.mean(p < 0.5) < 0.4


def test_equal_models_do_not_differ() -> None:
    a, _ = paired(0.0, 40, 0.1, 0)
    found = compare(a, a, chance=0.5)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    assert (found.ratio.low, found.ratio.high, found.p, found.p_users) == (1, 1, 1, 1)


def test_what_cannot_be_said_is_nan() -> None:
    one = interval([some_table(np.array([0.7, math.nan]))])
    assert (one.value, one.users) == (0.7, 1)
    assert math.isnan(one.low)
    nobody = interval([some_table(np.array([math.nan]))])
    assert math.isnan(nobody.value)
    assert nobody.users == 0
    pair = [some_table(np.array([0.7]))], [some_table(np.array([0.6]))]
    assert math.isnan(compare(*pair).p)
    # A bound that chance could have reached is no measure.
    low = [some_table(np.array([0.4, 0.7, 0.5, 0.6]))]
    assert math.isnan(compare(low, low, chance=0.5).ratio.low)
    with pytest.raises(ValueError, match="different users"):
        interval([some_table(np.ones(3)), some_table(np.ones(4))])
    with pytest.raises(ValueError, match="nothing"):
        interval([])


def test_auc_is_compared_by_resampling_users() -> None:
    random = np.random.default_rng(2)
    users = random.integers(0, 60, 1_500)
    truth = random.normal(size=1_500)
    labels = random.random(1_500) < 1 / (1 + np.exp(-2 * truth))
    a, b = (auc_table(truth + noise * random.normal(size=1_500), labels, users) for noise in (0.3, 2.0))
    found = compare([a], [b], chance=0.5)
    assert 0.05 < found.difference.low < found.difference.value < found.difference.high < 0.4
    assert found.p < 0.001
    assert math.isnan(found.p_users)
    # The interval of the AUC against the known standard error (Hanley & McNeil 1982), examples being independent here.
    theta, positive, negative = a.value, labels.sum(), (~labels).sum()
    q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)
    variance = theta * (1 - theta) + (positive - 1) * (q1 - theta**2) + (negative - 1) * (q2 - theta**2)
    spread = math.sqrt(variance / (positive * negative))
    measured = interval([a])
    assert (measured.high - measured.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("seeds", [1, 2])
def test_unequal_numbers_of_seeds(seeds: int) -> None:
    a, b = paired(0.1, 100, 0.02, 1)
    found = compare(a, b[:seeds])
    assert found.difference.low > 0.08
    assert found.p < 0.001


def test_holm_multiplies_each_p_by_the_comparisons_that_are_left() -> None:
    assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = holm([0.02, math.nan, 0.01])
    assert corrected[0] == pytest.approx(0.02)
    assert math.isnan(corrected[1])
    assert corrected[2] == pytest.approx(0.02)
    assert holm([]) == []
