"""Room for a generation: an estimate that holds for real files, what is free, and what is said of too little."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import room
from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from index.room import Room, RoomError
from tests.rows import batch_of

LAYOUTS = st.builds(
    RowLayout,
    width=st.integers(1, 512),
    bits=st.integers(1, 64).map(lambda octets: 8 * octets),
    dim=st.integers(1, 512),
    precision=st.sampled_from(["fp16", "fp32"]),
)


@given(LAYOUTS, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**12))
def test_more_rows_and_a_larger_bundle_never_need_less(layout: RowLayout, rows: int, more: int, bundle: int) -> None:
    small, large = room.need(layout, rows, 0), room.need(layout, rows + more, bundle)
    assert large.disk >= small.disk + bundle
    assert large.memory >= small.memory + bundle
    assert large.disk >= large.memory
    assert small.disk >= rows * (2 * layout.cold.itemsize + 3 * layout.hot.itemsize)


def test_the_files_of_a_generation_take_no_more_than_was_estimated_and_not_much_less(tmp_path: Path) -> None:
    """Grown in steps, with attributes of half the assumed size that hardly compress."""
    layout, rows, step = RowLayout(), 20_000, 2_000
    with closing(N2OWriter(tmp_path / "n2o", layout, 1, b"key")) as writer:
        for start in range(0, rows, step):
            hot, cold = aligned_empty(step, layout.hot), aligned_empty(step, layout.cold)
            for records in (hot, cold):
                octets = records.view("u1")
                octets[:] = list(os.urandom(octets.size)) if start == 0 else 7
            ids = [f"item {at}" for at in range(start, start + step)]
            attributes = [json.dumps({"title": os.urandom(256).hex()}).encode() for _ in ids]
            writer.apply([(batch_of(ids, start, hot, cold, attributes=attributes), start)])
    taken = sum(512 * path.stat().st_blocks for path in (tmp_path / "n2o").rglob("*") if path.is_file())
    needed = room.need(layout, rows, 0).disk
    assert taken <= needed <= 8 * taken


def test_what_is_free(tmp_path: Path) -> None:
    """Of the folder's own disk, also before the folder is made."""
    found = room.free(tmp_path / "not" / "there" / "yet")
    assert abs(found.disk - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert 0 < found.memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory_of_the_host_and_of_its_control_group(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:    1000 kB\nHugePages_Total: 0\n")
    assert room.available(tmp_path / "meminfo") == 1_024_000
    for content in ("MemTotal: 3 kB\n", "MemAvailable: many kB\n", "what"):
        (tmp_path / "meminfo").write_text(content)
        assert room.available(tmp_path / "meminfo") == room.allowed(tmp_path)
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    for limit, free in (("1000", 450), ("400", 0), ("max", room.allowed(tmp_path / "nowhere")), ("?", 1 << 62)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert room.allowed(tmp_path) == free


@given(st.integers(0, 10**13), st.integers(0, 10**13), st.integers(0, 10**13), st.integers(0, 10**13))
def test_too_little_is_refused_and_enough_is_not(disk: int, memory: int, there: int, left: int) -> None:
    needed, found = Room(disk, memory), Room(there, left)
    if disk <= there and memory <= left:
        room.check(needed, found)
        return
    with pytest.raises(RoomError) as error:
        room.check(needed, found)
    assert ("of disk" in str(error.value)) == (disk > there)
    assert ("of memory" in str(error.value)) == (memory > left)


FILLS = st.lists(st.tuples(st.integers(0, 10**13), st.floats(0, 1)), max_size=3)  # what each needs, and is done of it


@given(st.integers(0, 10**13), FILLS, st.integers(0, 10**13))
def test_what_other_fills_have_yet_to_write_is_not_free(disk: int, fills: list[tuple[int, float]], there: int) -> None:
    others = [room.remaining(Room(needed, 0), done) for needed, done in fills]
    for (needed, done), other in zip(fills, others, strict=True):
        assert other.memory == 0
        assert abs(other.disk - (1 - done) * needed) <= 1
    if disk <= there - sum(other.disk for other in others):
        room.check(Room(disk, 0), Room(there, 0), others)
        return
    with pytest.raises(RoomError, match="of disk"):
        room.check(Room(disk, 0), Room(there, 0), others)


def test_the_sentence() -> None:
    fills = [Room(1_500_000_000, 5), room.remaining(Room(2_000_000_000, 0), 0.5)]
    with pytest.raises(RoomError, match=r"^needs 3\.1 GB of disk, 4\.0 GB free, 2\.5 GB of it for fills under way$"):
        room.check(Room(3_100_000_000, 1), Room(4_000_000_000, 9), fills)
    with pytest.raises(RoomError, match=r"^needs 3\.1 GB of disk, 2\.0 GB free$"):
        room.check(Room(3_100_000_000, 1), Room(2_000_000_000, 1))
    with pytest.raises(RoomError, match=r"^needs 40\.0 GB of disk, 50\.0 MB free and 2\.0 MB of memory, 0\.0 MB free$"):
        room.check(Room(40_000_000_000, 2_000_000), Room(50_000_000, 0))
