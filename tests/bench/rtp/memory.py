"""Memory of an arena, and how long it takes to open, to build anew and to grow."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np

from index import table
from index.arena import ArenaReader, Progress
from index.arena_writer import ArenaWriter
from index.keys import keys_of_ints
from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from tests.bench.report import Report
from tests.bench.rtp.common import GENERATION
from tests.host import Host

_BLOCK = 500  # rows of a block
_SETTLED = 25_000  # rows from which on an arena's least room counts no more


def measure(report: Report, host: Host, items: int) -> None:
    path = host.settings.generation_dir(GENERATION) / "n2o"
    layout = RowLayout.of_manifest(path.parent / "bundle" / "manifest.json")
    opened = []
    for _ in range(5):
        began = time.perf_counter()
        reader = ArenaReader.open(path, layout)
        opened.append(time.perf_counter() - began)
    report.figure("memory_over_record", _over_records(reader, layout, items), "x")
    report.figure("id_table_bytes_per_item", reader.size().table_bytes / items, "B")
    report.figure("open_warm_arena_s", opened, "s")
    arena = path / "arena"
    shutil.rmtree(arena)
    began = time.perf_counter()
    N2OWriter(path, layout, 2, host.settings.hash_key.encode()).close()
    report.figure("rebuild_arena_s", time.perf_counter() - began, "s")
    report.figure("memory_over_record_rebuilt", _over_records(ArenaReader.open(path, layout), layout, items), "x")
    shutil.rmtree(arena)
    _arena_growth(report, path, layout, items)


def _over_records(reader: ArenaReader, layout: RowLayout, items: int) -> float:
    """Bytes of the record files per byte of the rows' own records."""
    size = reader.size()
    return (size.hot_bytes + size.cold_bytes) / items / (layout.hot.itemsize + layout.cold.itemsize)


def _arena_growth(report: Report, path: Path, layout: RowLayout, items: int) -> None:
    """An arena that begins empty and gets its rows a block at a time: the most it takes per row, from
    25,000 on, and the CPU time of all of it."""
    writer = ArenaWriter.create(path, layout, 1, 0)
    writer.publish(1, 0, Progress.empty(1))
    reader = ArenaReader.open(path, layout)
    hot, cold = (aligned_empty(_BLOCK, kind) for kind in (layout.hot, layout.cold))
    hot.view(np.uint8)[:], cold.view(np.uint8)[:] = 0, 0
    kinds, over = np.full(_BLOCK, table.PUT, np.uint8), 0.0
    used = time.process_time()
    for at in range(0, items, _BLOCK):
        writer.apply(keys_of_ints(np.arange(at, at + _BLOCK, dtype=np.uint64)), kinds, hot, cold)
        if writer.items >= _SETTLED:
            over = max(over, _over_records(reader, layout, writer.items))
    report.figure("grow_arena_cpu_s", time.process_time() - used, "s")
    report.figure("memory_over_record_worst", over, "x")
