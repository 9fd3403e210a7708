"""What a job does before its first batch: ingest waits for its turn and says what is lost, and none of them blocks."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaConsumer, TopicPartition

from infra.kafka.broker import admin_of
from infra.settings import Settings
from streams import events
from streams.heartbeat import Heartbeat, read_heartbeat
from tests.conftest import wait_until
from tests.streams.chain import Chain, item_body, running_chain

pytestmark = pytest.mark.e2e


def beat_of(chain: Chain, job: str) -> Heartbeat:
    found = read_heartbeat(chain.settings.heartbeat_dir, job)
    return found or Heartbeat(job, 0)


def test_one_hosts_ingest_runs_and_the_others_stand_by(settings: Callable[..., Settings], bundle_path: Path) -> None:
    """Takes turns by kills; after each turn stale updates come for items whose updates the new one never saw."""
    random = np.random.default_rng(1)
    one = settings(partitions=2, session_timeout_ms=2_000)
    two = dataclasses.replace(one, host="other", state=one.state.with_name("other"))
    names = {p: next(f"{k}" for k in range(99) if events.partition_of(f"{k}".encode(), 2) == p) for p in (0, 1)}

    def send(chain: Chain, *pairs: tuple[int, int]) -> None:
        chain.publish([item_body(names[place], version, random) for place, version in pairs])

    def versions(chain: Chain) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {0: [], 1: []}
        for record in chain.read("items"):
            found[record.partition].append(events.item(record.value).version)
        return found

    with running_chain(one, bundle_path) as first, running_chain(two, bundle_path) as second:
        first.start("ingest")
        wait_until(lambda: first.running("ingest"), "the first runs")
        second.start("ingest")
        wait_until(lambda: beat_of(second, "ingest").state == "standby", "the second stands by")
        assert one.host in beat_of(second, "ingest").reason
        send(first, (0, 10), (1, 10))
        wait_until(lambda: versions(first) == {0: [10], 1: [10]}, "both are in items")
        # it follows `items` while it stands by, so that nothing is left to read when its turn comes
        wait_until(lambda: beat_of(second, "ingest").handled == 2, "the second knows both")
        assert beat_of(second, "ingest").state == "standby"

        first.kill("ingest")
        wait_until(lambda: second.running("ingest"), "the second takes over")
        assert beat_of(second, "ingest").handled == 2
        first.start("ingest")
        wait_until(lambda: beat_of(first, "ingest").state == "standby", "the first stands by")
        send(second, (0, 5), (1, 20), (0, 11))  # the second never read version 10
        wait_until(lambda: versions(first) == {0: [10, 11], 1: [10, 20]}, "no stale update is in items")

        second.kill("ingest")
        wait_until(lambda: first.running("ingest"), "the first takes over")
        send(first, (1, 15), (1, 21), (0, 9), (0, 12))
        wait_until(lambda: versions(first) == {0: [10, 11, 12], 1: [10, 20, 21]}, "no stale update is in items")


def test_updates_that_kafka_deleted_unread_are_counted_and_said(
    settings: Callable[..., Settings], bundle_path: Path
) -> None:
    random = np.random.default_rng(2)
    with running_chain(settings(partitions=1), bundle_path) as chain:
        chain.start("ingest")
        chain.publish([item_body("a", 1, random)])
        chain.settle()
        assert chain.kill("ingest", signal.SIGTERM) == 0
        chain.publish([item_body("b", version, random) for version in range(5)])
        topic = chain.settings.topic("item-updates")
        with admin_of(chain.settings.kafka_bootstrap) as admin:
            admin.delete_records({TopicPartition(topic, 0): 4})
        chain.start("ingest")
        chain.settle()
        assert beat_of(chain, "ingest").reason.startswith(f"3 records of {topic} were deleted unread")
        assert [events.item(record.value).version for record in chain.read("items")] == [1, 3, 4]
        assert "forerank_lost_updates" in _metrics(chain.settings)
        assert chain.kill("ingest", signal.SIGTERM) == 0
        chain.start("ingest")  # said once
        wait_until(lambda: chain.running("ingest"), "ingest runs")
        assert beat_of(chain, "ingest").reason == ""


def _metrics(settings: Settings) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in settings.metrics_dir.glob("counter_*.db"))


@contextmanager
def member(settings: Settings, group: str, topic: str) -> Iterator[None]:
    """A stranger in a group, which makes setting the group's offsets wait."""
    consumer = KafkaConsumer(
        settings.topic(topic), bootstrap_servers=settings.kafka_bootstrap, group_id=settings.topic(group)
    )
    done, joined = threading.Event(), threading.Event()

    def poll() -> None:
        while not done.is_set():
            consumer.poll(timeout_ms=100)
            if consumer.assignment():
                joined.set()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        assert joined.wait(30)
        yield
    finally:
        done.set()
        thread.join()
        consumer.close()


@pytest.mark.parametrize("job", ["replicate:one", "histories"])
def test_a_job_that_waits_at_its_start_gives_signs_of_life_and_can_be_stopped(
    settings: Callable[..., Settings], bundle_path: Path, job: str
) -> None:
    host = settings(partitions=2, session_timeout_ms=20_000)
    group, topic = {
        "replicate:one": (f"replicate-{host.host}-one", "rows.one"),
        "histories": (f"replicate-histories-{host.host}", "behaviours"),
    }[job]
    with running_chain(host, bundle_path) as chain:
        chain.add_generation("one")
        with member(host, group, topic):
            chain.start(job)
            store = host.generation_dir("one") / "n2o" if ":" in job else host.histories_dir
            wait_until(store.exists, "its store is open")
            name = job.replace(":", "-")
            seen = beat_of(chain, name).time
            wait_until(lambda: beat_of(chain, name).time > seen + 2_500, "heartbeats", 15)
            assert beat_of(chain, name).state == "starting"
            assert chain.kill(job, signal.SIGTERM) == 0
