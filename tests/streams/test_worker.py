"""How a job reads and writes: what waits for what, and batches that every topic takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from streams.worker import Job, Outgoing, gather_s


@given(st.floats(0, 0.04), st.floats(0, 10), st.floats(0, 10))
def test_after_a_batch_that_took_long_the_next_one_waits_long_for_more(within: float, took: float, idle: float) -> None:
    waited = gather_s(within, took, idle)
    assert within <= waited <= 0.05
    assert waited + idle >= min(took, 0.05) - 1e-9, "what a batch costs by itself is at most half of the time"
    assert waited == within or idle < took, "what comes alone does not wait for others"


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["items", "items.dlq"])
def test_many_records_at_once_are_no_batch_that_the_broker_refuses(
    settings: Callable[..., Settings], name: str
) -> None:
    """Larger than a topic takes in one batch by default (1 MiB), in small records, in large ones, and both."""
    host = settings(partitions=1)
    ensure_topics(host)
    place = TopicPartition(host.topic(name), 0)
    sizes = [10_000] * 300 + [300_000] * 5 + [900_000, 10, 900_000] + [89] * 20_000

    async def sent(records: Sequence[Outgoing]) -> int:
        job = Job(host, "ingest", "ingest")
        async with job._new_producer() as producer:
            await job._send(producer, records)
        async with AIOKafkaConsumer(bootstrap_servers=host.kafka_bootstrap, group_id=None) as consumer:
            return int((await consumer.end_offsets([place]))[place])

    records = [Outgoing(place.topic, 0, b"k", bytes(size)) for size in sizes]
    assert asyncio.run(sent(records)) == len(records)
