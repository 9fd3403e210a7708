"""Item versions: nobody sees one from after the time that lateness allows, and what is missing is said to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.batches import Batch, Batches
from encoders.bundle import new_model
from encoders.config import ModelConfig
from encoders.data import oracle
from encoders.data.dataset import Dataset
from encoders.data.leaks import LeakError, check
from encoders.data.oracle import Oracle
from encoders.data.synthetic import START, Marketplace, generate
from encoders.data.turnover import ALWAYS, Lateness, Living, Versions, delayed, drifting, replayed, request_times
from encoders.evaluate import split_of
from encoders.spec import spec_of

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
SMALL = Marketplace(users=40, items=80, examples=1_500, days=6, categories=6, brands=8, past=10, restocked=True)
CONFIG = ModelConfig(embedding_dim=128)


@pytest.fixture(scope="module")
def world() -> tuple[Living, Oracle]:
    return drifting(SMALL, 1, 2 * HOUR)


# Versions and lateness ------------------------------------------------------------------------------------------------


@given(
    times=st.lists(st.lists(st.integers(0, 50), max_size=6), min_size=1, max_size=5),
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=30),
)
def test_the_last_version_strictly_before(times: list[list[int]], asked: list[tuple[int, int]]) -> None:
    listed = [(k, time) for k, own in enumerate(times) for time in (ALWAYS, *sorted(own))]
    versions = Versions(np.array([k for k, _ in listed], "i4"), np.array([time for _, time in listed], "i8"))
    pairs = [(item % len(times), time) for item, time in asked]
    found = versions.at(np.array([item for item, _ in pairs]), np.array([time for _, time in pairs]))
    for (item, time), place in zip(pairs, found.tolist(), strict=True):
        assert place == max(k for k, (owner, when) in enumerate(listed) if owner == item and when < time)


@given(
    delay=st.integers(0, 10**8),
    every=st.integers(0, 2 * 10**10),
    item=st.integers(0, 10**6),
    time=st.integers(10**11, 10**13),
    later=st.integers(0, 5),
)
def test_updates_are_seen_in_their_cycle_and_never_early(
    delay: int, every: int, item: int, time: int, later: int
) -> None:
    def seen(time: int) -> int:
        return int(Lateness(delay, every).seen(np.array([item]), np.array([time]))[0])

    assert seen(time) <= time - delay
    if every:
        assert seen(time) > time - delay - every
        assert seen(time + later * every) == seen(time) + later * every
        assert seen(seen(time) + delay) == seen(time)
        assert seen(seen(time) + delay + every - 1) == seen(time)
    else:
        assert seen(time) == time - delay


@pytest.mark.parametrize("every", [1_000, 200 * DAY])
def test_cycles_are_spread_over_items(every: int) -> None:
    lag = START - Lateness(every=every).seen(np.arange(500), np.full(500, START))
    counts = np.bincount(lag * 10 // every, minlength=10)
    assert counts.min() > 40
    assert counts.max() < 60


@pytest.mark.parametrize(
    ("item", "time", "message"),
    [
        ([0, 2], [ALWAYS, ALWAYS], "from the beginning"),
        ([0, 1], [ALWAYS, 5], "from the beginning"),
        ([0, 0, 0], [ALWAYS, 7, 5], "do not ascend"),
    ],
)
def test_versions_in_another_order_are_refused(item: list[int], time: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Versions(np.array(item, "i4"), np.array(time, "i8"))


def test_lateness_is_not_negative() -> None:
    with pytest.raises(ValueError, match="negative"):
        Lateness(-1)


# The delayed data set -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lateness",
    [Lateness(), Lateness(10 * MINUTE), Lateness(DAY), Lateness(0, 6 * HOUR), Lateness(HOUR, HOUR)],
    ids=str,
)
def test_examples_and_behaviours_see_their_versions(world: tuple[Living, Oracle], lateness: Lateness) -> None:
    living, base = world[0], world[0].data
    found, _ = delayed(living, lateness)
    data, versions = found.data, living.versions
    for name in ("user", "clicked", "time"):
        np.testing.assert_array_equal(getattr(data.examples, name), getattr(base.examples, name))
    np.testing.assert_array_equal(found.as_of, request_times(base))
    seen = lateness.seen(base.examples.item, found.as_of)
    added = base.items.added[base.examples.item]
    version = found.version[data.examples.item]
    np.testing.assert_array_equal(versions.item[version], base.examples.item)
    assert (versions.time[version] < np.maximum(seen, added)).all()
    np.testing.assert_array_equal(version, versions.at(base.examples.item, np.maximum(seen, added)))
    np.testing.assert_array_equal(found.missing, seen < added)
    assert found.missing.any() == (lateness.delay + lateness.every >= 2 * HOUR)

    version = found.version[data.log.item]
    np.testing.assert_array_equal(versions.item[version], base.log.item)
    late = np.maximum(lateness.seen(base.log.item, base.log.time), base.items.added[base.log.item])
    assert (versions.time[version] < late).all()

    place = int(data.examples.item[0])
    features, old = data.items.features[place], base.items.features[int(base.examples.item[0])]
    trend = float(living.features["trend"][found.version[place]])
    assert features == {**old, "trend": trend, "discount": features["discount"]}
    np.testing.assert_array_equal(data.items.embeddings[place], base.items.embeddings[int(base.examples.item[0])])


def test_a_part_and_other_items(world: tuple[Living, Oracle]) -> None:
    living, base = world[0], world[0].data
    lateness, split = Lateness(DAY), split_of(base)
    items = np.tile(np.arange(80), (2, 1))
    times = np.array([[split.test], [split.end]]) + np.zeros_like(items)
    part, rows = delayed(living, lateness, split.test, (items, times))
    whole, _ = delayed(living, lateness)
    test = base.examples.time >= split.test
    np.testing.assert_array_equal(part.version[part.data.examples.item], whole.version[whole.data.examples.item][test])
    there = times - DAY >= base.items.added[items]
    np.testing.assert_array_equal(rows >= 0, there)
    np.testing.assert_array_equal(part.version[rows[there]], living.versions.at(items, times - DAY)[there])
    assert 0 < (~there).sum() < there.sum()


def test_requests_are_the_groups_of_training(world: tuple[Living, Oracle]) -> None:
    data = world[0].data
    split, times = split_of(data), request_times(data)
    batches = Batches(data, spec_of(data, split), CONFIG)
    for since, until in ((split.start, split.validation), (split.validation, split.test), (split.test, split.end)):
        groups = batches.groups(since, until)
        for first, size in zip(groups.first, groups.size, strict=True):
            assert (times[first : first + size] == data.examples.time[first]).all()


def test_a_restocked_world_shows_new_items_at_once() -> None:
    youngest = []
    for restocked in (False, True):
        data = generate(dataclasses.replace(SMALL, items=400, restocked=restocked), 1)
        for met in (data.examples, data.log):
            assert (data.items.added[met.item] <= met.time).all()
            assert (data.items.removed[met.item] > met.time).all()
        youngest.append(int((data.examples.time - data.items.added[data.examples.item]).min()))
    assert youngest[1] < HOUR < youngest[0]


# The worlds -----------------------------------------------------------------------------------------------------------


def test_drift_is_in_the_truth_and_in_what_is_published(world: tuple[Living, Oracle]) -> None:
    living, known = world
    data, hidden = living.data, known.hidden
    assert data.examples.probability is not None
    np.testing.assert_allclose(oracle.sigmoid(known.logits()), data.examples.probability, rtol=1e-5)
    drift = living.drift(data.examples.item, request_times(data))
    column = known.terms[:, oracle.TERMS.index("quality")]
    np.testing.assert_allclose(column, hidden.quality[data.examples.item] + drift, atol=1e-5)
    assert np.corrcoef(living.quality, living.features["discount"])[0, 1] == pytest.approx(0.5**0.5, abs=0.05)
    assert np.corrcoef(living.quality, living.features["trend"])[0, 1] == pytest.approx(0.5**0.5 / 1.09**0.5, abs=0.05)
    live = living.versions.time >= START
    assert live.sum() == 80 * 6 * 12  # a change of every item in each two hours
    again, _ = drifting(SMALL, 1, 2 * HOUR)
    np.testing.assert_array_equal(again.data.examples.clicked, data.examples.clicked)


def test_counters_know_the_past_alone() -> None:
    data = generate(SMALL, 2)
    assert not delayed(replayed(data), Lateness(10_000 * DAY))[0].missing.any()
    found, _ = delayed(replayed(data), Lateness())
    click = data.actions.index("click")
    for place in range(0, len(data.examples), 97):
        past = (data.log.item == data.examples.item[place]) & (data.log.time < found.as_of[place])
        count, clicks = int(past.sum()), int((data.log.action[past] == click).sum())
        row = found.data.items.features[int(found.data.examples.item[place])]
        assert row["ratings"] == pytest.approx(np.log1p(count))
        assert row["liked"] == pytest.approx((clicks + 2.5) / (count + 5))


def _built(data: Dataset) -> Iterator[Batch]:
    split = split_of(data)
    spec = spec_of(data, split)
    made = Batches(data, spec, CONFIG)
    model = new_model(CONFIG, spec, 0).eval()
    groups = made.groups(split.test, split.end)
    for place in range(len(groups)):
        yield made.batch(groups.select(np.array([place])), model)


def test_no_version_holds_a_label_or_the_future() -> None:
    assert check(generate(SMALL, 2), lambda data: _built(delayed(replayed(data), Lateness())[0].data)).groups > 5


def test_counters_that_are_early_are_caught() -> None:
    def early(data: Dataset) -> Iterator[Batch]:
        living = replayed(data)
        time = living.versions.time
        sooner = Versions(living.versions.item, np.where(time == ALWAYS, time, time - DAY))
        return _built(delayed(dataclasses.replace(living, versions=sooner), Lateness())[0].data)

    with pytest.raises(LeakError, match=r"numerics of user .* something of the future builds it"):
        check(generate(SMALL, 2), early)
