"""Packs: many events in one message, taken as if each had come by itself, whatever breaks in between."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from streams import events
from streams.events import EventError
from streams.ingest import Ingest
from streams.publish import Publisher
from streams.worker import Record
from tests.streams.chain import Chain
from tests.streams.test_ingest import (
    PARTITIONS,
    SETTINGS,
    Crash,
    Log,
    opened,
    patch,
    record,
    replayed,
    run,
    update,
)

PLACE = events.partition_of(b"a", PARTITIONS)
HERE = [name for name in map(str, range(40)) if events.partition_of(name.encode(), PARTITIONS) == PLACE]
THERE = next(name for name in map(str, range(40)) if name not in HERE)


def pack(offset: int, bodies: Sequence[bytes], **changes: object) -> Record:
    headers = [("ce_id", b"p"), ("ce_source", b"/s"), (events.PACK, str(len(bodies)).encode())]
    return Record("item-updates", PLACE, offset, 1_000, None, events.pack(bodies), headers)._replace(**changes)


NAMES = st.sampled_from(HERE[:3])
BODIES = st.one_of(
    st.builds(update, NAMES, st.integers(0, 6), deleted=st.booleans(), note=st.integers(0, 9)),
    st.builds(lambda name, version: patch(name, version, attributes={"note": version}), NAMES, st.integers(0, 6)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(BODIES, min_size=1, max_size=8), min_size=1, max_size=6), st.integers(0, 30))
def test_packs_end_as_the_same_events_one_by_one_also_after_a_crash(parts: list[list[bytes]], crash: int) -> None:
    packs = [pack(offset, bodies) for offset, bodies in enumerate(parts)]
    singles = [record(k, raw, partition=PLACE) for k, raw in enumerate(body for bodies in parts for body in bodies)]
    single, packed = Log(), Log(crash_after=crash)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        with opened(Path(one)) as store:
            run(single, store, singles)
            wanted = {name: (known and known[:2]) for name, known in zip(HERE, store.get(_ids()), strict=True)}
        with opened(Path(two)) as store, suppress(Crash):
            run(packed, store, packs)
        packed.crash_after = -1
        with opened(Path(two)) as store:
            run(packed, store, packs[max(0, store.source_offsets(PARTITIONS)[PLACE]) :])
            assert store.source_offsets(PARTITIONS)[PLACE] == len(packs)
            assert {name: (known and known[:2]) for name, known in zip(HERE, store.get(_ids()), strict=True)} == wanted
    assert replayed(packed) == replayed(single)
    assert 0 <= len(packed.items()) - len(single.items()) <= crash, "only what was sent before the crash comes twice"
    assert _dead(packed) == _dead(single)


def _ids() -> list[bytes]:
    return [name.encode() for name in HERE]


def _dead(log: Log) -> set[bytes | None]:
    return {value for _, _, value, _, _ in log.topics.get("item-updates.dlq", [])}


def test_a_bad_event_is_a_dead_letter_by_itself_with_its_place(tmp_path: Path) -> None:
    log = Log()
    bodies = [update(HERE[0], 1), b'{"item_id": "x"}', update(THERE, 1), b"7", patch(HERE[1], 1, attributes={"a": 1})]
    with opened(tmp_path) as store:
        run(log, store, [pack(5, [*bodies, update(HERE[2], 1)])])
        assert store.source_offsets(PARTITIONS)[PLACE] == 6
    assert set(replayed(log)) == {HERE[0], HERE[2]}
    dead = log.topics["item-updates.dlq"]
    assert [value for _, _, value, _, _ in dead] == bodies[1:]
    kinds = [headers["error_type"] for *_, headers in dead]
    assert kinds == [b"malformed", b"wrong_partition", b"malformed", b"no_such_item"]
    assert [headers["index"] for *_, headers in dead] == [b"1", b"2", b"3", b"4"]
    assert {headers["source_offset"] for *_, headers in dead} == {b"5"}
    assert all(events.PACK not in headers for *_, headers in dead), "a letter that is published again is no pack"
    assert [headers["ce_id"] for *_, headers in log.topics["items"]] == [b"p/0", b"p/5"]


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (pack(0, [update(HERE[0], 1)], value=b"{"), "malformed"),
        (pack(0, [update(HERE[0], 1)], value=b'{"a":1}'), "malformed"),
        (pack(0, [update(HERE[0], 1)], value=None), "malformed"),
        (pack(0, [update(HERE[0], 1)], value=b"[" * 200_000), "malformed"),
        (pack(0, [update(HERE[0], 1)], value=b"[]"), "malformed"),
        (pack(0, [update(HERE[0], 1)], headers=[(events.PACK, b"2")]), "malformed"),
        (pack(0, [update(HERE[0], 1)] * 513), "too_large"),
    ],
)
def test_a_pack_that_is_none_is_one_dead_letter(tmp_path: Path, broken: Record, kind: str) -> None:
    log = Log()
    with opened(tmp_path) as store:
        run(log, store, [broken, pack(1, [update(HERE[0], 2)])])
        assert store.source_offsets(PARTITIONS)[PLACE] == 2
    ((_, _, value, _, headers),) = log.topics["item-updates.dlq"]
    assert (value, headers["error_type"]) == (broken.value, kind.encode())
    assert replayed(log) == {HERE[0]: (2, False, 0)}


@given(st.binary(max_size=50), st.none() | st.binary(max_size=5))
def test_no_bytes_make_anything_but_a_pack_or_a_refusal(value: bytes, said: bytes | None) -> None:
    with suppress(EventError):
        found = events.unpacked(value, [] if said is None else [(events.PACK, said)])
        assert (found is None) == (said is None)


def test_many_packs_are_taken_in_parts_of_whole_messages(tmp_path: Path) -> None:
    """What a crash leaves undone begins with a message, and is no more than a part of the batch."""
    log, moved = Log(), []
    bodies = [update(name, version) for version in range(1, 513) for name in HERE[:1]]
    packs = [pack(k, bodies) for k in range(20)]
    log.crash_after = 300  # the first part's events are stale but for the first pack's: it is in the second of them
    with opened(tmp_path) as store:
        ingest = Ingest(SETTINGS, store, log.send, lambda: moved.append(store.source_offsets(PARTITIONS)[PLACE]))
        with suppress(Crash):
            asyncio.run(ingest.batch(packs))
        assert (moved, store.source_offsets(PARTITIONS)[PLACE]) == ([], -1)
        log.crash_after = -1
        asyncio.run(ingest.batch(packs))
        assert moved == [8, 16, 20]
        assert replayed(log) == {HERE[0]: (512, False, 0)}


@pytest.mark.e2e
def test_bulk_publishing_packs_where_a_partition_has_several(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=3)
    ensure_topics(host)
    chain = Chain(host, Path())
    rows = [{"item_id": f"{k % 200}", "version": k, "attributes": {"text": "x" * 1000}} for k in range(600)]
    with Publisher(host) as publisher:
        done = publisher.publish("items", [*rows, b"{", {"item_id": "y"}], bulk=True)
        assert (done.sent, done.rejected, [error.place for error in done.errors]) == (600, 2, [601, 602])
        assert publisher.publish("items", rows[:4], bulk=True).sent == 4
        behaviour = {"event_id": "e", "user_id": "u", "item_id": "8", "action": "click"}
        assert publisher.publish("behaviours", [behaviour] * 20, bulk=True).sent == 20
    assert len(chain.read("behaviours")) == 20
    seen: list[dict[str, object]] = []
    single = 0
    for message in chain.read("item-updates"):
        bodies = events.unpacked(message.value, message.headers)
        if bodies is None:
            single += 1
            assert message.key == json.loads(message.value)["item_id"].encode()
            continue
        assert message.key is None
        assert len(bodies) >= 8
        assert len(message.value) < 100_000
        headers = dict(message.headers)
        assert headers["ce_type"] == b"forerank.item-updates"
        found = [json.loads(body) for body in bodies]
        assert {events.partition_of(str(one["item_id"]).encode(), 3) for one in found} == {message.partition}
        seen += found
    assert single < 4 + 3 * 8
    by_item = [one["version"] for one in seen if one["item_id"] == "7"]
    assert by_item == sorted(by_item)
    assert len(seen) + single == 604


def test_the_message_is_counted_with_all_its_events_where_the_broker_does_not_take_it() -> None:
    from streams.publish import PublishError, _Acks

    acks = _Acks()
    acks.failed(40, ValueError("no"))
    acks.failed(1, ValueError("neither"))
    with pytest.raises(PublishError, match=r"did not take 41 events \(ValueError: no\)"):
        acks.check()
