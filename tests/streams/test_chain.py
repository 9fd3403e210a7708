"""The hops together on the real broker: what is published becomes exactly the right rows, and failures have a
destination.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, multiprocess

from encoders.bundle import Bundle
from index.n2o import PATCHED
from infra.settings import Settings
from streams import blocks, events
from streams.freshness import HOPS
from streams.heartbeat import read_heartbeat
from tests.conftest import wait_until
from tests.streams.chain import check_rows, item_body, oracle, running_chain

pytestmark = pytest.mark.e2e


def hops(settings: Settings) -> dict[str, float]:
    """How often each hop was observed by the host's jobs."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(settings.metrics_dir))
    found = {hop: registry.get_sample_value("forerank_hop_seconds_count", {"hop": hop}) for hop in HOPS}
    return {hop: count or 0 for hop, count in found.items()}


def test_items_become_rows_through_a_fill_and_then_live(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(1)
    first = [item_body(f"item {k % 40}", k // 40, random) for k in range(120)]
    first += [{"item_id": f"item {k}", "version": 50, "deleted": True} for k in range(5)]
    with running_chain(settings(partitions=3), bundle_path) as chain:
        chain.publish(first)
        chain.add_generation("one")
        chain.start("ingest")
        wait_until(lambda: sum(chain.end_offsets("items")) == 125, "ingest wrote items")
        chain.start("encode:one", "replicate:one")
        wait_until(lambda: chain.filled("one"), "the fill is proven")
        check_rows(chain, "one", bundle, oracle(first))

        wait_until(lambda: chain.running("encode:one"), "encode is in its group")
        second = [item_body("item 1", 60, random), item_body("item 7", 1, random), item_body("new", 1, random)]
        second += [
            item_body("item 9", 60, random, embedding=[1.0]),
            {"item_id": "item 8", "version": 60, "deleted": True},
        ]
        chain.publish(second)
        chain.settle("one")
        check_rows(chain, "one", bundle, oracle([*first, *second]))
        wait_until(lambda: hops(chain.settings) == dict.fromkeys(HOPS, 2), "the hops of two rows, none of the fill")
        (dead,) = chain.read("items.dlq")
        headers = dict(dead.headers)
        assert headers["error_type"] == b"not_encodable"
        assert b"embedding" in headers["message"]
        assert dead.key == b"item 9"
        folder = chain.settings.heartbeat_dir
        wait_until(lambda: getattr(read_heartbeat(folder, "encode-one"), "dead", 0) == 1, "its heartbeat tells")

        before = chain.end_offsets("items")
        chain.publish([*first, *second])  # everything twice changes nothing
        chain.settle("one")
        assert chain.end_offsets("items") == before
        check_rows(chain, "one", bundle, oracle([*first, *second]))

        # times: of the event, of the publication, of the encoding, of becoming visible
        (cold,), _ = chain.arena("one").gather_cold(_keys(chain.settings, ["new"]))
        assert cold["event_time"] == events.to_ms(_time(second[2]))
        assert cold["publish_time"] <= cold["encode_time"] <= cold["visible_time"]


def test_patches_keep_what_they_do_not_name_and_attributes_alone_need_no_encoding(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(3)
    first: list[dict[str, object]] = [item_body(f"{k}", 10, random) for k in range(20)]
    first += [item_body("unfit", 10, random, embedding=[1.0]), {"item_id": "gone", "version": 10, "deleted": True}]
    time_ = "2026-01-02T00:00:00Z"

    def patch(item_id: str, version: int, **groups: object) -> dict[str, object]:
        return {"item_id": item_id, "version": version, "event_time": time_, "patch": groups}

    with running_chain(settings(partitions=2), bundle_path) as chain:
        chain.add_generation("one")
        chain.start("ingest", "encode:one", "replicate:one")
        wait_until(lambda: chain.running("encode:one"), "encode is in its group")
        published = list(first)
        chain.publish(first)
        chain.settle("one")
        for version in range(12, 16):  # the first after encode's start asks for the log's end, the others need not
            second = [patch(f"{k}", version, attributes={"bid": version / 100, "stock": k}) for k in range(20)]
            published += second
            chain.publish(second)
            chain.settle("one")
        check_rows(chain, "one", bundle, oracle(published))
        rows = [blocks.decode(record.value, chain.layout()) for record in chain.read("rows.one")]
        assert sum(int((batch.kinds == PATCHED).sum()) for batch in rows) >= 60

        third = [
            patch("1", 20, attributes={"bid": 0.7}),
            patch("1", 21, features={"price": 3.5}),
            patch("1", 19, attributes={"title": "late"}),
            patch("2", 20, crosses=["blue"], embedding=[0.25] * 8),
            item_body("3", 14, random),  # between the patches of its attributes and of nothing else
            patch("unfit", 20, attributes={"bid": 0.7}),
            patch("gone", 20, attributes={"bid": 0.7}),
            patch("unknown", 20, attributes={"bid": 0.7}),
            {"item_id": "4", "version": 20, "deleted": True},
            patch("4", 16, attributes={"bid": 0.7}),
        ]
        published += third
        chain.publish(third)
        chain.settle("one")
        expected = oracle(published)
        check_rows(chain, "one", bundle, expected)
        dead = chain.read("item-updates.dlq")
        assert {record.key.decode() for record in dead} == expected.refused == {"gone", "unknown"}
        assert {dict(record.headers)["error_type"] for record in dead} == {b"no_such_item"}

        chain.add_generation("two")  # a fill encodes everything in full
        chain.start("encode:two", "replicate:two")
        wait_until(lambda: chain.filled("two"), "the fill is proven")
        check_rows(chain, "two", bundle, expected)


def test_an_empty_catalogue_is_filled_at_once(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    with running_chain(settings(partitions=2), bundle_path) as chain:
        chain.add_generation("one")
        chain.start("encode:one", "replicate:one")
        wait_until(lambda: chain.filled("one"), "the fill is proven")
        check_rows(chain, "one", bundle, oracle([]))


def test_bad_events_go_to_dead_letters_and_the_rest_goes_on(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    from kafka import KafkaProducer

    random = np.random.default_rng(2)
    good = [item_body(f"{k}", 1, random) for k in range(6)]
    with running_chain(settings(partitions=2), bundle_path) as chain:
        producer = KafkaProducer(bootstrap_servers=chain.settings.kafka_bootstrap, max_request_size=4 << 20)
        topic = chain.settings.topic("item-updates")
        right = events.partition_of(b"x", 2)
        body = json.dumps(item_body("x", 1, random)).encode()
        producer.send(topic, b"{broken", b"x", partition=right)
        producer.send(topic, body, b"y", partition=right)
        producer.send(topic, body, b"x", partition=1 - right)
        producer.send(topic, None, b"x", partition=right)
        producer.send(topic, b'{"item_id":"x","version":1,"pad":"' + b"x" * 600_000 + b'"}', b"x", partition=right)
        producer.send(topic, b"v" * 340_000, b"k" * 700_000, partition=right, headers=[("h", b"1")])
        producer.close()
        chain.publish(good)
        chain.add_generation("one")
        chain.start("ingest", "encode:one", "replicate:one")
        chain.settle("one")
        check_rows(chain, "one", bundle, oracle(good))
        dead = {dict(record.headers)["error_type"]: record for record in chain.read("item-updates.dlq")}
        assert set(dead) == {b"malformed", b"key_mismatch", b"wrong_partition", b"too_large"}
        assert dead[b"wrong_partition"].value == body
        assert b"murmur2_random" in dict(dead[b"wrong_partition"].headers)["message"]
        assert len(chain.read("item-updates.dlq")) == 6


def _keys(settings: Settings, ids: list[str]):  # type: ignore[no-untyped-def]
    from index.keys import keys_of

    return keys_of(ids, settings.hash_key.encode())


def _time(body: dict[str, object]):  # type: ignore[no-untyped-def]
    import msgspec

    return msgspec.convert(body["event_time"], events.Time)
