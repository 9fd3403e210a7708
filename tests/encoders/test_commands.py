"""What the commands say of data that are damaged, empty or strange: one sentence and status 1, or a counted line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from encoders.data.dataset import Dataset
from encoders.data.store import copy, prepare
from encoders.evaluate import split_of
from tests.conftest import ROOT
from tests.encoders.small import small_data

NEW_ITEMS = 5


def strange() -> Dataset:
    """One user of the test slice never clicks; five items come with that slice, of a category and a cross that nothing
    had before, and are all that another of its users is shown in it.
    """
    data = small_data()
    split, examples, items = split_of(data), data.examples, data.items
    late = examples.time >= split.test
    silent, curious = np.unique(examples.user[late])[:2]
    item, clicked = examples.item.copy(), examples.clicked & (examples.user != silent)
    gone = np.isin(item, np.arange(NEW_ITEMS))
    item[gone] += NEW_ITEMS
    mine = np.flatnonzero(late & (examples.user == curious))
    item[mine] = np.arange(len(mine)) % NEW_ITEMS
    added = items.added.copy()
    added[:NEW_ITEMS] = split.test
    features = [
        {**row, "category": "never seen"} if k < NEW_ITEMS else row for k, row in enumerate(items.features)
    ]  # fmt: skip
    crosses = [["category:never seen"] if k < NEW_ITEMS else row for k, row in enumerate(items.crosses)]
    return dataclasses.replace(
        data,
        items=dataclasses.replace(items, features=features, crosses=crosses, added=added),
        examples=dataclasses.replace(examples, item=item, clicked=clicked),
    )


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m encoders ...`, in a process of its own."""
    argv = [sys.executable, "-m", "encoders", *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The strange data, prepared."""
    out = tmp_path_factory.mktemp("strange") / "data"
    prepare(lambda _, store: copy(strange(), store, "strange"), out, out)
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, str]:
    """A bundle trained on them for an epoch, and what was printed."""
    out = folder.parent / "bundle"
    done = command("train", "--data", folder, "--out", out, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_training_and_evaluation_count_what_they_leave_out_or_never_saw(trained: tuple[Path, str]) -> None:
    bundle, told = trained
    done = command("evaluate", bundle)
    assert done.returncode == 0, done.stderr
    data = strange()
    split, examples = split_of(data), data.examples
    users, clicks, shown = examples.user, examples.clicked, examples.time >= split.test
    rates = [clicks[shown & (users == user)].mean() for user in np.unique(users[shown])]
    mixed, none = sum(0 < rate < 1 for rate in rates), sum(rate == 0 for rate in rates)
    new = int((shown & (examples.item < NEW_ITEMS)).sum())
    assert none >= 1
    assert new > 0
    wanted = [
        f"GAUC is over {mixed} of {len(rates)} users; the others have examples of one class only, "
        f"{none} of them no click",
        f"test slice: {new} examples of an item with a new category, which training did not see",
        f"test slice: {new} examples of an item with a new cross, which training did not see",
    ]
    assert done.stdout.splitlines()[4:] == wanted
    assert done.stdout in told  # training ends with the same table
    assert re.search(r"^[1-9]\d* of \d+ users have no click in the training slice", told, flags=re.M)


def test_an_action_that_training_did_not_see_is_counted(trained: tuple[Path, str], tmp_path: Path) -> None:
    data = strange()
    renamed = dataclasses.replace(data, actions=(*data.actions[:-1], "gaze"))
    split = split_of(data)
    prepare(lambda _, store: copy(renamed, store, "strange"), tmp_path, tmp_path / "data")
    done = command("evaluate", trained[0], "--data", tmp_path / "data")
    count = int(((data.log.action == len(data.actions) - 1) & (data.log.time < split.end)).sum())
    assert count > 0
    assert f"test slice: {count} behaviours of a new action, which training did not see" in done.stdout


def _table(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        change(pl.read_parquet(path)).write_parquet(path)

    return apply


def _nan(items: pl.DataFrame) -> pl.DataFrame:
    values = items["embedding"].to_numpy().copy()
    values[7, 3] = np.nan
    return items.with_columns(embedding=pl.Series(values, dtype=items["embedding"].dtype))


def _backwards(log: pl.DataFrame) -> pl.DataFrame:
    """The second row of the first user is earlier than the first."""
    early = log["time"][0] - 1
    return log.with_columns(time=pl.Series([log["time"][0], early, *log["time"][2:]]))


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing column": (
        _table("examples", lambda table: table.drop("clicked")),
        r"examples\.parquet: no column clicked; there are user, item, time",
    ),
    "NaN embedding": (
        _table("items", _nan),
        r"items\.parquet: row 7: embedding holds a value that is not a finite number",
    ),
    "behaviours backwards": (
        _table("behaviours", _backwards),
        r"behaviours\.parquet: row 1: time goes backwards within a user",
    ),
    "examples backwards": (
        _table("examples", _backwards),
        r"examples\.parquet: row 1: time goes backwards within a user",
    ),
    "no examples": (_table("examples", lambda table: table.head(0)), r"the data hold no examples"),
    "one time": (
        _table("examples", lambda table: table.with_columns(time=pl.lit(table["time"][0]))),
        r"the data's times do not part into training, validation and test",
    ),
    "no click": (
        _table("examples", lambda table: table.with_columns(clicked=pl.lit(False))),
        r"every example of the training slice has the label False",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_data_that_cannot_be_used_end_with_one_sentence(folder: Path, tmp_path: Path, name: str) -> None:
    damage, sentence = BREAKS[name]
    copied = tmp_path / "data"
    copied.mkdir()
    for path in folder.glob("*.*"):
        (copied / path.name).write_bytes(path.read_bytes())
    damage(copied)
    done = command("train", "--data", copied, "--out", tmp_path / "bundle", "--epochs", 1)
    assert done.returncode == 1
    assert re.fullmatch(rf"train: {sentence}.*\n", done.stderr), done.stderr
    assert not (tmp_path / "bundle").exists()


def test_an_evaluation_of_an_empty_slice_ends_with_one_sentence(
    trained: tuple[Path, str], folder: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "data"
    copied.mkdir()
    for path in folder.glob("*.*"):
        (copied / path.name).write_bytes(path.read_bytes())
    BREAKS["one time"][0](copied)
    done = command("evaluate", trained[0], "--data", copied)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"evaluate: {BREAKS['one time'][1]}\n", done.stderr)


def test_published_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for text, sentence in (
        ("1,2,3,pv\n", r"UserBehavior\.csv:1: 4 fields, 5 are needed"),
        ("1,2,3,pv,soon\n", r"UserBehavior\.csv:1: time 'soon' is not a whole number"),
        ("", r"UserBehavior\.csv holds no rows"),
    ):
        (source / "UserBehavior.csv").write_text(text)
        format_ = "taobao-user-behavior"
        done = command("data", "prepare", "--format", format_, "--input", source, "--out", tmp_path / "out")
        assert done.returncode == 1
        assert re.fullmatch(rf"data: {sentence}\n", done.stderr)
