"""What the experiment on late items asks the oracle is what the world was made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from encoders.data.oracle import Oracle
from encoders.data.synthetic import Marketplace
from encoders.data.turnover import Lateness, Living, drifting, request_times
from encoders.evaluate import split_of
from tests.bench.marketplace import requests
from tests.bench.staleness import Slice, _last, _late_logits, _true_logits, _values, slice_of

HOUR = 3_600_000
SMALL = Marketplace(users=60, items=200, examples=3_000, days=6, categories=6, brands=8, past=10, restocked=True)


@pytest.fixture(scope="module")
def world() -> tuple[Living, Oracle, Slice]:
    living, known = drifting(SMALL, 3, 2 * HOUR)
    return living, known, slice_of(living, known, 1)


def test_shortlists_have_the_worlds_own_probabilities(world: tuple[Living, Oracle, Slice]) -> None:
    living, known, _ = world
    data, times, logits = living.data, request_times(living.data), known.logits()
    since = split_of(data).test
    pages = [
        (page, past)
        for page, past in requests(data, data.examples.time >= since)
        if data.examples.time[page.start] >= since  # a page on the border is two requests
    ]
    assert len(pages) > 10
    for page, past in pages:
        user, item = data.examples.user[page][:1].astype(np.int64), data.examples.item[page][None].astype(np.int64)
        found = _true_logits(living, known, user, item, times[page][None], [past])
        np.testing.assert_allclose(found[0], logits[page], atol=2e-4)


def test_the_oracle_loses_what_is_late_and_nothing_else(world: tuple[Living, Oracle, Slice]) -> None:
    living, _, asked = world
    shown = asked.impressions
    assert shown.logits is not None
    np.testing.assert_allclose(_late_logits(living, shown, Lateness(), 1.0), shown.logits, atol=1e-5)
    np.testing.assert_allclose(_late_logits(living, shown, Lateness(), 0.0), shown.logits - shown.drift, atol=1e-5)
    late = np.abs(_late_logits(living, shown, Lateness(HOUR), 1.0) - shown.logits) > 1e-5
    lag = np.maximum(shown.as_of - HOUR, living.data.items.added[shown.item])
    changed = living.versions.at(shown.item, lag) != living.versions.at(shown.item, shown.as_of)
    assert 0.2 < changed.mean() < 0.8
    np.testing.assert_array_equal(late, changed)
    young = living.data.items.added[shown.item] > shown.as_of - 24 * HOUR
    np.testing.assert_array_equal(asked.settled, ~young)
    assert young.any()


def test_an_item_without_a_row_is_last() -> None:
    found = _last(np.array([3.0, -7.0, 5.0]), np.array([False, False, True]))
    assert found.argmin() == 2
    assert found[:2].tolist() == [3.0, -7.0]


def test_what_freshness_is_worth() -> None:
    def line(kind: str, late: str, loss: float, low: float) -> dict[str, Any]:
        about = {"data": "market", "turnover": "fast", "kind": kind, "late": late, "gauc": 0.8}
        return {**about, "gauc_loss": loss, "gauc_loss_low": low, "gauc_loss_settled": loss / 2}

    table = [
        line("delay", "0s", 0.0, 0.0),
        line("delay", "1m", 0.001, -0.001),
        line("delay", "1h", 0.01, 0.002),
        line("delay", "24h", 0.03, 0.02),
        line("batch", "1m", 0.001, 0.0005),
    ]
    (found,) = _values(table)
    assert found["longest_delay_without_loss"] == "1m"
    assert found["longest_batch_without_loss"] == "0s"
    assert found["one_day_to_one_hour"] == pytest.approx(0.02)
    assert found["one_hour_to_one_minute"] == pytest.approx(0.009)
    assert found["of_which_missing_items"] == pytest.approx(0.015)
