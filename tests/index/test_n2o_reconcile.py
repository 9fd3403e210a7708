"""The N2O index reconciled with the log that it comes from, whatever it holds and wherever that is cut off."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.keys import digest_of, keys_of
from index.n2o import N2OWriter
from tests.conftest import ROOT
from tests.index.log import KEY, PARTITIONS, Change, Oracle, block, check
from tests.index.rows import LAYOUT


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
    code = "import sys; from pathlib import Path; from tests.index.test_n2o_reconcile import "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}reconcile_until_killed as run; run(Path(sys.argv[1]), {at})", str(tmp_path)],
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    writer = N2OWriter(tmp_path, LAYOUT, PARTITIONS, KEY)
    if at > 9:  # the one write of settle: it is done, and replicate may go on
        _settled(tmp_path, writer, KILLED_LOG)
    assert writer.rows_offsets().tolist() == ([7, 4] if at > 9 else [-1, -1])
    assert _reconcile(writer, KILLED_LOG)
    _settled(tmp_path, writer, KILLED_LOG)
    writer.close()
