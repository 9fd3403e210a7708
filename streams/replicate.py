"""Replicate: writes the blocks of one generation into this host's N2O index. The index's only writer.

Last hop of an item event: when a batch returns, its rows are in RocksDB and in the arena, visible to all API processes.

    1  decode the blocks
    2  apply them: rows, covered `items` offsets and `rows.<generation>` offsets in one WriteBatch, then the arena
    3  return, which lets Faust commit

The index's offsets are the truth. The group is moved to them before it is joined (an older index may have been
restored), and a log that has lost records the index still needs stops the job with `needs refill`: going on would
leave rows out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from index.arena import ArenaReader
from index.errors import StoreError
from index.layout import RowLayout
from index.n2o import N2OWriter, RowBatch
from infra.priority import Background
from infra.settings import Settings
from infra.telemetry import counter
from streams import blocks
from streams.blocks import BlockError
from streams.bundles import BundleFileError, layout_of
from streams.freshness import Hops, watch_oldest
from streams.groups import group_admin
from streams.worker import NEEDS_REFILL, Job, JobError, Plan, Record


class Replicate:
    """The handler of `rows.<generation>`."""

    def __init__(self, writer: N2OWriter, layout: RowLayout, following: Sequence[int]) -> None:
        """`following`: offset of the next block per partition."""
        self._writer, self._layout, self._following = writer, layout, list(following)
        self._hops = Hops()
        self._background = None if writer.progress().filled.all() else Background()

    async def batch(self, records: Sequence[Record]) -> None:
        batches = []
        for record in records:
            expected = self._following[record.partition]
            if record.offset > expected:  # not compacted, no transactions: offsets have no gaps
                raise needs_refill(record.topic, record.partition, expected, record.offset)
            if record.offset < expected:
                continue
            self._following[record.partition] = record.offset + 1
            try:
                batches.append((blocks.decode(record.value or b"", self._layout), record.offset))  # 1
            except BlockError as error:
                place = f"{record.topic}[{record.partition}] offset {record.offset}"
                raise JobError(f"{place} is not a block of this generation: {error}") from error
        if batches:
            before = self._writer.progress()
            without_row = self._writer.without_row
            await self._apply(batches)  # 2
            if without_row < self._writer.without_row:
                meaning = "Patches of attributes whose item had no row, because it could not be encoded"
                counter("forerank_patches_without_row", meaning).inc(self._writer.without_row - without_row)
            self._hops.observe([batch for batch, _ in batches], before, time.time_ns() // 1_000_000)

    async def _apply(self, batches: list[tuple[RowBatch, int]]) -> None:
        """Leaves the processors to others until the generation is filled."""
        if self._background is None:
            self._writer.apply(batches)
            return
        await asyncio.wrap_future(self._background.submit(lambda: self._writer.apply(batches)))
        if self._writer.progress().filled.all():
            self._background.close()
            self._background = None

    def close(self) -> None:
        self._writer.close()


def needs_refill(topic: str, partition: int, expected: int, found: int) -> JobError:
    return JobError(
        f"needs refill: {topic}[{partition}] begins at offset {found}, this host's index continues at {expected}",
        NEEDS_REFILL,
    )


def prepare(job: Job, generation: str) -> Plan:
    """Opens the index, checks that the log still has what it needs, and moves the group to the index's offsets."""
    settings, topic = job.settings, job.settings.topic(f"rows.{generation}")
    folder = settings.generation_dir(generation)
    try:
        layout = layout_of(folder / "bundle")
        writer = N2OWriter(folder / "n2o", layout, settings.partitions, settings.hash_key.encode())
    except (BundleFileError, StoreError) as error:
        raise JobError(str(error)) from error
    following = [max(0, int(offset)) for offset in writer.rows_offsets()]
    with group_admin(settings) as groups:
        for partition, start in enumerate(groups.starts(topic)):
            if following[partition] < start:
                raise needs_refill(topic, partition, following[partition], start)
        if groups.committed(job.group, topic) != following:
            groups.commit(job.group, topic, following, job.instance)
    return Plan({topic: following}, Replicate(writer, layout, following))


def run(settings: Settings, generation: str) -> None:
    """Ends the process."""
    name, group = f"replicate-{generation}", f"replicate-{settings.host}-{generation}"

    async def begin(job: Job) -> Plan:
        plan = await asyncio.to_thread(prepare, job, generation)
        layout = layout_of(settings.generation_dir(generation) / "bundle")
        arena = ArenaReader.open(settings.generation_dir(generation) / "n2o", layout)
        job.background(watch_oldest(generation, arena))
        return plan

    Job.start(settings, name, group, begin)
