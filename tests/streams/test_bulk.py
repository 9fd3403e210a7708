"""Bulk reading: all of what there was, or an error; never a part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from aiokafka import TopicPartition
from kafka import KafkaProducer
from kafka import TopicPartition as AdminPartition

from infra.kafka.broker import admin_of
from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from streams.bulk import BulkReader, BulkReadError, open_reader
from streams.fill import BULK_LAG, bulk_starts


class Found(NamedTuple):
    offset: int


class Scripted:
    """A consumer of one partition that gives what it is told, round by round, and stands at the end of what it gave."""

    def __init__(self, *rounds: Sequence[int]) -> None:
        self._rounds, self._position = list(rounds), 0

    async def getmany(self, *tps: TopicPartition, **_: Any) -> dict[TopicPartition, list[Found]]:
        await asyncio.sleep(0)
        offsets = self._rounds.pop(0) if self._rounds else ()
        if offsets:
            self._position = offsets[-1] + 1
        return {tp: [Found(offset) for offset in offsets] for tp in tps}

    async def position(self, _: TopicPartition) -> int:
        return self._position


def read(consumer: Scripted, end: int) -> list[int]:
    async def collect() -> list[int]:
        reader = BulkReader(consumer, "items", [0], [end], stall_s=0.2)
        return [record.offset async for batch in reader.batches() for record in batch.get(0, [])]

    return asyncio.run(collect())


def test_records_come_in_order_and_none_from_the_end_on() -> None:
    assert read(Scripted([0, 1], [], [4, 5, 6]), 6) == [0, 1, 4, 5]  # compaction took 2 and 3


def test_a_record_that_comes_again_is_an_error() -> None:
    with pytest.raises(BulkReadError, match=r"items\[0\] was read from 1 again"):
        read(Scripted([0, 1], [1, 2]), 3)


def test_an_end_that_is_not_reached_is_an_error() -> None:
    with pytest.raises(BulkReadError, match="gave no record"):
        read(Scripted([0, 1]), 3)


@pytest.mark.e2e
def test_a_start_that_kafka_no_longer_has_is_an_error(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=1)
    ensure_topics(host)
    topic = host.topic("item-updates")
    producer = KafkaProducer(bootstrap_servers=host.kafka_bootstrap)
    for k in range(5):
        producer.send(topic, b"%d" % k, partition=0)
    producer.close()
    with admin_of(host.kafka_bootstrap) as admin:
        admin.delete_records({AdminPartition(topic, 0): 3})

    async def values(starts: list[int] | None) -> list[bytes]:
        async with open_reader(host, topic, starts) as reader:
            return [record.value async for batch in reader.batches() for record in batch[0]]

    with pytest.raises(BulkReadError, match=r"begins at 3; offset 2 is gone"):
        asyncio.run(values([2]))
    assert asyncio.run(values([4])) == [b"4"]
    assert asyncio.run(values(None)) == [b"3", b"4"]


@pytest.mark.parametrize(
    ("committed", "ends", "starts"),
    [
        ([-1, -1], [5, 5], []),
        ([5, -1], [5, 0], []),
        ([5, 5], [5, 5], None),
        ([4, 5], [5, 5], None),
        ([0, 5], [5, 5], [0, 5]),  # Faust's commit can stick there
        ([0, 5], [0, 5], None),
        ([1, 1], [BULK_LAG, 2], None),
        ([1, 1], [BULK_LAG, 4], [1, 1]),
    ],
)
def test_where_bulk_reading_begins(committed: list[int], ends: list[int], starts: list[int] | None) -> None:
    assert bulk_starts(committed, ends) == starts
