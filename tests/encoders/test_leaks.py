"""The honest inputs pass; planted leaks are caught, and the tensor is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from encoders.__main__ import main
from encoders.batches import Batch, Batches, Groups
from encoders.bundle import new_model
from encoders.config import ModelConfig
from encoders.data import leaks
from encoders.data.dataset import BehaviourLog, DataError, Dataset, Examples, Items, UserProfiles, by_user
from encoders.data.leaks import Inputs, LeakError, check, model_inputs
from encoders.data.store import copy, prepare
from encoders.evaluate import split_of
from encoders.spec import spec_of

M, U, N = 40, 12, 1_500
HOUR = 3_600_000


@pytest.fixture(scope="module")
def data() -> Dataset:
    """People who click what they like; every example is a behaviour too."""
    random = np.random.default_rng(3)
    user, item = random.integers(0, U, N).astype("i4"), random.integers(0, M, N).astype("i4")
    time = random.integers(0, 200 * HOUR, N)
    clicked = (user + item) % 3 == 0
    order = by_user(user, time)
    user, item, time, clicked = user[order], item[order], time[order], clicked[order]
    return Dataset(
        name="hand",
        items=Items(
            ids=[f"i{k}" for k in range(M)],
            features=[{"kind": f"kind {k % 5}", "price": float(k)} for k in range(M)],
            crosses=[[f"kind:{k % 5}"] for k in range(M)],
            attributes=[{} for _ in range(M)],
            embeddings=random.standard_normal((M, 8)).astype("f4"),
            added=np.zeros(M, dtype="i8"),
            removed=np.full(M, np.iinfo(np.int64).max),
        ),
        profiles=UserProfiles([f"u{k}" for k in range(U)], [{"segment": f"s{k % 3}"} for k in range(U)]),
        log=BehaviourLog(user, item, clicked.astype("u1"), time),
        examples=Examples(user, item, clicked, time),
        actions=("view", "click"),
    )


CONFIG = ModelConfig(embedding_dim=8)


def _built(data: Dataset, batches: type[Batches] = Batches) -> Iterator[Batch]:
    """As `model_inputs`, of a data set's own items and with a fixed config."""
    split = split_of(data)
    spec = spec_of(data, split)
    made = batches(data, spec, CONFIG)
    model = new_model(CONFIG, spec, 0).eval()
    groups = made.groups(split.test, split.end)
    for place in range(0, len(groups), 3):
        yield made.batch(groups.select(np.array([place])), model)


def _with_feature(data: Dataset, name: str, values: np.ndarray) -> Dataset:
    features = [{**row, name: float(value)} for row, value in zip(data.items.features, values, strict=True)]
    return dataclasses.replace(data, items=dataclasses.replace(data.items, features=features))


def all_clicks(data: Dataset) -> Iterator[Batch]:
    """Leak: an item's click rate over all examples."""
    clicks = np.bincount(data.examples.item, weights=data.examples.clicked, minlength=M)
    return _built(_with_feature(data, "rate", clicks / np.maximum(1, np.bincount(data.examples.item, minlength=M))))


def all_shown(data: Dataset) -> Iterator[Batch]:
    """Leak without a label: how often an item is met, the future included."""
    return _built(_with_feature(data, "met", np.bincount(data.log.item, minlength=M)))


def past_shown(data: Dataset) -> Iterator[Batch]:
    """No leak: how often an item was met before the test slice."""
    return _built(
        _with_feature(data, "met", np.bincount(data.log.item[data.log.time < split_of(data).test], minlength=M))
    )


class _Inclusive(Batches):
    """Histories that hold the request's own behaviours."""

    def groups(self, since: int, until: int) -> Groups:
        groups = super().groups(since, until)
        own = np.array([np.searchsorted(self.log.time[b:e], t, side="right") + b for b, e, t in self._of(groups)])
        return dataclasses.replace(groups, history=own)

    def _of(self, groups: Groups) -> Iterator[tuple[int, int, int]]:
        for user, first in zip(groups.user, groups.first, strict=True):
            begin, end = np.searchsorted(self.log.user, [user, user + 1])
            yield int(begin), int(end), int(self.examples.time[first])


def own_behaviours(data: Dataset) -> Iterator[Batch]:
    return _built(data, _Inclusive)


def hidden_own_behaviours(data: Dataset) -> Iterator[Batch]:
    """The same leak with ages and places that look right."""
    for honest, batch in zip(_built(data), _built(data, _Inclusive), strict=True):
        users = dataclasses.replace(batch.users, ages=batch.users.ages.clamp(min=1))
        yield dataclasses.replace(batch, users=users, groups=honest.groups)


def own_label(data: Dataset) -> Iterator[Batch]:
    """Leak: the crosses of a candidate tell its label."""
    for batch in _built(data):
        crosses = batch.candidates.crosses.clone()
        crosses[0, 0] = int(batch.clicked[0, 0])
        yield dataclasses.replace(batch, candidates=dataclasses.replace(batch.candidates, crosses=crosses))


@pytest.mark.parametrize("inputs", [model_inputs, _built, past_shown])
def test_honest_inputs_pass(data: Dataset, inputs: Inputs) -> None:
    found = check(data, inputs)
    assert found.groups > 20
    assert found.cuts == 3


LEAKS: list[tuple[Inputs, str]] = [
    (all_clicks, r"candidates.features.numerics of user 'u\d+' as of .* is another when every label is inverted"),
    (
        all_shown,
        r"numerics of user 'u\d+' as of .* is another when everything from .* something of the future builds it",
    ),
    (
        own_behaviours,
        r"users.ages of user 'u\d+' as of .*: the history holds a behaviour of the request's time or later",
    ),
    (hidden_own_behaviours, r"users\..* something of the future builds it"),
    (own_label, r"candidates.crosses of .* a label builds it"),
]


@pytest.mark.parametrize(("inputs", "message"), LEAKS, ids=[inputs.__name__ for inputs, _ in LEAKS])  # type: ignore[attr-defined]
def test_planted_leaks_are_caught(data: Dataset, inputs: Inputs, message: str) -> None:
    with pytest.raises(LeakError, match=message):
        check(data, inputs)


def test_changes_are_changes(data: Dataset) -> None:
    cut = int(np.quantile(data.log.time, 0.8))
    asked = np.zeros(N, dtype=bool)
    asked[np.flatnonzero(data.examples.time >= cut)[:5]] = True
    other = leaks._changed(data, cut, asked, np.random.default_rng(0))
    past, still = data.log.time < cut, other.log.time < cut
    for name in ("user", "item", "action", "time"):
        np.testing.assert_array_equal(getattr(data.log, name)[past], getattr(other.log, name)[still])
    assert 0.3 < (~still).sum() / (~past).sum() < 0.7
    assert (other.examples.clicked == data.examples.clicked).tolist() == (data.examples.time < cut).tolist()
    moved = (data.examples.time >= cut) & ~asked
    assert (other.examples.item != data.examples.item).tolist() == moved.tolist()
    np.testing.assert_array_equal(other.examples.time, data.examples.time)


def test_nothing_to_check(data: Dataset) -> None:
    with pytest.raises(DataError, match="no request"):
        check(data, lambda _: iter(()))


def test_command(tmp_path: Path, data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(lambda _, store: copy(data, store, "hand"), tmp_path, tmp_path / "out")
    assert main(["data", "check", str(tmp_path / "out")]) == 0
    assert "no leak: the inputs of" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "holds neither" in capsys.readouterr().err
