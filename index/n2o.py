"""The N2O index of one generation on one host: RocksDB is the truth, the arena is what requests read.

`replicate` gives blocks of rows to N2OWriter. Order of its writes, each safe to be killed after:
 1. one RocksDB WriteBatch: rows, progress (covered offsets, offsets in `rows.<g>`, counts, digests), the batch's
 number and ids 2. the rows into the arena, each published by itself 3. progress and the batch's number into the arena
A writer that starts finds the arena at the same batch as RocksDB (nothing to do), one behind (killed between 1 and 3:
the ids of the last batch are applied again), or in any other state (built anew from RocksDB). Either way arena and
RocksDB must agree in count and digest before anything else happens. The WAL is not fsynced: what a power loss takes,
Kafka replays, because the offsets are lost with the rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from rocksdict import AccessType, Checkpoint, DBCompressionType, Options, Rdict, WriteBatch

from index import table
from index.arena import PROGRESS, Progress
from index.arena_writer import ArenaWriter
from index.errors import N2OError, StoreMissingError
from index.keys import digest_of, keys_of
from index.layout import RowLayout, aligned_empty
from index.lock import WriterLock
from index.plan import plan
from index.row_codec import StoredRow, decode_records, decode_row, encode_rows

META = b"meta"  # JSON: what these rows are
STATE = b"state"  # STATE_HEAD, then PROGRESS per partition
LAST = b"last"  # ids of the last batch, separated by newlines (ids have no control characters)
ROW = b"r"  # + the id's UTF-8: a row (row_codec)
AFTER_ROWS = b"s"
STATE_HEAD = np.dtype([("store", "<u8"), ("batch", "<u8")])
WHOLE, DELETED, PATCHED = 0, 1, 2  # kinds of a block's rows; of a patched one only version, times and attributes count
REBUILD_ROWS = 16384  # rows per step when the arena is built anew


@dataclasses.dataclass(frozen=True)
class FillProof:
    """Row count and digest of a partition at the block's `covered` offset; sent with the last block of a fill."""

    count: int
    digest: int


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """The columns of one block: n rows of one `items` partition. For a deleted row the other columns hold zeros, and a
    patched one has no hot record and no vector: it keeps those that the item's row had.
    """

    partition: int
    covered: int  # last `items` offset covered by this and all earlier blocks of the partition
    ids: list[str]
    versions: NDArray[np.uint64]
    offsets: NDArray[np.int64]  # in `items`
    kinds: NDArray[np.uint8]  # WHOLE, DELETED or PATCHED
    hot: NDArray[Any]  # layout.hot [n]; slot_version is the arena's and ignored
    cold: NDArray[Any]  # layout.cold [n]; visible_time is the host's and ignored (N2OWriter.apply sets it)
    attributes: list[bytes]  # JSON objects
    fill: FillProof | None = None

    @property
    def deleted(self) -> NDArray[np.bool_]:
        return np.equal(self.kinds, DELETED)


class N2OWriter:
    """The only writer of an index (StoreLockedError otherwise). `step(number)` is called after each write of
    `apply`. `without_row` counts the patched rows that were skipped because the item had none to keep."""

    def __init__(
        self,
        path: Path,
        layout: RowLayout,
        partitions: int,
        hash_key: bytes,
        step: Callable[[int], object] = int,
    ) -> None:
        self._path = path
        self._layout = layout
        self._partitions = partitions
        self._hash_key = hash_key
        self._step = step
        self._store, self._batch, self._progress = 0, 0, Progress.empty(partitions)
        self.without_row = 0
        self._copied = threading.Lock()  # RocksDB cannot be closed while another thread is in it
        with contextlib.ExitStack() as undo:
            self._lock = WriterLock(path)
            undo.callback(self._lock.release)
            self._rocks = Rdict(str(path / "rocks"), _options())
            undo.callback(self._rocks.close)
            self._load()
            self._arena = self._open_arena()
            undo.pop_all()

    def apply(self, batches: Sequence[tuple[RowBatch, int]], by_version: bool = True) -> int:
        """Blocks with their offsets in `rows.<generation>`, in log order. Returns how many rows were put or removed.
        Raises ValueError on a block that does not fit this index. Not `by_version`: a row replaces what is stored
        whatever the versions are; then an item may occur once in a call, and deletions of it before that.

        A row's `visible_time` in the arena is taken after RocksDB has the rows, immediately before the first of them is
        published: requests see the row at that time at the earliest, and when `apply` returns at the latest. RocksDB's
        copy, taken before its own write, is what the row has after the arena was built anew."""
        if not batches:
            return 0
        for batch, _ in batches:
            self._check(batch)
        hot = _stacked([batch.hot for batch, _ in batches], self._layout.hot)
        cold = _stacked([batch.cold for batch, _ in batches], self._layout.cold)
        ids = [one for batch, _ in batches for one in batch.ids]
        attributes = [one for batch, _ in batches for one in batch.attributes]
        offsets = np.concatenate([batch.offsets for batch, _ in batches]).astype(np.int64)
        cold["version"] = np.concatenate([batch.versions for batch, _ in batches])
        keys = keys_of(ids, self._hash_key)
        progress = self._progress.copy()
        deleted = np.concatenate([batch.deleted for batch, _ in batches])
        deleted[self._inherit(batches, hot, cold)] = True  # what never was does not become a row
        kinds = self._plan(batches, keys, offsets, cold["version"].copy(), deleted, progress, by_version)

        self._arena.make_room(len(keys))  # a full disk stops here, before anything is written
        cold["visible_time"] = _now()
        changed = np.flatnonzero(kinds)
        partition_of = np.repeat([batch.partition for batch, _ in batches], [len(batch.ids) for batch, _ in batches])
        write = WriteBatch(raw_mode=True)
        values = encode_rows(
            partition_of[changed], offsets[changed], hot[changed], cold[changed], [attributes[i] for i in changed]
        )
        names = [ids[i].encode() for i in changed]
        for name, value, kind in zip(names, values, kinds[changed].tolist(), strict=True):
            if kind == table.PUT:
                write.put(ROW + name, value)
            else:
                write.delete(ROW + name)
        write.put(LAST, b"\n".join(names))
        write.put(STATE, self._state(self._batch + 1, progress))
        self._rocks.write(write)
        self._step(1)

        cold["visible_time"] = _now()
        self._arena.apply(keys, kinds, hot, cold)
        self._step(2)

        self._batch, self._progress = self._batch + 1, progress
        self._arena.publish_progress(self._batch, progress)
        self._step(3)
        return len(changed)

    def rows_offsets(self) -> NDArray[np.int64]:
        """Next offset to read of `rows.<generation>` per partition, -1: none."""
        return self._progress.rows_offset.copy()

    def progress(self) -> Progress:
        return self._progress.copy()

    def reconsider(self) -> None:
        """Forgets how far the index has come, but none of its rows: all of `items` is to be applied again, and then
        `settle` is called.
        """
        self._remove([], keys_of([], self._hash_key), self._unknown())

    def settle(self, live: Sequence[NDArray[np.uint64]], covered: Sequence[int], rows_offset: Sequence[int]) -> bool:
        """Deletes every row that is not live, and says so how far the index is, in one write. Per partition: `live`,
        the digests (digest_of key and version) of the rows that there are to be, `covered`, the last `items` offset
        that they reflect, and `rows_offset`, the next one to read of `rows.<generation>`.

        False where live rows are missing because the index had newer versions of them (an item that was forgotten may
        be made again with any): those were deleted, and all of `items` has to be applied once more, not by version.
        """
        wanted = np.sort(np.concatenate(live))
        progress = self._unknown()
        progress.count[:], progress.digest[:] = 0, 0
        gone, keys_of_gone = [], [keys_of([], self._hash_key)]
        for names, keys, partitions, _, cold in self._chunks():
            digests = digest_of(keys, cold["version"])
            at = np.searchsorted(wanted, digests)
            kept = at < len(wanted)
            kept[kept] = wanted[at[kept]] == digests[kept]
            np.add.at(progress.count, partitions[kept], 1)
            np.add.at(progress.digest, partitions[kept], digests[kept])
            gone += [names[at] for at in np.flatnonzero(~kept)]
            keys_of_gone.append(keys[~kept])
        whole = bool(np.array_equal(progress.count, [len(digests) for digests in live]))
        if whole:
            progress.covered[:], progress.rows_offset[:], progress.filled[:] = covered, rows_offset, True
        self._remove(gone, np.concatenate(keys_of_gone), progress)
        return whole

    def checkpoint(self, folder: Path) -> Progress:
        """A copy of RocksDB as of one moment, of hard links where that can be, in a new folder; gives how far it is.
        May run beside `apply`, in another thread.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self._copied:
            self._rocks.flush()  # releases the GIL; the checkpoint does the same first, and would not
            Checkpoint(self._rocks).create_checkpoint(str(folder))
        copy = Rdict(str(folder), _options(), access_type=AccessType.read_only())
        try:
            return _stored_progress(copy, self._partitions, folder)[1]
        finally:
            copy.close()

    def close(self) -> None:
        self._arena.close()
        with self._copied:
            self._rocks.close()
        self._lock.release()

    def _check(self, batch: RowBatch) -> None:
        sizes = {len(batch.ids), len(batch.versions), len(batch.offsets), len(batch.kinds), len(batch.hot)}
        sizes |= {len(batch.cold), len(batch.attributes)}
        if len(sizes) != 1:
            raise ValueError("the columns of a block differ in length")
        if not 0 <= batch.partition < self._partitions:
            raise ValueError(f"partition {batch.partition} of {self._partitions}")
        if batch.hot.dtype != self._layout.hot or batch.cold.dtype != self._layout.cold:
            raise ValueError("the block has another row layout")
        if len(batch.offsets) and int(batch.offsets.max()) > batch.covered:
            raise ValueError("a row of the block lies beyond the offset that the block covers")

    def _inherit(self, batches: Sequence[tuple[RowBatch, int]], hot: NDArray[Any], cold: NDArray[Any]) -> list[int]:
        """Gives patched rows the hot record and the vector of the item's row before them, in these blocks or in the
        index, and counts those without. Their places.
        """
        wanted = {batch.ids[row] for batch, _ in batches for row in np.flatnonzero(batch.kinds == PATCHED)}
        if not wanted:
            return []
        latest = self._records(sorted(wanted))
        covered, place, without = self._progress.covered.tolist(), 0, []
        for batch, _ in batches:
            for name, offset, kind in zip(batch.ids, batch.offsets.tolist(), batch.kinds.tolist(), strict=True):
                if name in wanted and offset > covered[batch.partition]:
                    before = latest.pop(name, None)
                    if kind == PATCHED and before is not None:
                        hot[place], cold["vector"][place] = before
                    elif kind == PATCHED:
                        without.append(place)
                    if kind == WHOLE or (kind == PATCHED and before is not None):
                        latest[name] = hot[place], cold["vector"][place]
                place += 1
            covered[batch.partition] = max(covered[batch.partition], batch.covered)
        self.without_row += len(without)
        return without

    def _records(self, names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """Hot record and vector of the stored rows of ids."""
        found = zip(names, _values(self._rocks, [name.encode() for name in names]), strict=True)
        values = {name: value for name, value in found if value is not None}
        hot, cold = _zeros(len(values), self._layout.hot), _zeros(len(values), self._layout.cold)
        decode_records(list(values.values()), hot, cold)
        return {name: (hot[at], cold["vector"][at]) for at, name in enumerate(values)}

    def _plan(
        self,
        batches: Sequence[tuple[RowBatch, int]],
        keys: NDArray[np.uint64],
        offsets: NDArray[np.int64],
        versions: NDArray[np.uint64],
        deleted: NDArray[np.bool_],
        progress: Progress,
        by_version: bool,
    ) -> NDArray[np.uint8]:
        """kinds u1[n]; changes `progress`."""
        stored_versions, stored = self._arena.versions(keys)
        proofs = [batch.fill or FillProof(0, 0) for batch, _ in batches]
        kinds = np.zeros(len(keys), np.uint8)
        plan(
            np.concatenate([[0], np.cumsum([len(batch.ids) for batch, _ in batches])]).astype(np.int64),
            np.array([batch.partition for batch, _ in batches], np.int64),
            np.array([batch.covered for batch, _ in batches], np.int64),
            np.array([rows_offset + 1 for _, rows_offset in batches], np.int64),
            np.array([batch.fill is not None for batch, _ in batches], np.bool_),
            np.array([proof.count for proof in proofs], np.int64),
            np.array([proof.digest for proof in proofs], np.uint64),
            keys,
            versions,
            offsets,
            deleted,
            digest_of(keys, versions),
            stored,
            stored_versions if by_version else np.zeros_like(stored_versions),
            digest_of(keys, stored_versions),
            progress.covered,
            progress.rows_offset,
            progress.count,
            progress.digest,
            progress.filled,
            progress.mismatch,
            kinds,
        )
        return kinds

    def _unknown(self) -> Progress:
        """The rows that there are, and nothing of what they cover."""
        empty = Progress.empty(self._partitions)
        return dataclasses.replace(empty, count=self._progress.count.copy(), digest=self._progress.digest.copy())

    def _remove(self, names: Sequence[bytes], keys: NDArray[np.uint64], progress: Progress) -> None:
        """The writes of `apply`, for rows to be deleted and another progress."""
        write = WriteBatch(raw_mode=True)
        for name in names:
            write.delete(ROW + name)
        write.put(LAST, b"\n".join(names))
        write.put(STATE, self._state(self._batch + 1, progress))
        self._rocks.write(write)
        self._step(1)
        kinds = np.full(len(keys), table.REMOVE, np.uint8)
        self._arena.apply(keys, kinds, _zeros(len(keys), self._layout.hot), _zeros(len(keys), self._layout.cold))
        self._step(2)
        self._batch, self._progress = self._batch + 1, progress
        self._arena.publish_progress(self._batch, progress)
        self._step(3)

    def _state(self, batch: int, progress: Progress) -> bytes:
        return np.array((self._store, batch), STATE_HEAD).tobytes() + progress.to_array().tobytes()

    def _load(self) -> None:
        """Sets store, batch and progress from RocksDB; a new RocksDB is described first."""
        meta = {
            "format": 1,
            "layout": self._layout.to_json(),
            "partitions": self._partitions,
            "hash_key": keys_of(["the key that these rows were stored under"], self._hash_key).tolist(),
        }
        found = self._rocks.get(META)
        if found is None:
            if next(self._rows(), None) is not None:
                raise N2OError(f"{self._path} holds rows but not what they are")
            self._store = secrets.randbits(64)
            write = WriteBatch(raw_mode=True)
            write.put(META, json.dumps(meta).encode())
            write.put(LAST, b"")
            write.put(STATE, self._state(0, Progress.empty(self._partitions)))
            self._rocks.write(write)
        elif json.loads(found) != meta:
            names = [name for name, value in meta.items() if json.loads(found).get(name) != value]
            raise N2OError(f"{self._path} was made with another {' and '.join(names)}")
        head, self._progress = _stored_progress(self._rocks, self._partitions, self._path)
        self._store, self._batch = int(head["store"]), int(head["batch"])

    def _open_arena(self) -> ArenaWriter:
        arena = ArenaWriter.open(self._path, self._layout, self._partitions, self._store)
        if arena is None:
            return self._rebuilt_arena()
        digest = int(arena.digest)
        if arena.batch == self._batch - 1:
            digest += self._catch_up(arena)
            arena.publish_progress(self._batch, self._progress)
        wanted = int(self._progress.digest.sum(dtype=np.uint64))
        agree = arena.items == self._progress.count.sum() and digest % (1 << 64) == wanted
        if arena.batch != self._batch or not agree:
            return self._rebuilt_arena()
        return arena

    def _catch_up(self, arena: ArenaWriter) -> int:
        """Applies the last batch again. Returns what that adds to the digest."""
        names = [name for name in (self._rocks.get(LAST) or b"").split(b"\n") if name]
        keys = keys_of([name.decode() for name in names], self._hash_key)
        values = _values(self._rocks, names)
        exists = np.array([value is not None for value in values], np.bool_)
        hot, cold = _zeros(len(names), self._layout.hot), _zeros(len(names), self._layout.cold)
        found_hot, found_cold = hot[exists], cold[exists]
        decode_records([value for value in values if value is not None], found_hot, found_cold)
        hot[exists], cold[exists] = found_hot, found_cold
        before = _digest_sum(arena, keys)
        arena.apply(keys, np.where(exists, table.PUT, table.REMOVE).astype(np.uint8), hot, cold)
        return _digest_sum(arena, keys) - before

    def _rebuilt_arena(self) -> ArenaWriter:
        """All rows of RocksDB in a new arena, in force when they are complete. Raises N2OError when they are not those
        that were stored: a damaged RocksDB can open without complaint and hold half of them."""
        arena = ArenaWriter.create(self._path, self._layout, self._partitions, int(self._progress.count.sum()))
        count = np.zeros(self._partitions, np.int64)
        digest = np.zeros(self._partitions, np.uint64)
        with ThreadPoolExecutor(1) as other:  # the next chunk is read meanwhile
            put = other.submit(lambda: None)
            for _, keys, partitions, hot, cold in self._chunks():
                np.add.at(count, partitions, 1)
                np.add.at(digest, partitions, digest_of(keys, cold["version"]))
                put.result()
                put = other.submit(arena.apply, keys, np.full(len(keys), table.PUT, np.uint8), hot, cold)
            put.result()
        if not np.array_equal(count, self._progress.count) or not np.array_equal(digest, self._progress.digest):
            raise N2OError(
                f"{self._path} holds {int(count.sum())} rows where {int(self._progress.count.sum())} were stored, "
                "or other versions of them; the generation must be filled anew"
            )
        arena.publish(self._store, self._batch, self._progress)
        return arena

    def _rows(self) -> Iterator[tuple[bytes, bytes]]:
        return _all_rows(self._rocks, self._path)

    def _chunks(self) -> Iterator[tuple[list[bytes], NDArray[np.uint64], NDArray[np.int64], Any, Any]]:
        """Of all stored rows, some thousand at a time: ids, keys, partitions, hot and cold records."""
        rows = self._rows()
        while chunk := list(itertools.islice(rows, REBUILD_ROWS)):
            names = [name for name, _ in chunk]
            hot = aligned_empty(len(chunk), self._layout.hot)
            cold = aligned_empty(len(chunk), self._layout.cold)
            partitions, _ = decode_records([value for _, value in chunk], hot, cold)
            yield names, keys_of([name.decode() for name in names], self._hash_key), partitions, hot, cold


class N2OReader:
    """Single rows, from another process than the writer's (a RocksDB secondary instance). Raises StoreMissingError."""

    def __init__(self, path: Path) -> None:
        if not (path / "rocks" / "CURRENT").exists():
            raise StoreMissingError(f"{path} holds no N2O index yet")
        self._path = path
        # a secondary instance writes its log, and nothing else, into a folder: once open, that needs no name any more
        with tempfile.TemporaryDirectory(prefix="forerank-n2o-") as own:
            self._rocks = Rdict(str(path / "rocks"), _options(), access_type=AccessType.secondary(own))

    def get(self, ids: Sequence[str]) -> list[StoredRow | None]:
        """The rows as they are now; None where there is none. Costs some milliseconds: not for the request path."""
        self._rocks.try_catch_up_with_primary()
        values = _values(self._rocks, [one.encode() for one in ids])
        return [None if value is None else decode_row(value) for value in values]

    def ids(self) -> list[str]:
        """Ids of all live rows, for the retrieval builder. Raises N2OError when they cannot be read to the end."""
        self._rocks.try_catch_up_with_primary()
        return [name.decode() for name, _ in _all_rows(self._rocks, self._path)]

    def close(self) -> None:
        self._rocks.close()


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_compression_type(DBCompressionType.none())  # half floats do not compress
    options.set_max_background_jobs(2)
    options.set_max_open_files(-1)  # a secondary instance needs all of them
    options.set_max_total_wal_size(256 << 20)
    options.set_keep_log_file_num(2)
    return options


def _stored_progress(rocks: Rdict, partitions: int, path: Path) -> tuple[Any, Progress]:
    """STATE_HEAD and progress. Raises N2OError."""
    state = rocks.get(STATE)
    if state is None or len(state) != STATE_HEAD.itemsize + PROGRESS.itemsize * partitions:
        raise N2OError(f"{path} has no readable progress")
    head = np.frombuffer(state, STATE_HEAD, 1)[0]
    return head, Progress.from_array(np.frombuffer(state, PROGRESS, partitions, STATE_HEAD.itemsize))


def _all_rows(rocks: Rdict, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """(id, value) of all rows. Raises N2OError when the iteration ends early."""
    last = ROW
    pairs = cast("Iterator[tuple[bytes, bytes]]", rocks.items(from_key=ROW))  # end in silence where one is damaged
    for key, value in pairs:
        if not key.startswith(ROW):
            return
        last = key
        yield key[len(ROW) :], value
    iterator = rocks.iter()
    iterator.seek(last)
    if iterator.valid():
        iterator.next()
    try:
        iterator.status()
    except Exception as error:
        raise N2OError(f"{path} cannot be read to its end: {error}") from error


def _values(rocks: Rdict, names: Sequence[bytes]) -> list[bytes | None]:
    """The stored rows of ids."""
    return cast("list[bytes | None]", rocks.get([ROW + name for name in names])) if names else []


def _stacked(arrays: Sequence[NDArray[Any]], kind: np.dtype[np.void]) -> NDArray[Any]:
    """One aligned array of all records."""
    out = aligned_empty(sum(map(len, arrays)), kind)
    out.view(np.uint8)[:] = np.frombuffer(b"".join([array.tobytes() for array in arrays]), np.uint8)
    return out


def _zeros(count: int, kind: np.dtype[np.void]) -> NDArray[Any]:
    out = aligned_empty(count, kind)
    out.view(np.uint8)[:] = 0
    return out


def _digest_sum(arena: ArenaWriter, keys: NDArray[np.uint64]) -> int:
    """Of the live rows of these keys."""
    versions, exists = arena.versions(keys)
    return int(digest_of(keys[exists], versions[exists]).sum(dtype=np.uint64))


def _now() -> int:
    return time.time_ns() // 1_000_000
