"""The N2O index against an oracle: replays, deletes, duplicates, kills between and inside its writes, damage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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
from tests.index.rows import LAYOUT, cold_faults, hot_faults, made

ROOT = Path(__file__).parent.parent.parent
KEY = b"hash key"
PARTITIONS = 2


@dataclasses.dataclass(frozen=True)
class Change:
    """One item event as the encoder saw it in `items`."""

    item: int
    version: int
    offset: int
    deleted: bool

    @property
    def item_id(self) -> str:
        return str(self.item) if self.item % 3 else f"item {self.item}"


def block(partition: int, changes: list[Change], covered: int, fill: FillProof | None = None) -> RowBatch:
    ids = [change.item_id for change in changes]
    versions = np.array([change.version for change in changes], np.uint64)
    hot, cold = made(keys_of(ids, KEY), versions)
    cold["event_time"] = versions
    return RowBatch(
        partition,
        covered,
        ids,
        versions,
        np.array([change.offset for change in changes], np.int64),
        np.array([change.deleted for change in changes], np.uint8),
        hot,
        cold,
        [json.dumps({"version": change.version}).encode() for change in changes],
        fill,
    )


class Oracle:
    """Rules 4 and 5 of the design, one row after the other."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, int, int]] = {}  # id -> version, offset, partition
        self.covered = [-1] * PARTITIONS
        self.next = [-1] * PARTITIONS
        self.filled = [False] * PARTITIONS
        self.mismatch = [False] * PARTITIONS

    def proof(self, partition: int) -> FillProof:
        mine = [(name, row[0]) for name, row in self.rows.items() if row[2] == partition]
        keys = keys_of([name for name, _ in mine], KEY)
        versions = np.array([version for _, version in mine], np.uint64)
        return FillProof(len(mine), int(digest_of(keys, versions).sum(dtype=np.uint64)))

    def apply(self, batches: list[tuple[RowBatch, int]]) -> None:
        for batch, rows_offset in batches:
            p = batch.partition
            for at, name in enumerate(batch.ids):
                version, offset = int(batch.versions[at]), int(batch.offsets[at])
                known = self.rows.get(name, (-1, -1, p))
                if offset <= self.covered[p] or (version, offset) <= known[:2]:
                    continue
                if batch.deleted[at]:
                    self.rows.pop(name, None)
                else:
                    self.rows[name] = (version, offset, p)
            self.covered[p] = max(self.covered[p], batch.covered)
            self.next[p] = max(self.next[p], rows_offset + 1)
            if batch.fill is not None and batch.covered == self.covered[p]:
                self.filled[p] = batch.fill == self.proof(p)
                self.mismatch[p] = not self.filled[p]


def check(path: Path, writer: N2OWriter, oracle: Oracle, ids: set[str]) -> None:
    """Arena, RocksDB and progress are the oracle's."""
    names = sorted(ids | set(oracle.rows))
    arena = ArenaReader.open(path, LAYOUT)
    keys = keys_of(names, KEY)
    gathered = arena.gather(keys)
    cold, _ = arena.gather_cold(keys)
    assert gathered.found.tolist() == [name in oracle.rows for name in names]
    assert cold["version"].tolist() == [oracle.rows.get(name, (0,))[0] for name in names]
    assert hot_faults(keys[gathered.found], gathered.hot[gathered.found]) == 0
    assert cold_faults(keys[gathered.found], cold[gathered.found]) == 0
    assert (cold["visible_time"][gathered.found] > 0).all()
    stored = [writer._rocks.get(n2o.ROW + name.encode()) for name in names]
    for name, value in zip(names, stored, strict=True):
        row = None if value is None else n2o.decode_row(value)
        assert (None if row is None else (row.version, row.offset, row.partition)) == oracle.rows.get(name)
    progress = writer.progress()
    shared = arena.progress()
    proofs = [oracle.proof(p) for p in range(PARTITIONS)]
    for got in (progress, shared):
        assert got.covered.tolist() == oracle.covered
        assert got.rows_offset.tolist() == oracle.next
        assert got.count.tolist() == [proof.count for proof in proofs]
        assert got.digest.tolist() == [proof.digest for proof in proofs]
        assert got.filled.tolist() == oracle.filled
        assert got.mismatch.tolist() == oracle.mismatch
    assert writer.rows_offsets().tolist() == oracle.next


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


def _of_log(changes: list[Change]) -> tuple[list[Change], list[np.ndarray]]:
    """The rows that a log of partition 0 ends with, and their digests as `settle` takes them."""
    last = {change.item: change for change in changes}
    rows = [change for change in last.values() if not change.deleted]
    keys = keys_of([change.item_id for change in rows], KEY)
    digests = digest_of(keys, np.array([change.version for change in rows], np.uint64))
    return rows, [digests, np.empty(0, np.uint64)]


def _reconcile(writer: N2OWriter, log: list[Change], by_version: bool = True) -> bool:
    """As streams/reconcile.py does, with a log of partition 0 that compaction has shortened."""
    writer.reconsider()
    assert writer.progress().covered.tolist() == writer.rows_offsets().tolist() == [-1, -1]
    assert not writer.progress().filled.any()
    for at in range(0, len(log), 3):
        last = {change.item: change for change in log[at : at + 3]}  # as encode has them: each item once
        writer.apply([(block(0, list(last.values()), log[at : at + 3][-1].offset), -2)], by_version)
    assert writer.rows_offsets().tolist() == [-1, -1]
    return writer.settle(_of_log(log)[1], [99, -1], [7, 4])


def _settled(path: Path, writer: N2OWriter, log: list[Change]) -> None:
    rows, _ = _of_log(log)
    oracle = Oracle()
    oracle.rows = {row.item_id: (row.version, row.offset, 0) for row in rows}
    oracle.covered, oracle.next, oracle.filled = [99, -1], [7, 4], [True, True]
    check(path, writer, oracle, {change.item_id for change in log} | {str(at) for at in range(12)})


changes_of_items = st.builds(
    Change, st.integers(0, 8), st.integers(1, 5), st.just(0), st.sampled_from([False, False, True])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(changes_of_items, max_size=15), st.lists(changes_of_items, max_size=15))
def test_reconciled_rows_are_those_of_the_log_whatever_was_there(
    tmp_path_factory: pytest.TempPathFactory, before: list[Change], log: list[Change]
) -> None:
    """Rows that are newer than the log's too: such an item was forgotten and made again with lower versions."""
    path = tmp_path_factory.mktemp("reconciled")
    writer = N2OWriter(path, LAYOUT, PARTITIONS, KEY)
    try:
        before = [dataclasses.replace(change, offset=at) for at, change in enumerate(before)]
        log = [dataclasses.replace(change, offset=20 + at) for at, change in enumerate(log)]
        if before:
            writer.apply([(block(0, before, before[-1].offset), 3)])
        assert _reconcile(writer, log) or _reconcile(writer, log, by_version=False)
        _settled(path, writer, log)
    finally:
        writer.close()


def reconcile_until_killed(path: Path, at: int) -> None:
    """Ends by SIGKILL after so many of the writes that `N2OWriter` numbers."""
    writes = 0

    def step(_: int) -> None:
        nonlocal writes
        writes += 1
        if writes == at:
            os.kill(os.getpid(), signal.SIGKILL)

    writer = N2OWriter(path, LAYOUT, PARTITIONS, KEY, step)
    assert _reconcile(writer, KILLED_LOG)
    writer.close()


KILLED_LOG = [Change(item, 3, 30 + item, item == 4) for item in range(6)]


@pytest.mark.parametrize("at", range(1, 13))  # three writes of reconsider, six of two blocks, three of settle
def test_a_reconciliation_killed_after_any_write_can_be_repeated(tmp_path: Path, at: int) -> None:
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    writer.apply([(block(0, [Change(item, 2, item, False) for item in range(3, 9)], 8), 3)])
    writer.close()
    code = "import sys; from pathlib import Path; from tests.index.test_n2o import reconcile_until_killed as run; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code} run(Path(sys.argv[1]), {at})", str(tmp_path)], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    if at > 9:  # the one write of settle: it is done, and replicate may go on
        _settled(tmp_path, writer, KILLED_LOG)
    assert writer.rows_offsets().tolist() == ([7, 4] if at > 9 else [-1, -1])
    assert _reconcile(writer, KILLED_LOG)
    _settled(tmp_path, writer, KILLED_LOG)
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


# --- kills


def history(seed: int) -> list[list[tuple[RowBatch, int]]]:
    """A long seeded log in applies: inserts, updates and deletions of 300 items in two partitions."""
    rng = np.random.default_rng(seed)
    offsets, versions = [0] * PARTITIONS, [1] * 300
    applies = []
    for turn in range(400):
        batches = []
        for partition in range(PARTITIONS):
            changes = []
            for item in rng.integers(0, 150, rng.integers(0, 30)) * PARTITIONS + partition:
                versions[item] += 1
                changes.append(Change(int(item), versions[item], offsets[partition], bool(rng.random() < 0.2)))
                offsets[partition] += 1
            batches.append((block(partition, changes, offsets[partition] - 1), turn))
        applies.append(batches)
    return applies


def run_until_killed(path: Path, seed: int, kill_step: int, kill_turn: int) -> None:
    """The child: applies the log from where the index says, and kills itself after a step of an apply."""
    turn = 0

    def step(number: int) -> None:
        if number == kill_step and turn >= kill_turn:
            os.kill(os.getpid(), signal.SIGKILL)

    writer = N2OWriter(path, LAYOUT, PARTITIONS, KEY, step)
    applies = history(seed)
    print("ready", flush=True)
    for turn, batches in enumerate(applies):
        if turn >= writer.rows_offsets().max():
            writer.apply(batches)
    writer.close()


def child(path: Path, seed: int, kill_step: int, kill_turn: int) -> subprocess.Popen[str]:
    code = "import sys; from pathlib import Path; from tests.index.test_n2o import run_until_killed as run; "
    code += f"run(Path(sys.argv[1]), {seed}, {kill_step}, {kill_turn})"
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def expected(applies: list[list[tuple[RowBatch, int]]], turns: int) -> Oracle:
    oracle = Oracle()
    for batches in applies[:turns]:
        oracle.apply(batches)
    return oracle


@pytest.mark.parametrize("step", [1, 2, 3])
def test_killed_between_the_numbered_writes(tmp_path: Path, step: int) -> None:
    process = child(tmp_path, step, step, 40)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    applies = history(step)
    arena = ArenaReader.open(tmp_path, LAYOUT)
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    ids = {name for batches in applies for batch, _ in batches for name in batch.ids}
    check(tmp_path, writer, expected(applies, 41), ids)
    for batches in applies[38:]:  # Kafka gives some of it again
        writer.apply(batches)
    oracle = expected(applies, len(applies))
    check(tmp_path, writer, oracle, ids)
    names = sorted(ids)
    assert arena.gather(keys_of(names, KEY)).found.tolist() == [name in oracle.rows for name in names]
    writer.close()


def test_killed_at_any_moment_and_started_again_until_done(tmp_path: Path) -> None:
    applies = history(9)
    ids = {name for batches in applies for batch, _ in batches for name in batch.ids}
    reached = []
    for attempt, delay in enumerate((0.004, 0.01, 0.02, 0.04, 0.06, None)):
        process = child(tmp_path, 9, 0, 0)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if delay is None:
            process.communicate(timeout=60)
            assert process.returncode == 0
            break
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
        turns = max(0, int(writer.rows_offsets().max()))
        check(tmp_path, writer, expected(applies, turns), ids)
        reached.append(turns)
        if attempt % 2:
            writer.close()
        else:
            _abandon(writer)
    assert any(0 < turns < len(applies) for turns in reached)
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    check(tmp_path, writer, expected(applies, len(applies)), ids)
    writer.close()


def _abandon(writer: N2OWriter) -> Any:
    """Gives back the locks only: the arena stays as after a kill."""
    writer._rocks.close()
    writer._lock.release()


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
