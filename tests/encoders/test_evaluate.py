from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.data.dataset import DataError
from encoders.data.synthetic import Marketplace, generate
from encoders.evaluate import auc, baselines, figures, gauc, log_loss, split_of

examples = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-3, 3), st.booleans()), min_size=1, max_size=40
)  # user, score (often tied), label


def naive_auc(rows: list[tuple[int, int, bool]]) -> float | None:
    good = [score for _, score, label in rows if label]
    bad = [score for _, score, label in rows if not label]
    if not good or not bad:
        return None
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


def columns(rows: list[tuple[int, int, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, scores, labels = zip(*rows, strict=True)
    return np.array(scores, dtype=np.float64) / 7, np.array(labels), np.array(users) * 1000 - 5


@given(examples)
def test_auc_counts_pairs(rows: list[tuple[int, int, bool]]) -> None:
    scores, labels, _ = columns(rows)
    wanted = naive_auc(rows)
    assert math.isnan(auc(scores, labels)) if wanted is None else auc(scores, labels) == pytest.approx(wanted)


@given(examples)
def test_gauc_weighs_users_by_their_examples(rows: list[tuple[int, int, bool]]) -> None:
    total = weight = 0.0
    for user in range(5):
        own = [row for row in rows if row[0] == user]
        value = naive_auc(own)
        if value is not None:
            total, weight = total + value * len(own), weight + len(own)
    scores, labels, users = columns(rows)
    found = gauc(scores, labels, users)
    assert math.isnan(found) if weight == 0 else found == pytest.approx(total / weight)


def test_by_hand() -> None:
    scores = np.array([3.0, 2.0, 1.0, 5.0, 5.0, 0.0])
    labels = np.array([True, False, True, True, False, True])
    users = np.array([1, 1, 1, 2, 2, 3])
    assert auc(scores, labels) == pytest.approx((1 + 0 + 0 + 1 + 0.5 + 0 + 0 + 0) / 8)
    assert gauc(scores, labels, users) == pytest.approx((0.5 * 3 + 0.5 * 2) / 5)
    assert log_loss(np.array([0.0, 2.0]), np.array([True, False])) == pytest.approx(
        (math.log(2) + math.log(1 + math.e**2)) / 2
    )
    assert log_loss(np.array([1000.0, -1000.0]), np.array([True, False])) == 0.0  # no overflow
    assert figures(np.array([1.0]), np.array([True]), np.array([4]))["gauc"] is None


def test_split_and_baselines() -> None:
    data = generate(Marketplace(users=50, items=80, behaviours=4_000, days=10), seed=1)
    split = split_of(data)
    parts = [data.examples.time < split.validation, data.examples.time >= split.test]
    assert [round(part.mean(), 2) for part in parts] == [0.8, 0.1]
    found = baselines(data, split.test, split.end)
    assert found["chance"]["examples"] == int(parts[1].sum())
    assert abs(found["chance"]["auc"] - 0.5) < 0.06
    # Popularity must not know the labels it is measured on: flipping those of the test slice mirrors its AUC.
    data.examples.clicked[parts[1]] ^= True
    flipped = baselines(data, split.test, split.end)["popularity"]["auc"]
    assert flipped == pytest.approx(1 - found["popularity"]["auc"], abs=1e-4)


def test_data_that_cannot_be_split() -> None:
    data = generate(Marketplace(users=5, items=30, behaviours=40, days=1), seed=1)
    data.examples.time[:] = 5
    with pytest.raises(DataError, match="do not part"):
        split_of(data)
    with pytest.raises(DataError, match="no examples"):
        split_of(generate(Marketplace(users=5, items=30, behaviours=0, days=1), seed=1))
