"""Patches: merged leaf by leaf, the same in any order and however often they come, against an oracle that sorts."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from streams import events
from streams.events import Item
from streams.ingest import Ingest, replay
from streams.merge import of_record
from tests.streams.test_ingest import PARTITIONS, SETTINGS, Crash, Log, opened, patch, record, run, states, update

Body = dict[str, Any]


def full(version: int, **leaves: object) -> bytes:
    return json.dumps({"item_id": "a", "version": version, **leaves}).encode()


def leaves_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that a body names, embeddings as `items` has them."""
    out = {
        f"{group}.{name}": value for group in ("features", "attributes") for name, value in body.get(group, {}).items()
    }
    if body.get("crosses") is not None:
        out["crosses"] = body["crosses"]
    if body.get("embedding") is not None:
        out["embedding"] = events._floats(body["embedding"])
    return out


def content(item: Item) -> tuple[int, bool, dict[str, Any]]:
    shown = {"crosses": item.crosses or None, "features": item.features, "attributes": item.attributes}
    found = leaves_of(shown) | ({} if item.embedding is None else {"embedding": item.embedding})
    return item.version, item.deleted, found


def oracle(bodies: Sequence[bytes]) -> tuple[int, bool, dict[str, Any]] | None:
    """In the order of versions: the newest whole update or deletion, and over it the patches that are newer."""
    decoded: list[Body] = [json.loads(body) for body in bodies]
    whole = max((body for body in decoded if "patch" not in body), key=lambda body: body["version"], default=None)
    if whole is None:
        return None
    found = {} if whole.get("deleted") else leaves_of(whole)
    version = whole["version"]
    patches = [body for body in decoded if "patch" in body and body["version"] > whole["version"]]
    for body in sorted(patches, key=lambda body: body["version"]):
        found |= leaves_of(body["patch"])
        version = body["version"]
    return version, bool(whole.get("deleted")), found


def last(log: Log) -> Item | None:
    records = log.items()
    return events.item(records[-1][2]) if records else None


NAMES = st.sampled_from(["a", "b", "", "c.d"])
GROUPS: Mapping[str, st.SearchStrategy[object]] = {
    "crosses": st.lists(st.sampled_from(["red", "blue"]), min_size=1, max_size=2),
    "features": st.dictionaries(NAMES, st.integers(0, 99).map(float), min_size=1, max_size=3),
    "embedding": st.lists(st.integers(0, 9).map(float), min_size=1, max_size=2),
    "attributes": st.dictionaries(NAMES, st.integers(0, 99) | st.none(), min_size=1, max_size=3),
}


@st.composite
def histories(draw: st.DrawFn, deletions: bool) -> list[bytes]:
    """Events of one item: the first one makes it, all have versions of their own."""
    out = [full(0, **draw(st.fixed_dictionaries({}, optional=GROUPS)))]
    for version in range(1, draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(["full", "patch", "patch", "patch", "delete"] if deletions else ["full", "patch"]))
        if kind == "delete":
            out.append(full(version, deleted=True))
        elif kind == "full":
            out.append(full(version, **draw(st.fixed_dictionaries({}, optional=GROUPS))))
        else:
            named = draw(st.fixed_dictionaries({}, optional=GROUPS).filter(bool))
            out.append(patch("a", version, **named))
    return out


def arrivals(events_: list[bytes]) -> st.SearchStrategy[list[bytes]]:
    """The first one, then all in any order, some of them several times."""
    again = st.lists(st.sampled_from(events_), max_size=6)
    return again.flatmap(lambda more: st.permutations([*events_[1:], *more])).map(lambda rest: [events_[0], *rest])


def deliver(log: Log, folder: Path, bodies: Sequence[bytes], sizes: Sequence[int]) -> tuple[dict[bytes, bytes], int]:
    """In batches of these sizes; what the store has in the end, and how many were stale."""
    start = turn = stale = 0
    with opened(folder) as store:
        while start < len(bodies):
            size = sizes[turn % len(sizes)]
            stale += run(
                log, store, [record(start + k, raw) for k, raw in enumerate(bodies[start : start + size])]
            ).stale
            start, turn = start + size, turn + 1
        return states(store), stale


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_updates_and_patches_in_any_order_end_as_in_the_order_of_versions(data: st.DataObject) -> None:
    published = data.draw(histories(deletions=False))
    arrived = data.draw(arrivals(published))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    log, ordered = Log(), Log()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        _, stale = deliver(log, Path(one), arrived, sizes)
        deliver(ordered, Path(two), published, [1])
    found, wanted = last(log), last(ordered)
    assert found is not None
    assert wanted is not None
    assert content(found) == content(wanted) == oracle(published)
    assert (found.base, found.versions) == (wanted.base, wanted.versions)
    first = next(at for at, raw in enumerate(arrived) if json.loads(raw)["version"] == found.version)
    assert found.event_time == 1_000 + first
    assert len(log.items()) + stale == len(arrived)
    assert "item-updates.dlq" not in log.topics
    versions = [events.item(value).version for _, _, value in log.items()]
    assert versions == sorted(versions), "log order is version order"


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_with_deletions_the_end_is_that_of_the_events_that_were_accepted(data: st.DataObject) -> None:
    """A patch that meets a deleted item is refused, so what is accepted follows from the order; nothing else does."""
    arrived = data.draw(arrivals(data.draw(histories(deletions=True))))
    log = Log()
    with tempfile.TemporaryDirectory() as folder:
        deliver(log, Path(folder), arrived, data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    dead = log.topics.get("item-updates.dlq", [])
    assert {headers["error_type"] for *_, headers in dead} <= {b"no_such_item"}
    offsets = {int(headers["source_offset"]) for *_, headers in dead}
    found = last(log)
    assert found is not None
    assert content(found) == oracle([raw for at, raw in enumerate(arrived) if at not in offsets])
    for at in offsets:
        assert b'"patch"' in arrived[at]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(0, 20), st.sampled_from(["produce", "remember"]))
def test_a_crash_between_the_numbers_and_a_rebuild_change_nothing(data: st.DataObject, at: int, point: str) -> None:
    arrived = data.draw(arrivals(data.draw(histories(deletions=True))))
    records = [record(k, raw) for k, raw in enumerate(arrived)]
    log, whole = Log(), Log()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        with opened(Path(one)) as store:
            run(log, store, records[: len(records) // 2])
            log.crash_after, store.crashes = (at, False) if point == "produce" else (-1, True)
            with suppress(Crash):
                run(log, store, records[len(records) // 2 :])
        log.crash_after = -1
        with opened(Path(one)) as store:
            run(log, store, records[len(records) // 2 :])
            kept = states(store)
        deliver(whole, Path(two), arrived, [1])
        found, wanted = last(log), last(whole)
        assert found is not None
        assert wanted is not None
        assert (content(found), found.versions) == (content(wanted), wanted.versions)
        with tempfile.TemporaryDirectory() as three, opened(Path(three)) as rebuilt:
            replay(rebuilt, log.items()[: len(log.items()) // 2])
            replay(rebuilt, log.items())
            assert states(rebuilt) == kept, "byte by byte"


def test_two_writers_do_not_undo_each_other(tmp_path: Path) -> None:
    """One publishes whole items, slowly; the other the price and the stock, from a clock of the same item."""
    log = Log()
    with opened(tmp_path) as store:
        bodies = [
            full(1, features={"price": 10.0, "words": ["a"]}, attributes={"stock": 5, "title": "old"}),
            patch("a", 30, features={"price": 8.0}, attributes={"stock": 4}),
            full(20, features={"price": 10.0, "words": ["b"]}, attributes={"stock": 5, "title": "new"}),
            patch("a", 25, attributes={"stock": 9, "bid": 2}),
        ]
        assert run(log, store, [record(k, raw) for k, raw in enumerate(bodies)]).stale == 0
    item = last(log)
    assert item is not None
    assert (item.version, item.base) == (30, 20)
    assert item.features == {"price": 8.0, "words": ["b"]}
    assert item.attributes == {"stock": 4, "title": "new", "bid": 2}
    assert item.versions == {"features.price": 30, "attributes.stock": 30, "attributes.bid": 25}


def test_patches_of_unknown_and_deleted_items_are_dead_letters_and_late_ones_are_only_counted(tmp_path: Path) -> None:
    log = Log()
    bodies = [
        patch("b", 1, attributes={"x": 1}),
        update("a", 2),
        patch("a", 3, attributes={"x": 1}),
        update("a", 5, deleted=True),
        patch("a", 4, attributes={"x": 2}),  # late: the deletion took it with it
        patch("a", 6, attributes={"x": 3}),
        patch("a", 3, attributes={"x": 1}),
        update("a", 7, note=1),
    ]
    with opened(tmp_path) as store:
        ingest = run(log, store, [record(k, raw) for k, raw in enumerate(bodies)])
        assert store.source_offsets(PARTITIONS)[events.partition_of(b"a", PARTITIONS)] == 8
    assert ingest.stale == 2
    dead = log.topics["item-updates.dlq"]
    assert [(headers["error_type"], headers["source_offset"]) for *_, headers in dead] == [
        (b"no_such_item", b"0"),
        (b"no_such_item", b"5"),
    ]
    assert [value for _, _, value, _, _ in dead] == [bodies[0], bodies[5]]
    item = last(log)
    assert item is not None
    assert content(item) == (7, False, {"attributes.note": 1})


def test_what_was_remembered_is_not_taken_again_when_it_is_delivered_again(tmp_path: Path) -> None:
    """Faust commits once a second: the refused patch would meet the item that was made after it."""
    log = Log()
    bodies = [update("a", 1, deleted=True), patch("a", 6, attributes={"x": 1}), update("a", 5)]
    records = [record(k, raw) for k, raw in enumerate(bodies)]
    with opened(tmp_path) as store:
        ingest = Ingest(SETTINGS, store, log.send, following=[0] * PARTITIONS)
        for given_ in (records, records, [*records, record(3, update("a", 7))]):
            asyncio.run(ingest.batch(given_))
        assert ingest.stale == 0
    assert [events.item(value).version for _, _, value in log.items()] == [1, 5, 7]
    assert len(log.topics["item-updates.dlq"]) == 1


def test_a_deletion_keeps_what_a_newer_patch_wrote_for_an_update_between(tmp_path: Path) -> None:
    log = Log()
    bodies = [
        update("a", 1),
        patch("a", 6, attributes={"x": 6}),
        update("a", 4, deleted=True),
        update("a", 5, note=5),
    ]
    with opened(tmp_path) as store:
        run(log, store, [record(k, raw) for k, raw in enumerate(bodies[:3])])
        item = last(log)
        assert item is not None
        assert (item.deleted, item.version, item.base) == (True, 6, 4)  # N2O compares versions: not below the row's
        run(log, store, [record(3, bodies[3])])
    item = last(log)
    assert item is not None
    assert content(item) == (6, False, {"attributes.note": 5, "attributes.x": 6})


def test_an_item_that_patches_would_make_too_large_is_refused(tmp_path: Path) -> None:
    log = Log()
    text = "x" * 250_000
    bodies = [update("a", 1), *(patch("a", 2 + k, attributes={f"t{k}": text}) for k in range(4))]
    with opened(tmp_path) as store:
        run(log, store, [record(k, raw) for k, raw in enumerate(bodies)])
    dead = log.topics["item-updates.dlq"]
    assert [headers["error_type"] for *_, headers in dead] == [b"too_large"] * 2
    assert [events.item(value).version for _, _, value in log.items()] == [1, 2, 3]
    assert max(len(value or b"") for _, _, value in log.items()) <= events.MAX_ITEM_BYTES


def test_what_is_remembered_follows_from_the_record() -> None:
    item = events.item_update(update("a", 3), None, 5)
    known = of_record(events.encode(item), 77)
    assert known == (3, 3, 0, events.encode(item))
    item.base, item.versions, item.deleted = 2, {"attributes.note": 3}, True  # type: ignore[union-attr]
    assert of_record(events.encode(item), 77)[:3] == (3, 2, 77)
