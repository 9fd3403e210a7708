"""Ingest: makes `items` out of `item-updates`, in the order of versions. The only writer of `items`.

First hop of an item event. Compaction of `items` keeps the last record of an item, not the newest version, so ingest
remembers the newest record of every item, merges patches into it (merge.py), and lets only what is newer through: in
`items`, log order is version order.

A message may be a pack of events, all of its partition; one that is bad is a dead letter by itself, with its place in
the header `index`.

The order of its writes, for each part of a batch, which is whole messages (tests crash it between the numbers):

    1  produce the accepted records to `items`, the refused ones to `item-updates.dlq`, and wait for all
       acknowledgements
    2  remember the records and source offsets in its store, in one WriteBatch
    3  return, which lets Faust commit the source offsets

A crash after 1 repeats records as they were: harmless. The other order would lose them. What is remembered is not taken
again, though Faust's commits lag behind: a patch that was refused might meet an item that was made since.

A deletion is remembered for `tombstone_days`; then (1) the tombstone is produced and acknowledged, (2) the item is
forgotten. After that an old update of the item would be taken for a new one.

One host's ingest runs; those of other hosts stand by until its membership of the group has ended. A store knows only
what its own process accepted, so they follow `items` meanwhile, and when their turn comes little is left to read.

The store can always be made again from `items`, byte by byte: same key, same partition, and the record's time is when
it was accepted.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from kafka.errors import KafkaError
from rocksdict import Options, Rdict, WriteBatch

from infra.kafka.broker import BrokerError
from infra.settings import Settings
from infra.telemetry import counter
from streams import events
from streams.bulk import open_reader
from streams.events import EventError, Header, Item, ItemPatch
from streams.groups import GroupError, group_admin
from streams.merge import ATTRIBUTES_ONLY, Known, merged, of_record
from streams.worker import Job, JobError, Outgoing, Plan, Record, Send, dead_letter

LOG = logging.getLogger(__name__)
FORMAT = b"ingest-2"
_DAY_MS = 86_400_000
_EXPIRY_S = 1.0  # how often due deletions are looked for
_EXPIRY_BATCH = 1000
_LOOK_S = 2.0  # how often the group's members are asked for
_PART = 4096  # events that are merged and written at once, if one message has no more
_HEADER_BYTES = 4096  # of an event that may go to `items` with it: a body leaves room for no more than some
_KNOWN = struct.Struct("<QQQ")  # version, base, deleted_at
_OFFSET = struct.Struct("<q")


class _Arrived(NamedTuple):
    """One event. `packed`: `record` is the part of a pack that it is, and has no key."""

    record: Record
    packed: bool


class _Accepted(NamedTuple):
    """A well-formed event, and its id as bytes."""

    record: Record
    raw: bytes
    event: Item | ItemPatch


class IngestStore:
    """item id (UTF-8) -> Known, offsets per partition, and the deletions by their time, in one RocksDB.

    Keys: `i<id>`; `d<deleted_at, 8 bytes big-endian><id>`; `o<partition, 4 bytes big-endian>`, of `item-updates`;
    `p<partition>`, the offset of `items` up to which its state was taken from there; `format`; `whole` (that was the
    end once). A store of another format is emptied: it is made again.
    Raises an error of rocksdict if another process has it.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.increase_parallelism(1)
        options.set_write_buffer_size(16 << 20)
        self._db = Rdict(str(path), options)
        if self._db.get(b"format") != FORMAT:
            batch = WriteBatch(raw_mode=True)
            batch.delete_range(b"", b"\xff")
            batch.put(b"format", FORMAT)
            self._db.write(batch)

    @property
    def whole(self) -> bool:
        return self._db.get(b"whole") is not None

    def mark_whole(self) -> None:
        self._db.put(b"whole", b"1")

    def get(self, ids: Sequence[bytes]) -> list[Known | None]:
        found = self._db.get([b"i" + raw for raw in ids]) or []
        return [None if one is None else _known(one) for one in found]

    def source_offsets(self, partitions: int) -> list[int]:
        """Next offset of `item-updates` per partition; -1: none remembered."""
        return self._offsets(_source_key, partitions)

    def items_offsets(self, partitions: int) -> list[int]:
        """Next offset of `items` per partition that was not taken over; -1: none was."""
        return self._offsets(_items_key, partitions)

    def _offsets(self, key: Callable[[int], bytes], partitions: int) -> list[int]:
        found = self._db.get([key(partition) for partition in range(partitions)]) or []
        return [-1 if value is None else _OFFSET.unpack(value)[0] for value in found]

    def remember(
        self,
        changes: Mapping[bytes, tuple[Known | None, Known | None]],
        source_offsets: Mapping[int, int],
        items_offsets: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """One WriteBatch: id -> (before, after), None = not known; and partition -> next offset of both topics."""
        batch = WriteBatch(raw_mode=True)
        for raw, (before, after) in changes.items():
            if before is not None and before.deleted_at:
                batch.delete(_deletion_key(before.deleted_at, raw))
            if after is None:
                batch.delete(b"i" + raw)
                continue
            batch.put(b"i" + raw, _KNOWN.pack(*after[:3]) + after.value)
            if after.deleted_at:
                batch.put(_deletion_key(after.deleted_at, raw), b"")
        for partition, offset in source_offsets.items():
            batch.put(_source_key(partition), _OFFSET.pack(offset))
        for partition, offset in items_offsets.items():
            batch.put(_items_key(partition), _OFFSET.pack(offset))
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


def _known(stored: bytes) -> Known:
    version, base, deleted_at = _KNOWN.unpack_from(stored)
    return Known(version, base, deleted_at, stored[_KNOWN.size :])


def _source_key(partition: int) -> bytes:
    return b"o" + partition.to_bytes(4, "big")


def _items_key(partition: int) -> bytes:
    return b"p" + partition.to_bytes(4, "big")


def _deletion_key(deleted_at: int, raw: bytes) -> bytes:
    return b"d" + deleted_at.to_bytes(8, "big") + raw


class Ingest:
    """The handler of `item-updates`."""

    def __init__(
        self,
        settings: Settings,
        store: IngestStore,
        send: Send,
        moved: Callable[[], object] = int,
        following: Sequence[int] = (),
    ) -> None:
        """`moved` is called when a part of a batch is done. Records before `following`, per partition, were taken."""
        self.settings, self.store, self.send, self._moved = settings, store, send, moved
        self._following = list(following)
        self.stale = 0
        self._items = settings.topic("items")
        self._writing = asyncio.Lock()  # a tombstone must not overtake an update of its item

    async def batch(self, records: Sequence[Record]) -> None:
        arrived: list[_Arrived] = []
        refused: list[tuple[Record, EventError]] = []
        following: dict[int, int] = {}
        for record in records:
            if self._following and record.offset < self._following[record.partition]:
                continue
            try:
                arrived += _arrivals(record)
            except EventError as error:
                refused.append((record, error))
            following[record.partition] = record.offset + 1
            if len(arrived) >= _PART:
                await self._take(arrived, refused, following)
                arrived, refused, following = [], [], {}
        await self._take(arrived, refused, following)

    async def _take(
        self, arrived: Sequence[_Arrived], refused: list[tuple[Record, EventError]], following: Mapping[int, int]
    ) -> None:
        """All events of some messages, and those of them that are refused; `following`: the messages' next offsets."""
        accepted: list[_Accepted] = []
        for one in arrived:
            try:
                accepted.append(_accept(one, self.settings.partitions))
            except EventError as error:
                refused.append((one.record, error))
        async with self._writing:
            now = time.time_ns() // 1_000_000
            out, changes, unfit = self._merge(accepted, now)
            await self.send(out + [dead_letter(self.settings, *pair) for pair in refused + unfit])  # 1
            self.store.remember(changes, following)  # 2
        for partition, offset in following.items():
            if self._following:
                self._following[partition] = offset
        self._moved()
        stale = len(accepted) - len(out) - len(unfit)
        self.stale += stale  # 3: Faust commits after the return
        if stale:
            counter("forerank_stale_updates", "Item updates and patches that ingest knew, or knew better").inc(stale)

    def _merge(
        self, accepted: Sequence[_Accepted], now: int
    ) -> tuple[list[Outgoing], dict[bytes, tuple[Known | None, Known | None]], list[tuple[Record, EventError]]]:
        """One after the other, in this batch too: the records for `items`, what they change, and what meets no item."""
        ids = list(dict.fromkeys(raw for _, raw, _ in accepted))
        before = dict(zip(ids, self.store.get(ids), strict=True)) if ids else {}
        current = dict(before)
        out, unfit = [], []
        for record, raw, event in accepted:
            try:
                found = merged(current[raw], event, now)
            except EventError as error:
                unfit.append((record, error))
                continue
            if found is not None:
                current[raw] = found.known
                headers = _cloud_headers(record) + ([ATTRIBUTES_ONLY] if found.attributes_only else [])
                out.append(Outgoing(self._items, record.partition, raw, found.known.value, headers, now))
        return out, {raw: (before[raw], after) for raw, after in current.items() if after is not before[raw]}, unfit

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


def _arrivals(record: Record) -> list[_Arrived]:
    """The events of a message. Raises EventError where a pack is none."""
    bodies = events.unpacked(record.value, record.headers)
    if bodies is None:
        return [_Arrived(record, False)]
    shared = [pair for pair in events.header_list(record.headers) if pair[0] not in (events.PACK, "ce_id", "index")]
    ce_id = events.header(record.headers, "ce_id") or b""
    out = []
    for at, body in enumerate(bodies):
        place = str(at).encode()
        own = [("index", place), ("ce_id", ce_id + b"/" + place)]
        out.append(_Arrived(record._replace(key=None, value=body, headers=[*own, *shared]), True))
    return out


def _accept(arrived: _Arrived, partitions: int) -> _Accepted:
    record, packed = arrived
    event = events.item_update(record.value, record.headers, record.timestamp)
    raw = event.item_id.encode()
    events.check_key(raw if packed else record.key, raw, record.partition, partitions)
    return _Accepted(record, raw, event)


def _cloud_headers(record: Record) -> list[Header]:
    """The event's own, which travel on, so that it can be followed by its ce_id."""
    own = [pair for pair in events.header_list(record.headers) if pair[0].startswith("ce_")]
    return events.fitting_headers(own, _HEADER_BYTES)


def replay(
    store: IngestStore,
    records: Iterable[tuple[bytes, int, bytes | None]],
    items_offsets: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Takes records of `items` over, (id, record time, value) in log order, and remembers the offsets that follow. What
    the store knows better, it keeps.
    """
    found: dict[bytes, Known | None] = {}
    for raw, timestamp, value in records:
        found[raw] = None if value is None else of_record(value, timestamp)
    ids = list(found)
    changes = {
        raw: (before, found[raw])
        for raw, before in zip(ids, store.get(ids), strict=True)
        if before != found[raw] and _overrides(before, found[raw])
    }
    store.remember(changes, {}, items_offsets)


def _overrides(before: Known | None, found: Known | None) -> bool:
    if before is None:
        return found is not None
    return before.deleted_at > 0 if found is None else found.version >= before.version


async def catch_up(job: Job, store: IngestStore) -> None:
    """The store's state from `items`: what came since it was taken over before, or all of it."""
    topic = job.settings.topic("items")
    begin = await asyncio.to_thread(_not_taken_over, job, store, topic)
    async with open_reader(job.settings, topic, begin) as reader:
        async for batch in reader.batches():
            for partition, records in batch.items():
                if not records:
                    continue
                taken = ((record.key, record.timestamp, record.value) for record in records)
                replay(store, taken, {partition: records[-1].offset + 1})
                job.handled(len(records))
            await asyncio.sleep(0)
    store.remember({}, {}, dict(enumerate(reader.ends)))
    store.mark_whole()


async def stand_by(job: Job, store: IngestStore) -> bool:
    """Follows `items` until no other host's ingest is in the group; gives whether there was one."""
    while others := await _others(job):
        if job.heartbeat.state != "standby":
            job.say("standby")
        job.heartbeat.reason = f"waits for {', '.join(sorted(others))}"
        await catch_up(job, store)
        await asyncio.sleep(_LOOK_S)
    waited, job.heartbeat.reason = job.heartbeat.state == "standby", ""
    return waited


async def keep_alone(job: Job) -> None:
    """Ends the process when another one came into the group at the same moment: both start again, and one stands by."""
    while True:
        await asyncio.sleep(_LOOK_S)
        if job.heartbeat.state == "running" and (others := await _others(job)):
            raise JobError(f"{', '.join(sorted(others))} is in the group too; ingest starts again, to stand by")


async def _others(job: Job) -> set[str]:
    """The group's other members, by static id. Waits for a broker that is away."""

    def ask() -> set[str]:
        with group_admin(job.settings) as groups:
            return groups.members(job.group) - {job.instance}

    while True:
        try:
            return await asyncio.to_thread(ask)
        except (BrokerError, GroupError, KafkaError) as error:
            LOG.warning("ingest: the members of its group are unknown: %s", error)
            await asyncio.sleep(_LOOK_S)


async def prepare(job: Job) -> Plan:
    """Opens the store, waits for its turn, makes the store whole, and moves the group where the two disagree."""
    settings, source = job.settings, job.settings.topic("item-updates")
    store = await asyncio.to_thread(IngestStore, settings.ingest_dir)
    waited = await stand_by(job, store)
    committed, starts, ends = await asyncio.to_thread(_group, job, source)
    stored = store.source_offsets(settings.partitions)
    behind = any(
        known < done for known, done in zip(stored, committed, strict=True)
    )  # as when another host's ingest ran
    # what the store never saw is read again
    # and what it saw is not, unless the topic was made anew
    following = [known if -1 < known <= end else done for known, done, end in zip(stored, committed, ends, strict=True)]
    if waited or behind or not store.whole:
        job.say("rebuilding its state from items")
        await catch_up(job, store)
        seen = {p: done for p, (known, done) in enumerate(zip(stored, committed, strict=True)) if known < 0 <= done}
        store.remember({}, seen)
    lost = sum(
        max(0, start - max(known, done))
        for known, done, start in zip(stored, committed, starts, strict=True)
        if done >= 0
    )
    following = [offset if offset < 0 else max(offset, start) for offset, start in zip(following, starts, strict=True)]
    if following != committed:
        await asyncio.to_thread(_commit, job, source, following)
    if lost:
        _report_lost(job, source, lost)
    if others := await _others(job):
        raise JobError(f"{', '.join(sorted(others))} was quicker; ingest starts again, to stand by")
    begin = [max(pair) for pair in zip(following, starts, strict=True)]
    ingest = Ingest(settings, store, job.send, lambda: job.handled(0), begin)
    job.background(ingest.keep_expiring())
    job.background(keep_alone(job))
    return Plan({source: begin}, ingest)


def _not_taken_over(job: Job, store: IngestStore, topic: str) -> list[int]:
    """Where to go on in `items`; at its begin where it was made anew."""
    with group_admin(job.settings) as groups:
        starts, ends = groups.starts(topic), groups.ends(topic)
    known = store.items_offsets(job.settings.partitions)
    return [done if start <= done <= end else start for done, start, end in zip(known, starts, ends, strict=True)]


def _group(job: Job, source: str) -> tuple[list[int], list[int], list[int]]:
    """Offsets of `item-updates`: those that the group committed, the first there are, the ends."""
    with group_admin(job.settings) as groups:
        return groups.committed(job.group, source), groups.starts(source), groups.ends(source)


def _commit(job: Job, source: str, offsets: list[int]) -> None:
    with group_admin(job.settings) as groups:
        groups.commit(job.group, source, offsets, job.instance)


def _report_lost(job: Job, source: str, lost: int) -> None:
    """Retention took updates that ingest had not read. Nobody can read them again, so ingest says so and goes on."""
    job.heartbeat.reason = f"{lost} records of {source} were deleted unread: publish what changed meanwhile again"
    LOG.error("ingest: %s", job.heartbeat.reason)
    counter("forerank_lost_updates", "Item updates that Kafka deleted before ingest had read them").inc(lost)


def run(settings: Settings) -> None:
    """Ends the process."""
    Job.start(settings, "ingest", "ingest", prepare)
