"""replicate-histories on the real broker: behaviours and profiles arrive, bad events do not, an erasure outlives a
kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaProducer

from index.errors import StoreError
from index.histories import HistoriesReader
from infra.settings import Settings
from streams import events
from streams.publish import Publisher
from tests.conftest import wait_until
from tests.streams.chain import running_chain

pytestmark = pytest.mark.e2e
START = events.to_ms(events.msgspec.convert("2026-01-01T00:00:00Z", events.Time))
FAR = 2**50


def click(user: str, number: int, item: str | None = None) -> dict[str, object]:
    return {
        "event_id": f"{user}-{number}",
        "user_id": user,
        "item_id": item or f"i{number}",
        "action": "click",
        "event_time": events.to_rfc3339(START + number * 1000),
    }


def test_histories(settings: Callable[..., Settings], bundle_path: Path) -> None:
    host = settings(partitions=2)
    with running_chain(host, bundle_path) as chain, Publisher(host) as publisher:
        producer = KafkaProducer(bootstrap_servers=host.kafka_bootstrap)
        chain.start("histories")
        # out of order, and every event twice
        events_sent = [click("u", number) for number in (3, 1, 2, 3, 1, 2)]
        assert publisher.behaviours(events_sent).rejected == 0
        publisher.users([{"user_id": "u", "features": {"age": 30}}, {"user_id": "v", "features": {"age": 40}}])
        right = events.partition_of(b"u", 2)
        producer.send(host.topic("behaviours"), json.dumps(click("u", 9)).encode(), b"w", partition=right)
        producer.send(host.topic("behaviours"), json.dumps(click("u", 9)).encode(), b"u", partition=1 - right)
        producer.send(host.topic("users"), b"{", b"u", partition=right)
        producer.flush()

        def reader() -> HistoriesReader | None:
            try:
                return HistoriesReader(host.histories_dir)
            except StoreError:
                return None

        wait_until(lambda: reader() is not None, "there is a store")
        store = reader()
        assert store is not None
        try:
            wait_until(lambda: len(store.history("u", FAR).keys) == 3 and store.profile("v") is not None, "all arrived")
            assert store.history("u", FAR).times.tolist() == [START + n * 1000 for n in (1, 2, 3)]
            assert store.history("u", START + 2000).times.tolist() == [START + 1000, START + 2000]
            assert store.profile("u") == {"age": 30.0}
            wait_until(
                lambda: len(chain.read("behaviours.dlq")) == 2 and len(chain.read("users.dlq")) == 1, "dead letters"
            )
            kinds = sorted(dict(record.headers)["error_type"] for record in chain.read("behaviours.dlq"))
            assert kinds == [b"key_mismatch", b"wrong_partition"]

            # a null erases, and is rewritten so that compaction cannot lose it
            producer.send(host.topic("users"), None, b"u", partition=right, timestamp_ms=1)  # its clock is wrong
            producer.flush()
            wait_until(lambda: len(store.history("u", FAR).keys) == 0 and store.profile("u") is None, "u is erased")
            bodies = [json.loads(r.value) for r in chain.read("users") if r.key == b"u" and r.value not in (None, b"{")]
            wait_until(
                lambda: any(b'"erased_at"' in (record.value or b"") for record in chain.read("users")),
                "the null is rewritten",
            )
            assert bodies[0] == {"user_id": "u", "features": {"age": 30}}
            chain.kill("histories")
            publisher.behaviours([click("u", 7)])
            chain.start("histories")
            wait_until(
                lambda: store.history("u", FAR).times.tolist() == [START + 7000], "only what came later is there"
            )
            assert store.profile("v") == {"age": 40.0}
        finally:
            store.close()
            producer.close()
