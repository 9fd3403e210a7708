"""The arena within one process: every state against a dict; the machine's loads and stores; growth, reopening,
refusals."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numba import njit, uint64

from index import table
from index.arena import ArenaReader, Progress, Publications, arena_folder
from index.arena_writer import LEAST_RECORDS, SPARE, ArenaWriter, records_for
from index.errors import N2OError, StoreMissingError
from index.layout import RowLayout
from tests.index.rows import LAYOUT, cold_faults, hot_faults, int_keys, made

STORE = 77


def new_arena(path: Path, items: int = 0) -> ArenaWriter:
    writer = ArenaWriter.create(path, LAYOUT, 2, items)
    writer.publish(STORE, 0, Progress.empty(2))
    return writer


def put(writer: ArenaWriter, ids: list[int], version: int) -> None:
    keys = int_keys(ids)
    writer.apply(keys, np.full(len(ids), table.PUT, np.uint8), *made(keys, np.full(len(ids), version, np.uint64)))


def remove(writer: ArenaWriter, ids: list[int]) -> None:
    keys = int_keys(ids)
    writer.apply(keys, np.full(len(ids), table.REMOVE, np.uint8), *made(keys, np.zeros(len(ids), np.uint64)))


class ArenaAgainstDict(RuleBasedStateMachine):
    """Puts, removals, growth and reopening; a reader opened at the start must always see what a dict holds."""

    folder: Path
    many = 1 << 20  # ids from here on are the crowds that make it grow

    @initialize()
    def start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = new_arena(self.folder)
        self.reader = ArenaReader.open(self.folder, LAYOUT)
        self.rows: dict[int, int] = {}
        self.written: dict[int, int] = {}  # when each row there is was last put, in steps
        self.seen: list[tuple[Publications, list[int | None], int]] = []
        self.version = self.rebuilds = 0

    @rule(ids=st.lists(st.integers(0, 30), max_size=20), kinds=st.lists(st.integers(0, 2), min_size=20, max_size=20))
    def apply(self, ids: list[int], kinds: list[int]) -> None:
        self.version += 1
        keys = int_keys(ids)
        versions = np.arange(len(ids), dtype=np.uint64) + np.uint64(self.version * 100)
        self.writer.apply(keys, np.array(kinds[: len(ids)], np.uint8), *made(keys, versions))
        for one, kind, version in zip(ids, kinds, versions.tolist(), strict=False):
            if kind == table.PUT:
                self.rows[one], self.written[one] = version, self.version
            elif kind == table.REMOVE:
                self.rows.pop(one, None)
                self.written.pop(one, None)

    @rule(count=st.integers(500, 2500))
    def crowd(self, count: int) -> None:
        self.version += 1
        ids = [self.many + at for at in range(count)]
        put(self.writer, ids, self.version * 100)
        self.rows.update(dict.fromkeys(ids, self.version * 100))
        self.written.update(dict.fromkeys(ids, self.version))

    @rule()
    def crowd_leaves(self) -> None:
        ids = [one for one in self.rows if one >= self.many]
        remove(self.writer, ids)
        for one in ids:
            del self.rows[one], self.written[one]

    @rule(clean=st.booleans())
    def reopen(self, clean: bool) -> None:
        if clean:
            self.writer.close()
        again = ArenaWriter.open(self.folder, LAYOUT, 2, STORE)
        assert again is not None
        self.writer = again

    @rule()
    def rebuild(self) -> None:
        self.rebuilds += 1
        ids = list(self.rows)
        self.writer = ArenaWriter.create(self.folder, LAYOUT, 2, len(ids))
        keys = int_keys(ids)
        versions = np.array(list(self.rows.values()), np.uint64)
        self.writer.apply(keys, np.full(len(ids), table.PUT, np.uint8), *made(keys, versions))
        self.writer.publish(STORE, 0, Progress.empty(2))

    @invariant()
    def reader_sees_the_dict(self) -> None:
        wanted = [*range(32), *(self.many + at for at in range(0, 2600, 97))]
        keys = int_keys(wanted)
        gathered = self.reader.gather(keys)
        cold, found = self.reader.gather_cold(keys)
        assert gathered.found.tolist() == [one in self.rows for one in wanted]
        assert found.tolist() == gathered.found.tolist()
        versions = gathered.hot.view(np.uint64).reshape(-1, 24)[:, 0]
        assert versions.tolist() == [self.rows.get(one, 0) for one in wanted]
        assert cold["version"].tolist() == versions.tolist()
        assert hot_faults(keys[found], gathered.hot[found]) == 0
        assert cold_faults(keys[found], cold[found]) == 0
        for rows in (gathered.hot, cold):  # as bytes: NumPy does not copy what lies between the fields
            assert not rows.view(np.uint8).reshape(len(keys), -1)[~found].any()

    @invariant()
    def publications_are_the_same_exactly_where_nothing_was_written(self) -> None:
        wanted = [*range(32), *(self.many + at for at in range(0, 2600, 97))]
        now, written = self.reader.publications(int_keys(wanted)), [self.written.get(one) for one in wanted]
        for before, then, rebuilds in self.seen:
            same = [one == two and rebuilds == self.rebuilds for one, two in zip(then, written, strict=True)]
            assert before.same(now) == all(same)
            if rebuilds == self.rebuilds:
                assert (before.words == now.words).tolist() == same
        self.seen.append((now, written, self.rebuilds))
        assert not now.same(ArenaReader.open(self.folder, LAYOUT).publications(int_keys(wanted)))

    @invariant()
    def snapshot_is_the_dict(self) -> None:
        keys, cold = self.reader.snapshot()
        got = {
            (high, low): version for (high, low), version in zip(keys.tolist(), cold["version"].tolist(), strict=True)
        }
        wanted = dict(zip(map(tuple, int_keys(list(self.rows)).tolist()), self.rows.values(), strict=True))
        assert got == wanted
        assert len(keys) == len(self.rows) == self.writer.items
        assert self.reader.oldest() == min(self.rows.values(), default=None)


def test_any_order_of_operations_reads_as_a_dict(tmp_path: Path) -> None:
    class Machine(ArenaAgainstDict):
        folder = tmp_path / "n2o"

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_odd_numbers_of_keys_and_strangers(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    reader = ArenaReader.open(tmp_path, LAYOUT)
    put(writer, list(range(700)), 5)
    for count in (0, 1, 31, 32, 33, 63, 64, 65, 699):
        gathered = reader.gather(int_keys(np.arange(count)))
        assert gathered.found.all()
        assert len(gathered.hot) == count
        assert hot_faults(int_keys(np.arange(count)), gathered.hot) == 0
    same = reader.gather(int_keys([3] * 100))
    assert same.found.all()
    assert (same.hot == same.hot[0]).all()
    assert not reader.gather(int_keys(np.arange(10_000, 10_100))).found.any()
    swapped = int_keys(np.arange(100))[:, ::-1]
    assert not reader.gather(swapped).found.any()  # high and low are not interchangeable


def test_deletes_and_inserts_for_ever_do_not_grow_it(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    reader = ArenaReader.open(tmp_path, LAYOUT)
    for turn in range(60):
        ids = list(range(turn * 200, turn * 200 + 200))
        put(writer, ids, turn + 1)
        remove(writer, ids)
    size = reader.size()
    assert size.table_bytes == 4096 * table.ENTRY
    assert size.capacity < 3000
    assert not reader.gather(int_keys(np.arange(12_000))).found.any()


@settings(max_examples=30, deadline=None)
@given(
    rebuilt=st.integers(0, 20_000),
    blocks=st.lists(st.tuples(st.integers(1, 3_000), st.booleans()), max_size=12),
)
def test_files_hold_a_sixteenth_more_than_their_rows(
    rebuilt: int, blocks: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In every phase, after a rebuild, new rows and updates: (rows + largest block) x 17/16 + 1,024 records."""
    path = tmp_path_factory.mktemp("n2o")
    writer = new_arena(path, rebuilt)
    reader = ArenaReader.open(path, LAYOUT)
    put(writer, list(range(rebuilt)), 1)
    largest = 0
    for version, (count, fresh) in enumerate([(0, False), *blocks], 2):
        largest = max(largest, count)
        start = writer.items if fresh else 0
        put(writer, list(range(start, start + count)), version)
        size = reader.size()
        most = (writer.items + largest) * (1 + 1 / SPARE) + LEAST_RECORDS
        assert size.hot_bytes + size.cold_bytes <= most * (LAYOUT.hot.itemsize + LAYOUT.cold.itemsize)
    shutil.rmtree(path)


@given(st.integers(0, 1 << 32))
def test_records_per_row_by_size(rows: int) -> None:
    assert records_for(rows) >= rows + LEAST_RECORDS
    assert records_for(rows) <= (1 + 1 / SPARE) * rows + LEAST_RECORDS
    assert rows < 11_703 or records_for(rows) <= 1.15 * rows


def test_a_view_from_before_growth_and_updates_is_not_trusted(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    put(writer, list(range(100)), 1)
    reader = ArenaReader.open(tmp_path, LAYOUT)
    old = reader._files
    put(writer, list(range(5000)), 2)  # grows table and records, voids the slots of version 1
    assert reader._control.geometry()[0] > old.epoch
    gathered = reader.gather(int_keys(np.arange(5000)))
    assert gathered.found.all()
    assert set(gathered.hot.view(np.uint64).reshape(-1, 24)[:, 0].tolist()) == {2}
    assert reader._files.epoch > old.epoch
    # the machine level itself, on the old mapping: it stops at the first key instead of giving the old row
    hot, _, entries = old.addresses
    words = np.empty(10, np.uint64)
    out, _ = made(int_keys(np.arange(10)), np.zeros(10, np.uint64))
    size = np.uint64(LAYOUT.hot.itemsize)
    stopped = table.gather(
        np.uint64(entries),
        np.uint64(old.entries - 1),
        np.uint64(hot),
        size,
        np.uint64(176),
        np.uint64(hot),
        size,
        np.uint64(old.records),
        int_keys(np.arange(10)),
        0,
        words,
        np.uint64(out.ctypes.data),
    )
    assert stopped == 0


def test_double_buffers_are_fenced() -> None:
    """What only weakly ordered machines need is looked for in the generated code."""
    after, hold = njit(table.load_word_after.py_func), njit(table.hold_stores.py_func)
    after(np.zeros(1, np.uint64).ctypes.data)
    hold()
    (loads,), (stores,) = after.inspect_llvm().values(), hold.inspect_llvm().values()
    assert 0 <= loads.find("fence acquire") < loads.find("load atomic")
    assert "fence release" in stores


def test_progress_and_size_are_what_the_writer_published(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    reader = ArenaReader.open(tmp_path, LAYOUT)
    for batch in range(1, 6):
        progress = Progress(
            covered=np.array([batch, -1]),
            rows_offset=np.array([batch + 1, -1]),
            count=np.array([batch * 2, 0]),
            digest=np.array([batch * 3, 0], np.uint64),
            filled=np.array([batch > 2, False]),
            mismatch=np.array([False, batch > 3]),
        )
        writer.publish_progress(batch, progress)
        got = reader.progress()
        for name in ("covered", "rows_offset", "count", "digest", "filled", "mismatch"):
            assert getattr(got, name).tolist() == getattr(progress, name).tolist()
        assert writer.batch == batch
        assert reader.size().items == batch * 2
    size = reader.size()
    files = {file.name.split(".")[0]: file.stat().st_size for file in arena_folder(tmp_path).iterdir()}
    assert (size.hot_bytes, size.cold_bytes, size.table_bytes) == (files["hot"], files["cold"], files["table"])


def test_only_the_files_in_force_remain(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    (arena_folder(tmp_path) / "table.99").write_bytes(b"left by an interrupted growth")
    for turn in range(5):
        put(writer, list(range(turn * 2000, turn * 2000 + 2000)), 1)
    names = {file.name.split(".")[0] for file in arena_folder(tmp_path).iterdir()}
    assert len(list(arena_folder(tmp_path).iterdir())) == len(names) == 4


def test_readers_refuse_what_is_not_theirs(tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError):
        ArenaReader.open(tmp_path, LAYOUT)
    writer = ArenaWriter.create(tmp_path, LAYOUT, 2, 0)
    with pytest.raises(StoreMissingError):
        ArenaReader.open(tmp_path, LAYOUT)  # created, not yet published
    writer.publish(STORE, 0, Progress.empty(2))
    ArenaReader.open(tmp_path, LAYOUT)
    with pytest.raises(N2OError):
        ArenaReader.open(tmp_path, RowLayout(width=32))


def test_after_a_power_failure_nothing_is_trusted_unless_it_was_closed(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    put(writer, [1, 2, 3], 1)
    writer._control.page["boot"] = b"another start of the machine"
    with pytest.raises(StoreMissingError):
        ArenaReader.open(tmp_path, LAYOUT)
    assert ArenaWriter.open(tmp_path, LAYOUT, 2, STORE) is None
    writer.close()
    assert ArenaReader.open(tmp_path, LAYOUT).gather(int_keys([1, 2, 3])).found.all()
    again = ArenaWriter.open(tmp_path, LAYOUT, 2, STORE)
    assert again is not None
    again._control.page["boot"] = b"yet another"  # this time without a close
    with pytest.raises(StoreMissingError):
        ArenaReader.open(tmp_path, LAYOUT)


def test_a_writer_takes_over_only_sound_memory(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    put(writer, list(range(50)), 1)
    assert ArenaWriter.open(tmp_path, LAYOUT, 2, STORE + 1) is None  # of another RocksDB
    assert ArenaWriter.open(tmp_path, LAYOUT, 3, STORE) is None
    assert ArenaWriter.open(tmp_path, RowLayout(width=32), 2, STORE) is None
    assert ArenaWriter.open(tmp_path, LAYOUT, 2, STORE) is not None
    entries = writer._files.table.view(np.uint64).reshape(-1, 4)
    live = np.flatnonzero(entries[:, 2] > 1)
    saved = entries[live[0], 2]
    for wrong in (entries[live[1], 2], saved + np.uint64(2 << 32), saved | np.uint64(0xFFFFFFFF)):
        entries[live[0], 2] = wrong
        assert ArenaWriter.open(tmp_path, LAYOUT, 2, STORE) is None
    entries[live[0], 2] = saved
    again = ArenaWriter.open(tmp_path, LAYOUT, 2, STORE)
    assert again is not None
    digest = again.digest
    put(again, [0], 2)
    changed = ArenaWriter.open(tmp_path, LAYOUT, 2, STORE)
    assert changed is not None
    assert changed.digest != digest


def test_slot_versions_may_wrap(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    records = writer._files.hot.view(LAYOUT.hot)
    records["slot_version"] = 0xFFFFFFFB
    reader = ArenaReader.open(tmp_path, LAYOUT)
    for version in range(1, 40):
        put(writer, [1, 2], version)
        gathered = reader.gather(int_keys([1, 2]))
        assert gathered.found.all()
        assert gathered.hot.view(np.uint64).reshape(-1, 24)[:, 0].tolist() == [version, version]


@njit(nogil=True)
def _answer(mine: int, other: int, turns: int, patience: int) -> int:
    """Counts up `mine` whenever `other` has done so; returns how far it came within `patience` loads."""
    for turn in range(1, turns + 1):
        table.store64(uint64(mine), uint64(turn))
        waited = 0
        while table.load64(uint64(other)) < uint64(turn):
            waited += 1
            if waited > patience:
                return turn - 1
    return turns


def test_stores_are_seen_by_another_thread_and_loads_are_not_hoisted() -> None:
    """With plain loads one side would never see the other's stores, and the intermediate stores would be deleted."""
    memory = np.zeros(16, np.uint64)
    first, second = int(memory.ctypes.data), int(memory.ctypes.data) + 64
    _answer(first, first, 1, 1)
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda a=a, b=b: done.append(_answer(a, b, 200, 10_000_000_000)), daemon=True)
        for a, b in ((first, second), (second, first))
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert done == [200, 200]


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    writer = new_arena(tmp_path)
    put(writer, [1], 1)
    with pytest.raises(OSError, match=r"."):
        writer.make_room(1 << 40)
    assert ArenaReader.open(tmp_path, LAYOUT).gather(int_keys([1])).found.all()
