"""Training on a small world: it learns what popularity cannot know, and no example sees itself or the future."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import lsh
from encoders.__main__ import main
from encoders.baselines import MODELS
from encoders.batches import GROUP_SIZE, GROUP_SPAN, Batches
from encoders.bundle import BundleError, load_bundle, new_model, seeded_bundle
from encoders.config import ModelConfig
from encoders.data.dataset import NEVER, DataError, Dataset, Examples
from encoders.data.source import open_dataset
from encoders.data.synthetic import Marketplace, generate
from encoders.evaluate import evaluate, figures, predict, split_of
from encoders.fold import Behaviours, Head, ItemFold, UserFold, join_scores
from encoders.spec import material_of
from encoders.train import TrainingError, TrainOptions, fit, spec_of, train
from encoders.trials import stored
from tests.encoders.small import OPTIONS, small_data

WORLD = Marketplace(users=150, items=400, examples=12_000, days=20, categories=8, brands=20)
SMALL = ModelConfig(window=20, recent=5)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return generate(WORLD, seed=7)


@pytest.fixture(scope="module")
def little() -> Dataset:
    return small_data()


def _nothing(line: str) -> None:
    """A report that is not looked at."""


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
    first, *others = trained[2]
    epochs = [line for line in others if not re.match(r"\d+ of \d+ users have no click|validation slice: ", line)]
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
    again = evaluate(bundle, data)
    assert (again.figures, again.counts, again.unseen) == tuple(trained[1][key] for key in ("test", "counts", "unseen"))


def test_tiers_part_what_serving_sees(trained: tuple[Path, dict[str, Any], list[str]], data: Dataset) -> None:
    """Tier edges are measured on candidates with their histories: none is empty and none holds all, also later on."""
    bundle, split = load_bundle(trained[0]), split_of(data)
    rows = ItemFold(bundle).encode(data.items.rows())
    batches = Batches(data, bundle.manifest.features, bundle.manifest.config)
    batches.sign(rows.signature)
    equal = batches.matches_sample(batches.groups(split.test, split.end)).astype(np.int32)
    share = lsh.tier_counts(equal[None, :], bundle.manifest.config.tier_edges)[0] / equal.size
    assert share.max() < 0.6
    assert share.min() > 0.001


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


def test_an_item_takes_little_memory() -> None:
    """Beside its embedding, which is the data's: as Python objects an item would take kilobytes."""
    held = []
    for items in (20_000, 60_000):
        data = generate(Marketplace(users=40, items=items, examples=400, past=20), seed=3)
        tracemalloc.start()
        material = material_of(data, split_of(data), OPTIONS.config, 3)
        held.append(tracemalloc.get_traced_memory())
        tracemalloc.stop()
        assert np.shares_memory(material.batches.embedding, data.items.embeddings)
    (small, _), (large, peak) = held
    assert (large - small) / 40_000 < 200
    assert peak - large < 120e6  # one part at a time, as objects


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
    options = TrainOptions(seed=3, config=SMALL, epochs=3)
    metrics = [train(data, tmp_path / name, options, report=lambda line: None) for name in ("a", "b")]
    assert metrics[0]["test"] == metrics[1]["test"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_learns(name: str, little: Dataset) -> None:
    fitted = fit(little, dataclasses.replace(OPTIONS, model=name, epochs=2, learning_rate=1e-2), report=_nothing)
    assert type(fitted.model) is MODELS[name]
    assert fitted.curve[1]["loss"] < fitted.curve[0]["loss"]
    assert not any(weights.requires_grad for weights in fitted.model.parameters())


def test_the_best_epoch_is_kept_and_patience_ends_the_training(little: Dataset) -> None:
    """With such a step the validation slice soon gets worse; the weights of its best epoch are the ones kept."""
    options = dataclasses.replace(OPTIONS, learning_rate=5e-2, averaged_steps=1, epochs=30, patience=2)
    fitted = fit(little, options, report=_nothing)
    best = fitted.best["epoch"]
    assert fitted.epochs < 30
    assert fitted.epochs == best + 2
    upto = fit(little, dataclasses.replace(options, epochs=best), report=_nothing)
    batches, split = fitted.batches(little), split_of(little)
    groups = batches.groups(split.validation, split.test)
    measured = figures(*predict(fitted.model, batches, groups))
    assert measured["gauc"] == fitted.best["gauc"] == upto.curve[-1]["gauc"]


def test_the_test_slice_does_not_enter_training(little: Dataset) -> None:
    """Other labels behind the validation slice change neither weights nor progress."""
    split = split_of(little)
    behind = little.examples.time >= split.test
    turned = dataclasses.replace(little.examples, clicked=little.examples.clicked ^ behind)
    one, other = (
        fit(data, OPTIONS, report=_nothing) for data in (little, dataclasses.replace(little, examples=turned))
    )
    state = other.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.model.state_dict().items())


def test_distillation_draws_the_student_to_the_teacher(little: Dataset) -> None:
    options = dataclasses.replace(OPTIONS, epochs=2)
    plain, early, late = (
        fit(little, dataclasses.replace(options, distil=weight, distil_after=after), report=_nothing)
        for weight, after in ((0.0, 0), (1.0, 4), (1.0, 10_000))
    )
    one, two, three = (fitted.model.state_dict() for fitted in (plain, early, late))
    assert all(torch.equal(one[name], three[name]) for name in one)  # the teacher alone does not touch the student
    assert not all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="dssm has neither teacher nor bridges"):
        TrainOptions(model="dssm", distil=1.0)


def test_bridges_start_at_the_data(little: Dataset) -> None:
    options = dataclasses.replace(OPTIONS, epochs=1, learning_rate=1e-9)
    drawn, measured = (
        fit(little, dataclasses.replace(options, bridges_from_data=there), report=_nothing).model.state_dict()
        for there in (False, True)
    )
    assert not torch.allclose(drawn["bridges"], measured["bridges"], atol=1e-3)
    length = torch.linalg.vector_norm(measured["bridges"], dim=1)
    torch.testing.assert_close(length, torch.full_like(length, OPTIONS.config.dim**0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(drawn["b1"], measured["b1"], rtol=0, atol=1e-6)


def test_towers_start_standardised(little: Dataset) -> None:
    """Their vectors of what training sees have mean 0 and variance 1; where they cannot differ, they stay as drawn."""
    options = dataclasses.replace(OPTIONS, epochs=1, learning_rate=1e-9)
    fitted = fit(little, options, report=_nothing)
    batches, split = fitted.batches(little), split_of(little)
    known = np.flatnonzero(little.items.added < split.validation)
    users = np.unique(batches.groups(split.start, split.validation).user)
    with torch.inference_mode():
        items = fitted.model.item_vectors(batches.candidates(known[None, :]).features)
        profiles = fitted.model.profile_tower(batches.profiles(users[batches.known[users]]))
    for vectors in (items, profiles):
        assert vectors.mean(dim=0).abs().max() < 1e-3
        assert vectors.square().mean().item() == pytest.approx(1.0, rel=1e-3)

    alike = dataclasses.replace(little.profiles, features=[{"country": "pt"}] * len(little.profiles.ids))
    same = fit(dataclasses.replace(little, profiles=alike), options, report=_nothing).model
    assert all(torch.isfinite(tensor).all() for tensor in same.state_dict().values())
    assert same.profile_tower.outer.weight.abs().max() < 1
    drawn = fit(little, dataclasses.replace(options, towers_from_data=False), report=_nothing).model
    assert drawn.item_tower.outer.weight.abs().max() < 1 < fitted.model.item_tower.outer.weight.abs().max()


def test_profiles_of_the_future_do_not_shape_the_features(little: Dataset) -> None:
    """Users whose first example comes with the validation slice have no say in the feature spec."""
    split, own = split_of(little), little.examples
    late = own.user < 4
    kept = ~late | (own.time >= split.validation)
    columns = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    examples = dataclasses.replace(
        own, **{name: None if column is None else column[kept] for name, column in columns.items()}
    )
    assert (examples.user < 4).any()
    features = list(little.profiles.features)
    features[:4] = [{**one, "new": f"value {k}", "height": 1e6 * k} for k, one in enumerate(features[:4])]
    profiles = dataclasses.replace(little.profiles, features=features)
    data = dataclasses.replace(little, examples=examples)
    assert spec_of(dataclasses.replace(data, profiles=profiles), split) == spec_of(data, split)
    assert spec_of(dataclasses.replace(little, profiles=profiles), split) != spec_of(little, split)


def test_half_precision_steps_end_near_those_of_full(little: Dataset) -> None:
    full, half = (
        fit(little, dataclasses.replace(OPTIONS, epochs=1, autocast=autocast), report=_nothing)
        for autocast in (False, True)
    )
    assert full.curve[0]["loss"] == pytest.approx(half.curve[0]["loss"], rel=2e-2)
    assert full.curve[0]["loss"] != half.curve[0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in half.model.state_dict().values())


def test_log(little: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log.csv"
    fitted = fit(little, dataclasses.replace(OPTIONS, batch_groups=3, epochs=3), log=path, report=_nothing)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    of_epochs = [row for row in rows if row["gauc"]]
    assert [int(row["step"]) for row in of_epochs] == [row["step"] for row in fitted.curve]
    assert [float(row["gauc"]) for row in of_epochs] == [row["gauc"] for row in fitted.curve]
    assert any(int(row["step"]) == 100 and not row["gauc"] and float(row["loss"]) > 0 for row in rows)
    assert int(rows[-1]["examples"]) == 3 * int(of_epochs[0]["examples"])


def test_a_diverging_training_stops_and_keeps_its_checkpoint(little: Dataset, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"the loss is .* at step \d+ with learning rate 1e\+30") as caught:
        fit(little, options, checkpoint=tmp_path / "c", save_seconds=0.0, report=_nothing)
    step = int(re.search(r"step (\d+)", str(caught.value))[1])  # type: ignore[index]
    lines: list[str] = []
    with pytest.raises(TrainingError):
        fit(little, options, checkpoint=tmp_path / "c", report=lines.append)
    assert f"at step {step - 1}" in lines[-1]


def test_what_the_data_lack_is_said(little: Dataset) -> None:
    split, examples = split_of(little), little.examples
    inside = (examples.time >= split.validation) & (examples.time < split.test)
    lines: list[str] = []
    even = dataclasses.replace(examples, clicked=np.where(inside, examples.user % 2 == 0, examples.clicked))
    fitted = fit(dataclasses.replace(little, examples=even), OPTIONS, report=lines.append)
    assert any("both classes" in line and "AUC or LogLoss decides" in line for line in lines)
    assert fitted.best["gauc"] is None
    assert fitted.best["auc"] == max(row["auc"] for row in fitted.curve)

    cold = dataclasses.replace(examples, clicked=examples.clicked & (examples.user != examples.user[0]))
    lines.clear()
    fit(dataclasses.replace(little, examples=cold), dataclasses.replace(OPTIONS, epochs=1), report=lines.append)
    assert any(re.match(r"[1-9]\d* of \d+ users have no click in the training slice", line) for line in lines)

    for clicked, message in ((examples.clicked & inside, "label False"), (examples.clicked | ~inside, "label True")):
        with pytest.raises(DataError, match=message):
            fit(
                dataclasses.replace(little, examples=dataclasses.replace(examples, clicked=clicked)),
                OPTIONS,
                report=_nothing,
            )
    columns = (examples.user, examples.item, examples.clicked, examples.time)
    none = dataclasses.replace(little, examples=type(examples)(*(column[:0] for column in columns)))
    with pytest.raises(DataError, match="hold no examples"):
        fit(none, OPTIONS, report=_nothing)


def test_options_survive_json() -> None:
    options = dataclasses.replace(OPTIONS, minutes=2.0, config=dataclasses.replace(SMALL, without=("bea",)))
    assert TrainOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    for changes, message in (
        ({"model": "svm"}, "model 'svm' is not known"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(options, **changes)  # type: ignore[arg-type]


def test_time_limit_ends_the_training(data: Dataset, tmp_path: Path) -> None:
    options = TrainOptions(minutes=0.001, config=SMALL)
    metrics = train(data, tmp_path / "b", options, report=lambda line: None)
    assert metrics["epochs"] <= 1
    assert load_bundle(tmp_path / "b").manifest.metrics["epochs"] == metrics["epochs"]


def test_rivals_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "films", tmp_path / "bundle"
    folder.mkdir()
    _as_csv(small_data(), folder)
    train_it = ["train", "--data", str(folder), "--epochs", "2", "--log", str(tmp_path / "log.csv")]
    kept = ["--checkpoint", str(tmp_path / "c")]
    assert main([*train_it, "--out", str(out), "--without", "bea, simtier", "--distil", "0.5", *kept]) == 0
    bundle = load_bundle(out)
    assert bundle.manifest.config.without == ("bea", "simtier")
    assert bundle.manifest.metrics["options"]["distil"] == 0.5
    assert (tmp_path / "c").exists()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    cache = ["--cache", str(tmp_path / "cache")]
    asked = ["evaluate", str(out), "--data", str(folder), "--against", "dssm,cold", *cache]
    assert main(asked) == 0
    first = capsys.readouterr().out
    assert "training dssm" in first
    assert main(asked) == 0
    again = capsys.readouterr().out
    assert "training" not in again
    table = again[again.index("model") :].splitlines()[-4:]
    assert table == first.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["model", "bundle", "dssm", "cold"]
    assert re.search(r"0\.\d{4} \(0\.\d{4} \.\. [01]\.\d{4}\)", table[1])
    assert len(table[2].split()) == len(table[1].split()) + 5  # the difference, its interval, and p

    assert main([*asked, "--requests", "20"]) == 0
    ranked = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in ranked] == ["whole", "bundle", "dssm", "cold"]
    assert [len(re.findall(r"\d\.\d{4} \(", line)) for line in ranked] == [0, 4, 4, 4]

    # a checkpoint goes on to more epochs, and rivals have no limit of time
    more = [*train_it, "--epochs", "3", "--without", "bea, simtier", "--distil", "0.5", *kept]
    assert main([*more, "--out", str(tmp_path / "more")]) == 0
    assert "in epoch 3" in capsys.readouterr().out
    short = tmp_path / "short"
    assert main([*train_it, "--minutes", "0.001", "--out", str(short)]) == 0
    assert load_bundle(short).manifest.metrics["epochs"] < 2
    assert main(["evaluate", str(short), "--against", "dssm", *cache]) == 0
    assert "0.001 minutes at most, its rivals under no limit" in capsys.readouterr().out
    assert {stored(path.parent).epochs for path in (tmp_path / "cache").glob("*/manifest.json")} == {2}

    # what the bundle has seen is no test slice, and rivals are trained on what it was
    past = tmp_path / "past" / "films"
    past.mkdir(parents=True)
    whole = small_data()
    seen = whole.examples.time < split_of(whole).validation
    columns = {name: getattr(whole.examples, name)[seen] for name in ("user", "item", "clicked", "time")}
    _as_csv(dataclasses.replace(whole, examples=Examples(**columns)), past)
    assert main(["evaluate", str(out), "--data", str(past)]) == 1
    assert "but the bundle has seen examples up to" in capsys.readouterr().err
    assert main([*train_it, "--model", "dssm", "--out", str(tmp_path / "dssm")]) == 0
    assert main(["evaluate", str(tmp_path / "dssm"), "--data", str(folder)]) == 0
    with pytest.raises(BundleError, match="cannot be served"):
        load_bundle(tmp_path / "dssm")
    capsys.readouterr()
    for arguments, message in (
        ([*train_it, "--out", str(tmp_path / "b"), "--without", "head"], "'head' cannot be switched off"),
        ([*train_it, "--out", str(tmp_path / "b"), "--epochs", "0"], "epochs must be at least 1"),
        ([*train_it, "--out", str(tmp_path / "b"), "--seed", "1", *kept], "is of a training with other"),
        ([*asked[:-4], "--against", "svm"], "model 'svm' is not known"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


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
    shown = capsys.readouterr()
    assert ("popularity" in shown.out, shown.err) == (True, "")
    assert main(["evaluate", str(out)]) == 0  # on what it was trained on
    assert capsys.readouterr().out == shown.out
    others = tmp_path / "other films"
    shutil.copytree(folder, others)
    assert main(["evaluate", str(out), "--data", str(others)]) == 0
    assert "the bundle was trained on films, these data are other films" in capsys.readouterr().err
    assert main(["evaluate", str(out), "--data", str(others), "--against", "dssm"]) == 1
    assert "rivals are trained on these data, the bundle was on others" in capsys.readouterr().err
    folder.rename(tmp_path / "away")
    assert main(["evaluate", str(out)]) == 1
    assert "the bundle was trained on it: name the data with --data" in capsys.readouterr().err
    (tmp_path / "away").rename(folder)
    assert main(["export-data", "--data", str(folder), "--out", str(tmp_path / "events")]) == 0
    data = open_dataset(str(folder))
    for name, events in (("items", data.item_updates()), ("behaviours", data.behaviours()), ("users", data.users())):
        lines = (tmp_path / "events" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(events)

    seeded_bundle(tmp_path / "untrained")
    capsys.readouterr()
    for arguments, message in (
        (["train", "--data", str(folder), "--out", str(out)], "is already there"),
        (["train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "b")], "is not a folder"),
        (["train", "--data", "never read", "--out", str(folder / "movies.csv" / "b")], "movies.csv: File exists"),
        (["evaluate", str(tmp_path / "none"), "--data", str(folder)], "cannot be read"),
        (["evaluate", str(tmp_path / "untrained")], "does not say what it was trained on"),
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
