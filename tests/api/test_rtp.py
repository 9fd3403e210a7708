"""Order, ties and filters against plain Python, over whatever hypothesis thinks of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api import rtp
from api.problems import ProblemError
from api.schemas import Comparison
from encoders.fold import UserBlock
from index.keys import keys_of
from index.layout import RowLayout

IDS = st.one_of(
    st.integers(0, 30),
    st.integers(0, 30).map(str),
    st.sampled_from(
        ["a", "A", "ä", "z", "007", "-1", "18446744073709551615", "18446744073709551616", "\U0001d4b3", "\ufffd"]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=5),
)
VALUES = st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e-30]) | st.floats(-5, 5, width=32)


def order_of(item_id: int | str) -> tuple[bool, int, bytes]:
    text = str(item_id)
    numeric = text.isascii() and text.isdigit() and str(int(text)) == text and int(text) < 2**64
    return (False, int(text), b"") if numeric else (True, 0, text.encode())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(IDS, VALUES), max_size=60), st.integers(1, 70))
@example([("b", 0.0), ("a", -0.0), (3, 0.0), ("3", 0.0), ("10", 0.0)], 5)
def test_best_first_and_ties_by_id(candidates: list[tuple[int | str, float]], k: int) -> None:
    ids = [one for one, _ in candidates]
    values = np.array([value for _, value in candidates], np.float32)
    found = rtp.ranked(values, k, keys_of(ids, b"key").reshape(-1, 2), lambda places: [ids[at] for at in places])
    wanted = sorted(range(len(ids)), key=lambda at: (-values[at], order_of(ids[at]), at))[:k]
    assert found.tolist() == wanted


def test_ids_are_asked_for_only_where_values_are_equal() -> None:
    asked = []

    def names(places: Any) -> list[str]:
        asked.extend(places.tolist())
        return ["b", "a"]

    keys = keys_of(["x", "b", "y", "a"], b"key")
    assert rtp.ranked(np.array([3, 1, 2, 1], np.float32), 4, keys, names).tolist() == [0, 2, 3, 1]
    assert asked == [1, 3]


ATTRIBUTES = ("bid", "in_stock")


class FakeGeneration:
    name = "g"
    layout = RowLayout(attributes=ATTRIBUTES)


BOUNDS = st.none() | st.booleans() | st.floats(-3, 3) | st.sampled_from([0.1, 0.5, 1.0, 1e300])
COMPARISONS = st.builds(Comparison, eq=BOUNDS, ne=BOUNDS, lt=BOUNDS, lte=BOUNDS, gt=BOUNDS, gte=BOUNDS)
CELLS = st.sampled_from([0.1, 0.5, 1.0, math.nan]) | st.floats(-3, 3, width=32)


@settings(deadline=None)
@given(
    st.lists(st.tuples(CELLS, CELLS), max_size=20),
    st.dictionaries(st.sampled_from(ATTRIBUTES), COMPARISONS),
)
def test_filters_are_all_their_bounds(rows: list[tuple[float, float]], filters: dict[str, Comparison]) -> None:
    cold = np.zeros(len(rows), FakeGeneration.layout.cold)
    cold["attributes"] = np.array(rows, np.float32).reshape(-1, 2)
    operators = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "lt": lambda a, b: a < b,
        "lte": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "gte": lambda a, b: a >= b,
    }

    def passes(row: tuple[float, float]) -> bool:
        for name, comparison in filters.items():
            value = np.float32(row[ATTRIBUTES.index(name)])
            if np.isnan(value):
                return False
            for operator, holds in operators.items():
                bound = getattr(comparison, operator)
                narrow = math.inf if bound == 1e300 else bound
                if bound is not None and not holds(value, np.float32(narrow)):
                    return False
        return True

    found = rtp.passing(FakeGeneration(), filters, cold)  # type: ignore[arg-type]
    assert found.tolist() == [passes(row) for row in rows]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50, width=32) | st.just(-1e4), CELLS), min_size=1, max_size=30))
def test_score_times_attribute_is_probability_times_it(pairs: list[tuple[float, float]]) -> None:
    scores, weights = np.array(pairs, np.float32).T
    found = rtp.order_values(scores, weights)
    for value, score, weight in zip(found, scores.tolist(), weights.tolist(), strict=True):
        if math.isnan(weight):
            assert value == -math.inf
        else:
            assert value == pytest.approx(weight / (1 + math.exp(min(700.0, -score))), rel=1e-5, abs=1e-30)


def test_a_block_of_another_generation_is_never_scored() -> None:
    zero = np.zeros(1, np.float32)
    block = UserBlock(zero, zero, zero, zero, zero.astype(np.uint16), zero.astype(np.uint8), (1,), 1.0, "other", 0)

    @dataclasses.dataclass
    class Side:
        block: UserBlock

    with pytest.raises(rtp.GenerationMismatchError, match="other"):
        rtp.score(FakeGeneration(), Side(block), np.zeros(1, FakeGeneration.layout.hot))  # type: ignore[arg-type]


def test_an_unknown_attribute_is_named_with_those_there_are() -> None:
    with pytest.raises(ProblemError, match="bid, in_stock") as caught:
        rtp.order_attribute(FakeGeneration(), "score*height")  # type: ignore[arg-type]
    assert caught.value.body.field == "order"
