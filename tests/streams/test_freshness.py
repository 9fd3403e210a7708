"""What replicate measures of the rows that it makes visible, on a real index, and how old what waits for a job is."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer
from prometheus_client import REGISTRY

from index.arena import ArenaReader
from index.keys import digest_of, keys_of
from index.n2o import FillProof, N2OWriter, RowBatch
from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from infra.telemetry import gauge
from streams import blocks
from streams.freshness import HOPS, OLDEST, SAMPLE, watch_oldest
from streams.publish import Publisher
from streams.replicate import Replicate
from streams.worker import Job, Record
from tests.conftest import wait_until
from tests.index.rows import LAYOUT, made
from tests.rows import batch_of

HOUR = 3_600_000


def now() -> int:
    return time.time_ns() // 1_000_000


def block(ids: Sequence[str], start: int, ago: tuple[int, int, int], deleted: int = 0) -> RowBatch:
    """Rows whose event, publish and encode times lie so many ms back; the last `deleted` are deletions."""
    keys = keys_of(list(ids), b"key")
    hot, cold = made(keys, np.full(len(ids), start + 1, np.uint64))
    for name, ms in zip(("event_time", "publish_time", "encode_time"), ago, strict=True):
        cold[name] = now() - ms
    cold[len(ids) - deleted :] = np.zeros(1, cold.dtype)
    return batch_of(ids, start, hot, cold, [start + 1] * len(ids), deleted=deleted)


class Index:
    """A real index behind replicate's handler; `hops()` is what was counted and summed since it was made."""

    def __init__(self, path: Path) -> None:
        self.handler = Replicate(N2OWriter(path, LAYOUT, 1, b"key"), LAYOUT, [0])
        self._offset = 0
        self._before = self._read()

    def take(self, *batches: RowBatch) -> None:
        records = []
        for batch in batches:
            records.append(Record("rows.g", 0, self._offset, now(), None, blocks.encode(batch, LAYOUT), ()))
            self._offset += 1
        asyncio.run(self.handler.batch(records))

    def fill(self) -> None:
        self.take(dataclasses.replace(block([], 0, (0, 0, 0)), covered=-1, fill=FillProof(0, 0)))

    def hops(self) -> dict[str, tuple[float, float]]:
        return {
            hop: (count - self._before[hop][0], total - self._before[hop][1])
            for hop, (count, total) in self._read().items()
        }

    def _read(self) -> dict[str, tuple[float, float]]:
        def value(name: str, hop: str) -> float:
            return REGISTRY.get_sample_value(f"forerank_hop_seconds_{name}", {"hop": hop}) or 0.0

        return {hop: (value("count", hop), value("sum", hop)) for hop in HOPS}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    made_index = Index(tmp_path / "n2o")
    yield made_index
    made_index.handler.close()


def test_each_hop_is_counted_in_seconds(index: Index) -> None:
    index.fill()
    index.take(block(["a", "b", "c"], 0, (9_000, 4_000, 1_000), deleted=1))
    hops = index.hops()
    assert {hop: count for hop, (count, _) in hops.items()} == dict.fromkeys(HOPS, 2), "a deletion has no times"
    assert hops["event"][1] == pytest.approx(2 * 5.0, abs=0.1)
    assert hops["publish"][1] == pytest.approx(2 * 3.0, abs=0.1)
    assert 2 * 1.0 <= hops["encode"][1] < 2 * 20.0
    assert hops["visible"][1] == pytest.approx(sum(hops[hop][1] for hop in HOPS[:3]))


def test_a_clock_that_runs_backwards_counts_as_nothing(index: Index) -> None:
    index.fill()
    index.take(block(["a"], 0, (-HOUR, 2_000, 5_000)))  # an event of the future, encoded before it was published
    hops = index.hops()
    assert (hops["event"], hops["publish"], hops["visible"]) == ((1, 0.0), (1, 0.0), (1, 0.0))
    assert hops["encode"][1] >= 5.0


def test_of_a_large_batch_a_sample_is_counted(index: Index) -> None:
    index.fill()
    ids = [f"item {at}" for at in range(300)]
    index.take(*(block(ids[at : at + 100], at, (3, 2, 1)) for at in (0, 100, 200)))
    assert SAMPLE // 2 < index.hops()["event"][0] <= SAMPLE


def test_rows_of_a_fill_and_those_that_were_there_are_left_out(index: Index) -> None:
    old = block(["a"], 0, (HOUR, HOUR, 1))
    index.take(old)
    digest = int(digest_of(keys_of(["a"], b"key"), old.versions)[0])
    index.take(dataclasses.replace(block([], 1, (0, 0, 0)), covered=0, fill=FillProof(1, digest)))
    assert index.hops()["visible"][0] == 0
    new = block(["b"], 1, (3, 2, 1))
    index.take(new)
    index.take(new)  # again, as after an encoder's rebalance
    assert index.hops()["visible"][0] == 1


@pytest.mark.parametrize(("ages", "expected"), [((), 0), ((7_200_000, 3_600_000, 10_800_000), 10_800), ((-HOUR,), 0)])
def test_the_oldest_item_has_an_age(index: Index, tmp_path: Path, ages: Sequence[int], expected: int) -> None:
    for at, ago in enumerate(ages):
        index.take(block([f"item {at}"], at, (ago, 2, 1)))
    arena = ArenaReader.open(tmp_path / "n2o", LAYOUT)

    def age() -> float:
        return REGISTRY.get_sample_value("forerank_oldest_item_age_seconds", {"generation": "g"}) or 0.0

    async def scenario() -> None:
        gauge("forerank_oldest_item_age_seconds", OLDEST, ("generation",)).labels("g").set(-1)
        watch = asyncio.create_task(watch_oldest("g", arena))
        await asyncio.to_thread(wait_until, lambda: age() >= 0, "the first look")
        watch.cancel()

    asyncio.run(scenario())
    assert age() == pytest.approx(expected, abs=60)


@pytest.mark.e2e
def test_the_lag_in_seconds_is_of_what_waits(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=1)
    ensure_topics(host)
    topic = host.topic("item-updates")
    place = (topic, 0)

    def publish(version: int) -> None:
        with Publisher(host) as publisher:
            publisher.items([{"item_id": "a", "version": version, "deleted": True}])

    async def scenario() -> None:
        job = Job(host, "ingest", "ingest")
        consumer = AIOKafkaConsumer(bootstrap_servers=host.kafka_bootstrap, group_id=None)
        await consumer.start()
        try:
            job._next[place] = 0
            await job._measure(consumer)
            assert (job.heartbeat.lag, job.heartbeat.lag_s) == (0, 0.0)
            await asyncio.to_thread(publish, 1)
            await job._measure(consumer)
            assert job.heartbeat.lag == 1
            assert 0 < job.heartbeat.lag_s < 60, "an idle partition's wait is no age"
            job._reached[place] = now() - 120_000  # the last handled record was published then
            await job._measure(consumer)
            assert 120 <= job.heartbeat.lag_s < 180
            job._next[place] = 1
            await job._measure(consumer)
            assert (job.heartbeat.lag, job.heartbeat.lag_s) == (0, 0.0)
        finally:
            await consumer.stop()

    asyncio.run(scenario())
