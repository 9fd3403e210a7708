"""The N2O index against an oracle: replays, deletes, duplicates, damage."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index import n2o
from index.arena import ArenaReader
from index.errors import N2OError, StoreLockedError, StoreMissingError
from index.keys import digest_of, keys_of
from index.layout import RowLayout, aligned_empty
from index.n2o import FillProof, N2OReader, N2OWriter, RowBatch
from tests.conftest import wait_until
from tests.index.log import KEY, PARTITIONS, Change, Oracle, block, check
from tests.index.rows import LAYOUT, cold_faults, hot_faults, made


@st.composite
def logs(draw: st.DrawFn) -> list[list[tuple[RowBatch, int]]]:
    """What `rows.<g>` may carry: a log of `items` per partition, cut into blocks that are sent again from earlier
    places."""
    applies: list[list[tuple[RowBatch, int]]] = []
    blocks: list[list[RowBatch]] = []
    for partition in range(PARTITIONS):
        changes = [
            Change(partition + 10 * draw(st.integers(0, 5)), draw(st.integers(1, 6)), 2 * at, draw(st.booleans()))
            for at in range(draw(st.integers(0, 14)))
        ]
        mine = []
        at = 0
        while at < len(changes):
            size = draw(st.integers(0, 5))
            covered = changes[at + size - 1].offset if 0 < size <= len(changes) - at else 2 * at - 1
            covered = changes[-1].offset if at + size >= len(changes) else covered
            mine.append(block(partition, changes[at : at + size], covered + draw(st.integers(0, 1))))
            at += max(size, 0) if size else draw(st.integers(0, 1)) * 0
            if draw(st.integers(0, 3)) == 0 and mine:
                at = draw(st.integers(0, at))  # the encoder starts again from an earlier place
            if len(mine) > 12:
                break
        blocks.append(mine)
    offsets = [0] * PARTITIONS
    while any(blocks):
        batches = []
        for _ in range(draw(st.integers(1, 4))):
            ready = [p for p in range(PARTITIONS) if blocks[p]]
            if not ready:
                break
            p = draw(st.sampled_from(ready))
            batches.append((blocks[p].pop(0), offsets[p]))
            offsets[p] += 1
        applies.append(batches)
    return applies


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(applies=logs(), data=st.data())
def test_any_log_gives_the_oracles_rows(
    tmp_path_factory: pytest.TempPathFactory, applies: list[list[tuple[RowBatch, int]]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("n2o")
    writer = N2OWriter(path, LAYOUT, PARTITIONS, KEY)
    oracle = Oracle()
    ids: set[str] = set()
    for batches in applies:
        ids.update(name for batch, _ in batches for name in batch.ids)
        writer.apply(batches)
        oracle.apply(batches)
        if data.draw(st.integers(0, 5)) == 0:
            writer.apply(batches)  # read again after a crash before the commit
        if data.draw(st.integers(0, 5)) == 0:
            writer.close()
            if data.draw(st.booleans()):
                shutil.rmtree(path / "arena")
            writer = N2OWriter(path, LAYOUT, PARTITIONS, KEY)
    for partition in range(PARTITIONS):
        good = data.draw(st.booleans())
        proof = oracle.proof(partition)
        fill = proof if good else FillProof(proof.count, proof.digest ^ 1)
        last = [(block(partition, [], oracle.covered[partition], fill), 99)]
        writer.apply(last)
        oracle.apply(last)
        assert oracle.filled[partition] == good
    check(path, writer, oracle, ids)
    writer.close()
    shutil.rmtree(path)


def test_a_deleted_item_does_not_come_back_by_a_replay(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    first = block(0, [Change(1, 5, 0, False)], 0)
    writer.apply([(first, 0)])
    assert writer.apply([(block(0, [Change(1, 6, 1, True)], 1), 1)]) == 1
    assert writer.apply([(first, 2)]) == 0
    assert writer.apply([(block(0, [Change(1, 5, 0, False)], 7), 3)]) == 0  # not in a longer block either
    assert not ArenaReader.open(tmp_path, LAYOUT).gather(keys_of(["1"], KEY)).found.any()
    assert writer.progress().covered.tolist() == [7, -1]
    writer.close()


@pytest.mark.parametrize("together", [True, False])
def test_an_item_that_is_made_again_may_begin_with_a_lower_version(tmp_path: Path, together: bool) -> None:
    """Once its tombstone is written, `items` may carry any version of it: in one apply, in several, in one block."""
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    digest = int(digest_of(keys_of(["1"], KEY), np.array([1], np.uint64))[0])
    batches = [
        (block(0, [Change(1, 17, 90, False)], 90), 0),
        (block(0, [Change(1, 18, 100, True)], 100), 1),
        (block(0, [Change(1, 1, 160, False)], 160, FillProof(1, digest)), 2),
    ]
    for some in [batches] if together else [[one] for one in batches]:
        writer.apply(some)
    assert (writer.progress().filled[0], writer.progress().mismatch[0]) == (True, False)
    writer.apply([(block(0, [Change(1, 9, 170, True), Change(1, 2, 180, False)], 180), 3)])
    cold, found = ArenaReader.open(tmp_path, LAYOUT).gather_cold(keys_of(["1"], KEY))
    assert (found.tolist(), cold["version"].tolist()) == ([True], [2])
    assert writer.progress().count[0] == 1
    writer.close()


def test_a_fill_proof_that_disagrees_is_a_mismatch_until_one_agrees(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    change = Change(1, 5, 3, False)
    digest = int(digest_of(keys_of([change.item_id], KEY), np.array([5], np.uint64))[0])
    writer.apply([(block(0, [change], 3, FillProof(2, digest)), 0)])
    assert (writer.progress().filled[0], writer.progress().mismatch[0]) == (False, True)
    writer.apply([(block(0, [], 3, FillProof(1, digest)), 1)])
    assert (writer.progress().filled[0], writer.progress().mismatch[0]) == (True, False)
    writer.apply([(block(0, [], 1, FillProof(9, 9)), 2)])  # of an earlier fill: says nothing about now
    assert (writer.progress().filled[0], writer.progress().mismatch[0]) == (True, False)
    writer.apply([(block(1, [], -1, FillProof(0, 0)), 0)])  # an empty partition
    assert writer.progress().filled.tolist() == [True, True]
    writer.close()


def test_visible_time_is_taken_between_rocksdb_and_the_arena(tmp_path: Path) -> None:
    times = {}

    def step(number: int) -> None:
        if number == 1:  # RocksDB has the row; a slow disk would have taken this long
            begin = time.time_ns() // 1_000_000
            while time.time_ns() // 1_000_000 < begin + 20:
                time.sleep(0.001)
        times[number] = time.time_ns() // 1_000_000

    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY, step)
    writer.apply([(block(0, [Change(1, 5, 3, False)], 3), 0)])
    seen = int(ArenaReader.open(tmp_path, LAYOUT).gather_cold(keys_of(["1"], KEY))[0]["visible_time"][0])
    assert times[1] <= seen <= times[2]
    writer.close()


def test_a_checkpoint_taken_beside_writes_opens_as_the_index_of_one_moment(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path / "index", LAYOUT, PARTITIONS, KEY)
    stop, sent = threading.Event(), 0

    def write() -> None:
        nonlocal sent
        while not stop.is_set():
            changes = [Change(item, sent + 1, 10 * sent + item, False) for item in range(10)]
            writer.apply([(block(0, changes, 10 * sent + 9), sent)])
            sent += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        found = []
        wait_until(lambda: sent > 0, "rows")
        for number in range(5):
            progress = writer.checkpoint(tmp_path / f"copy {number}" / "rocks")
            copy = N2OWriter(tmp_path / f"copy {number}", LAYOUT, PARTITIONS, KEY)  # counts and digests agree
            at = int(progress.rows_offset[0])
            assert copy.progress().rows_offset.tolist() == progress.rows_offset.tolist() == [at, -1]
            oracle = Oracle()
            rows = [Change(item, at, 10 * at - 10 + item, False) for item in range(10)]
            oracle.apply([(block(0, rows, 10 * at - 1), at - 1)])
            check(tmp_path / f"copy {number}", copy, oracle, set())
            copy.close()
            found.append(at)
    finally:
        stop.set()
        thread.join()
        writer.close()
    assert 0 < found[0] < found[-1] <= sent


def test_an_index_is_closed_in_order_while_it_is_copied(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path / "index", LAYOUT, PARTITIONS, KEY)
    changes = [Change(item, 1, item, False) for item in range(40_000)]  # a flush takes a while
    writer.apply([(block(0, changes, 39_999), 0)])
    thread = threading.Thread(target=writer.checkpoint, args=(tmp_path / "copy" / "rocks",))
    thread.start()
    while thread.is_alive() and not writer._copied.locked():
        pass
    writer.close()
    thread.join()
    copy = N2OWriter(tmp_path / "copy", LAYOUT, PARTITIONS, KEY)
    assert copy.progress().count.tolist() == [40_000, 0]
    copy.close()


def test_blocks_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    good = block(0, [Change(1, 1, 1, False)], 1)
    other = RowLayout(width=32)
    for wrong in (
        dataclasses.replace(good, partition=2),
        dataclasses.replace(good, partition=-1),
        dataclasses.replace(good, covered=0),
        dataclasses.replace(good, ids=["1", "2"]),
        dataclasses.replace(good, hot=aligned_empty(1, other.hot)),
    ):
        with pytest.raises(ValueError, match=r"."):
            writer.apply([(good, 0), (wrong, 1)])
    assert writer.progress().covered.tolist() == [-1, -1]
    assert writer.apply([]) == 0
    writer.close()


def test_one_writer_and_one_kind_of_rows(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    with pytest.raises(StoreLockedError):
        N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    writer.close()
    for layout, partitions, key in ((RowLayout(width=32), 2, KEY), (LAYOUT, 3, KEY), (LAYOUT, 2, b"other")):
        with pytest.raises(N2OError):
            N2OWriter(tmp_path, layout, partitions, key)
    N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY).close()


def test_rocksdb_that_lost_rows_is_an_error_and_no_smaller_index(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    writer.apply([(block(0, [Change(at, 5, at, False) for at in range(10)], 9), 0)])
    writer._rocks.delete(n2o.ROW + b"4")
    writer.close()
    N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY).close()  # the arena still has all of them
    shutil.rmtree(tmp_path / "arena")
    with pytest.raises(N2OError, match="9 rows where 10"):
        N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)


@pytest.mark.parametrize("part", [0.3, 0.6])
def test_rows_that_cannot_be_read_are_an_error_and_no_end(tmp_path: Path, part: float) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    writer.apply([(block(0, [Change(at, 5, at, False) for at in range(3_000)], 2_999), 0)])
    writer._rocks.flush()
    writer.close()
    (rows,) = (tmp_path / "rocks").glob("*.sst")
    raw = bytearray(rows.read_bytes())
    at = int(part * len(raw))
    raw[at : at + 64] = bytes(64)
    rows.write_bytes(raw)
    reader = N2OReader(tmp_path)
    with pytest.raises(N2OError, match="cannot be read to its end"):
        reader.ids()
    reader.close()
    shutil.rmtree(tmp_path / "arena")
    with pytest.raises(N2OError):
        N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)


def test_an_arena_that_disagrees_is_built_anew(tmp_path: Path) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    changes = [Change(at, 5, at, False) for at in range(10)]
    writer.apply([(block(0, changes, 9), 0)])
    names = [change.item_id for change in changes]
    hot, cold = made(keys_of(names[:1], KEY), np.array([4], np.uint64))
    writer._arena.apply(keys_of(names[:1], KEY), np.array([1], np.uint8), hot, cold)  # an older version slipped in
    reader = ArenaReader.open(tmp_path, LAYOUT)
    assert reader.gather_cold(keys_of(names, KEY))[0]["version"].tolist() == [4] + [5] * 9
    writer.close()
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    assert reader.gather_cold(keys_of(names, KEY))[0]["version"].tolist() == [5] * 10  # an open reader follows
    writer.close()


def test_single_rows_from_another_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(StoreMissingError):
        N2OReader(tmp_path)
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    reader = N2OReader(tmp_path)
    assert list(temporary.iterdir()) == [], "whoever kills the process leaves nothing behind"
    assert reader.get(["1"]) == [None]
    assert reader.get([]) == []
    for version in (3, 4):
        writer.apply([(block(0, [Change(1, version, version, False)], version), version)])
        (row, none) = reader.get(["1", "2"])
        assert none is None
        assert row is not None
        assert (row.version, row.offset, row.partition, row.event_time) == (version, version, 0, version)
        assert row.attributes == {"version": version}
        assert row.visible_time > 1_600_000_000_000
        writer.checkpoint(tmp_path / f"copy-{version}")  # which flushes: the next rows are in other files
    writer.close()
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    writer.apply([(block(0, [Change(1, 5, 9, True)], 9), 9)])
    assert reader.get(["1"]) == [None]
    reader.close()
    assert list(temporary.iterdir()) == []
    writer.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_patched_rows_keep_the_hot_record_and_the_vector_of_the_row_before(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """However the log is cut into blocks and calls, and whatever is sent again."""
    kinds = st.sampled_from([n2o.WHOLE, n2o.PATCHED, n2o.PATCHED, n2o.DELETED])
    log = data.draw(st.lists(st.tuples(st.integers(0, 3), kinds), min_size=1, max_size=20))
    path = tmp_path_factory.mktemp("patched")
    rows: dict[str, tuple[int, int]] = {}  # id -> version, version of its last whole row
    without = at = sent = 0
    writer = N2OWriter(path, LAYOUT, PARTITIONS, KEY)
    try:
        while at < len(log):
            call = []
            for _ in range(data.draw(st.integers(1, 3))):
                start = data.draw(st.integers(max(0, at - 4), at))
                end = min(len(log), at + data.draw(st.integers(1, 4)))
                call.append((_patched_block(log, start, end), sent))
                for offset in range(at, end):
                    name, kind = str(log[offset][0]), log[offset][1]
                    if kind == n2o.WHOLE:
                        rows[name] = (offset, offset)
                    elif kind == n2o.PATCHED and name in rows:
                        rows[name] = (offset, rows[name][1])
                    else:
                        without += kind == n2o.PATCHED
                        rows.pop(name, None)
                at, sent = max(at, end), sent + 1
            writer.apply(call)
        assert writer.without_row == without
    finally:
        writer.close()
    for _ in range(2):  # and once more from an arena that is made anew
        arena = ArenaReader.open(path, LAYOUT)
        names = [str(item) for item in range(4)]
        keys = keys_of(names, KEY)
        hot, cold, found = arena.gather_both(keys)
        assert found.tolist() == [name in rows for name in names]
        assert cold["version"][found].tolist() == [rows[name][0] for name in names if name in rows]
        bases = np.array([rows[name][1] for name in names if name in rows], np.uint64)
        assert hot.view(np.uint64).reshape(len(hot), 24)[found, 0].tolist() == bases.tolist()
        assert hot_faults(keys[found], hot[found]) == 0
        cold["version"][found] = bases
        assert cold_faults(keys[found], cold[found]) == 0
        shutil.rmtree(path / "arena")
        N2OWriter(path, LAYOUT, PARTITIONS, KEY).close()


def _patched_block(log: list[tuple[int, int]], start: int, end: int) -> RowBatch:
    part = log[start:end]
    changes = [Change(3 * item, offset, offset, False) for offset, (item, _) in enumerate(part, start)]
    found = block(0, changes, end - 1)
    kinds = np.array([kind for _, kind in part], np.uint8)
    found.hot[kinds != n2o.WHOLE] = np.zeros(1, LAYOUT.hot)
    found.cold["vector"][kinds != n2o.WHOLE] = 0
    ids = [str(item) for item, _ in part]
    if ids:
        keys = keys_of(ids, KEY)
        hot, cold = made(keys, found.versions)
        whole = kinds == n2o.WHOLE
        found.hot[whole], found.cold[whole] = hot[whole], cold[whole]
    return dataclasses.replace(found, ids=ids, kinds=kinds)
