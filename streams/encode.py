"""Encode: rows of one generation out of `items`. ONE ITEM EVENT, top to bottom: `Encode.batch` and what it calls,
in order.

Second hop. Stateless: what it has done is in the offsets of its group (`encode-<generation>`), what it knows is the
bundle. For each batch:

    1  rows: decode the records, run the item side of the network over all of them at once, pack the rows
    2  blocks, one or more per partition, go to `rows.<generation>` on the partition of `items`; records that the bundle
       cannot encode go to `items.dlq` and become a deletion of the item's older row; all acknowledgements are awaited
    3  return, which lets Faust commit

A patch of attributes alone (ingest marks it) needs no network: its row is sent as patched, and the hosts keep the
item's hot record and vector. That is right only if the record it builds on went through a block, and compaction removes
records that nobody has read. So a patch is taken for one only where the partition was read without a gap up to it, and
beyond where the log ended after the last gap; all others are encoded in full, as in a fill.

A block that is sent again after a crash changes nothing at the hosts. A group without offsets starts with a fill
(fill.py), which sends its rows through the same two steps.

An encoder apart (FORERANK_ENCODERS) fetches the bundle itself, and says on `rows.<generation>` why it cannot use it: no
supervisor sees its end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from kafka.errors import KafkaError
from numpy.typing import NDArray

from encoders.bundle import Bundle, BundleError, load_bundle
from encoders.fold import EncodedItems, ItemFold
from index.layout import RowLayout
from index.n2o import DELETED, PATCHED, WHOLE, RowBatch
from infra.kafka.broker import BrokerError
from infra.kafka.topics import TopicError, ensure_rows_topic
from infra.settings import Settings
from streams import blocks, bundles, events, rollout
from streams.bundles import BundleFileError
from streams.events import EventError, Item
from streams.fill import Refused, bulk_starts, fill
from streams.groups import GroupError, group_admin
from streams.merge import ATTRIBUTES_ONLY
from streams.models import Models, ModelsError
from streams.worker import BAD_BUNDLE, Job, JobError, Outgoing, Plan, Record, Send, dead_letter

_Live = tuple[NDArray[np.intp], EncodedItems | None]  # places of the live rows, and their columns
_Rows = NDArray[np.void]


class _Decoded(NamedTuple):
    """Records that have an item, partition by partition."""

    records: list[Record]
    items: list[Item]
    kinds: NDArray[np.uint8]  # WHOLE, DELETED or PATCHED, before the bundle has seen it
    bounds: dict[int, slice]  # each partition's place

    def of_kind(self, kind: int) -> tuple[NDArray[np.intp], list[Item]]:
        """Places and items."""
        at = np.flatnonzero(self.kinds == kind)
        return at, self.items if len(at) == len(self.items) else [self.items[row] for row in at.tolist()]


class Encode:
    """The handler of `items` for one generation."""

    def __init__(
        self, settings: Settings, generation: str, bundle: Bundle, send: Send, ends: Callable[[], list[int]]
    ) -> None:
        """`ends`: the next offset to be written to each partition of `items`."""
        self.layout = RowLayout.from_json(bundle.manifest.row)
        self._settings, self._send = settings, send
        self._topic = settings.topic(f"rows.{generation}")
        self._fold = ItemFold(bundle)
        self._ends = ends
        self._next: dict[int, int] = {}  # offset that follows what was read, per partition
        self._patches_from: dict[int, int] = {}  # from here on nothing that a patch builds on can be missing

    async def batch(self, records: Sequence[Record]) -> None:
        by_partition: dict[int, list[Record]] = {}
        for record in records:
            by_partition.setdefault(record.partition, []).append(record)
        covered = {partition: found[-1].offset for partition, found in by_partition.items()}
        await self._follow(by_partition)
        batches, refused = self.rows(by_partition, covered, self._patches_from)  # 1
        await self.emit(batches, refused)  # 2

    async def _follow(self, by_partition: Mapping[int, Sequence[Record]]) -> None:
        """Notes gaps: whatever was written by now may build on what was in them."""
        for partition, records in by_partition.items():
            first, last = records[0].offset, records[-1].offset
            if self._next.get(partition) != first or last - first + 1 != len(records):
                self._patches_from.pop(partition, None)
            self._next[partition] = last + 1
        unsure = [partition for partition in by_partition if partition not in self._patches_from]
        if any(_is_patch(record) for partition in unsure for record in by_partition[partition]):
            try:
                ends = await asyncio.to_thread(self._ends)
            except (BrokerError, GroupError):  # they are encoded in full, and the next batch asks again
                return
            self._patches_from |= {partition: ends[partition] for partition in unsure}

    def rows(
        self,
        by_partition: Mapping[int, Sequence[Record]],
        covered: Mapping[int, int],
        patches_from: Mapping[int, int] | None = None,
    ) -> tuple[list[RowBatch], Refused]:
        """One RowBatch per partition: of each item the last record and all deletions before it, in log order. And the
        records that have no row. Patched rows only from the offset on that `patches_from` has for a partition.
        """
        decoded, refused = _decode(by_partition, patches_from or {})
        live, errors = self._encode(decoded)
        numbers, unfit = self._attributes(decoded)
        errors |= unfit
        refused += [(decoded.records[row], EventError("not_encodable", error)) for row, error in errors.items()]
        kinds = decoded.kinds.copy()
        kinds[list(errors)] = DELETED
        versions = np.array([item.version for item in decoded.items], np.uint64)
        hot, cold = self._pack(decoded.items, versions, kinds, live, numbers)
        batches = []
        for partition, part in decoded.bounds.items():
            batches.append(
                RowBatch(
                    partition,
                    covered[partition],
                    [item.item_id for item in decoded.items[part]],
                    versions[part],
                    np.array([record.offset for record in decoded.records[part]], np.int64),
                    kinds[part],
                    hot[part],
                    cold[part],
                    [
                        b"" if kind == DELETED else events.encode(item.attributes)
                        for kind, item in zip(kinds[part].tolist(), decoded.items[part], strict=True)
                    ],
                )
            )
        return batches, refused

    async def emit(self, batches: Sequence[RowBatch], refused: Refused) -> None:
        """Sends blocks and dead letters; returns when the broker has them."""
        pieces = [piece for batch in batches for piece in blocks.split(batch, self.layout)]
        out = [Outgoing(self._topic, piece.partition, None, blocks.encode(piece, self.layout)) for piece in pieces]
        await self._send(out + [dead_letter(self._settings, record, error) for record, error in refused])

    def _encode(self, decoded: _Decoded) -> tuple[_Live, dict[int, str]]:
        """The network's columns of the live rows that are no patches, and why some have none."""
        rows, items = decoded.of_kind(WHOLE)
        columns = self._fold.encode(items) if items else None
        return (rows, columns), {} if columns is None else _errors(rows, columns.errors)

    def _attributes(self, decoded: _Decoded) -> tuple[dict[int, NDArray[np.float32]], dict[int, str]]:
        """The numeric attributes of the patches by place, and why some have none."""
        rows, items = decoded.of_kind(PATCHED)
        if not items:
            return {}, {}
        numbers, errors = self._fold.attributes(items)
        return dict(zip(rows.tolist(), numbers, strict=True)), _errors(rows, errors)

    def _pack(
        self,
        items: Sequence[Item],
        versions: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        live: _Live,
        numbers: Mapping[int, NDArray[np.float32]],
    ) -> tuple[_Rows, _Rows]:
        """Hot and cold records, zero where there is no row."""
        hot, cold = np.zeros(len(items), self.layout.hot), np.zeros(len(items), self.layout.cold)
        rows, columns = live
        if columns is not None:
            kept = kinds[rows] == WHOLE
            at, of = (slice(None), slice(None)) if kept.all() and len(rows) == len(items) else (rows[kept], kept)
            for name in ("joint", "bridge", "signature", "crosses"):
                hot[name][at] = getattr(columns, name)[of]
            for name in ("vector", "attributes"):
                cold[name][at] = getattr(columns, name)[of]
        for row, values in numbers.items():
            cold["attributes"][row] = values
        there = kinds != DELETED
        for name, column in (
            ("version", versions),
            ("event_time", np.array([item.event_time for item in items], np.int64)),
            ("publish_time", np.array([item.publish_time for item in items], np.int64)),
            ("encode_time", time.time_ns() // 1_000_000),
        ):
            cold[name] = np.where(there, column, 0)
        return hot, cold

    def close(self) -> None:
        """Nothing to close: stateless."""


def _decode(by_partition: Mapping[int, Sequence[Record]], patches_from: Mapping[int, int]) -> tuple[_Decoded, Refused]:
    records: list[Record] = []
    items: list[Item] = []
    kinds: list[int] = []
    bounds = {}
    refused: Refused = []
    for partition, found in by_partition.items():
        start = len(items)
        # log order is version order: the last one counts. But after a deletion, which ends with the tombstone, an item
        # may be made again with any version, and hosts take a lower one only if they have seen the deletion
        last = {record.key: record.offset for record in found}
        first_patch = patches_from.get(partition)
        patched: set[bytes | None] = set()
        if first_patch is not None:
            whole = {record.key for record in found if not _is_patch(record, first_patch)}
            patched = {record.key for record in found} - whole
        if len(last) < len(found):
            found = [record for record in found if last[record.key] == record.offset or _may_delete(record)]
        for record, item in zip(found, _items(found), strict=True):
            if isinstance(item, EventError):
                refused.append((record, item))
            elif item.deleted or last[record.key] == record.offset:
                records.append(record)
                items.append(item)
                kinds.append(DELETED if item.deleted else PATCHED if record.key in patched else WHOLE)
        bounds[partition] = slice(start, len(items))
    return _Decoded(records, items, np.array(kinds, np.uint8), bounds), refused


def _errors(rows: NDArray[np.intp], errors: Sequence[str | None]) -> dict[int, str]:
    return {row: error for row, error in zip(rows.tolist(), errors, strict=True) if error is not None}


def _is_patch(record: Record, first: int = 0) -> bool:
    """Of attributes alone, and not before the offset `first`."""
    name, value = ATTRIBUTES_ONLY
    return record.offset >= first and events.header(record.headers, name) == value


def _may_delete(record: Record) -> bool:
    """Without decoding it."""
    return record.value is None or b'"deleted":true' in record.value


def _items(records: Sequence[Record]) -> Sequence[Item | EventError]:
    """The item of each, or why there is none."""
    try:
        items = [_deletion(record) if record.value is None else events.plain_item(record.value) for record in records]
        if [item.item_id.encode() for item in items] == [record.key for record in records]:
            return items
    except (ValueError, RecursionError, OverflowError):
        pass  # some have none: one by one, which is slower
    return [_item(record) for record in records]


def _item(record: Record) -> Item | EventError:
    try:
        if record.value is None:
            return _deletion(record)
        item = events.item(record.value)
        if item.item_id.encode() != record.key:
            raise EventError("key_mismatch", f"key {record.key!r} is not the id in the body")
        return item
    except EventError as error:
        return error


def _deletion(record: Record) -> Item:
    """The deletion whose version a tombstone carries."""
    try:
        item_id = (record.key or b"").decode()
        version = int(events.header(record.headers, "version") or b"0")
    except ValueError:
        raise EventError("malformed", "a tombstone without id or version") from None
    events.check_id(item_id, "item_id")
    return Item(item_id, version, record.timestamp, record.timestamp, True)


async def prepare(job: Job, generation: str, step: Callable[[int], object] = int) -> Plan:
    """Loads the bundle; fills the generation if its group has no offsets, or catches up in bulk if it is far behind. A
    fill leaves the processors to others; a generation that catches up may be served. Before the group is joined:

        1  all blocks, of a fill with the proof, are acknowledged
        2  the group's offsets are committed

    `step(number)` is called after each. Killed before 2, all of it is repeated. An encoder apart fetches the bundle
    before, and says on `rows.<generation>` why it is bad.
    """
    if job.settings.encoders == "local":
        return await _prepared(job, generation, step)
    await asyncio.to_thread(_fetch, job.settings, generation)
    try:
        return await _prepared(job, generation, step)
    except JobError as error:
        if error.status == BAD_BUNDLE:
            topic, said = job.settings.topic(f"rows.{generation}"), [(blocks.REFUSED, str(error).encode())]
            await job.send([Outgoing(topic, place, None, b"", said) for place in range(job.settings.partitions)])
        raise


def _fetch(settings: Settings, generation: str) -> None:
    """Bundle and topic, which a supervisor provides for encoders that it starts. Raises JobError or BrokerError; not
    BAD_BUNDLE, for a bundle that cannot be had here may be there for all others.
    """
    try:
        with closing(Models(settings)) as log:
            log.read_all()
        desired = rollout.reduce_models(log.events)
        if generation in desired.retired:
            raise JobError(f"generation {generation} was retired, so nobody needs its encoder")
        if generation not in desired.staged:
            raise JobError(f"generation {generation} was never staged")
        event = desired.staged[generation].event
        bundles.fetch(event.uri or "", event.sha256 or "", settings.generation_dir(generation) / "bundle")
        ensure_rows_topic(settings, generation)
    except (ModelsError, BundleFileError, TopicError) as error:
        raise JobError(str(error)) from error
    except KafkaError as error:
        raise JobError(f"models cannot be read: {error}") from error


async def _prepared(job: Job, generation: str, step: Callable[[int], object]) -> Plan:
    settings, topic = job.settings, job.settings.topic("items")
    try:
        bundle = await asyncio.to_thread(load_bundle, settings.generation_dir(generation) / "bundle")
    except BundleError as error:
        raise JobError(f"bad bundle: {error}", BAD_BUNDLE) from error
    torch.set_num_threads(1)

    def encode(send: Send) -> Encode:
        return Encode(settings, generation, bundle, send, lambda: _offsets(job, topic)[1])

    committed, ends = await asyncio.to_thread(_offsets, job, topic)
    starts = bulk_starts(committed, ends)
    if starts is not None:
        if starts:
            committed = await fill(job, encode(job.send), topic, starts)
        else:
            committed = await job.in_background(lambda send: fill(job, encode(send), topic, []))
        step(1)
        await asyncio.to_thread(_commit, job, topic, committed)
        step(2)
    return Plan({topic: committed}, encode(job.send))


def _offsets(job: Job, topic: str) -> tuple[list[int], list[int]]:
    """Those that the group committed, and the ends of `items`."""
    with group_admin(job.settings) as groups:
        return groups.committed(job.group, topic), groups.ends(topic)


def _commit(job: Job, topic: str, offsets: list[int]) -> None:
    with group_admin(job.settings) as groups:
        groups.commit(job.group, topic, offsets, job.instance)


def run(settings: Settings, generation: str) -> None:
    """Ends the process."""
    name = f"encode-{generation}"
    Job.start(settings, name, name, lambda job: prepare(job, generation))
