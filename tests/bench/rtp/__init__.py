"""Benchmark `rtp`: a request of 10,000 candidates, from their ids to the best 100, against what the machine can do.

An index of 1M rows (d = h = 64, n = 16, b = 128, fp16; tests/bench/peers/data.py), users with 1,000 behaviours, all
timings interleaved in one run. What is measured where, and the names of its figures:

in_process.py   score_* user_* request_* kernel_* over_kernels_ratio, limits: stream_* clock_* fma_* popcount_* limit_*
                over_limit_ratio simtier_roof_share
stores.py       store_* gather_over_rocksdb
peers.py        *_over_forerank, the table `peers` (full runs)
http.py         http_* gc_pause* requests_per_s_per_core, the tables `clients` and `processes`
nearline.py     http_alone_* http_under_nearline_* p99_under_nearline_ratio
loop.py         loop_longest_*
memory.py       memory_over_record* id_table_bytes_per_item open_warm_arena_s rebuild_arena_s grow_arena_cpu_s
users.py        user_block_* user_D_*
towers.py       tower_*
growth.py       din_growth_ratio simtier_sample_rms, the tables `candidates`, `length`, `bits` and `items`
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from api.service import Service
from tests.bench.peers.data import Data, write_world
from tests.bench.report import Report
from tests.bench.rtp import common, growth, http, in_process, memory, peers, towers, users


def run(seed: int, quick: bool) -> None:
    report = Report("rtp", seed, quick)
    items, rounds = (50_000, 60) if quick else (1_000_000, 400)
    folder = Path(tempfile.mkdtemp(prefix="forerank-rtp-"))
    torch.set_num_threads(1)
    try:
        write_world(folder / "world", items, common.USERS, common.LENGTH, seed, common.CANDIDATES, common.REQUESTS)
        data = Data(folder / "world")
        host = common.host_of(folder / "state", data)
        print(f"{items:,} rows, {common.USERS} users with {common.LENGTH:,} behaviours", flush=True)
        service = Service(host.settings)
        service.start()
        try:
            in_process.measure(report, host, service, data, rounds)
            if not quick:
                peers.measure(report, service, data)
        finally:
            service.stop()
        http.measure(report, host, data, rounds, quick)
        memory.measure(report, host, items)
        users.measure(report, folder, seed, 20 if quick else 200)
        towers.measure(report, folder, seed, quick)
        growth.measure(report, folder, seed, quick)
    finally:
        shutil.rmtree(folder)
    report.finish(lambda canvas: _draw(canvas, report.tables))


def _draw(canvas: Any, tables: dict[str, list[dict[str, Any]]]) -> None:
    panels = canvas.subplots(2, 3).ravel()
    canvas.set_size_inches(13, 7)
    plots = [
        ("candidates", "candidates", {"score_ms": "score"}, "ms"),
        (
            "length",
            "length",
            {"counting_all_ms": "counting all", "score_ms": "score", "without_simtier_ms": "without SimTier"},
            "ms",
        ),
        ("bits", "bits", {"score_ms": "score"}, "ms"),
        ("items", "items", {"gather_ms": "id table and gather"}, "ms"),
        ("clients", "clients", {"p50_ms": "p50", "p99_ms": "p99"}, "ms"),
        ("processes", "processes", {"requests_per_s": "8 clients"}, "requests/s"),
    ]
    for panel, (name, x, lines, unit) in zip(panels, plots, strict=True):
        rows = tables[name]
        for key, label in lines.items():
            panel.plot([row[x] for row in rows], [row[key] for row in rows], marker="o", markersize=3, label=label)
        panel.set(xlabel=x, ylabel=unit, ylim=(0, None))
        if x in ("length", "items", "bits", "clients"):
            panel.set_xscale("log")
        panel.legend(fontsize=8)
