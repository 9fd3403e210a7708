"""A model is trained once, whoever asks for it, and however often the asking is interrupted."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from encoders.bundle import BundleError, load_model
from encoders.data.dataset import Dataset
from encoders.data.fingerprint import fingerprint
from encoders.train import Fitted, TrainOptions, fit
from encoders.trials import key_of, stored, trained
from tests.encoders.small import OPTIONS, small_data

SHORT = dataclasses.replace(OPTIONS, epochs=1)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_data()


def _never(line: str) -> None:
    raise AssertionError(f"this trains again: {line}")


def _equal(one: Fitted, other: Fitted) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_is_trained_once(data: Dataset, tmp_path: Path) -> None:
    lines: list[str] = []
    first = trained(data, SHORT, tmp_path, report=lines.append)
    assert any(line.startswith("epoch 1") for line in lines)
    again = trained(data, SHORT, tmp_path, report=_never)
    plain = fit(data, SHORT, report=lines.append)
    assert _equal(first, plain)
    assert _equal(again, plain)
    assert (again.spec, again.config, again.options, again.epochs) == (plain.spec, plain.config, SHORT, 1)
    assert again.best["gauc"] == plain.best["gauc"]
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_half_trained_model_goes_on(data: Dataset, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("epoch 2"):
            raise StoppedError

    with pytest.raises(StoppedError):
        trained(data, OPTIONS, tmp_path, report=stop)
    lines: list[str] = []
    went_on = trained(data, OPTIONS, tmp_path, report=lines.append)
    assert any("going on" in line for line in lines)
    assert _equal(went_on, fit(data, OPTIONS, report=lines.append))


def test_keys_tell_data_and_options_apart(data: Dataset) -> None:
    name = fingerprint(data)
    shown = dataclasses.replace(data.examples, clicked=~data.examples.clicked)
    moved = data.items.embeddings.copy()
    moved[0, 0] += 1
    renamed = [{**data.profiles.features[0], "new": "x"}, *data.profiles.features[1:]]
    others = [
        dataclasses.replace(data, examples=shown),
        dataclasses.replace(data, items=dataclasses.replace(data.items, embeddings=moved)),
        dataclasses.replace(data, profiles=dataclasses.replace(data.profiles, features=renamed)),
    ]
    options = [
        SHORT,
        dataclasses.replace(SHORT, seed=9),
        dataclasses.replace(SHORT, model="dssm"),
        dataclasses.replace(SHORT, config=dataclasses.replace(SHORT.config, without=("bea",))),
    ]
    keys = [key_of(name, wanted) for wanted in options] + [key_of(fingerprint(other), SHORT) for other in others]
    assert len(set(keys)) == len(keys)
    assert key_of(fingerprint(small_data()), TrainOptions.from_json(SHORT.to_json())) == keys[0]


def test_two_that_ask_at_once_train_once(data: Dataset, tmp_path: Path) -> None:
    """Locks are the file's, so two openings exclude each other within a process as between two."""
    begun, go_on, lines = threading.Event(), threading.Event(), list[str]()
    found: list[Fitted] = []

    def slow(line: str) -> None:
        begun.set()
        assert go_on.wait(60)
        lines.append(line)

    first = threading.Thread(target=lambda: found.append(trained(data, SHORT, tmp_path, report=slow)))
    first.start()
    assert begun.wait(60)
    second = threading.Thread(target=lambda: found.append(trained(data, SHORT, tmp_path, report=_never)))
    second.start()
    go_on.set()
    first.join(60)
    second.join(60)
    assert len(found) == 2
    assert _equal(*found)


def test_a_bundle_that_says_nothing_of_its_training(tmp_path: Path) -> None:
    from encoders.bundle import seeded_bundle

    seeded_bundle(tmp_path / "b")
    assert load_model(tmp_path / "b").manifest.model == "aif"
    with pytest.raises(BundleError, match="does not say how its model was trained"):
        stored(tmp_path / "b")
