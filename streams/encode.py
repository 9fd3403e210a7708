"""Encode: rows of one generation out of `items`. ONE ITEM EVENT, top to bottom: `Encode.batch` and what it calls,
in order.

Second hop. Stateless: what it has done is in the offsets of its group (`encode-<generation>`), what it knows is the
bundle. For each batch:

    1  rows: decode the records, run the item side of the network over all of them at once, pack the rows
    2  blocks, one or more per partition, go to `rows.<generation>` on the partition of `items`; records that the bundle
       cannot encode go to `items.dlq` and become a deletion of the item's older row; all acknowledgements are awaited
    3  return, which lets Faust commit

A block that is sent again after a crash changes nothing at the hosts. A group without offsets starts with a fill
(fill.py), which sends its rows through the same two steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.bundle import Bundle, BundleError, load_bundle
from encoders.fold import EncodedItems, ItemFold
from index.layout import RowLayout
from index.n2o import RowBatch
from infra.settings import Settings
from streams import blocks, events
from streams.events import EventError, Item
from streams.fill import Refused, bulk_starts, fill
from streams.groups import group_admin
from streams.worker import BAD_BUNDLE, Job, JobError, Outgoing, Plan, Record, Send, dead_letter

Decoded = list[tuple[Record, Item]]
_Live = tuple[list[int], EncodedItems | None]  # places of the live rows, and their columns
_Rows = NDArray[np.void]


class Encode:
    """The handler of `items` for one generation."""

    def __init__(self, settings: Settings, generation: str, bundle: Bundle, send: Send) -> None:
        self.layout = RowLayout.from_json(bundle.manifest.row)
        self._settings, self._send = settings, send
        self._topic = settings.topic(f"rows.{generation}")
        self._fold = ItemFold(bundle)

    async def batch(self, records: Sequence[Record]) -> None:
        by_partition: dict[int, list[Record]] = {}
        for record in records:
            by_partition.setdefault(record.partition, []).append(record)
        covered = {partition: found[-1].offset for partition, found in by_partition.items()}
        batches, refused = self.rows(by_partition, covered)  # 1
        await self.emit(batches, refused)  # 2

    def rows(
        self, by_partition: Mapping[int, Sequence[Record]], covered: Mapping[int, int]
    ) -> tuple[list[RowBatch], Refused]:
        """One RowBatch per partition: of each item the last record, in log order. And the records that have no row."""
        decoded, bounds, refused = _decode(by_partition)
        live, errors = self._encode(decoded)
        refused += [(decoded[row][0], EventError("not_encodable", error)) for row, error in errors.items()]
        hot, cold = self._pack(decoded, live, errors)
        deleted = np.array([item.deleted or row in errors for row, (_, item) in enumerate(decoded)], np.bool_)
        batches = []
        for partition, part in bounds.items():
            rows = decoded[part]
            batches.append(
                RowBatch(
                    partition,
                    covered[partition],
                    [item.item_id for _, item in rows],
                    np.array([item.version for _, item in rows], np.uint64),
                    np.array([record.offset for record, _ in rows], np.int64),
                    deleted[part],
                    hot[part],
                    cold[part],
                    [
                        b"" if gone else events.encode(item.attributes)
                        for gone, (_, item) in zip(deleted[part].tolist(), rows, strict=True)
                    ],
                )
            )
        return batches, refused

    async def emit(self, batches: Sequence[RowBatch], refused: Refused) -> None:
        """Sends blocks and dead letters; returns when the broker has them."""
        pieces = [piece for batch in batches for piece in blocks.split(batch, self.layout)]
        out = [Outgoing(self._topic, piece.partition, None, blocks.encode(piece, self.layout)) for piece in pieces]
        await self._send(out + [dead_letter(self._settings, record, error) for record, error in refused])

    def _encode(self, decoded: Decoded) -> tuple[_Live, dict[int, str]]:
        """The network's columns of the live rows, and why some have none."""
        rows = [row for row, (_, item) in enumerate(decoded) if not item.deleted]
        columns = self._fold.encode([decoded[row][1] for row in rows]) if rows else None
        errors = {}
        if columns is not None:
            errors = {row: error for row, error in zip(rows, columns.errors, strict=True) if error is not None}
        return (rows, columns), errors

    def _pack(self, decoded: Decoded, live: _Live, errors: Mapping[int, str]) -> tuple[_Rows, _Rows]:
        """Hot and cold records, zero where there is no row."""
        hot, cold = np.zeros(len(decoded), self.layout.hot), np.zeros(len(decoded), self.layout.cold)
        rows, columns = live
        if columns is None:
            return hot, cold
        kept = np.array([row not in errors for row in rows], np.bool_)
        at = np.array(rows)[kept]
        for name in ("joint", "bridge", "signature", "crosses"):
            hot[name][at] = getattr(columns, name)[kept]
        for name in ("vector", "attributes"):
            cold[name][at] = getattr(columns, name)[kept]
        now = time.time_ns() // 1_000_000
        items = [decoded[row][1] for row in at]
        cold["version"][at] = [item.version for item in items]
        cold["event_time"][at] = [item.event_time for item in items]
        cold["publish_time"][at] = [item.publish_time for item in items]
        cold["encode_time"][at] = now
        return hot, cold

    def close(self) -> None:
        """Nothing to close: stateless."""


def _decode(by_partition: Mapping[int, Sequence[Record]]) -> tuple[Decoded, dict[int, slice], Refused]:
    """Records and items, partition by partition, with each partition's place."""
    decoded: Decoded = []
    refused: Refused = []
    bounds = {}
    for partition, records in by_partition.items():
        start = len(decoded)
        last = {record.key: record.offset for record in records}  # log order is version order: the last one counts
        for record in records:
            if last[record.key] != record.offset:
                continue
            try:
                decoded.append((record, _item(record)))
            except EventError as error:
                refused.append((record, error))
        bounds[partition] = slice(start, len(decoded))
    return decoded, bounds, refused


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


async def prepare(job: Job, generation: str) -> Plan:
    """Loads the bundle; fills the generation if its group has no offsets, or catches up in bulk if it is far behind."""
    settings, topic = job.settings, job.settings.topic("items")
    try:
        bundle = await asyncio.to_thread(load_bundle, settings.generation_dir(generation) / "bundle")
    except BundleError as error:
        raise JobError(f"bad bundle: {error}", BAD_BUNDLE) from error
    torch.set_num_threads(1)
    encode = Encode(settings, generation, bundle, job.send)
    committed, ends = await asyncio.to_thread(_offsets, job, topic)
    starts = bulk_starts(committed, ends)
    if starts is not None:
        committed = await fill(job, encode, topic, starts)
        await asyncio.to_thread(_commit, job, topic, committed)
    return Plan({topic: committed}, encode)


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
