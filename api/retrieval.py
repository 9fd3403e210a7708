"""Retrieval: candidates for users who bring none, from nearest neighbours and from popularity.

Beside user inference in a request, and never waiting for it: the query is the mean `vector` of the user's newest
behaviours. The index belongs to one generation, is built by a process of its own (`python -m api retrieval`) from the
arena and the histories, published by renaming one small file, and mapped read-only by all API processes; a build never
interrupts a request.

Files of a build, below `<generation>/retrieval/<build>/`: `index.usearch`, `keys.npy` u8[m,2], `ids.bin` (the ids'
UTF-8, one after the other), `offsets.npy` i8[m+1] into it, `popular.npy` i8[p] (positions, most popular first).
`retrieval/current` names the build.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from index.arena import ArenaReader
from index.errors import StoreError
from index.histories import HistoriesReader
from index.keys import keys_of
from index.layout import RowLayout
from index.lock import WriterLock
from index.n2o import N2OReader
from infra.settings import Settings

LOG = logging.getLogger(__name__)

NEWEST = 50  # behaviours whose mean vector is the query
POPULAR_SHARE = 5  # at least every fifth candidate comes from popularity
_POPULAR_MAX = 20_000
_REST = 5.0  # times a build's own time without another
_KEPT_BUILDS = 2  # an API process may still be opening the one before

Positions = NDArray[np.int64]


class RetrievalError(StoreError):
    """A build cannot be opened."""


class Channel(Protocol):
    """One way to find candidates."""

    def positions(self, query: NDArray[np.float32] | None, count: int) -> Positions:
        """At most `count` different positions, best first; none where the channel has nothing to go by."""
        ...


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Approximate nearest neighbours by cosine; usearch releases the GIL while it searches."""

    index: Index
    items: int

    def positions(self, query: NDArray[np.float32] | None, count: int) -> Positions:
        if query is None or self.items == 0 or not np.any(query):
            return np.zeros(0, np.int64)
        return np.asarray(self.index.search(query, min(count, self.items), threads=1).keys).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Popular:
    """The same for everybody: items by behaviours, then the rest in the order of the index."""

    ranked: Positions

    def positions(self, query: NDArray[np.float32] | None, count: int) -> Positions:  # noqa: ARG002 the interface's
        return self.ranked[:count]


@dataclasses.dataclass(frozen=True)
class RetrievalView:
    """A build, mapped read-only, with the arena of its generation. `built`: ms since the epoch."""

    generation: str
    build: str
    built: int
    keys: NDArray[np.uint64]
    arena: ArenaReader
    nearest: Channel
    popular: Channel
    _ids: NDArray[np.uint8]
    _offsets: NDArray[np.int64]

    @classmethod
    def open(cls, settings: Settings, generation: str, arena: ArenaReader) -> RetrievalView | None:
        """The newest build; None where there is none yet."""
        folder = settings.generation_dir(generation) / "retrieval"
        build = current(folder)
        if build is None:
            return None
        path = folder / build
        keys = np.load(path / "keys.npy", mmap_mode="r")
        index = Index.restore(path / "index.usearch", view=True)
        if index is None:
            raise ValueError("index.usearch is no index")
        return cls(
            generation,
            build,
            int(build.partition("-")[0]),
            keys,
            arena,
            Nearest(index, len(keys)),
            Popular(np.load(path / "popular.npy", mmap_mode="r")),
            np.memmap(path / "ids.bin", np.uint8, "r") if len(keys) else np.zeros(0, np.uint8),
            np.load(path / "offsets.npy", mmap_mode="r"),
        )

    @staticmethod
    def newer(
        known: RetrievalView | None, settings: Settings, generation: str, arena: ArenaReader
    ) -> RetrievalView | None:
        """The view to use from now on: `known` unless there is another build, or a generation that has one by now."""
        folder = settings.generation_dir(generation) / "retrieval"
        try:
            build = current(folder)
        except OSError as error:
            raise RetrievalError(f"{folder} cannot be read: {error}") from error
        same = known is not None and (known.generation, known.build) == (generation, build) and known.arena is arena
        if build is None or same:
            return known
        try:
            return RetrievalView.open(settings, generation, arena)
        except FileNotFoundError:
            return known  # replaced and removed in between; the next look finds its successor
        except (OSError, EOFError, ValueError, RuntimeError) as error:
            raise RetrievalError(f"the retrieval index {build} of {generation} cannot be opened: {error}") from error

    def retrieve(self, newest: NDArray[np.uint64], count: int) -> Positions:
        """At most `count` different positions for a user whose newest behaviours have these keys u8[n, 2]."""
        if count >= len(self.keys):
            return np.arange(len(self.keys))
        popular = self.popular.positions(None, count)
        near = self.nearest.positions(self._query(newest), count)
        first = popular[: max(count // POPULAR_SHARE, count - len(near))]
        taken = np.zeros(len(self.keys), bool)
        taken[first] = True
        return np.concatenate([first, near[~taken[near]]])[:count]

    def ids(self, positions: Positions) -> list[str]:
        at, to = self._offsets[positions], self._offsets[positions + 1]
        return [self._ids[a:b].tobytes().decode() for a, b in zip(at.tolist(), to.tolist(), strict=True)]

    def _query(self, newest: NDArray[np.uint64]) -> NDArray[np.float32] | None:
        cold, found = self.arena.gather_cold(newest)
        return cold["vector"][found].astype(np.float32).mean(axis=0) if found.any() else None


def arena_of(settings: Settings, generation: str) -> ArenaReader:
    """The arena of a generation whose bundle is not loaded. Raises OSError, LayoutError or StoreError."""
    folder = settings.generation_dir(generation)
    return ArenaReader.open(folder / "n2o", RowLayout.of_manifest(folder / "bundle" / "manifest.json"))


def current(folder: Path) -> str | None:
    try:
        return (folder / "current").read_text()
    except FileNotFoundError:
        return None


def build(settings: Settings, generation: str, arena: ArenaReader) -> int:
    """Builds and publishes the index of all rows that are live now; returns how many. Readers see the old one or the
    new one. Raises StoreLockedError where another process builds one, RetrievalError or OSError where it cannot be
    written; then nothing is left of it.
    """
    folder = settings.generation_dir(generation) / "retrieval"
    lock = WriterLock(folder)
    try:
        _remove_unended(folder)  # of a process that was killed
        return _build(settings, generation, arena, folder)
    except RuntimeError as error:  # usearch's
        raise RetrievalError(f"the index cannot be written: {error}") from error
    finally:
        _remove_unended(folder)
        lock.release()


def _build(settings: Settings, generation: str, arena: ArenaReader, folder: Path) -> int:
    keys, cold = arena.snapshot()
    keys, vectors, ids = _named(settings, generation, keys, cold["vector"])
    index = Index(
        ndim=vectors.shape[1], metric="cos", dtype="f16", connectivity=16, expansion_add=64, expansion_search=64
    )
    if len(keys):
        index.add(np.arange(len(keys), dtype=np.uint64), vectors.astype(np.float32), threads=1)
    name = f"{time.time_ns() // 1_000_000}-{len(keys)}"
    path = folder / f"{name}.new"
    path.mkdir()
    index.save(path / "index.usearch")
    np.save(path / "keys.npy", keys)
    np.save(path / "popular.npy", _popular(settings, keys))
    np.save(path / "offsets.npy", np.cumsum([0, *map(len, ids)], dtype=np.int64))
    (path / "ids.bin").write_bytes(b"".join(ids))
    path.rename(folder / name)
    pointer = folder / "current.new"
    pointer.write_text(name)
    pointer.replace(folder / "current")
    for old in sorted(path for path in folder.iterdir() if path.is_dir())[:-_KEPT_BUILDS]:
        shutil.rmtree(old, ignore_errors=True)
    return len(keys)


def _named(
    settings: Settings, generation: str, keys: NDArray[np.uint64], vectors: NDArray[np.float16]
) -> tuple[NDArray[np.uint64], NDArray[np.float16], list[bytes]]:
    """The rows in order of their keys with their ids. The id of an integer is in its key, any other's is read from
    RocksDB.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys, vectors = keys[order], vectors[order]
    if not keys[:, 0].any():
        return keys, vectors, [b"%d" % low for low in keys[:, 1].tolist()]
    rows = N2OReader(settings.generation_dir(generation) / "n2o")
    try:
        texts = rows.ids()
    finally:
        rows.close()
    known = dict(zip(map(tuple, keys_of(texts, settings.hash_key.encode()).tolist()), texts, strict=True))
    names = [known.get((high, low)) if high else str(low) for high, low in keys.tolist()]
    there = np.array([name is not None for name in names], bool)  # a row may be newer than what was read of RocksDB
    return keys[there], vectors[there], [name.encode() for name in names if name is not None]


def _popular(settings: Settings, keys: NDArray[np.uint64]) -> Positions:
    """Positions by popularity, the most popular first; items without any behaviour follow, spread evenly."""
    try:
        histories = HistoriesReader(settings.histories_dir)
    except StoreError:
        wanted, counts = np.zeros((0, 2), np.uint64), np.zeros(0, np.int64)
    else:
        wanted, counts = histories.popular()
        histories.close()
    position = {key: at for at, key in enumerate(map(tuple, keys.tolist()))}
    ranked = [position.get((high, low), -1) for high, low in wanted[np.argsort(-counts, kind="stable")].tolist()]
    known = np.array([at for at in ranked if at >= 0][:_POPULAR_MAX], np.int64)
    rest = np.setdiff1d(np.arange(len(keys)), known)
    np.random.default_rng(0).shuffle(rest)
    return np.concatenate([known, rest[: _POPULAR_MAX - len(known)]])


def _remove_unended(folder: Path) -> None:
    for path in folder.glob("*.new"):
        shutil.rmtree(path, ignore_errors=True)


@dataclasses.dataclass
class Built:
    """What a build was made of, to see whether another is due."""

    rows: str = ""
    at: float = 0.0
    took: float = 0.0


def due(arena: ArenaReader, built: Built, interval_s: float) -> bool:
    """Whether rows have changed since and the interval has passed, a longer one after a long build: of a catalogue that
    always changes it would otherwise take most of a processor.
    """
    if built.rows and time.monotonic() - built.at < max(interval_s, _REST * built.took):
        return False
    return _state(arena) != built.rows


def rebuild(settings: Settings, generation: str, arena: ArenaReader, built: Built) -> None:
    """One build, recorded in `built`."""
    state, began = _state(arena), time.monotonic()
    count = build(settings, generation, arena)
    built.rows, built.at = state, time.monotonic()
    built.took = built.at - began
    LOG.info("retrieval built", extra={"generation": generation, "items": count, "seconds": round(built.took, 3)})


def _state(arena: ArenaReader) -> str:
    progress = arena.progress()
    return json.dumps([progress.count.tolist(), progress.digest.tolist()])
