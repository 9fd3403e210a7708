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
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.bundle import Bundle, BundleError, load_bundle
from encoders.fold import EncodedItems, ItemFold
from index.layout import RowLayout
from index.n2o import DELETED, PATCHED, WHOLE, RowBatch
from infra.kafka.broker import BrokerError
from infra.settings import Settings
from streams import blocks, events
from streams.events import EventError, Item
from streams.fill import Refused, bulk_starts, fill
from streams.groups import GroupError, group_admin
from streams.merge import ATTRIBUTES_ONLY
from streams.worker import BAD_BUNDLE, Job, JobError, Outgoing, Plan, Record, Send, dead_letter

_Live = tuple[list[int], EncodedItems | None]  # places of the live rows, and their columns
_Rows = NDArray[np.void]


class _Decoded(NamedTuple):
    record: Record
    item: Item
    kind: int  # WHOLE, DELETED or PATCHED, before the bundle has seen it


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
        decoded, bounds, refused = _decode(by_partition, patches_from or {})
        live, errors = self._encode(decoded)
        numbers, unfit = self._attributes(decoded)
        errors |= unfit
        refused += [(decoded[row].record, EventError("not_encodable", error)) for row, error in errors.items()]
        hot, cold = self._pack(decoded, live, numbers, errors)
        kinds = np.array([DELETED if row in errors else one.kind for row, one in enumerate(decoded)], np.uint8)
        batches = []
        for partition, part in bounds.items():
            rows = decoded[part]
            batches.append(
                RowBatch(
                    partition,
                    covered[partition],
                    [one.item.item_id for one in rows],
                    np.array([one.item.version for one in rows], np.uint64),
                    np.array([one.record.offset for one in rows], np.int64),
                    kinds[part],
                    hot[part],
                    cold[part],
                    [
                        b"" if kind == DELETED else events.encode(one.item.attributes)
                        for kind, one in zip(kinds[part].tolist(), rows, strict=True)
                    ],
                )
            )
        return batches, refused

    async def emit(self, batches: Sequence[RowBatch], refused: Refused) -> None:
        """Sends blocks and dead letters; returns when the broker has them."""
        pieces = [piece for batch in batches for piece in blocks.split(batch, self.layout)]
        out = [Outgoing(self._topic, piece.partition, None, blocks.encode(piece, self.layout)) for piece in pieces]
        await self._send(out + [dead_letter(self._settings, record, error) for record, error in refused])

    def _encode(self, decoded: Sequence[_Decoded]) -> tuple[_Live, dict[int, str]]:
        """The network's columns of the live rows that are no patches, and why some have none."""
        rows = [row for row, one in enumerate(decoded) if one.kind == WHOLE]
        columns = self._fold.encode([decoded[row].item for row in rows]) if rows else None
        errors = {}
        if columns is not None:
            errors = {row: error for row, error in zip(rows, columns.errors, strict=True) if error is not None}
        return (rows, columns), errors

    def _attributes(self, decoded: Sequence[_Decoded]) -> tuple[dict[int, NDArray[np.float32]], dict[int, str]]:
        """The numeric attributes of the patches by place, and why some have none."""
        rows = [row for row, one in enumerate(decoded) if one.kind == PATCHED]
        if not rows:
            return {}, {}
        numbers, errors = self._fold.attributes([decoded[row].item for row in rows])
        return dict(zip(rows, numbers, strict=True)), {
            row: error for row, error in zip(rows, errors, strict=True) if error is not None
        }

    def _pack(
        self,
        decoded: Sequence[_Decoded],
        live: _Live,
        numbers: Mapping[int, NDArray[np.float32]],
        errors: Mapping[int, str],
    ) -> tuple[_Rows, _Rows]:
        """Hot and cold records, zero where there is no row."""
        hot, cold = np.zeros(len(decoded), self.layout.hot), np.zeros(len(decoded), self.layout.cold)
        rows, columns = live
        if columns is not None:
            kept = np.array([row not in errors for row in rows], np.bool_)
            at = np.array(rows)[kept]
            for name in ("joint", "bridge", "signature", "crosses"):
                hot[name][at] = getattr(columns, name)[kept]
            for name in ("vector", "attributes"):
                cold[name][at] = getattr(columns, name)[kept]
        for row, values in numbers.items():
            cold["attributes"][row] = values
        at = np.array([row for row, one in enumerate(decoded) if one.kind != DELETED and row not in errors], np.intp)
        now = time.time_ns() // 1_000_000
        items = [decoded[row].item for row in at]
        cold["version"][at] = [item.version for item in items]
        cold["event_time"][at] = [item.event_time for item in items]
        cold["publish_time"][at] = [item.publish_time for item in items]
        cold["encode_time"][at] = now
        return hot, cold

    def close(self) -> None:
        """Nothing to close: stateless."""


def _decode(
    by_partition: Mapping[int, Sequence[Record]], patches_from: Mapping[int, int]
) -> tuple[list[_Decoded], dict[int, slice], Refused]:
    """Records and items, partition by partition, with each partition's place."""
    decoded: list[_Decoded] = []
    refused: Refused = []
    bounds = {}
    for partition, records in by_partition.items():
        start = len(decoded)
        # log order is version order: the last one counts. But after a deletion, which ends with the tombstone, an item
        # may be made again with any version, and hosts take a lower one only if they have seen the deletion
        last = {record.key: record.offset for record in records}
        first_patch = patches_from.get(partition)
        whole = {record.key for record in records if first_patch is None or not _is_patch(record, first_patch)}
        for record in records:
            newest = last[record.key] == record.offset
            if not newest and not _may_delete(record):
                continue
            try:
                item = _item(record)
            except EventError as error:
                refused.append((record, error))
            else:
                if not newest and not item.deleted:
                    continue
                kind = DELETED if item.deleted else WHOLE if record.key in whole else PATCHED
                decoded.append(_Decoded(record, item, kind))
        bounds[partition] = slice(start, len(decoded))
    return decoded, bounds, refused


def _is_patch(record: Record, first: int = 0) -> bool:
    """Of attributes alone, and not before the offset `first`."""
    name, value = ATTRIBUTES_ONLY
    return record.offset >= first and events.header(record.headers, name) == value


def _may_delete(record: Record) -> bool:
    """Without decoding it."""
    return record.value is None or b'"deleted":true' in record.value


def _item(record: Record) -> Item:
    """The item of a record; a tombstone is the deletion whose version it carries."""
    if record.value is not None:
        item = events.item(record.value)
        if item.item_id.encode() != record.key:
            raise EventError("key_mismatch", f"key {record.key!r} is not the id in the body")
        return item
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

    `step(number)` is called after each. Killed before 2, all of it is repeated.
    """
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
