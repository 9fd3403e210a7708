"""Ingest against a single-threaded oracle, without a broker: its store is real, what it sends lands in lists."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.settings import Settings
from streams import events
from streams.ingest import Ingest, IngestStore, replay
from streams.merge import Known
from streams.worker import Outgoing, Record

PARTITIONS = 2
SETTINGS = Settings(partitions=PARTITIONS, tombstone_days=1.0)
DAY_MS = 86_400_000


class Crash(BaseException):
    """A process that ends here; not an Exception, so nothing handles it."""


@dataclasses.dataclass
class Log:
    """What a broker would hold: (partition, key, value, timestamp) per topic. Crashes at the named points."""

    topics: dict[str, list[tuple[int, bytes | None, bytes | None, int, dict[str, bytes]]]] = dataclasses.field(
        default_factory=dict
    )
    crash_after: int = -1  # records until the process dies, unacknowledged ones included

    async def send(self, records: Sequence[Outgoing]) -> None:
        for topic, partition, key, value, headers, timestamp in records:
            if self.crash_after == 0:
                raise Crash
            self.crash_after -= 1
            self.topics.setdefault(topic, []).append((partition, key, value, timestamp or 0, dict(headers)))

    def items(self) -> list[tuple[bytes, int, bytes | None]]:
        return [(key or b"", time, value) for _, key, value, time, _ in self.topics.get("items", [])]


def record(offset: int, value: bytes | None, *, key: bytes | None = None, partition: int | None = None) -> Record:
    if key is None and value is not None:
        try:
            key = str(json.loads(value)["item_id"]).encode()
        except (ValueError, KeyError, TypeError):
            key = b"unknown"
    place = events.partition_of(key or b"", PARTITIONS) if partition is None else partition
    return Record("item-updates", place, offset, 1_000 + offset, key, value, ())


def patch(item_id: str, version: int, **groups: object) -> bytes:
    return json.dumps({"item_id": item_id, "version": version, "patch": groups}).encode()


def update(item_id: str, version: int, *, deleted: bool = False, note: int = 0) -> bytes:
    body: dict[str, object] = {"item_id": item_id, "version": version}
    return json.dumps(body | ({"deleted": True} if deleted else {"attributes": {"note": note}})).encode()


class MortalStore(IngestStore):
    """A real store, before whose writing the process may die."""

    crashes = False

    def remember(self, changes: Mapping[bytes, tuple[Known | None, Known | None]], *offsets: Mapping[int, int]) -> None:
        if self.crashes:
            raise Crash
        super().remember(changes, *offsets)


@contextmanager
def opened(path: Path) -> Iterator[MortalStore]:
    store = MortalStore(path)
    try:
        yield store
    finally:
        store.close()


def run(log: Log, store: IngestStore, records: Sequence[Record]) -> Ingest:
    ingest = Ingest(SETTINGS, store, log.send)
    asyncio.run(ingest.batch(records))
    return ingest


def states(store: IngestStore) -> dict[bytes, bytes]:
    """All that a store remembers of items and deletions, as it lies there."""
    return {key: value for key, value in store._db.items() if key[:1] in b"id"}


def oracle(bodies: Sequence[bytes]) -> tuple[dict[str, tuple[int, bool, int]], list[tuple[str, int]]]:
    """Final (version, deleted, note) per item, and the accepted (item, version) in order."""
    state: dict[str, tuple[int, bool, int]] = {}
    accepted = []
    for raw in bodies:
        body = json.loads(raw)
        name, version = body["item_id"], body["version"]
        if name not in state or version > state[name][0]:
            state[name] = (version, body.get("deleted", False), body.get("attributes", {}).get("note", 0))
            accepted.append((name, version))
    return state, accepted


def replayed(log: Log) -> dict[str, tuple[int, bool, int]]:
    """What a reader of `items` ends with, taking the last record of each item as compaction does."""
    last: dict[str, tuple[int, bool, int]] = {}
    for key, _, value in log.items():
        if value is None:
            last.pop(key.decode(), None)
            continue
        item = events.item(value)
        note = item.attributes.get("note", 0)
        assert isinstance(note, int)
        last[item.item_id] = (item.version, item.deleted, note)
    return last


UPDATES = st.lists(
    st.builds(
        update,
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 6),
        deleted=st.booleans(),
        note=st.integers(0, 1000),
    ),
    max_size=30,
)


@settings(max_examples=25, deadline=None)
@given(UPDATES, st.lists(st.integers(1, 8), min_size=1, max_size=8))
def test_any_order_in_any_batches_ends_as_the_oracle_says(bodies: list[bytes], sizes: list[int]) -> None:
    log = Log()
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as store:
        start = turn = 0
        while start < len(bodies):
            size = sizes[turn % len(sizes)]
            run(log, store, [record(start + k, raw) for k, raw in enumerate(bodies[start : start + size])])
            start, turn = start + size, turn + 1
        state, accepted = oracle(bodies)
        assert replayed(log) == state
        assert [(key.decode(), events.item(value).version) for key, _, value in log.items()] == accepted
        known = store.get([name.encode() for name in state])
        assert [(k and k.version, bool(k and k.deleted_at)) for k in known] == [(v, d) for v, d, _ in state.values()]


@settings(max_examples=25, deadline=None)
@given(UPDATES, st.integers(0, 25), st.sampled_from(["produce", "remember"]))
def test_a_crash_between_the_numbers_loses_nothing(bodies: list[bytes], at: int, point: str) -> None:
    """Dies while producing (some records are out) or between 1 and 2 (all are out, nothing is remembered); then
    runs again.
    """
    log = Log()
    with tempfile.TemporaryDirectory() as folder:
        records = [record(k, raw) for k, raw in enumerate(bodies)]
        with opened(Path(folder)) as store:
            run(log, store, records[: len(records) // 2])
            second = records[len(records) // 2 :]
            if point == "produce":
                log.crash_after = at
            else:
                store.crashes = True
            with suppress(Crash):
                run(log, store, second)
        log.crash_after = -1
        with opened(Path(folder)) as store:  # Kafka gives the batch again: its offsets were not committed
            run(log, store, second)
            run(log, store, records)  # and all of it once more, as after a rewind
            state, _ = oracle(bodies)
            assert replayed(log) == state
        with tempfile.TemporaryDirectory() as other, opened(Path(other)) as rebuilt, opened(Path(folder)) as store:
            replay(rebuilt, log.items())
            names = [name.encode() for name in state]
            assert [k and k.version for k in rebuilt.get(names)] == [k and k.version for k in store.get(names)]


def test_versions_are_compared_within_a_batch_and_duplicates_are_stale(tmp_path: Path) -> None:
    log = Log()
    bodies = [update("a", 5, note=1), update("a", 4, note=2), update("a", 5, note=3), update("a", 6, note=4)]
    with opened(tmp_path) as store:
        ingest = run(log, store, [record(k, raw) for k, raw in enumerate(bodies)])
        assert ingest.stale == 2
        assert [events.item(value).version for _, _, value in log.items()] == [5, 6]
        again = run(log, store, [record(k, raw) for k, raw in enumerate(bodies)])
        assert again.stale == 4
        assert len(log.items()) == 2


def test_an_old_update_does_not_bring_a_deleted_item_back(tmp_path: Path) -> None:
    log = Log()
    with opened(tmp_path) as store:
        run(log, store, [record(0, update("a", 3)), record(1, update("a", 5, deleted=True)), record(2, update("a", 4))])
        assert replayed(log) == {"a": (5, True, 0)}
        run(log, store, [record(3, update("a", 6, note=7))])
        assert replayed(log) == {"a": (6, False, 7)}


def test_refused_events_go_to_the_dead_letter_topic_with_their_bytes_and_the_rest_goes_on(tmp_path: Path) -> None:
    log = Log()
    right = events.partition_of(b"a", PARTITIONS)
    bad = [
        record(0, b"{nonsense", key=b"a", partition=right),
        record(1, update("a", 1), key=b"b", partition=right),
        record(2, update("a", 1), partition=1 - right),
        record(3, None, key=b"a", partition=right),
        record(4, update("a", 1, note=1)),
    ]
    with opened(tmp_path) as store:
        run(log, store, bad)
        assert replayed(log) == {"a": (1, False, 1)}
        dead = log.topics["item-updates.dlq"]
        assert [value for _, _, value, _, _ in dead] == [r.value for r in bad[:4]]
        assert [headers["error_type"] for *_, headers in dead] == [
            b"malformed",
            b"key_mismatch",
            b"wrong_partition",
            b"malformed",
        ]
        assert [headers["source_offset"] for *_, headers in dead] == [b"0", b"1", b"2", b"3"]
        assert store.source_offsets(PARTITIONS)[right] == 5


def test_nothing_that_fits_the_source_is_too_large_for_where_it_goes(tmp_path: Path) -> None:
    """Whatever is large about a record (key, value, headers), what is sent stays below the broker's 1 MiB."""
    log = Log()
    right = events.partition_of(b"a", PARTITIONS)
    many = [(f"h{k}", b"") for k in range(60_000)]
    bad = [
        record(0, b"v" * 340_000, key=b"k" * 700_000, partition=right),
        record(1, b"v" * 1_000_000, key=b"k", partition=right),
        record(2, b"v", key=b"a", partition=right)._replace(headers=[("x" * 500_000, b"h" * 500_000), ("ce_id", b"1")]),
        record(3, None, key=b"a", partition=right)._replace(headers=many),
    ]
    large = [("ce_id", b"1"), ("x", b"h" * 400_000), ("ce_source", b"s" * 400_000)]
    good = [
        record(4, update("a", 1))._replace(headers=large),
        record(5, update("a", 2))._replace(headers=[("ce_id", None)]),  # type: ignore[list-item]
    ]
    with opened(tmp_path) as store:
        run(log, store, bad + good)
        for _, key, value, _, headers in log.topics["items"] + log.topics["item-updates.dlq"]:
            size = len(key or b"") + len(value or b"")
            assert size + sum(len(name) + len(found or b"") + 10 for name, found in headers.items()) < 910_000
        dead = log.topics["item-updates.dlq"]
        assert [value for _, _, value, _, _ in dead] == [b"v" * 340_000, b"v" * 900_000, b"v", None]
        assert dead[0][1] == b"k" * 560_000
        assert [headers["source_offset"] for *_, headers in dead] == [b"0", b"1", b"2", b"3"]
        assert [headers for *_, headers in log.topics["items"]] == [{"ce_id": b"1"}, {"ce_id": None}]


def test_times_and_headers_travel_on(tmp_path: Path) -> None:
    log = Log()
    headers = [("ce_id", b"x/1"), ("ce_time", b"2026-01-01T00:00:00Z")]
    with opened(tmp_path) as store:
        run(log, store, [record(0, update("a", 1))._replace(headers=headers)])
    ((_, _, value, _, sent),) = log.topics["items"]
    item = events.item(value)
    assert (item.event_time, item.publish_time) == (1_767_225_600_000, 1_000)
    assert sent["ce_id"] == b"x/1"


def test_a_deletion_is_remembered_for_its_days_and_then_becomes_a_tombstone(tmp_path: Path) -> None:
    log = Log()
    with opened(tmp_path) as store:
        ingest = run(log, store, [record(0, update("a", 5, deleted=True)), record(1, update("b", 1))])
        (known,) = store.get([b"a"])
        assert known is not None
        assert asyncio.run(ingest.expire(known.deleted_at + DAY_MS)) == 0
        run(log, store, [record(2, update("a", 4))])
        assert replayed(log)["a"] == (5, True, 0)
        assert asyncio.run(ingest.expire(known.deleted_at + DAY_MS + 1)) == 1
        gone, kept = store.get([b"a", b"b"])
        assert gone is None
        assert kept is not None
        assert kept[:3] == (1, 1, 0)
        partition, key, value, _, headers = log.topics["items"][-1]
        assert (partition, key, value) == (events.partition_of(b"a", PARTITIONS), b"a", None)
        assert headers == {"version": b"5"}
        assert asyncio.run(ingest.expire(known.deleted_at + 9 * DAY_MS)) == 0


def test_an_item_that_came_back_gets_no_tombstone(tmp_path: Path) -> None:
    log = Log()
    with opened(tmp_path) as store:
        run(log, store, [record(0, update("a", 5, deleted=True))])
        ingest = run(log, store, [record(1, update("a", 6))])
        assert asyncio.run(ingest.expire(2**50)) == 0
        (known,) = store.get([b"a"])
        assert known is not None
        assert known[:3] == (6, 6, 0)


def test_a_crash_before_a_tombstone_is_remembered_repeats_it(tmp_path: Path) -> None:
    log = Log()
    with opened(tmp_path) as store:
        ingest = run(log, store, [record(0, update("a", 5, deleted=True))])
        store.crashes = True
        with pytest.raises(Crash):
            asyncio.run(ingest.expire(2**50))
        store.crashes = False
        assert asyncio.run(Ingest(SETTINGS, store, log.send).expire(2**50)) == 1
        assert [value for _, _, value in log.items()][1:] == [None, None]


def test_the_state_can_be_made_again_from_items(tmp_path: Path) -> None:
    log = Log()
    with opened(tmp_path / "one") as store:
        run(
            log,
            store,
            [
                record(0, update("a", 5, deleted=True)),
                record(1, update("b", 1)),
                record(2, update("c", 1, deleted=True)),
                record(3, update("b", 2)),
            ],
        )
        names = [b"a", b"b", b"c", b"d"]
        known = store.get(names)
        assert known[0] is not None
        with opened(tmp_path / "two") as other:
            replay(other, log.items())
            replay(other, log.items())
            assert other.get(names) == known
            # the deletions' deadlines too
            assert [raw for raw, _ in other.deleted_before(2**50, 10)] == [b"a", b"c"]
            replay(other, [(b"a", 0, None)])
            assert other.get([b"a"]) == [None]
            replay(other, [(b"b", 0, None)])  # a live item is not forgotten: what is known better is kept
            assert other.get([b"b"]) == known[1:2]


def test_what_was_taken_over_from_items_is_remembered_with_its_offsets(tmp_path: Path) -> None:
    log = Log()
    with opened(tmp_path / "one") as store:
        run(log, store, [record(0, update("a", 1)), record(1, update("b", 1))])
        assert store.items_offsets(2) == [-1, -1]  # its own
    with opened(tmp_path / "two") as other:
        replay(other, log.items(), {1: 2})
        assert [known and known.version for known in other.get([b"a", b"b"])] == [1, 1]
        assert (other.items_offsets(2), other.source_offsets(2)) == ([-1, 2], [-1, -1])


def test_the_store_has_one_writer(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(Exception, match=r"[Ll]ock"):
        IngestStore(tmp_path)


def test_a_store_of_another_format_is_emptied_and_made_again(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        run(Log(), store, [record(0, update("a", 1))])
        store.mark_whole()
        store._db.put(b"format", b"ingest-1")
    with opened(tmp_path) as store:
        assert (store.whole, store.get([b"a"]), store.source_offsets(PARTITIONS)) == (False, [None], [-1, -1])
        run(Log(), store, [record(0, update("a", 2))])
    with opened(tmp_path) as store:
        assert store.get([b"a"]) != [None]
