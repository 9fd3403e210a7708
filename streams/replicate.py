"""Replicate: writes the blocks of one generation into this host's N2O index. The index's only writer.

Last hop of an item event: when a batch returns, its rows are in RocksDB and in the arena, visible to all API processes.

    1  decode the blocks; one that says that the bundle cannot be encoded with fails a generation that is not filled
    2  apply them: rows, covered `items` offsets and `rows.<generation>` offsets in one WriteBatch, then the arena
    3  return, which lets Faust commit

The index's offsets are the truth, and the group is moved to them before it is joined. Where there is no index, or one
whose next blocks are no longer in Kafka, it starts from a checkpoint (checkpoints.py), else from the first block; where
that is gone too, the job ends with `needs refill`, for going on would leave rows out, and reconcile takes its place.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from index.arena import ArenaReader
from index.errors import StoreError
from index.layout import RowLayout
from index.n2o import N2OWriter, RowBatch
from infra.priority import Background
from infra.settings import Settings
from infra.telemetry import counter
from streams import blocks, events
from streams.blocks import BlockError
from streams.bundles import BundleFileError, layout_of
from streams.checkpoints import Checkpoints, keep_writing
from streams.freshness import Hops, watch_oldest
from streams.groups import group_admin
from streams.worker import BAD_BUNDLE, NEEDS_REFILL, Job, JobError, Plan, Record

LOG = logging.getLogger(__name__)
_LOOK_S = 1.0


class Replicate:
    """The handler of `rows.<generation>`."""

    def __init__(self, writer: N2OWriter, layout: RowLayout, following: Sequence[int]) -> None:
        """`following`: offset of the next block per partition."""
        self._writer, self._layout, self._following = writer, layout, list(following)
        self._hops = Hops()
        self._background = None if writer.progress().filled.all() else Background()

    async def batch(self, records: Sequence[Record]) -> None:
        batches, refused = [], dict[int, bytes]()
        for record in records:
            expected = self._following[record.partition]
            if record.offset > expected:  # not compacted, no transactions: offsets have no gaps
                place = f"{record.topic}[{record.partition}]"
                raise JobError(f"{place} goes on at offset {record.offset}, not {expected}: started again, if it can")
            if record.offset < expected:
                continue
            self._following[record.partition] = record.offset + 1
            if reason := events.header(record.headers, blocks.REFUSED):
                refused[record.partition] = reason
                continue
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
        if refused:
            filled = self._writer.progress().filled
            for partition, reason in refused.items():
                if not filled[partition]:  # else it is an encoder's of another version, say, that came later
                    raise JobError(reason.decode(errors="replace"), BAD_BUNDLE)

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


def prepare(job: Job, generation: str) -> tuple[Plan, N2OWriter, Checkpoints | None]:
    """Opens the index, or has one restored; checks that the log still has what it needs, and moves the group to the
    index's offsets.
    """
    settings, topic = job.settings, job.settings.topic(f"rows.{generation}")
    folder = settings.generation_dir(generation)
    with group_admin(settings) as groups:
        starts = groups.starts(topic)
        checkpoints = Checkpoints(settings, generation, groups.cluster()) if settings.checkpoint_uri else None
    try:
        layout = layout_of(folder / "bundle")
        writer = _opened(folder / "n2o", layout, job, topic, starts, checkpoints)
    except (BundleFileError, StoreError) as error:
        raise JobError(str(error)) from error
    following = [max(0, int(offset)) for offset in writer.rows_offsets()]
    with group_admin(settings) as groups:
        if groups.committed(job.group, topic) != following:
            groups.commit(job.group, topic, following, job.instance)
    return Plan({topic: following}, Replicate(writer, layout, following)), writer, checkpoints


def _opened(
    index: Path, layout: RowLayout, job: Job, topic: str, starts: Sequence[int], checkpoints: Checkpoints | None
) -> N2OWriter:
    """The index, fit to go on from the log. Raises JobError (NEEDS_REFILL) and StoreError."""
    lacks: JobError | None = None
    if (index / "rocks" / "CURRENT").exists():
        writer = _writer(job.settings, index, layout)
        lacks = _lacks(writer, topic, starts)
        if lacks is None:
            return writer
        writer.close()
    if checkpoints is not None:
        job.say("restoring")
        if name := checkpoints.restore(starts, layout):
            LOG.info("%s: from checkpoint %s", job.name, name)
            return _writer(job.settings, index, layout)
    if lacks is None:
        writer = _writer(job.settings, index, layout)
        lacks = _lacks(writer, topic, starts)
        if lacks is None:
            return writer
        writer.close()
    raise lacks


def _writer(settings: Settings, index: Path, layout: RowLayout) -> N2OWriter:
    return N2OWriter(index, layout, settings.partitions, settings.hash_key.encode())


def _lacks(writer: N2OWriter, topic: str, starts: Sequence[int]) -> JobError | None:
    """Why the index cannot go on from the log."""
    found = writer.progress()
    begun = (found.rows_offset < 0) & ((found.covered >= 0) | (found.count > 0))
    if begun.any():
        return JobError("needs refill: a reconciliation was begun and not ended", NEEDS_REFILL)
    for partition, (following, start) in enumerate(zip(found.rows_offset.tolist(), starts, strict=True)):
        if max(0, following) < start:
            return needs_refill(topic, partition, max(0, following), start)
    return None


async def _in_place(arena: ArenaReader) -> None:
    """Ends the job where its index was deleted: what it writes would be lost, and nobody would see it."""
    while True:
        await asyncio.sleep(_LOOK_S)
        if arena.replaced():
            raise JobError("the folder of the index has gone")


def run(settings: Settings, generation: str) -> None:
    """Ends the process. SIGUSR1 has a checkpoint written at once."""
    name, group = f"replicate-{generation}", f"replicate-{settings.host}-{generation}"

    async def begin(job: Job) -> Plan:
        wanted = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, wanted.set)
        plan, writer, checkpoints = await asyncio.to_thread(prepare, job, generation)
        layout = layout_of(settings.generation_dir(generation) / "bundle")
        arena = ArenaReader.open(settings.generation_dir(generation) / "n2o", layout)
        job.background(watch_oldest(generation, arena))
        job.background(_in_place(arena))
        if checkpoints is not None:
            interval_s = settings.checkpoint_interval_s
            job.background(keep_writing(checkpoints, writer, interval_s, wanted, generation))
        return plan

    Job.start(settings, name, group, begin)
