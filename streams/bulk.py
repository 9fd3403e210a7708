"""Reading a whole topic once, far faster than Faust can: ingest rebuilds its state so, and encode fills a generation.

Guarantees that every record from the start offsets to the end offsets taken at opening is handed over, or raises
BulkReadError. It joins no group and commits nothing: what was read counts only once the caller says so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from infra.settings import Settings

_STALL_S = 60.0
_RECORDS = 4096  # per round
_COLLECT_AFTER = 200_000  # new objects; some thousand records


class BulkReadError(RuntimeError):
    """The topic was not read from start to end; nothing may be committed."""


class BulkReader:
    """`starts` and `ends` have one entry per partition; `ends` were the end offsets when it was opened."""

    def __init__(
        self, consumer: AIOKafkaConsumer, topic: str, starts: list[int], ends: list[int], stall_s: float = _STALL_S
    ) -> None:
        self._consumer, self._topic, self._stall_s = consumer, topic, stall_s
        self.starts, self.ends = starts, ends

    async def batches(self) -> AsyncIterator[dict[int, list[ConsumerRecord]]]:
        """Records by partition, in log order; none at or after `ends`. Returns when all of them were handed over."""
        position = list(self.starts)
        waiting = {p for p, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)) if start < end}
        moved = time.monotonic()
        while waiting:
            tps = [TopicPartition(self._topic, partition) for partition in waiting]
            found = await self._consumer.getmany(*tps, timeout_ms=200, max_records=_RECORDS)
            out = {}
            for tp, records in found.items():
                if records and records[0].offset < position[tp.partition]:
                    raise BulkReadError(f"{self._topic}[{tp.partition}] was read from {records[0].offset} again")
                if records and records[-1].offset >= self.ends[tp.partition]:
                    records = [record for record in records if record.offset < self.ends[tp.partition]]
                out[tp.partition] = records
            if any(out.values()):
                yield out
            for partition in list(waiting):
                # the position also passes offsets that compaction has emptied
                reached = await self._consumer.position(TopicPartition(self._topic, partition))
                if reached > position[partition]:
                    position[partition], moved = reached, time.monotonic()
                if reached >= self.ends[partition]:
                    waiting.discard(partition)
            if time.monotonic() - moved > self._stall_s:
                raise BulkReadError(
                    f"{self._topic} gave no record for {self._stall_s:.0f} s before its end was reached"
                )


@asynccontextmanager
async def open_reader(settings: Settings, topic: str, starts: Sequence[int] | None = None) -> AsyncIterator[BulkReader]:
    """Reads from `starts`, or from the first offsets there are."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # under the default, "latest", a fill read nothing once and called it all
        max_partition_fetch_bytes=4 << 20,
    )
    await consumer.start()
    try:
        tps = [TopicPartition(topic, partition) for partition in range(settings.partitions)]
        consumer.assign(tps)
        first = await consumer.beginning_offsets(tps)
        last = await consumer.end_offsets(tps)
        begin = [first[tp] for tp in tps] if starts is None else list(starts)
        for tp, offset in zip(tps, begin, strict=True):
            if offset < first[tp]:
                raise BulkReadError(f"{topic}[{tp.partition}] begins at {first[tp]}; offset {offset} is gone")
            consumer.seek(tp, offset)
            if await consumer.position(tp) != offset:
                raise BulkReadError(f"{topic}[{tp.partition}] could not be read from offset {offset}")
        with _few_collections():
            yield BulkReader(consumer, topic, begin, [last[tp] for tp in tps])
    finally:
        await consumer.stop()


@contextmanager
def _few_collections() -> Iterator[None]:
    """Records and what is made of them have no cycles, yet make the collector look through all that is loaded again and
    again: a third of a fill's time.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()  # or what died meanwhile would stay
