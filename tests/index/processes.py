"""The other processes of the arena's and histories' tests: `python -m tests.index.processes <role> <path> ...`, each
held by a `Process`, and the `race` between a writer of the arena and its readers.

A role prints `ready`, works at full speed until its standard input ends, and prints one JSON object about what it saw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from index.arena import ArenaReader, Progress
from index.arena_writer import ArenaWriter
from index.histories import HistoriesReader
from tests.index.rows import LAYOUT, cold_faults, hot_faults, int_keys, made

ROOT = Path(__file__).parent.parent.parent


class Process:
    """One role in a process of its own."""

    def __init__(self, role: str, path: Path, argument: str) -> None:
        command = [sys.executable, "-m", "tests.index.processes", role, str(path), argument]
        self._popen = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._popen.stdout is not None
        assert self._popen.stdout.readline() == "ready\n"

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def stop(self) -> dict[str, Any]:
        out, _ = self._popen.communicate("", timeout=60)
        assert self._popen.returncode == 0
        seen: dict[str, Any] = json.loads(out)
        return seen

    def kill(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.communicate()


@dataclasses.dataclass(frozen=True)
class Race:
    """What the writer and each reader said of themselves; the first reader was paused all the time but for the end."""

    wrote: dict[str, Any]
    seen: list[dict[str, Any]]

    def wrong(self) -> int:
        """Rows that were torn or another item's, older than seen before, or of two publications."""
        return sum(int(one[name]) for one in self.seen for name in ("faults", "back", "mixed"))


def race(path: Path, seconds: float, ids: int, readers: int = 3) -> Race:
    """Readers at full speed against a writer at full speed, for so long. One reader is paused until the end, most
    likely inside a gather, as it does nothing else for long; the others and the writer are paused shortly and often,
    each time somewhere else in the protocol."""
    with contextlib.ExitStack() as held:

        def started(role: str) -> Process:
            process = Process(role, path, str(ids))
            held.callback(process.kill)
            return process

        writer = started("writer")
        paused, *others = all_ = [started("reader") for _ in range(readers)]
        end = time.monotonic() + seconds
        paused.send(signal.SIGSTOP)
        while time.monotonic() < end:
            for process in (*others, writer):
                process.send(signal.SIGSTOP)
                time.sleep(0.02)
                process.send(signal.SIGCONT)
                time.sleep(0.03)
        paused.send(signal.SIGCONT)
        time.sleep(1.0)  # it goes on
        return Race(writer.stop(), [reader.stop() for reader in all_])


def until_stopped(step: Callable[[], None]) -> None:
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        step()
    step()  # of what was there when it was told to stop, nothing is missed


def writer(path: Path, ids: str) -> dict[str, Any]:
    """Inserts, updates and deletes; the set of ids grows from a tenth, and with it table and records. When it is
    complete the arena is built anew, from a tenth on."""
    rng = np.random.default_rng(1)
    most, known, version = int(ids), int(ids) // 10, 1
    seen = {"updates": 0, "deletes": 0, "growths": 0, "rebuilds": -1}

    def built() -> ArenaWriter:
        seen["rebuilds"] += 1
        arena = ArenaWriter.create(path, LAYOUT, 1, 0)
        keys = int_keys(np.arange(known))
        arena.apply(keys, np.ones(known, np.uint8), *made(keys, np.full(known, version, np.uint64)))
        arena.publish(1, 0, Progress.empty(1))
        return arena

    arena = built()
    files = arena._files

    def step() -> None:
        nonlocal known, version, files, arena
        version += 1
        known += 3
        if known > most:
            known = most // 10
            arena = built()
            files = arena._files
        changed = np.unique(np.append(rng.integers(0, known, 256), known - 1))
        kinds = np.where(rng.random(len(changed)) < 0.1, 2, 1).astype(np.uint8)
        keys = int_keys(changed)
        arena.apply(keys, kinds, *made(keys, np.full(len(keys), version, np.uint64)))
        seen["updates"] += int((kinds == 1).sum())
        seen["deletes"] += int((kinds == 2).sum())
        seen["growths"] += arena._files is not files
        files = arena._files

    until_stopped(step)
    return seen


def overwriter(path: Path, ids: str) -> dict[str, Any]:
    """What the arena must not do: changes records in place, without the protocol."""
    count = int(ids)
    arena = ArenaWriter.create(path, LAYOUT, 1, 0)
    keys = int_keys(np.arange(count))
    arena.apply(keys, np.ones(count, np.uint8), *made(keys, np.ones(count, np.uint64)))
    arena.publish(1, 0, Progress.empty(1))
    words = arena._files.hot.view(np.uint64).reshape(-1, 24)[:count]

    def step() -> None:
        words[:, 1:20] += np.uint64(1)
        words[:, 1:20] -= np.uint64(1)

    until_stopped(step)
    return {}


def reader(path: Path, ids: str) -> dict[str, Any]:
    """Gathers and checks every row; a key's version must never go back."""
    rng = np.random.default_rng()
    arena = ArenaReader.open(path, LAYOUT)
    newest = np.zeros(int(ids), np.uint64)
    counts = ("gathers", "found", "missing", "faults", "back", "mixed", "longest_ms", "remaps")
    seen: dict[str, Any] = dict.fromkeys(counts, 0)
    files, last = arena._files, time.monotonic()

    def step() -> None:
        nonlocal files, last
        seen["longest_ms"] = max(seen["longest_ms"], (time.monotonic() - last) * 1000)
        last = time.monotonic()
        wanted = rng.integers(0, len(newest), 2000)
        keys = int_keys(wanted)
        gathered = arena.gather(keys)
        found = gathered.found
        versions = gathered.hot.view(np.uint64).reshape(len(keys), 24)[found, 0]
        seen["faults"] += hot_faults(keys[found], gathered.hot[found])
        seen["back"] += int((versions < newest[wanted[found]]).sum())
        np.maximum.at(newest, wanted[found], versions)
        cold, found = arena.gather_cold(keys)
        seen["faults"] += cold_faults(keys[found], cold[found])
        hot, cold, found = arena.gather_both(keys)
        seen["mixed"] += int((hot.view(np.uint64).reshape(len(keys), 24)[found, 0] != cold["version"][found]).sum())
        seen["faults"] += hot_faults(keys[found], hot[found]) + cold_faults(keys[found], cold[found])
        if seen["gathers"] % 20 == 0:
            keys, cold = arena.snapshot()
            seen["faults"] += cold_faults(keys, cold)
            seen["faults"] += arena.oldest() == 0  # no row has had version 0
            drawn = arena.sample(len(newest), rng)
            seen["faults"] += len(drawn) - len(np.unique(drawn, axis=0))  # a key that is not there yet is 0
        seen["gathers"] += 1
        seen["found"] += int(found.sum())
        seen["missing"] += int((~found).sum())
        seen["remaps"] += arena._files is not files
        files = arena._files

    until_stopped(step)
    return seen


def watcher(path: Path, user: str) -> dict[str, Any]:
    """How late each new behaviour of a user was seen, in ms; its event time is when it was written."""
    histories = HistoriesReader(path)
    late: list[float] = []
    newest = histories.history(user, 1 << 62).position

    def step() -> None:
        nonlocal newest
        history = histories.history(user, 1 << 62)
        if history.position > newest:
            newest = history.position
            late.append(time.time() * 1000 - int(history.times[-1]))
        time.sleep(0.001)

    until_stopped(step)
    return {"seen": len(late), "latest_ms": max(late, default=0.0), "position": newest}


if __name__ == "__main__":
    roles = {"writer": writer, "overwriter": overwriter, "reader": reader, "watcher": watcher}
    role, path, argument = sys.argv[1:]
    print(json.dumps(roles[role](Path(path), argument)), flush=True)
