"""Ingest: makes `items` out of `item-updates`, in the order of versions. The only writer of `items`.

First hop of an item event. Compaction of `items` keeps the last record of an item, not the newest version, so ingest
remembers version and deletion of every item and lets only newer ones through: in `items`, log order is version order.

The order of its writes, for each batch (tests crash it between the numbers):

    1  produce the accepted records to `items`, the refused ones to `item-updates.dlq`, and wait for all
    acknowledgements 2  remember versions and source offsets in its store, in one WriteBatch 3  return, which lets
    Faust commit the source offsets

A crash after 1 repeats records with the version they had: harmless. The other order would lose them.

A deletion is remembered for `tombstone_days`; then (1) the tombstone is produced and acknowledged, (2) the item is
forgotten. After that an old update of the item would be taken for a new one.

The store can always be made again from `items`: same key, same partition, and the record's time is when it was
accepted.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rocksdict import Options, Rdict, WriteBatch

from infra.settings import Settings
from infra.telemetry import counter
from streams import events
from streams.bulk import open_reader
from streams.events import EventError, Header, Item
from streams.groups import group_admin
from streams.worker import Job, Outgoing, Plan, Record, Send, dead_letter

FORMAT = b"ingest-1"
_DAY_MS = 86_400_000
_EXPIRY_S = 1.0  # how often due deletions are looked for
_EXPIRY_BATCH = 1000
_HEADER_BYTES = 4096  # of an event that may go to `items` with it: a body leaves room for no more than some
_VALUE = struct.Struct("<QQ")  # version, deleted_at (0 = live)
_OFFSET = struct.Struct("<q")


class Known(NamedTuple):
    """What is remembered of an item. `deleted_at`: ms since the epoch at which ingest accepted the deletion, 0 =
    live.
    """

    version: int
    deleted_at: int


class IngestStore:
    """item id (UTF-8) -> Known, source offset per partition, and the deletions by their time, in one RocksDB.

    Keys: `i<id>`; `d<deleted_at, 8 bytes big-endian><id>`; `o<partition, 4 bytes big-endian>`; `format`; `whole` (its
    state was taken from `items` to the end, or began with it). Raises an error of rocksdict if another process has it.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.increase_parallelism(1)
        options.set_write_buffer_size(16 << 20)
        self._db = Rdict(str(path), options)
        found = self._db.get(b"format")
        if found not in (None, FORMAT):
            raise RuntimeError(f"{path} was written by another version ({found!r}); delete it: it is made again")

    @property
    def whole(self) -> bool:
        return self._db.get(b"whole") is not None

    def mark_whole(self) -> None:
        batch = WriteBatch(raw_mode=True)
        batch.put(b"format", FORMAT)
        batch.put(b"whole", b"1")
        self._db.write(batch)

    def get(self, ids: Sequence[bytes]) -> list[Known | None]:
        found = self._db.get([b"i" + raw for raw in ids]) or []
        return [None if value is None else Known(*_VALUE.unpack(value)) for value in found]

    def source_offsets(self, partitions: int) -> list[int]:
        """Next offset of `item-updates` per partition; -1: none remembered."""
        found = self._db.get([_source_key(partition) for partition in range(partitions)]) or []
        return [-1 if value is None else _OFFSET.unpack(value)[0] for value in found]

    def remember(
        self, changes: Mapping[bytes, tuple[Known | None, Known | None]], source_offsets: Mapping[int, int]
    ) -> None:
        """One WriteBatch: id -> (before, after), None = not known; and partition -> next source offset."""
        batch = WriteBatch(raw_mode=True)
        for raw, (before, after) in changes.items():
            if before is not None and before.deleted_at:
                batch.delete(_deletion_key(before.deleted_at, raw))
            if after is None:
                batch.delete(b"i" + raw)
                continue
            batch.put(b"i" + raw, _VALUE.pack(*after))
            if after.deleted_at:
                batch.put(_deletion_key(after.deleted_at, raw), b"")
        for partition, offset in source_offsets.items():
            batch.put(_source_key(partition), _OFFSET.pack(offset))
        self._db.write(batch)

    def deleted_before(self, deadline: int, limit: int) -> list[tuple[bytes, Known]]:
        """Items deleted before `deadline` (ms), oldest deletion first."""
        out: list[bytes] = []
        rows = self._db.iter()
        rows.seek(b"d")
        while rows.valid() and len(out) < limit:
            key = rows.key()
            if key[:1] != b"d" or int.from_bytes(key[1:9], "big") >= deadline:
                break
            out.append(key[9:])
            rows.next()
        rows.status()  # raises on a corrupted store: an iterator can stop half way in silence
        return [(raw, known) for raw, known in zip(out, self.get(out), strict=True) if known is not None]

    def close(self) -> None:
        self._db.close()


def _source_key(partition: int) -> bytes:
    return b"o" + partition.to_bytes(4, "big")


def _deletion_key(deleted_at: int, raw: bytes) -> bytes:
    return b"d" + deleted_at.to_bytes(8, "big") + raw


class Ingest:
    """The handler of `item-updates`."""

    def __init__(self, settings: Settings, store: IngestStore, send: Send) -> None:
        self.settings, self.store, self.send = settings, store, send
        self.stale = 0
        self._items = settings.topic("items")
        self._writing = asyncio.Lock()  # a tombstone must not overtake an update of its item

    async def batch(self, records: Sequence[Record]) -> None:
        accepted: list[tuple[Record, bytes, Item]] = []
        refused: list[tuple[Record, EventError]] = []
        for record in records:
            try:
                accepted.append((record, *_accept(record, self.settings.partitions)))
            except EventError as error:
                refused.append((record, error))
        async with self._writing:
            now = time.time_ns() // 1_000_000
            newer, changes = self._newer(accepted, now)
            out = [
                Outgoing(self._items, record.partition, raw, events.encode(item), _cloud_headers(record), now)
                for record, raw, item in newer
            ]
            await self.send(out + [dead_letter(self.settings, *pair) for pair in refused])  # 1
            self.store.remember(changes, {record.partition: record.offset + 1 for record in records})  # 2
        stale = len(accepted) - len(newer)
        self.stale += stale  # 3: Faust commits after the return
        if stale:
            counter("forerank_stale_updates", "Item updates that were not newer than what ingest knew").inc(stale)

    def _newer(
        self, accepted: Sequence[tuple[Record, bytes, Item]], now: int
    ) -> tuple[list[tuple[Record, bytes, Item]], dict[bytes, tuple[Known | None, Known | None]]]:
        """Those with a higher version than all before them, in this batch too; and what they change."""
        ids = list(dict.fromkeys(raw for _, raw, _ in accepted))
        before = dict(zip(ids, self.store.get(ids), strict=True)) if ids else {}
        current = dict(before)
        newer = []
        for record, raw, item in accepted:
            known = current[raw]
            if known is None or item.version > known.version:
                newer.append((record, raw, item))
                current[raw] = Known(item.version, now if item.deleted else 0)
        return newer, {raw: (before[raw], after) for raw, after in current.items() if after is not before[raw]}

    async def expire(self, now: int) -> int:
        """Writes the tombstones that are due at `now` (ms), at most a batch of them; returns how many."""
        deadline = now - round(self.settings.tombstone_days * _DAY_MS)
        async with self._writing:
            due = self.store.deleted_before(deadline, _EXPIRY_BATCH)
            if due:
                await self.send([self._tombstone(raw, known, now) for raw, known in due])  # 1
                self.store.remember({raw: (known, None) for raw, known in due}, {})  # 2
        return len(due)

    def _tombstone(self, raw: bytes, known: Known, now: int) -> Outgoing:
        partition = events.partition_of(raw, self.settings.partitions)
        version = str(known.version).encode()  # for a reader that missed the deletion itself
        return Outgoing(self._items, partition, raw, None, [("version", version)], now)

    async def keep_expiring(self) -> None:
        while True:
            while await self.expire(time.time_ns() // 1_000_000) == _EXPIRY_BATCH:
                pass
            await asyncio.sleep(_EXPIRY_S)

    def close(self) -> None:
        self.store.close()


def _accept(record: Record, partitions: int) -> tuple[bytes, Item]:
    item = events.item_update(record.value, record.headers, record.timestamp)
    raw = item.item_id.encode()
    events.check_key(record.key, raw, record.partition, partitions)
    return raw, item


def _cloud_headers(record: Record) -> list[Header]:
    """The event's own, which travel on, so that it can be followed by its ce_id."""
    own = [pair for pair in events.header_list(record.headers) if pair[0].startswith("ce_")]
    return events.fitting_headers(own, _HEADER_BYTES)


class _ItemHead(msgspec.Struct):
    """The part of a record of `items` that ingest remembers."""

    version: int
    deleted: bool = False


_HEAD = msgspec.json.Decoder(_ItemHead)


def replay(store: IngestStore, records: Iterable[tuple[bytes, int, bytes | None]]) -> None:
    """Takes records of `items` over, (id, record time, value) in log order. What the store knows better, it keeps."""
    found: dict[bytes, Known | None] = {}
    for raw, timestamp, value in records:
        if value is None:
            found[raw] = None
        else:
            head = _HEAD.decode(value)
            found[raw] = Known(head.version, timestamp if head.deleted else 0)
    ids = list(found)
    changes = {
        raw: (before, found[raw])
        for raw, before in zip(ids, store.get(ids), strict=True)
        if before != found[raw] and _overrides(before, found[raw])
    }
    store.remember(changes, {})


def _overrides(before: Known | None, found: Known | None) -> bool:
    if before is None:
        return found is not None
    return before.deleted_at > 0 if found is None else found.version >= before.version


async def rebuild(job: Job, store: IngestStore) -> None:
    """The store's state from all of `items`."""
    job.say("rebuilding its state from items")
    async with open_reader(job.settings, job.settings.topic("items")) as reader:
        async for batch in reader.batches():
            for records in batch.values():
                replay(store, ((record.key, record.timestamp, record.value) for record in records))
                job.handled(len(records))
            await asyncio.sleep(0)
    store.mark_whole()


async def prepare(job: Job) -> Plan:
    """Opens the store, makes it whole, and moves the group where the two disagree."""
    settings, source = job.settings, job.settings.topic("item-updates")
    with group_admin(settings) as groups:
        committed, starts = groups.committed(job.group, source), groups.starts(source)
        store = IngestStore(settings.ingest_dir)
        stored = store.source_offsets(settings.partitions)
        behind = any(-1 < known < done for known, done in zip(stored, committed, strict=True))
        if behind or not store.whole:
            await rebuild(job, store)
        if behind:  # read those again that the store never saw
            target = [done if known < 0 else min(known, done) for known, done in zip(stored, committed, strict=True)]
            groups.commit(job.group, source, target, job.instance)
            committed = target
    ingest = Ingest(settings, store, job.send)
    job.background(ingest.keep_expiring())
    return Plan({source: [max(pair) for pair in zip(committed, starts, strict=True)]}, ingest)


def run(settings: Settings) -> None:
    """Ends the process."""
    Job.start(settings, "ingest", "ingest", prepare)
