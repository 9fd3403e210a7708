"""What is measured of a model: against plain definitions, request by request, on a small world made here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import lsh
from encoders.baselines import build
from encoders.batches import Batches, Groups
from encoders.bundle import SAMPLE_SPEC, seeded_bundle
from encoders.config import ModelConfig
from encoders.data.dataset import NEVER, BehaviourLog, DataError, Dataset, Examples, Items, UserProfiles, by_user
from encoders.evaluate import (
    Sampling,
    baselines,
    evaluate,
    figures,
    measure,
    measure_popularity,
    predict,
    score_items,
    split_of,
)
from encoders.evaluation import Evaluation, compare, rows, tables
from encoders.metrics import gauc
from encoders.ranker import Ranker

CONFIG = ModelConfig(
    width=16, dim=8, bridges=3, bits=16, crosses=2, window=12, recent=4, head=(8,), embedding_dim=6,
    heads=2, hidden=10, category_dim=4, tier_edges=(6, 9),
)  # fmt: skip
SAMPLING = Sampling(requests=30, shortlists=20, candidates=40)
M, U, HOUR = 150, 40, 3_600_000


def small_world(sessions: int = 500) -> Dataset:
    """Sessions of 6 impressions on a clock of hours; clicked items are behaviours; items come and go."""
    random = np.random.default_rng(11)
    appeal = random.normal(size=M)
    added, removed = np.zeros(M, dtype=np.int64), np.full(M, NEVER)
    added[:20], removed[20:40] = 300 * HOUR, 470 * HOUR
    user = np.repeat(random.integers(0, U, sessions), 6)
    time = np.repeat(np.arange(sessions) * 1.0, 6) * HOUR + np.tile(np.arange(6) * 1_000, sessions)
    item = random.integers(0, M, len(user))
    probability = 1 / (1 + np.exp(-1.5 * appeal[item]))
    clicked = random.random(len(user)) < probability
    order = by_user(user, time.astype(np.int64))
    columns = [user[order].astype(np.int32), item[order].astype(np.int32)]
    when, clicks = time[order].astype(np.int64), clicked[order]
    log = BehaviourLog(*(c[clicks] for c in columns), np.ones(clicks.sum(), dtype=np.uint8), when[clicks])
    return Dataset(
        name="small",
        items=Items(
            ids=[f"i{k}" for k in range(M)],
            features=[{"category": f"c{k % 7}", "price": float(k)} for k in range(M)],
            crosses=[[f"category:{k % 7}"] for k in range(M)],
            attributes=[{}] * M,
            embeddings=random.standard_normal((M, 6)).astype(np.float32),
            added=added,
            removed=removed,
        ),
        profiles=UserProfiles([f"u{k}" for k in range(U)], [{"segment": f"s{k % 3}"} for k in range(U)]),
        log=log,
        examples=Examples(*columns, clicks, when, probability[order].astype(np.float32)),
        actions=("view", "click"),
    )


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_world()


@pytest.fixture(scope="module")
def batches(data: Dataset) -> Batches:
    made = Batches(data, SAMPLE_SPEC, CONFIG)
    projection = lsh.projection(CONFIG.embedding_dim, CONFIG.bits, 0)
    made.sign(lsh.signatures(made.embedding, np.zeros(CONFIG.embedding_dim, dtype=np.float32), projection))
    return made


@pytest.fixture(scope="module")
def groups(data: Dataset, batches: Batches) -> Groups:
    split = split_of(data)
    return batches.groups(split.validation, split.end)


def model_of(name: str = "aif", seed: int = 0) -> Ranker:
    return build(name, CONFIG, SAMPLE_SPEC.sizes, seed).eval()


@pytest.mark.parametrize("together", [1, 100, 1_000])
def test_groups_of_some_users_at_a_time_are_those_of_all(
    together: int, batches: Batches, groups: Groups, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(data)
    monkeypatch.setattr("encoders.batches._EXAMPLES", together)
    again = batches.groups(split.validation, split.end)
    for field in dataclasses.fields(Groups):
        one, other = getattr(groups, field.name), getattr(again, field.name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["aif", "dssm", "din"])
def test_predictions_stand_in_the_order_of_the_data(name: str, batches: Batches, data: Dataset, groups: Groups) -> None:
    model = model_of(name)
    logits, labels, users = predict(model, batches, groups)
    split = split_of(data)
    inside = data.examples.time >= split.validation
    np.testing.assert_array_equal(labels, data.examples.clicked[inside])
    np.testing.assert_array_equal(users, data.examples.user[inside])
    wanted = []
    with torch.inference_mode():
        for k in range(len(groups)):  # one request at a time
            batch = batches.batch(groups.select(np.array([k])), model)
            wanted.append(model(batch.users, batch.candidates)[0].numpy())
    np.testing.assert_allclose(logits, np.concatenate(wanted), atol=1e-5)


def test_any_items_score_as_in_a_batch(batches: Batches, data: Dataset, groups: Groups) -> None:
    model, some = model_of(), groups.select(np.array([3, 0, 8]))
    items = np.stack([data.examples.item[k : k + 6] for k in some.first])
    with torch.inference_mode():
        batch = batches.batch(some, model)
        wanted = model(batch.users, batch.candidates).numpy()
    assert batch.counted.all()
    for room in (1, 150, 1 << 20):  # one, a few and all candidates at a time
        np.testing.assert_allclose(score_items(model, batches, some, items, room=room), wanted, atol=1e-5)


def test_catalogue_ranks_are_the_plain_ones(batches: Batches, data: Dataset, groups: Groups) -> None:
    """Every item alive and not seen before, the request's clicks among them, is a candidate."""
    model, sampling = model_of(), dataclasses.replace(SAMPLING, requests=10_000)
    found = measure(model, batches, data, groups, name="aif", sampling=sampling).catalogue
    assert found is not None
    place, gone, query, repeated = 0, 0, 0, 0
    for k in range(len(groups)):
        user, first, size = groups.user[k], groups.first[k], groups.size[k]
        as_of = data.examples.time[first]
        own = range(first, first + size)
        clicked = {int(data.examples.item[e]) for e in own if data.examples.clicked[e]}
        alive = {m for m in range(M) if data.items.added[m] <= as_of < data.items.removed[m]}
        seen = {int(m) for m in data.log.item[(data.log.user == user) & (data.log.time < as_of)]}
        gone += len(clicked - alive)
        repeated += len(clicked & alive & seen)
        candidates = sorted((alive - seen) | (clicked & alive))
        if not clicked & alive:
            continue
        assert (found.user[query], found.first[query], found.size[query]) == (user, first, len(candidates))
        scores = score_items(model, batches, groups.select(np.array([k])), np.array([candidates]))[0]
        for item in sorted(clicked & alive):
            score = scores[candidates.index(item)]
            assert found.query[place] == query
            assert found.above[place] == pytest.approx((scores > score).sum(), abs=1)  # the batch's rounding may differ
            assert found.tied[place] >= 1
            place += 1
        query += 1
    assert (query, place, gone) == (len(found.user), len(found.above), found.gone)
    assert gone > 0
    assert repeated > 0


def test_ranks_of_popularity_are_exact(batches: Batches, data: Dataset, groups: Groups) -> None:
    split = split_of(data)
    found = measure_popularity(data, groups, split.validation, SAMPLING)
    assert found.catalogue is not None
    assert found.shortlists is not None
    past = data.examples.time < split.validation
    rate = data.examples.clicked[past].mean()
    shown = np.bincount(data.examples.item[past], minlength=M)
    clicks = np.bincount(data.examples.item[past & data.examples.clicked], minlength=M)
    score = (clicks + 20 * rate) / (shown + 20)
    listed = found.shortlists
    for row in range(len(listed.user)):
        ascending = score[listed.items[row][np.argsort(listed.scores[row], kind="stable")]]
        assert (np.diff(ascending) >= -1e-12).all()
    assert found.catalogue.tied.max() > 1  # items never shown
    value = tables(found)["gauc"].value
    assert value == pytest.approx(gauc(score[data.examples.item[~past]], found.labels, found.users), abs=1e-6)
    assert figures(found.scores, found.labels, found.users) == pytest.approx(
        baselines(data, split.validation, split.end)["popularity"], abs=1e-4
    )


def test_shortlists_are_common_alive_and_overlap_with_themselves(
    batches: Batches, data: Dataset, groups: Groups
) -> None:
    few = dataclasses.replace(SAMPLING, candidates=120)
    a, b = (measure(model_of(n), batches, data, groups, name=n, sampling=few) for n in ("aif", "din"))
    lists = a.shortlists
    assert lists is not None
    assert lists.items.shape == (20, 120)
    for row, first in zip(lists.items, lists.first, strict=True):
        time = data.examples.time[first]
        assert len(set(row.tolist())) == len(row)
        assert ((data.items.added[row] <= time) & (time < data.items.removed[row])).all()
    own, other = tables(a, bound=a), tables(a, bound=b)
    assert own["overlap@100"].value == own["overlap10@100"].value == 1.0
    assert 0.8 < other["overlap@100"].value < 1.0  # 100 of 120 share 80 at least
    assert "overlap@100" not in tables(a)


def test_regret_is_measured_against_the_truth(batches: Batches, data: Dataset, groups: Groups) -> None:
    asked: list[tuple[int, list[int]]] = []

    def truth(user: np.ndarray, items: np.ndarray, history: np.ndarray) -> np.ndarray:
        asked.append((int(user[0]), history[0].tolist()))
        return items / M  # the higher an item's place, the likelier its click

    found = measure(model_of(), batches, data, groups, name="aif", sampling=SAMPLING, truth=truth)
    lists = found.shortlists
    assert lists is not None
    for (user, history), whose, first in zip(asked, lists.user, lists.first, strict=True):
        before = (data.log.user == whose) & (data.log.time < data.examples.time[first])
        assert (user, history) == (whose, data.log.item[before].tolist())
    assert 0 < tables(found)["regret@10"].value < 1
    perfect = dataclasses.replace(lists, scores=lists.items.astype(np.float32))
    assert tables(dataclasses.replace(found, shortlists=perfect))["regret@10"].value == pytest.approx(0, abs=1e-6)


def as_oracle(found: Evaluation, data: Dataset) -> Evaluation:
    assert data.examples.probability is not None
    inside = data.examples.time >= split_of(data).validation
    return dataclasses.replace(found, name="oracle", scores=data.examples.probability[inside])


def test_models_are_set_side_by_side(batches: Batches, data: Dataset, groups: Groups) -> None:
    runs = [measure(model_of("aif", s), batches, data, groups, name="aif", seed=s, sampling=SAMPLING) for s in range(2)]
    oracle = [as_oracle(runs[0], data)]
    table = {row.name: row for row in rows({"oracle": oracle, "aif": runs}, bound="aif")}
    assert (table["aif"].seeds, table["oracle"].seeds) == (2, 1)
    assert set(table["aif"].figures) == {
        "gauc", "auc", "logloss", "hr@10", "ndcg@10", "hr@100", "ndcg@100", "overlap@100", "overlap10@100"
    }  # fmt: skip
    values = [tables(run)["gauc"].value for run in runs]
    assert table["aif"].figures["gauc"].value == pytest.approx(np.mean(values))
    found = compare(oracle, runs)
    assert found["gauc"].difference.low > 0.05
    assert found["gauc"].p < 0.01
    assert found["gauc"].p_users < 0.01
    assert found["gauc"].difference.value == pytest.approx(
        table["oracle"].figures["gauc"].value - table["aif"].figures["gauc"].value
    )
    assert found["hr@10"].difference.seeds == 1
    assert "overlap@100" in compare(oracle, runs, bound=runs)
    # The overlap is taken with the bound's run of the same seed; runs of seeds that it lacks have none.
    unequal = rows({"aif": runs, "more": [runs[1], dataclasses.replace(runs[0], seed=7), runs[0]]}, bound="aif")
    assert [row.figures["overlap@100"].value for row in unequal] == [1.0, 1.0]
    assert [(row.seeds, row.figures["overlap@100"].seeds) for row in unequal] == [(2, 2), (3, 2)]
    # Of unequal numbers of seeds, those in common are paired.
    more = [*runs, dataclasses.replace(runs[0], seed=99, scores=-runs[0].scores)]
    assert compare(more[::-1], runs)["gauc"] == compare(runs, runs)["gauc"]
    assert compare(more, runs)["gauc"].difference.value == 0


def test_only_the_same_slice_is_compared(batches: Batches, data: Dataset, groups: Groups) -> None:
    popular = measure_popularity(data, groups, split_of(data).validation, SAMPLING)
    fewer = measure_popularity(data, groups.select(np.arange(5)), split_of(data).validation, SAMPLING)
    other = measure_popularity(data, groups, split_of(data).validation, dataclasses.replace(SAMPLING, seed=1))
    for wrong in (fewer, other):
        with pytest.raises(DataError, match="same slice"):
            compare([popular], [wrong])
        with pytest.raises(DataError, match="same slice"):
            tables(popular, bound=wrong)
    with pytest.raises(DataError, match="without a run"):
        rows({"popularity": []})


def test_equal_users_and_labels_are_not_enough_to_be_compared(data: Dataset, groups: Groups) -> None:
    """Of one draw of users and labels: other items, other times, other requests, other candidates, other shortlists."""

    def of(changed: Dataset, asked: Groups, sampling: Sampling) -> Evaluation:
        return measure_popularity(changed, asked, split_of(data).validation, sampling)

    none, examples = Sampling(requests=0, shortlists=0), data.examples
    first = groups.first[groups.size > 1][0]
    item, time = examples.item.copy(), examples.time.copy()
    item[first], time[first + 1] = (item[first] + 1) % M, time[first + 1] + 1
    other_items, later = (
        dataclasses.replace(data, examples=dataclasses.replace(examples, **{column: values}))
        for column, values in (("item", item), ("time", time))
    )
    halves = np.stack([groups.size // 2, groups.size - groups.size // 2], axis=1).ravel()
    begins = np.stack([groups.first, groups.first + groups.size // 2], axis=1).ravel()
    parted = Groups(np.repeat(groups.user, 2), begins, halves, np.repeat(groups.history, 2)).select(halves > 0)
    plain = of(data, groups, none)
    for wrong in (of(other_items, groups, none), of(later, groups, none), of(data, parted, none)):
        np.testing.assert_array_equal(wrong.users, plain.users)
        np.testing.assert_array_equal(wrong.labels, plain.labels)
        with pytest.raises(DataError, match="differ in the items, times or requests of the impressions"):
            compare([plain], [wrong])
        assert compare([plain], [dataclasses.replace(wrong, shown="")])  # saved before it was kept

    full = of(data, groups, SAMPLING)
    fewer = dataclasses.replace(data, items=dataclasses.replace(data.items, removed=data.items.added + 480 * HOUR))
    with pytest.raises(DataError, match="differ in the requests ranked, their candidates or their clicks"):
        compare([full], [of(fewer, groups, SAMPLING)])
    with pytest.raises(DataError, match="differ in the shortlists"):
        compare([full], [of(data, groups, dataclasses.replace(SAMPLING, candidates=30))])
    assert compare([full], [plain])["gauc"].difference.value == 0  # what both have is the same


def test_counts_say_what_is_left_out(data: Dataset, groups: Groups) -> None:
    found = measure_popularity(data, groups, split_of(data).validation, SAMPLING)
    by_user_ = [found.labels[found.users == user] for user in np.unique(found.users)]
    assert found.catalogue is not None
    assert found.counts == {
        "examples": len(found.labels),
        "users": len(by_user_),
        "users of one class": sum(own.all() or not own.any() for own in by_user_),
        "users without a click": sum(not own.any() for own in by_user_),
        "requests ranked": len(found.catalogue.user),
        "clicked items gone": found.catalogue.gone,
    }


@pytest.mark.parametrize("truth", [None, lambda user, items, history: items / M])
def test_an_evaluation_is_kept_as_it_was(tmp_path: Path, data: Dataset, groups: Groups, truth: Any) -> None:
    found = measure_popularity(data, groups, split_of(data).validation, SAMPLING, truth)
    bare = dataclasses.replace(found, catalogue=None, shortlists=None)
    for kept in (found, bare):
        kept.save(tmp_path / "one.npz")
        again = Evaluation.load(tmp_path / "one.npz")
        assert again.counts == kept.counts
        assert list(tables(again)) == list(tables(kept))
        assert {n: t.value for n, t in tables(again).items()} == {n: t.value for n, t in tables(kept).items()}
        assert (again.name, again.seed, again.shown) == ("popularity", 0, found.shown)
    with np.load(tmp_path / "one.npz") as arrays:
        np.savez(tmp_path / "one.npz", **{name: array for name, array in arrays.items() if name != "shown"})
    assert Evaluation.load(tmp_path / "one.npz").shown == ""  # saved before it was kept
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"]


def test_what_is_no_evaluation_is_refused(tmp_path: Path, data: Dataset, groups: Groups) -> None:
    path = tmp_path / "one.npz"
    measure_popularity(data, groups, split_of(data).validation, SAMPLING).save(path)
    whole = path.read_bytes()
    for broken in (b"", b"no archive", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"one\.npz is not a saved evaluation"):
            Evaluation.load(path)
    np.savez(path, other=np.ones(3))
    with pytest.raises(DataError, match="is not a saved evaluation"):
        Evaluation.load(path)


def test_what_cannot_be_measured(batches: Batches, data: Dataset, groups: Groups) -> None:
    nothing = batches.groups(0, 0)
    with pytest.raises(DataError, match="no examples"):
        measure(model_of(), batches, data, nothing, name="aif")
    with pytest.raises(DataError, match="no examples"):
        measure_popularity(data, nothing, 1)
    broken = model_of()
    with torch.no_grad():
        for weights in broken.parameters():
            weights.fill_(float("nan"))
    with pytest.raises(DataError, match="aif gives scores that are not finite"):
        measure(broken, batches, data, groups, name="aif", sampling=SAMPLING)


def test_no_sample_where_none_is_wanted_or_possible(batches: Batches, data: Dataset, groups: Groups) -> None:
    found = measure_popularity(data, groups, 1, Sampling(requests=0, shortlists=0))
    assert found.catalogue is found.shortlists is None
    later = dataclasses.replace(data.items, added=np.full(M, 10**12))
    found = measure_popularity(dataclasses.replace(data, items=later), groups, 1, SAMPLING)
    assert found.catalogue is found.shortlists is None
    assert set(tables(found)) == {"gauc", "auc", "logloss"}


def test_split_and_baselines() -> None:
    data = small_world()
    split = split_of(data)
    parts = [data.examples.time < split.validation, data.examples.time >= split.test]
    assert [round(part.mean(), 2) for part in parts] == [0.8, 0.1]
    found = baselines(data, split.test, split.end)
    assert found["chance"]["examples"] == int(parts[1].sum())
    assert found["chance"]["auc"] is not None
    assert abs(found["chance"]["auc"] - 0.5) < 0.1
    # Popularity must not know the labels it is measured on: flipping those of the test slice mirrors its AUC.
    popular = found["popularity"]["auc"]
    assert popular is not None
    assert popular > 0.6
    data.examples.clicked[parts[1]] ^= True
    flipped = baselines(data, split.test, split.end)["popularity"]["auc"]
    assert flipped == pytest.approx(1 - popular, abs=1e-4)


def test_data_that_cannot_be_split() -> None:
    data = small_world(sessions=20)
    data.examples.time[:] = 5
    with pytest.raises(DataError, match="do not part"):
        split_of(data)
    with pytest.raises(DataError, match="no examples"):
        split_of(small_world(sessions=0))


def test_a_bundle_is_evaluated_beside_popularity_and_chance(tmp_path: Path, data: Dataset) -> None:
    found = evaluate(seeded_bundle(tmp_path / "bundle", CONFIG), data).figures
    assert list(found) == ["model", "popularity", "chance"]
    assert len({row["examples"] for row in found.values()}) == 1
    assert figures(np.array([1.0]), np.array([True]), np.array([4]))["gauc"] is None
    longer = dataclasses.replace(CONFIG, embedding_dim=7)
    with pytest.raises(DataError, match="not as long"):
        evaluate(seeded_bundle(tmp_path / "other", longer), data)
