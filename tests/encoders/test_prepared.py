"""A prepared folder gives back what went in, from disk, and says what is wrong with one that others wrote."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.__main__ import main
from encoders.data import prepared
from encoders.data.dataset import NEVER, BehaviourLog, DataError, Dataset, Examples, Items, UserProfiles
from encoders.data.prepared import Rows, open_prepared
from encoders.data.sorting import Sorter, distinct, records
from encoders.data.source import open_dataset
from encoders.data.store import copy, prepare


def _data(probability: bool = True) -> Dataset:
    """Three items, two users."""
    return Dataset(
        name="hand",
        items=Items(
            ids=["a", "b", "ç"],
            features=[{"kind": "x", "words": ["one", "two"], "price": 1.5, "year": 3}, {"words": []}, {"kind": "y"}],
            crosses=[["kind:x"], [], ["kind:y", "far"]],
            attributes=[{"title": "A", "bid": 0.5, "in_stock": True}, {}, {"in_stock": False}],
            embeddings=np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32),
            added=np.array([5, 6, 7]),
            removed=np.array([NEVER, 90, NEVER]),
        ),
        profiles=UserProfiles(ids=["u", "v"], features=[{"age": 30.0}, {}]),
        log=BehaviourLog(
            np.array([0, 0, 1], dtype="i4"),
            np.array([1, 0, 2], dtype="i4"),
            np.array([1, 0, 1], dtype="u1"),
            np.array([10, 20, 5]),
        ),
        examples=Examples(
            np.array([0, 1], dtype="i4"),
            np.array([2, 2], dtype="i4"),
            np.array([True, False]),
            np.array([11, 12]),
            np.array([0.25, 1], dtype="f4") if probability else None,
        ),
        actions=("view", "click"),
    )


def _equal(one: Dataset, other: Dataset) -> None:
    assert (one.name, one.actions) == (other.name, other.actions)
    for name in ("ids", "features", "crosses", "attributes"):
        assert list(getattr(one.items, name)) == list(getattr(other.items, name)), name
    assert list(one.profiles.ids) == list(other.profiles.ids)
    assert list(one.profiles.features) == list(other.profiles.features)
    for ours, theirs in ((one.items, other.items), (one.log, other.log), (one.examples, other.examples)):
        for name in ("embeddings", "added", "removed", "user", "item", "action", "clicked", "time", "probability"):
            first, second = getattr(ours, name, None), getattr(theirs, name, None)
            assert (first is None) == (second is None), name
            if first is not None and second is not None:
                assert first.dtype == second.dtype, name
                np.testing.assert_array_equal(first, second, err_msg=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(lambda _, store: copy(_data(), store, "hand"), tmp_path, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("probability", [True, False])
def test_round_trip(tmp_path: Path, probability: bool) -> None:
    data = _data(probability)
    prepare(lambda _, store: copy(data, store, "hand"), tmp_path, tmp_path / "data")
    _equal(open_prepared(tmp_path / "data"), data)
    _equal(open_dataset(str(tmp_path / "data")), data)  # this time from the cache
    assert list(open_dataset(str(tmp_path / "data")).item_updates()) == list(data.item_updates())


def test_columns_lie_on_disk(folder: Path) -> None:
    data = open_prepared(folder)
    for column in (data.log.user, data.log.time, data.examples.clicked, data.items.embeddings, data.items.added):
        assert isinstance(column, np.memmap)
        assert not column.flags.writeable
    assert isinstance(data.items.features, Rows)
    assert data.items.ids[-1] == "ç"
    assert data.items.ids[:2] == ["a", "b"]
    with pytest.raises(IndexError):
        data.items.ids[3]


def test_the_cache_follows_the_parquet_files(folder: Path) -> None:
    open_prepared(folder)
    before = (folder / "cache" / "stamp.json").stat().st_mtime_ns
    open_prepared(folder)
    assert (folder / "cache" / "stamp.json").stat().st_mtime_ns == before
    frame = pl.read_parquet(folder / "users.parquet").with_columns(pl.Series("feature:age", [31.0, 4.0]))
    frame.write_parquet(folder / "users.parquet")
    assert list(open_prepared(folder).profiles.features) == [{"age": 31.0}, {"age": 4.0}]
    os.utime(folder / "items.parquet", ns=(1, 1))
    (folder / "cache" / "items.added.npy").unlink()  # would not be looked at again if the cache were kept
    assert open_prepared(folder).items.added.tolist() == [5, 6, 7]


def test_half_a_cache_is_not_taken_for_one(folder: Path) -> None:
    data = open_prepared(folder)
    _equal(data, _data())
    (folder / "cache" / "stamp.json").write_text("{")
    (folder / "cache" / "log.junk").write_text("")
    (folder / "cache.part").mkdir()
    _equal(open_prepared(folder), _data())
    assert not (folder / "cache" / "log.junk").exists()
    assert not (folder / "cache.part").exists()


def _with(table: str, **columns: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{table}.parquet"
        pl.read_parquet(path).with_columns(**columns).write_parquet(path)

    return apply


def _without(table: str, column: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{table}.parquet"
        pl.read_parquet(path).drop(column).write_parquet(path)

    return apply


def _meta(**fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return apply


def _vectors(*rows: list[float] | None) -> pl.Series:
    return pl.Series(list(rows), dtype=pl.Array(pl.Float32, 2))


NAN = float("nan")
BREAKS: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / "users.parquet").unlink(), r"holds no users.parquet"),
    (lambda folder: (folder / "users.parquet").write_bytes(b"PAR1 no"), r"users.parquet cannot be read"),
    (lambda folder: (folder / "meta.json").write_text("{"), r"meta.json does not read"),
    (_meta(format=2), r"has format 2; this version reads 1"),
    (_meta(actions=[1]), r"actions a list of at most 255 texts"),
    (_meta(actions="view"), r"actions a list of at most 255 texts"),
    (_meta(actions=["view"]), r"behaviours.parquet: row 0: action is not in 0..0"),
    (_without("items", "embedding"), r"items.parquet: no column embedding; there are id"),
    (_with("items", embedding=_vectors([1, 0], [0, NAN], [1, 1])), r"items.parquet: row 1: embedding holds a value"),
    (_with("items", embedding=_vectors([1, 0], [0, 1], [float("inf"), 1])), r"items.parquet: row 2: embedding holds"),
    (_with("items", embedding=_vectors([1, 0], None, [1, 1])), r"items.parquet: row 1: embedding is null"),
    (_with("items", embedding=pl.Series([1.0, 2, 3])), r"items.parquet: column embedding cannot be Float64"),
    (
        _with("items", embedding=pl.Series([[]] * 3, dtype=pl.Array(pl.Float32, 0))),
        r"items.parquet: column embedding cannot be Array",
    ),
    (
        _with("items", embedding=pl.Series([["x", "1"]] * 3, dtype=pl.Array(pl.String, 2))),
        r"items.parquet: column embedding cannot be Array",
    ),
    (_with("items", added=pl.Series([1, None, 3])), r"items.parquet: row 1: added is null"),
    (
        _with("items", added=pl.Series([1, 2, 3]), removed=pl.Series([None, 1, 4])),
        r"items.parquet: row 1: removed is before added",
    ),
    (_with("items", id=pl.Series(["a", "b", "a"])), r"items.parquet: row 2: the id 'a' stands twice"),
    (_with("items", id=pl.Series(["a", "", "c"])), r"items.parquet: row 1: the id is empty, longer than 128"),
    (_with("items", id=pl.Series(["a", "b\n", "c"])), r"items.parquet: row 1: the id is empty, .*control character"),
    (_with("items", crosses=pl.Series([["a"], [None], []])), r"items.parquet: row 1: crosses hold a null"),
    (
        _with("items", **{"feature:price": pl.Series([1.0, NAN, 2.0])}),
        r"items.parquet: row 1: feature:price is not a finite",
    ),
    (
        _with("items", **{"feature:price": pl.Series([1.0, 2.0, 1e300])}),
        r"items.parquet: row 2: feature:price is not a finite number of 32 bits",
    ),
    (_with("items", **{"feature:price": pl.Series([True, False, True])}), r"column feature:price cannot be Boolean"),
    (
        _with("users", **{"feature:age": pl.Series([1.0, float("inf")])}),
        r"users.parquet: row 1: feature:age is not a finite",
    ),
    (_with("behaviours", user=pl.Series([1, 0, 1])), r"behaviours.parquet: row 1: users go backwards"),
    (_with("behaviours", time=pl.Series([20, 10, 5])), r"behaviours.parquet: row 1: time goes backwards within a user"),
    (_with("behaviours", item=pl.Series([1, 3, 2])), r"behaviours.parquet: row 1: item is not in 0..2"),
    (_with("behaviours", item=pl.Series([1.0, 2, 2])), r"behaviours.parquet: column item cannot be Float64"),
    (_with("examples", user=pl.Series([0, None])), r"examples.parquet: row 1: user is null"),
    (_with("examples", clicked=pl.Series([1, 0])), r"examples.parquet: column clicked cannot be Int64"),
    (_with("examples", time=pl.Series([11, 10**18])), r"examples.parquet: row 1: time is not in"),
    (_with("examples", probability=pl.Series([0.5, 1.5])), r"examples.parquet: row 1: probability is not in 0..1"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS)
def test_what_is_wrong_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        open_prepared(folder)
    assert not (folder / "cache").exists()


def test_those_that_open_at_once_fill_one_cache(folder: Path) -> None:
    """As the processes of torchrun do; a file's lock parts threads too."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            found = [pool.submit(open_prepared, folder) for _ in range(4)]
            assert [len(one.result().log) for one in found] == [3] * 4


def test_a_folder_of_another_s_stays(tmp_path: Path) -> None:
    (tmp_path / "data.part").mkdir()
    prepare(lambda _, store: copy(_data(), store, "made"), tmp_path, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.part"]


def test_rows_are_counted_across_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_ROWS", 1)
    monkeypatch.setattr(prepared, "_WIDE_ROWS", 1)
    _equal(open_prepared(folder), _data())
    _with("behaviours", item=pl.Series([1, 0, 9]))(folder)
    with pytest.raises(DataError, match=r"row 2: item is not in"):
        open_prepared(folder)


def test_empty_tables(tmp_path: Path) -> None:
    none = np.empty(0, dtype="i4")
    data = Dataset(
        "none",
        Items([], [], [], [], np.empty((0, 4), dtype="f4"), np.empty(0, dtype="i8"), np.empty(0, dtype="i8")),
        UserProfiles([], []),
        BehaviourLog(none, none, none.astype("u1"), none.astype("i8")),
        Examples(none, none, none.astype(bool), none.astype("i8")),
        (),
    )
    prepare(lambda _, store: copy(data, store, "none"), tmp_path, tmp_path / "data")
    _equal(open_prepared(tmp_path / "data"), data)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    rows = [f"1,{k % 3},7,pv,{1_511_600_000 + 600 * k}" for k in range(20)]
    (source / "UserBehavior.csv").write_text("\n".join([*rows, "1,1,7,pv,5", "1,1,7,pv,6"]) + "\n")
    arguments = ["data", "prepare", "--format", "taobao-user-behavior", "--input", str(source), "--out"]
    assert main([*arguments, str(out)]) == 0
    told = capsys.readouterr().out
    assert f"prepared {out}: 3 items, 1 users, 20 behaviours" in told
    assert "skipped 2 rows: behaviour: time outside the days that the data set covers" in told
    assert len(open_dataset(str(out)).log) == 20
    assert main([*arguments, str(out)]) == 1
    assert "is already there" in capsys.readouterr().err
    assert main(["data", "prepare", "--format", "kuairand", "--input", str(source), "--out", str(tmp_path / "no")]) == 1
    assert "holds no log_standard_*.csv" in capsys.readouterr().err
    assert main(["data", "prepare", "--format", "amazon", "--out", str(tmp_path / "no")]) == 1
    assert "--input is needed" in capsys.readouterr().err
    for seed in ("-1", "one", str(2**63)):
        with pytest.raises(SystemExit):
            main(["data", "check", "synthetic", "--seed", seed])
        assert f"'{seed}' is not a whole number of 0 to 2^63 - 1" in capsys.readouterr().err


ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2)), max_size=60)


@given(rows=ROWS, in_memory=st.integers(1, 70), cut=st.integers(0, 60))
def test_sorter(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, int]], in_memory: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("sorter")
    with Sorter(folder, 7, len(rows), in_memory) as sorter:
        for part in (rows[:cut], rows[cut:]):
            user, item, time, code = np.array(part, dtype=np.int64).reshape(-1, 4).T
            sorter.add(records(user, item, time, code))
        parts = list(sorter.parts())
        assert [part.tolist() for part in sorter.parts()] == [part.tolist() for part in parts]  # may be asked again
    expected = sorted(rows, key=lambda row: (row[0], row[2]))
    assert [row for part in parts for row in part.tolist()] == expected
    kept = [row for part in parts for row in distinct(part).tolist()]
    assert kept == list(dict.fromkeys(expected))
    assert not list(folder.iterdir())
