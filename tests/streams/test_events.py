"""Events: what is accepted, what is refused and why, and that no bytes whatever make anything else happen."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2 as kafka_murmur2

from streams import events
from streams.events import EventError

NOW = 1_767_225_600_000  # 2026-01-01T00:00:00Z
ITEM = {
    "item_id": "i1",
    "version": 17,
    "event_time": "2026-01-31T12:00:00Z",
    "crosses": ["shoes", "acme"],
    "features": {"category": "shoes", "price": 12.5, "tags": ["a", "b"]},
    "embedding": [0.5, -1.0],
    "attributes": {"bid": 1.2, "in_stock": True, "title": "Schuh für Ümläute", "none": None},
}
BEHAVIOUR = {
    "event_id": "e1",
    "user_id": "u1",
    "item_id": "i1",
    "action": "click",
    "event_time": "2026-01-31T12:00:00Z",
}


def test_an_erasure_at_a_time_that_no_body_can_hold_is_malformed() -> None:
    assert json.loads(events.erasure("u", NOW)) == {"user_id": "u", "erased_at": "2026-01-01T00:00:00.000Z"}
    for time in (2**62, -(2**62)):
        with pytest.raises(EventError, match="outside the years") as found:
            events.erasure("u", time)
        assert found.value.kind == "malformed"


def body(base: dict[str, object], **changes: object) -> bytes:
    return json.dumps({k: v for k, v in {**base, **changes}.items() if v is not ...}).encode()


def refusal(value: bytes | None) -> EventError:
    with pytest.raises(EventError) as caught:
        events.item_update(value, None, NOW)
    return caught.value


def test_an_item_update_becomes_an_item_with_its_times_resolved() -> None:
    item = events.item_update(body(ITEM), None, NOW)
    assert (item.item_id, item.version, item.event_time, item.publish_time) == ("i1", 17, 1_769_860_800_000, NOW)
    assert item.features == {"category": "shoes", "price": 12.5, "tags": ["a", "b"]}
    assert item.attributes == ITEM["attributes"]
    assert events.item(events.encode(item)) == item


def test_the_golden_record_of_items() -> None:
    item = events.item_update(body(ITEM), None, NOW)
    assert events.encode(item) == (
        b'{"item_id":"i1","version":17,"event_time":1769860800000,"publish_time":1767225600000,'
        b'"crosses":["shoes","acme"],"features":{"category":"shoes","price":12.5,"tags":["a","b"]},'
        b'"embedding":"AAAAPwAAgL8=","attributes":{"bid":1.2,"in_stock":true,'
        b'"title":"Schuh f\xc3\xbcr \xc3\x9cml\xc3\xa4ute","none":null}}'
    )


def test_an_embedding_on_items_is_little_endian_floats_or_the_list_of_older_records() -> None:
    item = events.item_update(body(ITEM, embedding=[0.1, 1e300, -1e-60]), None, NOW)
    assert item.embedding == np.array([0.1, np.inf, -0.0], "<f4").tobytes()
    older = events.encode(item).replace(events.encode(item.embedding), b"[0.5,1]")
    assert events.item(older).embedding == [0.5, 1.0]
    for bad in (b'"AAAAPwAAgL8"', b'"-_--"', b'"?"', b"7", b"[null]"):
        with pytest.raises(EventError) as caught:
            events.item(events.encode(item).replace(events.encode(item.embedding), bad))
        assert caught.value.kind == "malformed"
        assert caught.value.field.startswith("embedding")


def test_a_deletion_keeps_only_what_counts() -> None:
    item = events.item_update(body(ITEM, deleted=True), None, NOW)
    assert item == events.Item("i1", 17, 1_769_860_800_000, NOW, True)
    bare = events.item_update(b'{"item_id":"i1","version":3,"deleted":true}', None, NOW)
    assert bare == events.Item("i1", 3, NOW, NOW, True)


def test_a_patch_names_what_it_changes() -> None:
    named = {"crosses": ["a"], "features": {"price": 1}, "embedding": [0.5], "attributes": {"stock": 3, "note": None}}
    found = events.item_update(body({"item_id": "i1", "version": 4, "patch": named}), None, NOW)
    floats = np.array([0.5], "<f4").tobytes()
    assert found == events.ItemPatch("i1", 4, NOW, NOW, ["a"], {"price": 1.0}, floats, {"stock": 3, "note": None})
    found = events.item_update(body({"item_id": "i1", "version": 4, "patch": {"attributes": {"stock": 3}}}), None, NOW)
    assert found == events.ItemPatch("i1", 4, NOW, NOW, None, {}, None, {"stock": 3})


def test_the_golden_record_of_a_patched_item() -> None:
    item = events.Item("i1", 9, 5, 6, attributes={"stock": 3}, base=7, versions={"attributes.stock": 9})
    assert events.encode(item) == (
        b'{"item_id":"i1","version":9,"event_time":5,"publish_time":6,"attributes":{"stock":3},"base":7,'
        b'"versions":{"attributes.stock":9}}'
    )
    assert events.item(events.encode(item)) == item


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (body(ITEM, version=...), "version"),
        (body(ITEM, version=-1), "version"),
        (body(ITEM, version=2**63), "version"),
        (body(ITEM, version=1.0), "version"),
        (body(ITEM, version=True), "version"),
        (body(ITEM, version="17"), "version"),
        (body(ITEM, item_id=""), "item_id"),
        (body(ITEM, item_id=17), "item_id"),
        (body(ITEM, item_id="a\x00b"), "item_id"),
        (body(ITEM, item_id="a\x7f"), "item_id"),
        (body(ITEM, item_id="a\x85"), "item_id"),
        (body(ITEM, item_id="ü" * 65), "item_id"),
        (body(ITEM, event_time="2026-01-31T12:00:00"), "event_time"),
        (body(ITEM, event_time="yesterday"), "event_time"),
        (body(ITEM, event_time=1_769_860_800_000), "event_time"),
        (body(ITEM, event_tiem="x"), "event_tiem"),
        (body(ITEM, crosses=["a", ""]), "crosses[1]"),
        (body(ITEM, crosses=["a"] * 257), "crosses"),
        (body(ITEM, features={"a": {"b": 1}}), "features[...]"),
        (body(ITEM, features={"a": [1]}), "features[...][0]"),
        (body(ITEM, embedding=["a"]), "embedding[0]"),
        (body(ITEM, patch={"attributes": {"bid": 1}}), "patch"),
        (body({"item_id": "i", "version": 1, "deleted": True}, patch={"attributes": {"bid": 1}}), "patch"),
        (body({"item_id": "i", "version": 1}, patch={}), "patch"),
        (body({"item_id": "i", "version": 1}, patch={"features": {}}), "patch"),
        (body({"item_id": "i", "version": 1}, patch={"title": "x"}), "patch"),
        (body({"item_id": "i", "version": 1}, patch={"features": {"a": None}}), "patch.features[...]"),
        (body(ITEM, attributes={"a": 10**30}), "attributes[...]"),
        (body(ITEM, embedding=[0.0])[:-3] + b"NaN]}", ""),
        (body(ITEM, embedding=[math.inf]), ""),
        (body(ITEM).replace(b"12.5", b"1e999"), "features[...]"),
        (body(ITEM).replace(b"12.5", b"9" * 5000), "features[...]"),
        (body(ITEM).replace(b'"i1"', b'"\\ud800"'), ""),
        (body(ITEM).replace(b'"i1"', b'"\xed\xa0\x80"'), ""),
        (body(ITEM) + b"{}", ""),
        (b'{"item_id":"i1","version":1,"x":' + b"[" * 200_000, "x"),
        (b'{"item_id":"i1","version":1,"features":{"x":' + b"[" * 200_000, "features[...][0]"),
        (b"[" * 200_000, ""),
        (b"", ""),
        (b"null", ""),
        (b"\xff\xfe", ""),
        (None, ""),
    ],
)
def test_a_bad_item_is_malformed_and_the_field_is_named(value: bytes | None, field: str) -> None:
    error = refusal(value)
    assert (error.kind, error.field) == ("malformed", field), error.message
    assert error.message


def test_an_event_of_more_than_a_quarter_of_a_megabyte_is_too_large() -> None:
    assert refusal(body(ITEM, attributes={"title": "x" * (256 << 10)})).kind == "too_large"
    # one that grows when it is written again can still be read, and sent
    grown = events.encode(events.item_update(body(ITEM, embedding=[1] * 80_000), None, NOW))
    assert events.MAX_EVENT_BYTES < len(grown) < 1_000_000
    assert events.item(grown).version == 17


def test_of_a_key_given_twice_the_last_one_counts() -> None:
    assert events.item_update(b'{"item_id":"a","version":1,"version":2}', None, NOW).version == 2


@given(st.binary(max_size=300))
def test_no_bytes_make_anything_but_an_event_or_an_event_error(value: bytes) -> None:
    for decode in (events.item_update, events.behaviour, events.user):
        with suppress(EventError):
            decode(value, None, NOW)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(ITEM)), JSON)
def test_any_json_in_any_field_is_accepted_or_refused_and_accepted_survives_the_round_trip(
    field: str, value: object
) -> None:
    try:
        item = events.item_update(json.dumps({**ITEM, field: value}).encode(), None, NOW)
    except EventError:
        return
    again = events.item(events.encode(item))
    assert again == item


def test_behaviours_and_users() -> None:
    found = events.behaviour(body(BEHAVIOUR), None, NOW)
    assert found == events.Behaviour("e1", "u1", "i1", "click", 1_769_860_800_000, NOW)
    for name in ("event_id", "user_id", "item_id", "action"):
        with pytest.raises(EventError):
            events.behaviour(body(BEHAVIOUR, **{name: ...}), None, NOW)
        with pytest.raises(EventError):
            events.behaviour(body(BEHAVIOUR, **{name: "a\n"}), None, NOW)
    profile = events.user(b'{"user_id":"u","features":{"age":30}}', None, NOW)
    assert profile == events.User("u", {"age": 30.0}, NOW, None, NOW)
    erased = events.user(events.erasure("u", NOW), None, NOW)
    assert erased == events.User("u", None, NOW, NOW, NOW)
    for bad in (b'{"user_id":"u"}', b'{"user_id":"u","features":{},"erased_at":"2026-01-01T00:00:00Z"}'):
        with pytest.raises(EventError, match="exactly one"):
            events.user(bad, None, NOW)
    with pytest.raises(EventError, match="future") as refused:
        events.user(events.erasure("u", NOW + 600_000), None, NOW)
    assert refused.value.field == "erased_at"


def test_model_events() -> None:
    stage = {"action": "stage", "generation": "g-1.a", "uri": "file:///b", "sha256": "0" * 64}
    assert events.model(json.dumps(stage).encode()).activate_when_complete is False
    for change in (
        {"generation": "G"},
        {"generation": "-g"},
        {"generation": "g\n"},
        {"sha256": "0" * 63},
        {"action": "x"},
    ):
        with pytest.raises(EventError):
            events.model(json.dumps({**stage, **change}).encode())
    with pytest.raises(EventError, match="`uri`"):
        events.model(b'{"action":"stage","generation":"g"}')
    assert events.model(b'{"action":"activate","generation":"g"}').action == "activate"
    for share in (0, 0.01, 0.5, 1):
        assert (
            events.model(json.dumps({"action": "activate", "generation": "g", "share": share}).encode()).share == share
        )
    for share in (-0.1, 1.01, "0.1", True):
        with pytest.raises(EventError) as refused:
            events.model(json.dumps({"action": "activate", "generation": "g", "share": share}).encode())
        assert refused.value.field == "share"
    for action in ("rollback", "retire"):
        with pytest.raises(EventError, match="`share` goes with activate alone"):
            events.model(json.dumps({"action": action, "generation": "g", "share": 0.5}).encode())


@given(st.binary(max_size=140), st.integers(1, 64))
def test_the_partitioner_is_that_of_kafka(key: bytes, partitions: int) -> None:
    assert events.murmur2(key) == kafka_murmur2(key) & 0xFFFFFFFF
    assert events.partition_of(key, partitions) == (kafka_murmur2(key) & 0x7FFFFFFF) % partitions


def test_key_and_partition_are_checked() -> None:
    right = events.partition_of(b"i1", 8)
    events.check_key(b"i1", b"i1", right, 8)
    for key in (b"i2", None, b""):
        with pytest.raises(EventError) as caught:
            events.check_key(key, b"i1", right, 8)
        assert caught.value.kind == "key_mismatch"
    with pytest.raises(EventError, match="murmur2_random") as caught:
        events.check_key(b"i1", b"i1", (right + 1) % 8, 8)
    assert caught.value.kind == "wrong_partition"


def test_cloud_events_headers_go_out_and_come_in_as_a_list_or_a_mapping() -> None:
    headers = events.cloud_headers("item-updates", "i1/17", "/here", NOW)
    assert dict(headers) == {
        "content-type": b"application/json",
        "ce_specversion": b"1.0",
        "ce_id": b"i1/17",
        "ce_source": b"/here",
        "ce_type": b"forerank.item-updates",
        "ce_time": b"2026-01-01T00:00:00.000Z",
    }
    for given_as in (headers, dict(headers), tuple(headers)):
        assert events.cloud_time(given_as, 5) == NOW
        assert events.header(given_as, "ce_id") == b"i1/17"
        assert events.header_list(given_as) == headers
        # the body's time counts before the header's, the header's before the record's
        assert events.item_update(b'{"item_id":"a","version":1}', given_as, 5).event_time == NOW
        assert events.item_update(body(ITEM), given_as, 5).event_time != NOW
    for nothing in (None, [], {}, ()):
        assert events.cloud_time(nothing, 5) == 5
        assert events.header_list(nothing) == []
    with pytest.raises(EventError, match="ce_time"):
        events.item_update(b'{"item_id":"a","version":1}', [("ce_time", b"noon")], 5)


def test_dead_letters_say_where_from_and_why() -> None:
    error = EventError("malformed", "bad \ud800" + "x" * 2000)
    assert dict(events.dead_letter_headers("items", 3, 77, error)) == {
        "source_topic": b"items",
        "source_partition": b"3",
        "source_offset": b"77",
        "error_type": b"malformed",
        "message": b"bad ?" + b"x" * 995,
    }


@given(st.integers(-(2**40), 2**42))
def test_times_are_whole_milliseconds(ms: int) -> None:
    text = events.to_rfc3339(ms)
    assert events.to_ms(msgspec.convert(text, events.Time)) == ms
