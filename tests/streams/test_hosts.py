"""What a host says on `hosts`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaProducer

from index.arena import ArenaReader
from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from streams import rollout
from streams.events import HostReport, ModelEvent
from streams.hosts import Hosts, read_hosts
from tests.conftest import wait_until
from tests.rows import batch_of


@pytest.mark.e2e
def test_reports_follow_the_rows_of_an_active_generation(settings: Callable[..., Settings], tmp_path: Path) -> None:
    host, layout = settings(), RowLayout()
    ensure_topics(host)
    serving = rollout.Serving()
    for offset, name in enumerate(("live", "resting")):
        serving = rollout.stage(serving, offset, ModelEvent("stage", name, f"file:///{name}", name))
        serving = rollout.advance(rollout.fill(serving, name, [0]), name, [0], [True])
        serving = rollout.verified(serving, name, rollout.Verification(verdict="yes"))
    serving = rollout.activate(serving, "live")
    hot, cold = aligned_empty(1, layout.hot), aligned_empty(1, layout.cold)
    for records in (hot, cold):
        records.view(np.uint8)[:] = 0

    def told(name: str) -> list[HostReport]:
        return [report for report in read_hosts(host) if report.generation == name]

    def followed() -> bool:
        assert hosts.report(serving, ["live"], lambda _: arena.progress()) == [], "nothing has changed"
        producer.flush()
        return told("live")[-1].covered == arena.progress().covered.tolist()

    with (
        closing(N2OWriter(tmp_path / "n2o", layout, 1, b"key")) as writer,
        closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer,
    ):
        arena = ArenaReader.open(tmp_path / "n2o", layout)
        hosts = Hosts(host, producer, sign_s=0.05)
        assert hosts.report(serving, ["live"], lambda _: arena.progress()) == ["live", "resting"]
        for offset, version in enumerate((1, 2, 3)):
            writer.apply([(batch_of(["a"], offset, hot, cold, [version]), offset)])
            wait_until(followed, "a report has the newest row")
            now, newest = arena.progress(), told("live")[-1]
            assert (newest.state, newest.counts) == ("active", now.count.tolist())
            assert newest.digests == [f"{digest:016x}" for digest in now.digest.tolist()]
        assert [report.covered for report in told("resting")] == [[-1]]
        serving = rollout.activate(serving, "resting")
        assert hosts.report(serving, [], lambda _: None) == ["live", "resting"]


@pytest.mark.e2e
def test_a_report_that_the_broker_did_not_take_is_made_again(settings: Callable[..., Settings]) -> None:
    host = settings()
    ensure_topics(host, {"hosts": {"max.message.bytes": "100"}})
    serving = rollout.stage(rollout.Serving(), 0, ModelEvent("stage", "g", "file:///g", "g"))
    with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer:
        hosts = Hosts(host, producer)
        assert hosts.report(serving, [], lambda _: None) == ["g"]
        wait_until(lambda: hosts.report(serving, [], lambda _: None) == ["g"], "it is said again")
