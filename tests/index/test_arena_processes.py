"""The arena between processes: readers at full speed against a writer at full speed, paused, during growth and
deletion."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from index import table
from index.arena import ArenaReader
from index.arena_writer import ArenaWriter
from tests.index.processes import Process, race
from tests.index.rows import LAYOUT, cold_faults, hot_faults, int_keys

IDS = 30_000


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


@pytest.mark.parametrize("pause", [3.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_readers_never_see_a_torn_or_foreign_row(tmp_path: Path, pause: float) -> None:
    """For minutes: `make bench NAME=arena_race`."""
    found = race(tmp_path, pause, IDS)
    wrote, seen = found.wrote, found.seen
    assert wrote["updates"] > 10_000
    assert wrote["deletes"] > 1_000
    assert wrote["growths"] >= 1
    for one in seen:
        assert one["found"] > 10_000
        assert one["missing"] > 100  # deleted at the time, or not yet inserted
    assert found.wrong() == 0, found
    assert seen[0]["longest_ms"] > 1000 * pause - 100  # it was paused, and went on
    assert sum(one["remaps"] for one in seen) >= 1


def test_the_check_finds_torn_rows_where_there_are_some(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(Process("overwriter", tmp_path, "2000"))
    reader = Process("reader", tmp_path, "2000")
    processes.append(reader)
    _wait(1.0)
    assert reader.stop()["faults"] > 0


def test_a_writer_killed_anywhere_leaves_whole_rows(tmp_path: Path, processes: list[Process]) -> None:
    """Each killed at another moment; the next writer goes on with the memory as it is."""
    for turn in range(4):
        folder = tmp_path / str(turn)
        writer = Process("writer", folder, str(IDS))
        processes.append(writer)
        _wait(0.05 + 0.08 * turn)
        writer.send(signal.SIGKILL)
        writer.kill()
        reader = ArenaReader.open(folder, LAYOUT)
        keys = int_keys(np.arange(IDS))
        before = reader.gather(keys)
        again = ArenaWriter.open(folder, LAYOUT, 1, 1)
        assert again is not None
        after = reader.gather(keys)
        assert before.found.tolist() == after.found.tolist()
        assert int(after.found.sum()) == again.items > 1000
        assert hot_faults(keys[after.found], after.hot[after.found]) == 0
        cold, found = reader.gather_cold(keys)
        assert cold_faults(keys[found], cold[found]) == 0
        free = again._free[: again._state[0]].tolist()
        assert len(set(free)) == len(free) == again._files.records - again.items
        words = again._files.table.view(np.uint64).reshape(-1, 4)[:, 2]
        live = words[words > table.DELETED] & np.uint64(0xFFFFFFFF)
        assert len(live) == again.items
        assert not set(free) & set(live.tolist())


def _wait(seconds: float) -> None:
    """Lets the other processes work; nothing is expected to have happened by then."""
    time.sleep(seconds)
