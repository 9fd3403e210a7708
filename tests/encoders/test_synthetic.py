"""The synthetic marketplace: its data keep their promises, its probabilities are the oracle's, every term of the oracle
has work to do, and what the terms need can be seen. No model is trained here, and none may ever size the world.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from encoders.data import oracle
from encoders.data.dataset import NEVER, BehaviourLog
from encoders.data.oracle import BIAS, HISTORY_TERMS, TERMS, WEIGHTS
from encoders.data.synthetic import ACTIONS, START, Marketplace, World, generate, with_oracle
from tests.bench.marketplace import expected_gauc, is_test, measure, recomputed, requests
from tests.encoders.test_data import check_events

WORLD = Marketplace(users=60, items=150, examples=3_000, days=12, categories=8)
SIZED = Marketplace(users=800, items=4_000, examples=48_000)
SEEDS = (11, 12, 13)
LEAST = 0.015  # GAUC that every term is worth


@pytest.fixture(scope="module")
def small() -> World:
    return with_oracle(WORLD, 2)


@pytest.fixture(scope="module")
def sized() -> World:
    return with_oracle(SIZED, SEEDS[0])


@pytest.fixture(scope="module")
def measured(sized: World) -> list[dict[str, float]]:
    return [measure(sized), *(measure(with_oracle(SIZED, seed)) for seed in SEEDS[1:])]


def test_it_is_the_same_for_the_same_seed() -> None:
    one, same, other = generate(WORLD, 4), generate(WORLD, 4), generate(WORLD, 5)
    assert list(one.behaviours()) == list(same.behaviours())
    assert list(one.item_updates()) == list(same.item_updates())
    assert list(one.users()) == list(same.users())
    for column in dataclasses.fields(one.examples):
        np.testing.assert_array_equal(getattr(one.examples, column.name), getattr(same.examples, column.name))
    assert list(one.item_updates()) != list(other.item_updates())


def test_it_keeps_its_promises(small: World) -> None:
    data = small.data
    check_events(data)
    items, log, examples = data.items, data.log, data.examples
    assert data.actions == ACTIONS
    assert len(examples) == WORLD.examples
    assert examples.time.min() >= START > log.time.min()  # users have a past
    for met in (log, examples):
        assert (np.lexsort((met.time, met.user)) == np.arange(len(met))).all()
        assert (items.added[met.item] <= met.time).all()  # nobody meets an item before it arrives
        assert (items.removed[met.item] > met.time).all()  # nor after it is gone
    assert (items.added > START).mean() > 0.2
    assert 0.05 < (items.removed != NEVER).mean() < 0.3
    assert (examples.item[:, None] == np.flatnonzero(items.added > START)).any()  # late items are shown
    assert data.end >= examples.time.max() - 60_000


def test_clicks_enter_histories_and_views_do_not(small: World) -> None:
    log, examples = small.data.log, small.data.examples
    seen = {event[:3]: event[3] for event in zip(log.user, log.item, log.time, log.action, strict=True)}
    shown = zip(examples.user, examples.item, examples.time, examples.clicked, strict=True)
    for user, item, time, clicked in shown:
        assert ((user, item, time) in seen) == clicked
        assert seen.get((user, item, time), 0) == ACTIONS.index("click")
    live = int((log.time >= START).sum())
    assert live > examples.clicked.sum() + (log.action == ACTIONS.index("buy")).sum() > examples.clicked.sum()


def test_requests_are_pages_more_than_an_hour_apart(small: World) -> None:
    examples = small.data.examples
    sizes, distinct = [], 0
    for page, _ in requests(small.data, np.ones(WORLD.examples, dtype=bool)):
        assert len(set(examples.user[page].tolist())) == 1
        assert examples.time[page][-1] - examples.time[page][0] < 3 * 60_000
        distinct += len(set(examples.item[page].tolist()))
        sizes.append(page.stop - page.start)
    assert sum(size < 8 for size in sizes) <= 1  # the last one
    assert max(sizes) == 16
    assert distinct > 0.98 * len(examples)  # twice on a page only where there is too little


def test_probabilities_are_the_oracles(small: World) -> None:
    probability, terms = small.data.examples.probability, small.oracle.terms
    assert probability is not None
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-(BIAS + terms.astype("f8") @ WEIGHTS))), rtol=1e-6)
    np.testing.assert_allclose(oracle.sigmoid(small.oracle.logits()), probability, rtol=1e-6)
    less = small.oracle.logits(("price", "intent"))
    np.testing.assert_allclose(small.oracle.logits() - less, terms[:, [2, 3]] @ WEIGHTS[[2, 3]], rtol=1e-4, atol=1e-5)


def test_labels_are_drawn_by_the_probabilities(sized: World) -> None:
    examples = sized.data.examples
    assert examples.probability is not None
    for low in np.arange(0, 1, 0.2):
        here = (examples.probability >= low) & (examples.probability < low + 0.2)
        p = examples.probability[here].astype(np.float64)
        deviation = (examples.clicked[here].sum() - p.sum()) / np.sqrt((p * (1 - p)).sum())
        assert abs(deviation) < 4


def test_terms_follow_from_the_published_behaviours_before_the_request(small: World) -> None:
    data = small.data
    every = np.ones(len(data.examples), dtype=bool)
    np.testing.assert_allclose(recomputed(data, small.oracle.hidden, every), small.oracle.terms, rtol=1e-3, atol=2e-5)


def test_terms_by_hand() -> None:
    """Two items of one category, far apart, and one of another; the first stands in the history three times, the third
    once.
    """
    far = np.zeros((3, 4), dtype=np.float32)
    far[1, 0], far[2, 1] = 9, 9
    hidden = oracle.Hidden(
        position=far,
        category=np.array([0, 0, 1], dtype=np.int32),
        level=np.array([1, -1, 0.5], dtype=np.float32),
        quality=np.array([0.1, 0.2, 0.3], dtype=np.float32),
        segment=np.array([1], dtype=np.int32),
        wallet=np.array([0.2], dtype=np.float32),
        affinity=np.array([[0, 0], [7, 8]], dtype=np.float32),
    )
    history = np.array([[-1, 0, 0, 2, 0]], dtype=np.int32)
    found = oracle.terms_of(hidden, np.array([0], dtype=np.int32), np.array([[0, 1, 2]], dtype=np.int32), history)
    mean = (1 + 1 + 1 + 0.2) / 4
    wanted = [
        [np.log(4), 0, 0.3, -abs(1 - mean), 0.1, 7],
        [0, 0, 0, -abs(-1 - mean), 0.2, 7],
        [np.log(2), 0, 0.1, -abs(0.5 - (0.5 + 0.2) / 2), 0.3, 8],
    ]
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)
    none = oracle.terms_of(hidden, np.array([0], dtype=np.int32), np.array([[0]], dtype=np.int32), history[:, :1])
    np.testing.assert_allclose(none[0, 0], [0, 0, 0, -0.8, 0.1, 7], atol=1e-6)


def test_only_the_newest_thousand_behaviours_count(small: World) -> None:
    hidden, user = small.oracle.hidden, np.array([3], dtype=np.int32)
    items = np.random.default_rng(0).integers(0, WORLD.items, (1, oracle.WINDOW + 50), dtype=np.int32)
    candidates = np.arange(20, dtype=np.int32)[None]
    whole = oracle.terms_of(hidden, user, candidates, items)
    np.testing.assert_array_equal(whole, oracle.terms_of(hidden, user, candidates, items[:, 50:]))
    assert (whole[..., 0] > oracle.terms_of(hidden, user, candidates, items[:, 51:])[..., 0]).any()


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_worth_something(measured: list[dict[str, float]], term: str) -> None:
    """By labels' expectation, which is free of their noise; the published figures are of the larger preset."""
    drops = [figures[f"{term}_expected_drop"] for figures in measured]
    assert min(drops) >= LEAST
    assert max(drops) < 0.04  # and none is all of it


def test_oracle_and_click_rate_are_plausible(measured: list[dict[str, float]]) -> None:
    for figures in measured:
        assert 0.78 < figures["expected_gauc"] < 0.87
        assert abs(figures["gauc"] - figures["expected_gauc"]) < 0.02
        assert 0.15 < figures["click_rate"] < 0.3


@pytest.mark.parametrize("term", HISTORY_TERMS)
def test_no_term_follows_from_category_counts(measured: list[dict[str, float]], term: str) -> None:
    assert max(figures[f"{term}_by_counts"] for figures in measured) < 0.5


def test_what_counts_tell_does_not_replace_the_terms(measured: list[dict[str, float]]) -> None:
    assert min(figures["by_counts_drop"] for figures in measured) >= LEAST


def test_the_terms_can_be_seen(measured: list[dict[str, float]]) -> None:
    """Places read from embeddings and quality from features lose little: the hidden part is small."""
    for figures in measured:
        assert figures["expected_gauc"] - figures["observable_gauc"] < 0.02
        assert min(figures[f"{term}_observable"] for term in TERMS) > 0.75


def test_embeddings_keep_the_fine_structure(sized: World) -> None:
    some = slice(0, 2_000)
    embeddings, places = sized.data.items.embeddings[some], sized.oracle.hidden.position[some]
    category = sized.oracle.hidden.category[some]
    cosine = embeddings @ embeddings.T
    square = (places**2).sum(axis=1)
    distance = square[:, None] + square - 2 * places @ places.T
    fine = (distance < 0.1) & ~np.eye(len(places), dtype=bool)
    cluster = (distance > 0.2) & (distance < 0.5)
    rest = (distance > 1.0) & (category[:, None] == category)
    for closer, wider in ((fine, cluster), (cluster, rest)):
        assert np.quantile(cosine[closer], 0.1) > np.quantile(cosine[wider], 0.9)


def test_a_mean_of_interests_says_little(sized: World) -> None:
    """In a category, behaviours lie on several sides: nearness to their mean does not tell the term."""
    hidden, examples = sized.oracle.hidden, sized.data.examples
    test = is_test(examples)
    guess, places = [], []
    for page, history in requests(sized.data, test):
        for place in range(page.start, page.stop):
            item = examples.item[place]
            past = hidden.position[history[hidden.category[history] == hidden.category[item]]]
            if len(past) > 20:  # fewer than that are on one side by chance
                guess.append(-np.linalg.norm(past.mean(axis=0) - hidden.position[item]))
                places.append(place)
    assert len(places) > 1_000
    term = sized.oracle.terms[places, TERMS.index("interests")]
    assert np.corrcoef(guess, term)[0, 1] ** 2 < 0.5


def test_items_are_made_when_asked_for(small: World) -> None:
    features = small.data.items.features
    assert len(features) == WORLD.items
    assert list(features) == [features[k] for k in range(len(features))] == features[:]
    assert features[-1] == features[WORLD.items - 1]
    with pytest.raises(IndexError):
        features[WORLD.items]
    row = small.data.items.crosses[3]
    category, brand, band = (str(features[3][name]) for name in ("category", "brand", "price_band"))
    assert row == [
        f"category:{category}", f"brand:{brand}", f"price_band:{band}", f"category_price:{category}, {band}",
    ]  # fmt: skip


def test_long_histories() -> None:
    data = generate(Marketplace(users=20, items=500, examples=500, days=10, past=12_000, history=10_000), 1)
    lengths = np.bincount(data.log.user[data.log.time < START], minlength=20)
    assert lengths.max() == 10_000
    assert (np.diff(data.log.time)[np.diff(data.log.user) == 0] >= 0).all()


@pytest.mark.parametrize(
    "world",
    [
        Marketplace(users=5, items=30, examples=0, days=1),
        Marketplace(users=1, items=1, examples=9, days=1, categories=1, clusters=1, families=1, brands=1, past=0),
        Marketplace(users=3, items=9, examples=30, days=2, categories=2, past=3),
    ],
)
def test_tiny_worlds(world: Marketplace) -> None:
    data = generate(world, 1)
    assert len(data.examples) == world.examples
    assert isinstance(data.log, BehaviourLog)


def test_users_need_time() -> None:
    with pytest.raises(ValueError, match="2 users do not see 9999 impressions in 1 days"):
        generate(Marketplace(users=2, items=30, examples=9_999, days=1))


def test_expected_gauc_is_the_mean_over_labels() -> None:
    random = np.random.default_rng(1)
    p = random.random(40).astype(np.float32)
    score, user = np.round(p + random.normal(0, 0.3, 40), 1), np.repeat([4, 7], 20)
    right = total = 0.0
    for _ in range(4_000):
        clicked = random.random(40) < p
        for one in (4, 7):
            good, bad = score[clicked & (user == one)], score[~clicked & (user == one)]
            right += ((good[:, None] > bad).sum() + 0.5 * (good[:, None] == bad).sum()) / 1
            total += len(good) * len(bad)
    assert expected_gauc(score, p, user) == pytest.approx(right / total, abs=0.01)
