"""Events over HTTP on their way to Kafka, and back from it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from api.events import Feed, checked, shown
from api.problems import ProblemError
from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from streams import events
from tests.conftest import wait_until
from tests.streams.chain import Chain


def test_a_patched_record_is_shown_as_a_whole_that_can_be_published_again() -> None:
    item = events.Item("i", 9, 5, 6, attributes={"stock": 3}, base=7, versions={"attributes.stock": 9})
    assert shown(events.encode(item)) == {
        "item_id": "i",
        "version": 9,
        "event_time": 5,
        "publish_time": 6,
        "attributes": {"stock": 3},
    }


def test_a_bad_patch_is_refused_with_its_place() -> None:
    bodies = [
        {"item_id": "i", "version": 1, "patch": {"attributes": {"a": 1}}},
        {"item_id": "i", "version": 1, "patch": {}},
    ]
    assert checked("items", json.dumps(bodies[0]).encode(), lines=False)
    with pytest.raises(ProblemError) as caught:
        checked("items", json.dumps(bodies).encode(), lines=False)
    assert (caught.value.body.status, caught.value.body.field) == (422, "[1].patch")


@pytest.mark.e2e
def test_a_body_of_many_items_is_few_messages_and_a_single_one_is_its_own(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    feed = Feed(host)
    many = [json.dumps({"item_id": f"{k}", "version": 1}).encode() for k in range(100)]

    def accepted(rows: list[bytes]) -> bool:
        try:
            return asyncio.run(feed.publish("items", rows)).accepted == len(rows)
        except ProblemError:  # the first connection, on a busy machine; events may come twice then
            return False

    try:
        wait_until(lambda: accepted(many[:1]), "the broker answers")
        wait_until(lambda: accepted(many), "all are there")
    finally:
        feed.close()
    messages = Chain(host, Path()).read("item-updates")
    packs = [pack for message in messages if (pack := events.unpacked(message.value, message.headers)) is not None]
    assert {json.loads(body)["item_id"] for pack in packs for body in pack} == {f"{k}" for k in range(100)}
    assert min(map(len, packs)) > 20
    assert {message.key for message in messages} == {b"0", None}
