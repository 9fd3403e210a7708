"""The N2O index killed between its writes and at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.arena import ArenaReader
from index.keys import keys_of
from index.n2o import N2OWriter, RowBatch
from tests.conftest import ROOT
from tests.index.log import KEY, PARTITIONS, Change, Oracle, block, check
from tests.index.rows import LAYOUT


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
    code = "import sys; from pathlib import Path; from tests.index.test_n2o_kills import run_until_killed as run; "
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
