"""Behaviours and profiles of the host's users: one writer (replicate-histories), read by all API processes.

An LMDB environment with four tables, keyed by the user (length byte + UTF-8 of the id):

    users       HEAD: the chunks in use, position, erasure
    chunks      user + chunk number u8 big-endian -> RECORDs; read in key order they are in (event_time, offset) order
    profiles    PROFILE, then the features' JSON
    meta        length, hash_key (a key made with it), actions (JSON list, place = code), offsets (JSON list of
                [topic, partition, next offset])

Guarantees: one `apply` is one transaction, so a reader sees all of it or nothing, at once after the commit. A record
whose offset is not above its user's newest was applied before and changes nothing (a user's records come from one
partition, in offset order). A user keeps exactly the newest `length` behaviours by (event_time, offset), an event id
counts once among them, and what was published at or before `erased_at` is gone and stays out. Commits are synced in
the order that keeps the store whole; a power loss can take the last one together with its offsets, and Kafka replays
it.

Chosen over RocksDB by measurement: a secondary instance costs 3 ms per catch-up and whole values rewrite too much.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from index.errors import HistoriesError, StoreMissingError
from index.keys import digest_of, keys_of
from index.lock import WriterLock

CHUNK = 100  # behaviours per chunk
MAP_SIZE = 256 << 30  # address space, not disk
ACTIONS_MAX = 256  # codes are one byte; the last stands for all names that come later
OTHER = "other"
NEVER = -(1 << 63)

HEAD = np.dtype(
    [("first", "<u8"), ("next", "<u8"), ("count", "<u8"), ("position", "<i8"), ("erased_at", "<i8")]
)  # chunks first..next-1 with count behaviours
RECORD = np.dtype(
    [
        ("high", "<u8"),  # the item's key
        ("low", "<u8"),
        ("time", "<i8"),
        ("publish", "<i8"),
        ("offset", "<i8"),
        ("event", "<u8"),  # 64 bits of the event id's key
        ("action", "u1"),
        ("zero", "u1", (7,)),
    ]
)
PROFILE = np.dtype([("publish", "<i8"), ("offset", "<i8")])


class StoredBehaviour(NamedTuple):
    """One record of `behaviours`; times in ms since the epoch, `publish_time` the log append time."""

    user_id: str
    item_id: str
    event_id: str
    action: str
    event_time: int
    publish_time: int
    partition: int
    offset: int


class StoredProfile(NamedTuple):
    """One record of `users`: a profile (`features` is a JSON object), or an erasure (`erased_at`)."""

    user_id: str
    features: bytes | None
    erased_at: int | None
    publish_time: int
    partition: int
    offset: int


@dataclasses.dataclass(frozen=True)
class History:
    """Behaviours of a user, oldest first: item keys u8[L, 2], action codes u1[L], event times i8[L]. `position` is the
    highest offset of `behaviours` applied for this user (-1: none); with `as_of` it fixes what the history contains."""

    keys: NDArray[np.uint64]
    actions: NDArray[np.uint8]
    times: NDArray[np.int64]
    position: int


class HistoriesWriter:
    """The only writer (StoreLockedError otherwise); keeps the newest `length` behaviours per user. HistoriesError on
    a store that was made with another `hash_key`: its item keys would name no row any more."""

    def __init__(self, path: Path, length: int, hash_key: bytes) -> None:
        if length < 1:
            raise ValueError(f"length {length} must be at least 1")
        self._length = length
        self._hash_key = hash_key
        self._lock = WriterLock(path)
        try:
            self._env = lmdb.open(str(path), map_size=MAP_SIZE, max_dbs=4, max_readers=1024, metasync=False)
            self._tables = _Tables.open(self._env, create=True)
            self._env.reader_check()  # frees the places of readers that were killed
            mark = keys_of(["the key that these histories were stored under"], hash_key).tolist()
            with self._env.begin(write=True) as txn:
                made_with = _meta(txn, self._tables, b"hash_key", mark)
                if made_with == mark:
                    txn.put(b"length", json.dumps(length).encode(), db=self._tables.meta)
                    txn.put(b"hash_key", json.dumps(mark).encode(), db=self._tables.meta)
        except lmdb.Error as error:
            self._lock.release()
            raise HistoriesError(f"{path} cannot be opened: {error}") from error
        if made_with != mark:
            self.close()
            raise HistoriesError(f"{path} was made with another hash_key; set that one, or remove the folder")

    def apply(
        self,
        behaviours: Sequence[StoredBehaviour],
        users: Sequence[StoredProfile],
        offsets: Mapping[tuple[str, int], int],
    ) -> None:
        """All of it and the next offsets to read, (topic, partition) -> offset, in one transaction. Records that were
        applied before change nothing. Raises HistoriesError when the store cannot take it; nothing is applied then."""
        try:
            with self._env.begin(write=True) as txn:
                erased = [one.user_id for one in users if self._profile(txn, one)]
                for user_id, records in self._records_by_user(txn, behaviours, erased).items():
                    self._user(txn, user_id, records)
                self._advance(txn, offsets)
        except lmdb.Error as error:
            raise HistoriesError(f"histories cannot be written: {error}") from error

    def offsets(self) -> dict[tuple[str, int], int]:
        with self._env.begin() as txn:
            return self._offsets(txn)

    def close(self) -> None:
        self._env.close()
        self._lock.release()

    def _profile(self, txn: lmdb.Transaction, one: StoredProfile) -> bool:
        """Stores or refuses a profile; an erasure takes the profile away. Returns whether behaviours may go too."""
        name = _name(one.user_id)
        head = _head(txn, self._tables, name)
        if one.erased_at is not None and one.erased_at > head["erased_at"]:
            head["erased_at"] = one.erased_at
            txn.put(name, head.tobytes(), db=self._tables.users)
        stored = txn.get(name, db=self._tables.profiles)
        known = None if stored is None else np.frombuffer(stored, PROFILE, 1)[0]
        if known is not None and known["publish"] <= head["erased_at"]:
            txn.delete(name, db=self._tables.profiles)
        newer = known is None or one.offset > known["offset"]
        if one.features is not None and newer and one.publish_time > head["erased_at"]:
            mark = np.array((one.publish_time, one.offset), PROFILE)
            txn.put(name, mark.tobytes() + one.features, db=self._tables.profiles)
        return one.erased_at is not None

    def _records_by_user(
        self, txn: lmdb.Transaction, behaviours: Sequence[StoredBehaviour], erased: Iterable[str]
    ) -> dict[str, NDArray[Any]]:
        """user id -> RECORDs in offset order; empty for a user who was only erased."""
        keys = keys_of([one.item_id for one in behaviours], self._hash_key)
        events = keys_of([one.event_id for one in behaviours], self._hash_key)
        records = np.zeros(len(behaviours), RECORD)
        records["high"], records["low"] = keys[:, 0], keys[:, 1]
        records["event"] = digest_of(events, np.zeros(len(events), np.uint64))
        records["time"] = [one.event_time for one in behaviours]
        records["publish"] = [one.publish_time for one in behaviours]
        records["offset"] = [one.offset for one in behaviours]
        records["action"] = self._codes(txn, [one.action for one in behaviours])
        places: dict[str, list[int]] = {user_id: [] for user_id in erased}
        for place, one in enumerate(behaviours):
            places.setdefault(one.user_id, []).append(place)
        out = {}
        for user_id, own in places.items():
            mine = records[own]
            out[user_id] = mine[np.argsort(mine["offset"], kind="stable")]
        return out

    def _codes(self, txn: lmdb.Transaction, names: Sequence[str]) -> list[int]:
        """Action codes; new names get the next ones."""
        known = _meta(txn, self._tables, b"actions", [])
        codes = {name: code for code, name in enumerate(known)}
        before = len(codes)
        for name in names:
            if name not in codes and len(codes) < ACTIONS_MAX:
                codes[name if len(codes) < ACTIONS_MAX - 1 else OTHER] = len(codes)
        if len(codes) > before:
            txn.put(b"actions", json.dumps(list(codes)).encode(), db=self._tables.meta)
        return [codes.get(name, ACTIONS_MAX - 1) for name in names]

    def _user(self, txn: lmdb.Transaction, user_id: str, given: NDArray[Any]) -> None:
        """Brings one user's chunks up to date."""
        name = _name(user_id)
        head = _head(txn, self._tables, name)
        new = given[(given["offset"] > head["position"]) & (given["publish"] > head["erased_at"])]
        stored = _chunks(txn, self._tables, name, head)
        old = np.frombuffer(b"".join(stored), RECORD)
        if len(given):
            head["position"] = max(head["position"], given["offset"].max())
        if (old["publish"] <= head["erased_at"]).any():
            for number in range(head["first"], head["next"]):
                txn.delete(_chunk_name(name, number), db=self._tables.chunks)
            kept = old[-self._length :]
            new = np.concatenate([kept[kept["publish"] > head["erased_at"]], new])
            stored, old = [], old[:0]
            head["first"], head["next"], head["count"] = 0, 0, 0
        kept = old[-self._length :]
        if len(new) > 1:
            new = new[np.sort(np.unique(new["event"], return_index=True)[1])]  # the first of an event id counts
            new = new[np.lexsort((new["offset"], new["time"]))]
        if len(new) and len(kept):
            new = new[~_among(new["event"], kept["event"])]
        if len(kept) == self._length and len(new):
            new = new[_place(new, kept[0]) :]  # what is older than a full history does not enter
        if len(new):
            self._insert(txn, name, head, stored, old, new)
        txn.put(name, head.tobytes(), db=self._tables.users)

    def _insert(
        self,
        txn: lmdb.Transaction,
        name: bytes,
        head: Any,
        stored: Sequence[bytes],
        old: NDArray[Any],
        new: NDArray[Any],
    ) -> None:
        """Writes the chunks from the first that changes, and drops chunks that hold nothing of the newest `length`."""
        sizes = [len(chunk) // RECORD.itemsize for chunk in stored]
        place = _place(old, new[0])
        chunk, start = 0, 0
        while chunk < len(sizes) and start + sizes[chunk] <= place and (start + sizes[chunk] < len(old)):
            start += sizes[chunk]
            chunk += 1
        if chunk == len(sizes) - 1 and place == len(old) and sizes[chunk] >= CHUNK:  # append after a full chunk
            start, chunk = len(old), len(sizes)
        tail = np.frombuffer(old[start:].tobytes() + new.tobytes(), RECORD)
        if place < len(old):
            tail = tail[np.lexsort((tail["offset"], tail["time"]))]
        sizes = sizes[:chunk]
        for at in range(0, len(tail), CHUNK):
            part = tail[at : at + CHUNK]
            txn.put(_chunk_name(name, int(head["first"]) + len(sizes)), part.tobytes(), db=self._tables.chunks)
            sizes.append(len(part))
        head["next"] = int(head["first"]) + len(sizes)
        count = start + len(tail)
        for size in sizes:
            if count - size < self._length:
                break
            txn.delete(_chunk_name(name, int(head["first"])), db=self._tables.chunks)
            head["first"] += 1
            count -= size
        head["count"] = count

    def _offsets(self, txn: lmdb.Transaction) -> dict[tuple[str, int], int]:
        stored = _meta(txn, self._tables, b"offsets", [])
        return {(topic, partition): offset for topic, partition, offset in stored}

    def _advance(self, txn: lmdb.Transaction, offsets: Mapping[tuple[str, int], int]) -> None:
        merged = self._offsets(txn)
        for source, offset in offsets.items():
            merged[source] = max(offset, merged.get(source, 0))
        rows = [[topic, partition, offset] for (topic, partition), offset in merged.items()]
        txn.put(b"offsets", json.dumps(rows).encode(), db=self._tables.meta)


class HistoriesReader:
    """Fresh at every call; may be used from many threads. Raises StoreMissingError when there is no store (yet)."""

    def __init__(self, path: Path) -> None:
        if not (path / "data.mdb").exists():
            raise StoreMissingError(f"{path} holds no histories yet")
        try:
            self._env = lmdb.open(
                str(path), map_size=MAP_SIZE, readonly=True, max_dbs=4, max_readers=1024, readahead=False
            )  # the size given: a store that is new has recorded none yet
            self._tables = _Tables.open(self._env, create=False)
        except (lmdb.NotFoundError, lmdb.ReadonlyError, lmdb.InvalidError) as error:
            raise StoreMissingError(f"{path} holds no histories yet: {error}") from error
        except lmdb.Error as error:
            raise HistoriesError(f"{path} cannot be opened: {error}") from error

    def history(self, user_id: str, as_of: int) -> History:
        """The newest behaviours with event_time <= as_of; empty for an unknown user."""
        name = _name(user_id)
        with self._env.begin(buffers=True) as txn:
            head = _head(txn, self._tables, name)
            length = _meta(txn, self._tables, b"length", 0)
            records = np.frombuffer(b"".join(_chunks(txn, self._tables, name, head)), RECORD)
        records = records[-length:]
        records = records[: np.searchsorted(records["time"], as_of, side="right")]
        keys = np.empty((len(records), 2), np.uint64)
        keys[:, 0], keys[:, 1] = records["high"], records["low"]
        times = np.ascontiguousarray(records["time"])
        return History(keys, np.ascontiguousarray(records["action"]), times, int(head["position"]))

    def profile(self, user_id: str) -> dict[str, Any] | None:
        """The features; None for a user without a profile."""
        with self._env.begin() as txn:
            stored = txn.get(_name(user_id), db=self._tables.profiles)
        if stored is None:
            return None
        features: dict[str, Any] = json.loads(stored[PROFILE.itemsize :])
        return features

    def actions(self) -> tuple[str, ...]:
        """Names of the action codes."""
        with self._env.begin() as txn:
            return tuple(_meta(txn, self._tables, b"actions", []))

    def popular(self, newest: int = 100) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Item keys u8[m, 2] and how often each is among the users' `newest` behaviours i8[m]. Reads every user: for
        the retrieval builder, not for requests."""
        seen = []
        with self._env.begin(buffers=True) as txn:
            for name, stored in txn.cursor(db=self._tables.users):
                head = np.frombuffer(stored, HEAD, 1)[0]
                first = max(
                    int(head["first"]), int(head["next"]) - 1 - -(-newest // CHUNK)
                )  # the last one may be short
                numbers = range(first, int(head["next"]))
                found = (txn.get(_chunk_name(bytes(name), number), db=self._tables.chunks) for number in numbers)
                chunks = [chunk for chunk in found if chunk is not None]
                seen.append(np.frombuffer(b"".join(chunks), RECORD)[-newest:][["high", "low"]])
        keys, counts = np.unique(
            np.concatenate(seen) if seen else np.empty(0, RECORD[["high", "low"]]), return_counts=True
        )
        return np.stack([keys["high"], keys["low"]], axis=1), counts.astype(np.int64)

    def close(self) -> None:
        self._env.close()


@dataclasses.dataclass(frozen=True)
class _Tables:
    users: Any
    chunks: Any
    profiles: Any
    meta: Any

    @classmethod
    def open(cls, env: lmdb.Environment, create: bool) -> _Tables:
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: env.open_db(name.encode(), create=create) for name in names})


def _name(user_id: str) -> bytes:
    """The user in the tables' keys: no name is the beginning of another."""
    encoded = user_id.encode()
    if not 1 <= len(encoded) <= 255:
        raise ValueError(f"a user id has 1 to 255 bytes, not {len(encoded)}")
    return bytes([len(encoded)]) + encoded


def _chunk_name(name: bytes, number: int) -> bytes:
    return name + number.to_bytes(8, "big")


def _meta(txn: lmdb.Transaction, tables: _Tables, key: bytes, absent: Any) -> Any:
    stored = txn.get(key, db=tables.meta)
    return absent if stored is None else json.loads(bytes(stored))


def _head(txn: lmdb.Transaction, tables: _Tables, name: bytes) -> Any:
    """The user's HEAD, changeable; that of a new user where there is none."""
    stored = txn.get(name, db=tables.users)
    if stored is None:
        return np.array((0, 0, 0, -1, NEVER), HEAD)
    return np.frombuffer(stored, HEAD, 1).copy()[0]


def _chunks(txn: lmdb.Transaction, tables: _Tables, name: bytes, head: Any) -> list[Any]:
    """The user's chunks in order."""
    found = []
    number = int(head["next"]) - int(head["first"])
    if number:
        cursor = txn.cursor(db=tables.chunks)
        cursor.set_key(_chunk_name(name, int(head["first"])))
        for value in cursor.iternext(keys=False):
            found.append(value)
            if len(found) == number:
                break
    return found


def _among(new: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of `new` are among `known`; for the usual few, without sorting."""
    if len(new) > 16:
        return np.isin(new, known)
    return np.array([(known == one).any() for one in new], np.bool_)


def _place(records: NDArray[Any], one: Any) -> int:
    """How many records are before `one` in (event_time, offset) order."""
    if len(records) == 0 or (records[-1]["time"], records[-1]["offset"]) < (one["time"], one["offset"]):
        return len(records)
    first = int(np.searchsorted(records["time"], one["time"], side="left"))
    last = int(np.searchsorted(records["time"], one["time"], side="right"))
    return first + int(np.searchsorted(records["offset"][first:last], one["offset"], side="left"))
