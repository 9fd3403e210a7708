"""Benchmark `arena_race`: the arena's readers against its writer for minutes, all at full speed and paused anywhere.

The same race as in tests/index/test_arena_processes.py, for MINUTES (3). Every row that is read is compared with what
its key and version must hold. It fails where one is wrong.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.report import Report
from tests.index.processes import race

IDS = 30_000


def run(seed: int, quick: bool) -> None:
    report = Report("arena_race", seed, quick)
    seconds = 10.0 if quick else 60 * float(os.environ.get("MINUTES", "3"))
    with tempfile.TemporaryDirectory(prefix="forerank-race-") as folder:
        found = race(Path(folder), seconds, IDS)
    for name, count in found.wrote.items():
        report.figure(f"written_{name}", count, "")
    for name in ("gathers", "found", "missing", "remaps"):
        report.figure(f"read_{name}", sum(one[name] for one in found.seen), "")
    report.figure("longest_pause_s", max(one["longest_ms"] for one in found.seen) / 1e3, "s")
    report.figure("wrong_rows", found.wrong(), "")
    report.table("readers", found.seen)
    report.finish(lambda canvas: _draw(canvas, report.tables["readers"]))
    if found.wrong():
        raise SystemExit(f"{found.wrong()} rows were wrong: {found}")


def _draw(canvas: Any, readers: list[dict[str, Any]]) -> None:
    axes = canvas.subplots()
    for name in ("found", "missing"):
        axes.bar([f"reader {at}, {name}" for at in range(len(readers))], [one[name] for one in readers])
    axes.set(ylabel="rows read whole, or not there", yscale="log")
