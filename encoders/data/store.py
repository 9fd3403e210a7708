"""A prepared folder, written: what every adapter hands its rows to. `prepared.py` says what the folder holds.

Order: sorted logs and examples first (they say when an item was first seen), then users and items, `meta.json` last.
Everything goes through polars' streaming writer, so memory does not grow with the tables; what does grow is 8 bytes per
item for the time it was first seen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.io.plugins import register_io_source

from encoders.data import text
from encoders.data.dataset import NEVER, DataError, Dataset
from encoders.data.sorting import IN_MEMORY, Records, Sorter

FORMAT = 1
META = "meta.json"
_ROWS = 8_192  # of items and users turned into columns at a time; also bounds the word vectors that are remembered
_ROW_GROUP = 262_144

Kinds = Mapping[str, pl.DataType | type[pl.DataType]]
Columns = Mapping[str, npt.NDArray[Any]]
_Row = TypeVar("_Row")

_LOG = ("user", "item", "action", "time")
_EXAMPLES = ("user", "item", "clicked", "time")

_KINDS: Kinds = {
    "user": pl.Int32,
    "item": pl.Int32,
    "time": pl.Int64,
    "action": pl.UInt8,
    "clicked": pl.Boolean,
    "probability": pl.Float32,
}
_TYPES: Mapping[frozenset[type], pl.DataType | type[pl.DataType]] = {
    frozenset({str}): pl.String,
    frozenset({list}): pl.List(pl.String),
    frozenset({bool}): pl.Boolean,
    frozenset({int}): pl.Int64,
    frozenset({int, float}): pl.Float64,
}


@dataclasses.dataclass(frozen=True)
class Item:
    """One item. Its embedding is that of `words`, which stands in for a multi-modal vector, unless it has one."""

    id: str
    features: Mapping[str, Any]
    crosses: list[str]
    attributes: Mapping[str, Any]
    words: Mapping[str, float] = dataclasses.field(default_factory=dict)
    embedding: npt.NDArray[np.float32] | None = None
    added: int | None = None  # ms; None: when it was first seen
    removed: int = NEVER


@dataclasses.dataclass(frozen=True)
class Profile:
    id: str
    features: Mapping[str, Any]


class Store:
    """Writes the tables of one prepared folder. `skipped` counts rows that are left out, `noted` what else is odd."""

    def __init__(self, folder: Path, in_memory: int = IN_MEMORY) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self._in_memory = in_memory
        self._seen: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._counts: dict[str, int] = {}

    def skip(self, reason: str, rows: int | np.integer) -> None:
        if rows:
            self.skipped[reason] += int(rows)

    def note(self, what: str, count: int | np.integer) -> None:
        if count:
            self.noted[what] += int(count)

    def sorter(self, name: str, users: int, expected: int) -> Sorter:
        """Close it (it is a context manager) when its rows are written."""
        return Sorter(self.folder / "parts" / name, users, expected, self._in_memory)

    def behaviours(self, parts: Iterable[Records], items: int) -> None:
        self.log("behaviours", _LOG, (_columns(part, "action") for part in parts), items)

    def examples(self, parts: Iterable[Records], items: int) -> None:
        self.log("examples", _EXAMPLES, (_columns(part, "clicked") for part in parts), items)

    def log(self, name: str, columns: Sequence[str], parts: Iterable[Columns], items: int) -> None:
        """A table of rows by user, then time. `items` is how many there are in all."""
        kinds = {column: _KINDS[column] for column in columns}
        if not len(self._seen):
            self._seen = np.full(items, NEVER, dtype=np.int64)

        def frames() -> Iterator[pl.DataFrame]:
            for part in parts:
                np.minimum.at(self._seen, part["item"], part["time"])
                yield pl.DataFrame(dict(part), schema=dict(kinds))

        self._write(name, frames(), kinds)

    def first_seen(self, item: int) -> int:
        """Time (ms) of the item's first row in the logs written so far; NEVER without one."""
        return int(self._seen[item])

    def users(self, profiles: Iterable[Profile], features: Kinds) -> None:
        kinds = {"id": pl.String, **_prefixed("feature", features)}

        def frames() -> Iterator[pl.DataFrame]:
            for rows in _batches(profiles):
                columns = {
                    "id": [row.id for row in rows],
                    **_cells("feature", features, [row.features for row in rows]),
                }
                yield pl.DataFrame(columns, schema=kinds)

        self._write("users", frames(), kinds)

    def items(self, items: Iterable[Item], features: Kinds, attributes: Kinds, dim: int = 128) -> None:
        """All items in the order of their places. One that no row names counts as added at the data's beginning."""
        kinds: dict[str, Any] = {
            "id": pl.String,
            **_prefixed("feature", features),
            **_prefixed("attribute", attributes),
            "crosses": pl.List(pl.String),
            "embedding": pl.Array(pl.Float32, dim),
            "added": pl.Int64,
            "removed": pl.Int64,
        }
        seen = self._seen
        start = int(seen.min()) if (seen != NEVER).any() else 0

        def frames() -> Iterator[pl.DataFrame]:
            at = 0
            for rows in _batches(items):
                first = np.where(seen[at : at + len(rows)] == NEVER, start, seen[at : at + len(rows)]).tolist()
                columns = {
                    "id": [row.id for row in rows],
                    **_cells("feature", features, [row.features for row in rows]),
                    **_cells("attribute", attributes, [row.attributes for row in rows]),
                    "crosses": [row.crosses for row in rows],
                    "embedding": _embeddings(rows, dim),
                    "added": [when if row.added is None else row.added for row, when in zip(rows, first, strict=True)],
                    "removed": [None if row.removed == NEVER else row.removed for row in rows],
                }
                at += len(rows)
                yield pl.DataFrame(columns, schema=kinds)

        self._write("items", frames(), kinds)

    def finish(self, name: str, form: str, actions: tuple[str, ...]) -> None:
        """Write `meta.json`, which makes the folder a prepared one."""
        meta = {
            "format": FORMAT,
            "name": name,
            "form": form,
            "actions": list(actions),
            "counts": self._counts,
            "skipped": dict(self.skipped),
            "noted": dict(self.noted),
        }
        for parts in sorted((self.folder / "parts").glob("**"), reverse=True):
            parts.rmdir()
        (self.folder / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _write(self, name: str, frames: Iterator[pl.DataFrame], kinds: Kinds) -> None:
        raised: list[Exception] = []
        rows = 0

        def source(*_: object) -> Iterator[pl.DataFrame]:  # what polars pushes down is none of our business: no filter
            nonlocal rows
            try:
                for frame in frames:
                    rows += len(frame)
                    yield frame
            except Exception as error:  # polars would wrap it
                raised.append(error)

        lazy = register_io_source(source, schema=dict(kinds))
        lazy.sink_parquet(
            self.folder / f"{name}.parquet", row_group_size=_ROW_GROUP if "embedding" not in kinds else _ROWS
        )
        if raised:
            raise raised[0]
        self._counts[name] = rows


def copy(data: Dataset, store: Store, form: str) -> None:
    """Write a data set that is in memory."""
    logs: dict[str, Columns] = {
        "behaviours": {"user": data.log.user, "item": data.log.item, "action": data.log.action, "time": data.log.time},
        "examples": {
            "user": data.examples.user,
            "item": data.examples.item,
            "clicked": data.examples.clicked,
            "time": data.examples.time,
            **({} if data.examples.probability is None else {"probability": data.examples.probability}),
        },
    }
    for name, columns in logs.items():
        parts = (
            {column: values[at : at + _ROW_GROUP] for column, values in columns.items()}
            for at in range(0, len(columns["time"]), _ROW_GROUP)
        )
        store.log(name, list(columns), parts, len(data.items.ids))
    profiles = zip(data.profiles.ids, data.profiles.features, strict=True)
    store.users((Profile(*row) for row in profiles), _kinds_of(data.profiles.features))
    items = data.items
    rows = zip(items.ids, items.rows(), items.added.tolist(), items.removed.tolist(), strict=True)
    store.items(
        (
            Item(id, row.features, row.crosses, row.attributes, embedding=row.embedding, added=added, removed=removed)
            for id, row, added, removed in rows
        ),
        _kinds_of(items.features),
        _kinds_of(items.attributes),
        items.embeddings.shape[1],
    )
    store.finish(data.name, form, data.actions)


def _kinds_of(rows: Iterable[Mapping[str, Any]]) -> Kinds:
    """The type of each feature; whole numbers where all are. Raises DataError where types are mixed."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, set()).add(type(value))
    kinds: dict[str, pl.DataType | type[pl.DataType]] = {}
    for name, types in found.items():
        for of, kind in _TYPES.items():
            if types <= of:
                kinds[name] = kind
                break
        else:
            raise DataError(f"{name} has values of several types: {', '.join(sorted(of.__name__ for of in types))}")
    return kinds


def prepare(read: Callable[[Path, Store], None], source: Path, out: Path, in_memory: int = IN_MEMORY) -> Store:
    """Let an adapter read `source` into the new folder `out`, which appears complete or not at all. Gives the store,
    which says what was skipped and noted. Raises DataError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is already there; choose another folder or remove it")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    store = Store(part, in_memory)
    try:
        read(source, store)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return store


def price_band(price: float) -> str:
    """The power of two below a price: needs nothing of the other prices, so nothing of the future."""
    return str(math.floor(math.log2(1 + price)))


def _columns(part: Records, code: str) -> dict[str, npt.NDArray[Any]]:
    values = part["code"].astype(bool) if code == "clicked" else part["code"]
    names = ("user", "item", "time")
    return {code: np.ascontiguousarray(values), **{name: np.ascontiguousarray(part[name]) for name in names}}


def _prefixed(prefix: str, kinds: Kinds) -> dict[str, Any]:
    return {f"{prefix}:{name}": kind for name, kind in kinds.items()}


def _cells(prefix: str, kinds: Kinds, rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {f"{prefix}:{name}": [row.get(name) for row in rows] for name in kinds}


def _embeddings(rows: list[Item], dim: int) -> npt.NDArray[np.float32]:
    given = [row.embedding for row in rows if row.embedding is not None]
    if len(given) == len(rows):
        return np.stack(given).astype(np.float32)
    if given:
        raise DataError("some items have an embedding and some have none")
    return text.embed([row.words for row in rows], dim)


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _ROWS)):
        yield batch
