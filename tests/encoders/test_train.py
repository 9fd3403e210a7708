"""Training on a small world: it learns what popularity cannot know, and no example sees itself or the future."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import lsh
from encoders.__main__ import main
from encoders.batches import GROUP_SIZE, GROUP_SPAN, Batches
from encoders.bundle import load_bundle, new_model
from encoders.data.dataset import NEVER, Dataset
from encoders.data.source import open_dataset
from encoders.data.synthetic import Marketplace, generate
from encoders.evaluate import evaluate, split_of
from encoders.fold import Behaviours, Head, ItemFold, UserFold, join_scores
from encoders.model import ModelConfig
from encoders.train import TrainOptions, spec_of, train

WORLD = Marketplace(users=150, items=400, examples=12_000, days=20, categories=8, brands=20)
SMALL = ModelConfig(window=20, recent=5)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return generate(WORLD, seed=7)


@pytest.fixture(scope="module")
def trained(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    out = tmp_path_factory.mktemp("trained") / "bundle"
    lines: list[str] = []
    torch.set_num_threads(1)
    options = TrainOptions(seed=1, minutes=1, epochs=4, config=ModelConfig(window=100))
    metrics = train(data, out, options, report=lines.append)
    return out, metrics, lines


def test_it_beats_popularity_and_chance(trained: tuple[Path, dict[str, Any], list[str]]) -> None:
    test = trained[1]["test"]
    assert test["model"]["auc"] > test["popularity"]["auc"] + 0.05
    assert test["model"]["gauc"] > test["popularity"]["gauc"] + 0.05
    assert test["model"]["auc"] > test["chance"]["auc"] + 0.12
    assert test["model"]["logloss"] < test["popularity"]["logloss"]


def test_progress_says_what_happens(trained: tuple[Path, dict[str, Any], list[str]]) -> None:
    first, *epochs = trained[2]
    assert "Ctrl-C stops" in first
    assert len(epochs) == trained[1]["epochs"] >= 2
    assert all(re.match(r"epoch \d+: loss 0\.\d+, validation GAUC 0\.\d+, AUC 0\.\d+.*s left", line) for line in epochs)


def test_bundle_carries_what_was_measured(trained: tuple[Path, dict[str, Any], list[str]], data: Dataset) -> None:
    bundle = load_bundle(trained[0])
    config = bundle.manifest.config
    assert bundle.manifest.metrics == json.loads(json.dumps(trained[1]))
    assert config.tier_edges != ModelConfig().tier_edges
    assert config.din_shift != 0.5
    assert bundle.manifest.features.actions == data.actions
    assert set(bundle.manifest.features.attributes) == {"bid", "in_stock", "price"}
    assert evaluate(bundle, data) == trained[1]["test"]


def test_tiers_part_what_serving_sees(trained: tuple[Path, dict[str, Any], list[str]], data: Dataset) -> None:
    """Tier edges come from quantiles: no tier may hold most of the similarities."""
    bundle = load_bundle(trained[0])
    rows = ItemFold(bundle).encode(data.items.rows())
    recent = data.log.item[-4_000:]
    equal = lsh.matches(rows.signature[recent[:200]], rows.signature[recent])
    share = lsh.tier_counts(equal, bundle.manifest.config.tier_edges).sum(axis=0) / equal.size
    assert share.max() < 0.4
    assert share.min() > 0.01


def test_trained_weights_keep_the_fold_exact(trained: tuple[Path, dict[str, Any], list[str]], data: Dataset) -> None:
    """The batches of training and the user block of serving, from the same log, give the same scores."""
    bundle = load_bundle(trained[0])
    config = bundle.manifest.config
    rows = ItemFold(bundle).encode(data.items.rows())
    batches = Batches(data, bundle.manifest.features, config)
    batches.sign(rows.signature)
    split = split_of(data)
    groups = batches.groups(split.test, split.end)
    fold, head = UserFold(bundle), Head.of(bundle)
    codes = bundle.manifest.features.action_codes(data.actions)
    lengths = set()
    for batch in list(batches.batches(groups, bundle.model, size=8))[::2]:
        with torch.inference_mode():
            wanted = bundle.model(batch.users, batch.candidates).numpy()
        for row, (user, first, size) in enumerate(
            zip(batch.groups.user, batch.groups.first, batch.groups.size, strict=True)
        ):
            as_of = int(batches.examples.time[first])
            mine = np.flatnonzero((data.log.user == user) & (data.log.time < as_of))[-config.window :]
            past = data.log.item[mine]
            behaviours = Behaviours(
                vectors=rows.vector[past],
                signatures=rows.signature[past],
                crosses=rows.crosses[past],
                actions=codes[data.log.action[mine]],
                times=data.log.time[mine],
            )
            served = join_scores(fold.block(data.profiles.features[user], behaviours, as_of), head, rows)
            items = batches.examples.item[first : first + size]
            np.testing.assert_allclose(served[items], wanted[row, :size], atol=1e-5)
            lengths.add(len(mine))
    assert len(lengths) > 10


def test_groups_hold_every_example_once_and_never_see_the_future(data: Dataset) -> None:
    spec = spec_of(data, split_of(data))
    batches = Batches(data, spec, SMALL)
    groups = batches.groups(0, NEVER)
    places = np.concatenate([np.arange(f, f + s) for f, s in zip(groups.first, groups.size, strict=True)])
    np.testing.assert_array_equal(np.sort(places), np.arange(len(data.examples)))
    for user, first, size, history in zip(groups.user, groups.first, groups.size, groups.history, strict=True):
        assert 1 <= size <= GROUP_SIZE
        assert (batches.examples.user[first : first + size] == user).all()
        assert batches.examples.time[first + size - 1] - batches.examples.time[first] <= GROUP_SPAN
        mine = np.flatnonzero((batches.log.user == user) & (batches.log.time < batches.examples.time[first]))
        assert history == (mine[-1] + 1 if len(mine) else np.searchsorted(batches.log.user, user))


def test_ties_are_not_history(data: Dataset) -> None:
    """Behaviours of the same millisecond as the first example are left out, whatever their order."""
    hours = [column // 3_600_000 * 3_600_000 for column in (data.log.time, data.examples.time)]
    tied = dataclasses.replace(
        data,
        log=dataclasses.replace(data.log, time=hours[0]),
        examples=dataclasses.replace(data.examples, time=hours[1]),
    )
    batches = Batches(tied, spec_of(tied, split_of(tied)), SMALL)
    groups = batches.groups(0, NEVER)
    for user, first, history in zip(groups.user, groups.first, groups.history, strict=True):
        mine = np.flatnonzero((batches.log.user == user) & (batches.log.time < batches.examples.time[first]))
        assert history == (mine[-1] + 1 if len(mine) else np.searchsorted(batches.log.user, user))
    after = groups.select(groups.history < len(batches.log))
    tie = batches.log.time[after.history] == batches.examples.time[after.first]
    assert (tie & (batches.log.user[after.history] == after.user)).any()


def test_batches_show_the_newest_history(data: Dataset) -> None:
    spec = spec_of(data, split_of(data))
    batches = Batches(data, spec, SMALL)
    model = new_model(SMALL, spec, 0)
    groups = batches.groups(0, NEVER)
    long = groups.select(np.flatnonzero(groups.history - np.searchsorted(batches.log.user, groups.user) > 25)[:5])
    (batch,) = batches.batches(long, model, size=8)
    assert batch.users.valid.all()
    for row, (first, end) in enumerate(zip(batch.groups.first, batch.groups.history, strict=True)):
        ages = batches.examples.time[first] - batches.log.time[end - 20 : end]
        np.testing.assert_array_equal(batch.users.ages[row].numpy(), ages)
        assert (ages > 0).all()
        clicked = batches.examples.clicked[first : first + batch.groups.size[row]]
        np.testing.assert_array_equal(batch.clicked[row][batch.counted[row]].numpy() > 0, clicked)


def test_equal_seeds_train_equal_bundles(tmp_path: Path) -> None:
    data = generate(Marketplace(users=40, items=80, examples=1_500, days=6, categories=6, brands=8), seed=1)
    options = TrainOptions(seed=3, config=SMALL)
    metrics = [train(data, tmp_path / name, options, report=lambda line: None) for name in ("a", "b")]
    assert metrics[0]["test"] == metrics[1]["test"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_time_limit_ends_the_training(data: Dataset, tmp_path: Path) -> None:
    options = TrainOptions(minutes=0.001, config=SMALL)
    metrics = train(data, tmp_path / "b", options, report=lambda line: None)
    assert metrics["epochs"] <= 1
    assert load_bundle(tmp_path / "b").manifest.metrics["epochs"] == metrics["epochs"]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = generate(Marketplace(users=40, items=80, examples=1_500, days=6, categories=6, brands=8), seed=1)
    folder = tmp_path / "films"
    folder.mkdir()
    _as_csv(small, folder)
    out = tmp_path / "bundle"
    assert main(["train", "--data", str(folder), "--out", str(out), "--minutes", "0.2", "--precision", "fp32"]) == 0
    said = capsys.readouterr().out
    assert load_bundle(out).sha256 in said
    assert load_bundle(out).manifest.precision == "fp32"
    assert main(["evaluate", str(out), "--data", str(folder)]) == 0
    assert "popularity" in capsys.readouterr().out
    assert main(["export-data", "--data", str(folder), "--out", str(tmp_path / "events")]) == 0
    data = open_dataset(str(folder))
    for name, events in (("items", data.item_updates()), ("behaviours", data.behaviours()), ("users", data.users())):
        lines = (tmp_path / "events" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(events)

    capsys.readouterr()
    for arguments, message in (
        (["train", "--data", str(folder), "--out", str(out)], "is already there"),
        (["train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "b")], "is not a folder"),
        (["evaluate", str(tmp_path / "none"), "--data", str(folder)], "cannot be read"),
        (["export-data", "--data", str(folder), "--out", str(folder / "movies.csv")], "movies.csv"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def _as_csv(data: Dataset, folder: Path) -> None:
    """A marketplace in MovieLens' csv form."""
    movies = [
        f"{place},{place} ({1950 + place}),{'Drama' if place % 2 else 'War|Comedy'}"
        for place in range(len(data.items.ids))
    ]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")
    examples = data.examples
    columns = zip(examples.user, examples.item, examples.clicked, examples.time, strict=True)
    ratings = [f"{user},{item},{5 if clicked else 2.5},{time // 1000}" for user, item, clicked, time in columns]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
