"""Stores that are lost, old, or ahead of what is left in Kafka: the rows end right, or the job stops and says why."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kafka import TopicPartition

from encoders.bundle import Bundle
from index.n2o import N2OWriter
from infra.kafka.broker import admin_of
from infra.settings import Settings
from streams.heartbeat import read_heartbeat
from streams.replicate import Replicate
from streams.worker import BAD_BUNDLE, NEEDS_REFILL, JobError, Record
from tests.conftest import wait_until
from tests.index.rows import LAYOUT
from tests.streams.chain import Chain, check_rows, item_body, oracle, running_chain

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
JOBS = ("ingest", "encode:one", "replicate:one")


def stop(chain: Chain, job: str) -> None:
    import signal

    assert chain.kill(job, signal.SIGTERM) == 0


def test_a_lost_or_old_ingest_store_is_made_again_from_items(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(1)
    first = [item_body(f"{k % 50}", 10 + k, random) for k in range(200)]
    second = [item_body(f"{k % 50}", 500 + k, random) for k in range(100)]
    second += [{"item_id": "3", "version": 700, "deleted": True}]
    old = [item_body(f"{k}", 5, random) for k in range(50)]
    with running_chain(settings(partitions=2), bundle_path) as chain:
        folder, copy = chain.settings.ingest_dir, chain.settings.state / "older"
        chain.add_generation("one")
        chain.start(*JOBS)
        chain.publish(first)
        chain.settle("one")
        stop(chain, "ingest")
        shutil.copytree(folder, copy)
        chain.start("ingest")
        chain.publish(second)
        chain.settle("one")
        written = chain.end_offsets("items")

        chain.kill("ingest")
        shutil.rmtree(folder)  # lost
        chain.start("ingest")
        chain.publish([*old, *first, *second])
        chain.settle("one")
        assert chain.end_offsets("items") == written

        chain.kill("ingest")
        shutil.rmtree(folder)  # older than the group's offsets
        shutil.copytree(copy, folder)
        chain.start("ingest")
        chain.publish([*old, *second])
        chain.settle("one")
        assert chain.end_offsets("items") == written
        check_rows(chain, "one", bundle, oracle([*first, *second]))


def test_an_older_index_is_brought_up_to_date(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(2)
    first = [item_body(f"{k}", 1, random) for k in range(100)]
    second = [item_body(f"{k}", 2, random) for k in range(50)] + [{"item_id": "99", "version": 2, "deleted": True}]
    with running_chain(settings(partitions=2), bundle_path) as chain:
        folder = chain.settings.generation_dir("one") / "n2o"
        chain.add_generation("one")
        chain.start(*JOBS)
        chain.publish(first)
        chain.settle("one")
        stop(chain, "replicate:one")
        shutil.copytree(folder, folder.with_name("older"))
        chain.start("replicate:one")
        chain.publish(second)
        chain.settle("one")
        chain.kill("replicate:one")
        shutil.rmtree(folder)
        folder.with_name("older").rename(folder)
        chain.start("replicate:one")
        chain.settle("one")
        check_rows(chain, "one", bundle, oracle([*first, *second]))


def test_replicate_ends_at_a_gap_so_that_its_next_start_looks_for_a_checkpoint(tmp_path: Path) -> None:
    handler = Replicate(N2OWriter(tmp_path, LAYOUT, 1, b"key"), LAYOUT, [3])
    with pytest.raises(JobError, match=r"rows.g\[0\] goes on at offset 5, not 3") as caught:
        asyncio.run(handler.batch([Record("rows.g", 0, 5, 0, None, b"", ())]))
    assert caught.value.status not in (NEEDS_REFILL, BAD_BUNDLE)
    handler.close()


def test_an_index_that_lacks_rows_no_longer_in_kafka_stops_with_needs_refill(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(3)
    first = [item_body(f"{k}", 1, random) for k in range(20)]
    with running_chain(settings(partitions=2), bundle_path) as chain:
        chain.add_generation("one")
        chain.start(*JOBS)
        chain.publish(first)
        chain.settle("one")
        stop(chain, "replicate:one")
        before = chain.end_offsets("rows.one")
        chain.publish([item_body(f"{k}", 2, random) for k in range(20)])
        wait_until(lambda: chain.end_offsets("rows.one") > before, "encode goes on")
        stop(chain, "encode:one")
        with admin_of(chain.settings.kafka_bootstrap) as admin:
            topic = chain.settings.topic("rows.one")
            ends = chain.end_offsets("rows.one")
            admin.delete_records({TopicPartition(topic, p): end for p, end in enumerate(ends)})
        chain.start("replicate:one")
        wait_until(lambda: chain.ended("replicate:one") is not None, "replicate stops")
        assert chain.ended("replicate:one") == NEEDS_REFILL
        beat = read_heartbeat(chain.settings.heartbeat_dir, "replicate-one")
        assert beat is not None
        assert (beat.state, beat.status) == ("stopped", NEEDS_REFILL)
        assert "needs refill" in beat.reason
        check_rows(chain, "one", bundle, oracle(first))  # what it has, it keeps
