"""A prepared folder -> `Dataset` whose columns lie on disk, so that data which do not fit in memory can be trained on.

The folder is the exchange form: Parquet that any tool can write, and `meta.json`.

| file | columns |
|---|---|
| items.parquet | `id` text, `embedding` [e] f4, `crosses` list of text, `added` ms, `removed` ms or null |
| | and any `feature:NAME`, `attribute:NAME` |
| users.parquet | `id` text, and any `feature:NAME` |
| behaviours.parquet | `user`, `item`: row numbers of the tables above; `action`: place in meta's actions; `time` ms |
| examples.parquet | `user`, `item`, `clicked` bool, `time` ms, and `probability` f4 where a generator knows it |
| meta.json | `format` 1, `name`, `actions`; what else `data prepare` writes there is for people |

A feature is text, a list of text or a number, null where there is none; an attribute is text, a number or a bool. Both
logs are sorted by user, then time.

Opening checks all of it once and writes memory maps to `cache/`, reading the Parquet in batches. They are a derived
copy, made anew when a Parquet file's size or time of change is another. An open data set costs memory for what is
touched, not for what is there: a training touches all 17 bytes of an example, in pages that the system takes back, and
adds no more than half of that (tests/encoders/test_memory.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from encoders.data.dataset import NEVER, BehaviourLog, DataError, Dataset, Examples, Items, UserProfiles
from encoders.data.store import FORMAT, META
from encoders.lock import alone

TABLES = ("items", "users", "behaviours", "examples")
_CACHE_FORMAT = 1
_ROWS = 65_536  # rows of a table in memory at a time
_WIDE_ROWS = 8_192  # the same where embeddings are read
_UNUSABLE_ID = re.compile(r"[\x00-\x1f\x7f]")
_ID_BYTES = 128
_LATEST = 253_402_300_800_000  # the year 10000, ms

_Value = TypeVar("_Value")


class Rows(Sequence[_Value]):
    """JSON values on disk: `NAME.json` holds them one after the other, `NAME.ends.npy` where each ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ends = _column(folder, f"{name}.ends")
        path = folder / f"{name}.json"
        self._text = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> _Value: ...
    @overload
    def __getitem__(self, place: slice) -> list[_Value]: ...
    def __getitem__(self, place: int | slice) -> _Value | list[_Value]:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        place %= len(self)
        begin = int(self._ends[place - 1]) if place else 0
        value: _Value = orjson.loads(self._text[begin : int(self._ends[place])].tobytes())
        return value

    def __iter__(self) -> Iterator[_Value]:
        for at in range(0, len(self), _ROWS):
            ends = self._ends[at : at + _ROWS].tolist()
            begin = int(self._ends[at - 1]) if at else 0
            text = self._text[begin : ends[-1]].tobytes()
            first = begin
            for end in ends:
                yield orjson.loads(text[begin - first : end - first])
                begin = end


def is_prepared(folder: Path) -> bool:
    return (folder / META).is_file()


def open_prepared(folder: Path) -> Dataset:
    """The data set in a prepared folder. Raises DataError naming file, row and column."""
    name, actions = _meta(folder)
    stamp = _stamp(folder)
    cache = folder / "cache"
    if not _fresh(cache, stamp):
        with alone(folder / ".lock"):  # processes that train together open the folder together
            if not _fresh(cache, stamp):
                _fill(folder, cache, actions, stamp)
    probability = _column(cache, "examples.probability")
    return Dataset(
        name=name,
        items=Items(
            ids=Rows(cache, "items.id"),
            features=Rows(cache, "items.feature"),
            crosses=Rows(cache, "items.crosses"),
            attributes=Rows(cache, "items.attribute"),
            embeddings=_column(cache, "items.embedding"),
            added=_column(cache, "items.added"),
            removed=_column(cache, "items.removed"),
        ),
        profiles=UserProfiles(ids=Rows(cache, "users.id"), features=Rows(cache, "users.feature")),
        log=BehaviourLog(*(_column(cache, f"behaviours.{column}") for column in ("user", "item", "action", "time"))),
        examples=Examples(
            user=_column(cache, "examples.user"),
            item=_column(cache, "examples.item"),
            clicked=_column(cache, "examples.clicked"),
            time=_column(cache, "examples.time"),
            probability=probability if len(probability) else None,
        ),
        actions=actions,
    )


def _meta(folder: Path) -> tuple[str, tuple[str, ...]]:
    path = folder / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, name, actions = meta["format"], meta["name"], meta["actions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not read: {error!r}") from error
    if version != FORMAT:
        raise DataError(f"{path} has format {version!r}; this version reads {FORMAT}: prepare the data again")
    listed = isinstance(actions, list) and all(isinstance(action, str) for action in actions)
    if not isinstance(name, str) or not listed or len(actions) > 255:
        raise DataError(f"{path}: name must be text, and actions a list of at most 255 texts")
    return name, tuple(actions)


def _stamp(folder: Path) -> dict[str, Any]:
    """What tells whether the cache belongs to the Parquet files."""
    stamp: dict[str, Any] = {"format": _CACHE_FORMAT, "meta": (folder / META).read_text(encoding="utf-8")}
    for table in TABLES:
        path = folder / f"{table}.parquet"
        if not path.is_file():
            raise DataError(f"{folder} holds no {path.name}")
        stamp[table] = [path.stat().st_size, path.stat().st_mtime_ns]
    return stamp


def _fresh(cache: Path, stamp: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((cache / "stamp.json").read_text(encoding="utf-8")) == stamp)
    except (OSError, ValueError):
        return False


def _fill(folder: Path, cache: Path, actions: tuple[str, ...], stamp: dict[str, Any]) -> None:
    """Check the tables and write the memory maps; the stamp last, so that half a cache is never taken for one."""
    part = folder / "cache.part"
    for old in (part, cache):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    try:
        items = _fill_items(_Table(folder / "items.parquet"), part)
        users = _fill_users(_Table(folder / "users.parquet"), part)
        sizes = (users, items)
        _fill_log(_Table(folder / "behaviours.parquet"), part, sizes, ("action", np.uint8, len(actions)))
        _fill_log(_Table(folder / "examples.parquet"), part, sizes, ("clicked", np.bool_, 2))
        (part / "stamp.json").write_text(json.dumps(stamp), encoding="utf-8")
        part.rename(cache)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Table:
    """A Parquet file, read in batches; `at` is the number of the batch's first row."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._lazy = pl.scan_parquet(path, glob=False)
        try:
            self.kinds = self._lazy.collect_schema()
            self.rows = int(self._lazy.select(pl.len()).collect().item())
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{self.name} cannot be read: {error}") from error
        self.at = 0

    def need(self, **kinds: Callable[[pl.DataType], bool]) -> None:
        for column, fits in kinds.items():
            if column not in self.kinds:
                raise DataError(f"{self.name}: no column {column}; there are {', '.join(self.kinds)}")
            if not fits(self.kinds[column]):
                raise DataError(f"{self.name}: column {column} cannot be {self.kinds[column]}")

    def batches(self, columns: Sequence[str], rows: int = _ROWS) -> Iterator[pl.DataFrame]:
        try:
            self.at = 0
            for batch in self._lazy.select(columns).collect_batches(chunk_size=rows):
                yield batch
                self.at += len(batch)
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{self.name} cannot be read: {error}") from error

    def demand(self, good: npt.NDArray[np.bool_] | pl.Series, what: str) -> None:
        """Raises DataError with the first row of the batch that is not good."""
        good = np.asarray(good, dtype=bool)
        if not good.all():
            raise DataError(f"{self.name}: row {self.at + int(good.argmin())}: {what}")

    def whole(self, batch: pl.DataFrame, column: str, below: int, start: int = 0) -> npt.NDArray[np.int64]:
        self.demand(batch[column].is_not_null(), f"{column} is null")
        values = batch[column].cast(pl.Int64).to_numpy()
        self.demand((values >= start) & (values < below), f"{column} is not in {start}..{below - 1}")
        return values


def _fill_items(table: _Table, cache: Path) -> int:
    table.need(
        id=_is_text,
        embedding=_is_vector,
        crosses=_is_texts,
        added=_is_whole,
        removed=_is_whole,
    )
    dim = int(table.kinds["embedding"].shape[0])  # type: ignore[attr-defined]
    _fill_rows(table, cache, ("feature", "attribute"))
    with (
        _Array(cache / "items.embedding.npy", np.float32, (table.rows, dim)) as embeddings,
        _Array(cache / "items.added.npy", np.int64, (table.rows,)) as added,
        _Array(cache / "items.removed.npy", np.int64, (table.rows,)) as removed,
        _Json(cache, "items.crosses", table.rows) as crosses,
    ):
        for batch in table.batches(["embedding", "crosses", "added", "removed"], _WIDE_ROWS):
            table.demand(batch["embedding"].is_not_null(), "embedding is null")
            vectors = batch["embedding"].explode(empty_as_null=False, keep_nulls=False)
            numbers = vectors.cast(pl.Float32).fill_null(float("nan")).to_numpy().reshape(len(batch), dim)
            table.demand(np.isfinite(numbers).all(axis=1), "embedding holds a value that is not a finite number")
            embeddings.write(numbers)
            names = batch["crosses"].to_list()
            table.demand(np.array([not row or None not in row for row in names]), "crosses hold a null")
            crosses.write([row or [] for row in names])
            added.write(table.whole(batch, "added", _LATEST, -_LATEST))
            ends = batch["removed"].cast(pl.Int64).fill_null(NEVER)
            table.demand(ends >= batch["added"], "removed is before added")
            removed.write(ends.to_numpy())
    return table.rows


def _fill_users(table: _Table, cache: Path) -> int:
    table.need(id=_is_text)
    _fill_rows(table, cache, ("feature",))
    return table.rows


def _fill_rows(table: _Table, cache: Path, prefixes: Sequence[str]) -> None:
    """Ids, features and attributes of items or users, as JSON."""
    stem = table.name.removesuffix(".parquet")
    for prefix in prefixes:
        named = {column: column.partition(":")[2] for column in table.kinds if column.startswith(f"{prefix}:")}
        table.need(**dict.fromkeys(named, _is_feature if prefix == "feature" else _is_attribute))
        with _Json(cache, f"{stem}.{prefix}", table.rows) as out:
            if not named:
                out.write([{}] * table.rows)
                continue
            for batch in table.batches(list(named)):
                _demand_finite(table, batch)
                rows = batch.rename(named).iter_rows(named=True)
                out.write([{name: value for name, value in row.items() if value is not None} for row in rows])
    hashes: list[npt.NDArray[np.uint64]] = []
    with _Json(cache, f"{stem}.id", table.rows) as out:
        for batch in table.batches(["id"]):
            ids = batch["id"]
            good = [id is not None and 0 < len(id.encode()) <= _ID_BYTES and not _UNUSABLE_ID.search(id) for id in ids]
            table.demand(np.array(good), f"the id is empty, longer than {_ID_BYTES} bytes, or has a control character")
            out.write(ids.to_list())
            hashes.append(ids.hash().to_numpy())
    _demand_distinct(table, hashes)


def _demand_distinct(table: _Table, hashes: list[npt.NDArray[np.uint64]]) -> None:
    """No id twice; remembers 8 bytes per id, and the ids themselves only where hashes are equal."""
    values, counts = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *hashes]), return_counts=True)
    several = pl.Series(values[counts > 1], dtype=pl.UInt64)
    if not len(several):
        return
    seen: set[str] = set()
    for batch in table.batches(["id"]):
        ids = batch["id"]
        for row in np.flatnonzero(ids.hash().is_in(several.implode()).to_numpy()):
            if ids[int(row)] in seen:
                raise DataError(f"{table.name}: row {table.at + int(row)}: the id {ids[int(row)]!r} stands twice")
            seen.add(ids[int(row)])


def _demand_finite(table: _Table, batch: pl.DataFrame) -> None:
    for column in batch.columns:
        if batch[column].dtype.is_float():
            finite = batch[column].cast(pl.Float32, strict=False).is_finite().fill_null(True)
            table.demand(finite, f"{column} is not a finite number of 32 bits")
        elif isinstance(batch[column].dtype, pl.List):
            table.demand(
                batch[column].list.drop_nulls().list.len().eq_missing(batch[column].list.len()),
                f"{column} holds a null",
            )


def _fill_log(table: _Table, cache: Path, sizes: tuple[int, int], coded: tuple[str, type[np.generic], int]) -> None:
    code, kind, below = coded
    table.need(user=_is_whole, item=_is_whole, time=_is_whole, **{code: _is_bool if kind is np.bool_ else _is_whole})
    stem = table.name.removesuffix(".parquet")
    known = "probability" in table.kinds and stem == "examples"
    columns: dict[str, type[np.generic]] = {"user": np.int32, "item": np.int32, "time": np.int64, code: kind}
    with ExitStack() as files:
        arrays = {
            name: files.enter_context(_Array(cache / f"{stem}.{name}.npy", dtype, (table.rows,)))
            for name, dtype in columns.items()
        }
        chances = files.enter_context(
            _Array(cache / f"{stem}.probability.npy", np.float32, (table.rows if known else 0,))
        )
        last = (-1, -_LATEST)
        for batch in table.batches([*columns, *(["probability"] if known else [])]):
            user = table.whole(batch, "user", sizes[0])
            time = table.whole(batch, "time", _LATEST, -_LATEST)
            step = np.diff(user, prepend=last[0])
            table.demand(step >= 0, "users go backwards; the rows must be sorted by user, then time")
            table.demand((step > 0) | (np.diff(time, prepend=last[1]) >= 0), "time goes backwards within a user")
            last = (int(user[-1]), int(time[-1])) if len(user) else last
            arrays["user"].write(user)
            arrays["time"].write(time)
            arrays["item"].write(table.whole(batch, "item", sizes[1]))
            arrays[code].write(table.whole(batch, code, below))
            if known:
                chance = batch["probability"].cast(pl.Float32).fill_null(float("nan")).to_numpy()
                table.demand((chance >= 0) & (chance <= 1), "probability is not in 0..1")
                chances.write(chance)


class _Array:
    """A .npy file of known shape, written from front to back without holding it."""

    def __init__(self, path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
        self._dtype = np.dtype(dtype)
        self._file: BinaryIO = path.open("wb")
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> _Array:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())


class _Json:
    """The two files of `Rows`."""

    def __init__(self, cache: Path, name: str, rows: int) -> None:
        self._files = ExitStack()
        self._text: BinaryIO = self._files.enter_context((cache / f"{name}.json").open("wb"))
        self._ends = self._files.enter_context(_Array(cache / f"{name}.ends.npy", np.int64, (rows,)))
        self._end = 0

    def __enter__(self) -> _Json:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def write(self, values: Sequence[Any]) -> None:
        texts = [orjson.dumps(value) for value in values]
        ends = self._end + np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._text.write(b"".join(texts))
        self._ends.write(ends)
        self._end = int(ends[-1]) if len(ends) else self._end


def _column(cache: Path, name: str) -> npt.NDArray[Any]:
    path = cache / f"{name}.npy"
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return array


def _is_text(kind: pl.DataType) -> bool:
    return kind == pl.String


def _is_texts(kind: pl.DataType) -> bool:
    return kind == pl.List(pl.String)


def _is_vector(kind: pl.DataType) -> bool:
    return isinstance(kind, pl.Array) and kind.inner.is_numeric() and len(kind.shape) == 1 and kind.shape[0] > 0


def _is_whole(kind: pl.DataType) -> bool:
    return kind.is_integer()


def _is_bool(kind: pl.DataType) -> bool:
    return kind == pl.Boolean


def _is_feature(kind: pl.DataType) -> bool:
    return _is_text(kind) or _is_texts(kind) or kind.is_integer() or kind.is_float()


def _is_attribute(kind: pl.DataType) -> bool:
    return _is_text(kind) or _is_bool(kind) or kind.is_integer() or kind.is_float()
