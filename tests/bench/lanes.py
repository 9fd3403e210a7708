"""Benchmark `lanes`: recommendations through HTTP with the heavy steps of requests on lanes, against the commit before
them, where each request's thread took its own steps beside all others'.

Two real servers over one state, 1 to 30 closed-loop clients, in turns; no block is kept, so every request infers its
user (1,000 behaviours). `built-in`: 2,000 candidates of the built-in retrieval. `remote`: 10,000 of a stand-in for a
remote retrieval that takes 10 ms. BEFORE= names another commit. A ratio is lanes over before, of a round's pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.bench import http_load
from tests.bench.peers.data import Data, write_world
from tests.bench.report import Report
from tests.bench.rtp import common
from tests.bench.rtp.server import clients, server
from tests.conftest import ROOT

BEFORE = "432079d"
USERS, K = 32, 100
CLIENTS = (1, 2, 4, 8, 15, 22, 30)
FIGURES = ("p50_ms", "p95_ms", "p99_ms", "requests_per_s", "cpu_ms")
COLOURS = {"before": "#b33a2f", "lanes": "#2f6db3"}
Row = dict[str, Any]


def run(seed: int, quick: bool) -> None:
    report = Report("lanes", seed, quick)
    items, rounds, seconds = (20_000, 1, 2) if quick else (200_000, 5, 2)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="forerank-lanes-") as made:
        folder = Path(made)
        before = _checkout(folder / "before")
        write_world(folder / "world", items, USERS, common.LENGTH, seed, common.CANDIDATES, common.REQUESTS)
        host = common.host_of(folder / "state", Data(folder / "world"))
        host.retrieval(common.GENERATION)
        asked = folder / "asked"
        asked.mkdir()
        for user in range(USERS):
            body = json.dumps({"user_id": f"u{user}", "k": K}).encode()
            (asked / f"{user:03}").write_bytes(http_load.request("/v1/recommend", body, http_load.JSON))
        remote = ("tests.bench.stand_in", "retrieval", str(items), str(seed))
        for name, command in {"built-in": ("api", "serve"), "remote": remote}.items():
            with contextlib.ExitStack() as held:
                ways = {
                    way: held.enter_context(server(host, *command, folder=where))
                    for way, where in (("before", before), ("lanes", ROOT))
                }
                loads = (1, 8) if quick else CLIENTS
                rows = [_point(ways, count, asked, rounds, seconds) for count in loads]
            report.table(name, [row for pair in rows for row in _medians(pair)])
            for count, pair in zip(loads, rows, strict=True):
                for figure in FIGURES:
                    ratios = [new[figure] / old[figure] for old, new in zip(*pair.values(), strict=True)]
                    report.figure(f"{name}_{count}_{figure.removesuffix('_ms')}_ratio", ratios, "x")
    report.finish(lambda canvas: _draw(canvas, report.tables))


def _checkout(folder: Path) -> Path:
    """Of the commit to compare with."""
    subprocess.run(["git", "clone", "-q", "--shared", "--no-checkout", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "-q", os.environ.get("BEFORE", BEFORE)], cwd=folder, check=True)
    return folder


def _point(
    ways: dict[str, tuple[int, int]], count: int, asked: Path, rounds: int, seconds: int
) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in (list(ways), list(ways)[::-1])[turn % 2]:
            row = clients(*ways[way], count, asked, seconds)
            found[way].append(row | {"cpu_ms": 1e3 / row["per_core"]})
    return found


def _medians(pair: dict[str, list[Row]]) -> list[Row]:
    out = []
    for way, rounds in pair.items():
        row: Row = {"clients": rounds[0]["clients"], "way": way}
        for figure in FIGURES:
            values = [one[figure] for one in rounds]
            row |= {figure: statistics.median(values), f"{figure}_low": min(values), f"{figure}_high": max(values)}
        print("  " + "  ".join(f"{key} {row[key]:.4g}" for key in ("clients", *FIGURES)) + f"  {way}", flush=True)
        out.append(row)
    return out


def _draw(canvas: Any, tables: dict[str, list[Row]]) -> None:
    for axes, (name, rows) in zip(canvas.subplots(1, len(tables)), tables.items(), strict=True):
        for way, colour in COLOURS.items():
            own = [row for row in rows if row["way"] == way]
            for figure, style in (("p50_ms", "-"), ("p99_ms", "--")):
                label = f"{way}, {figure.removesuffix('_ms')}"
                axes.plot(
                    [row["clients"] for row in own], [row[figure] for row in own], style, color=colour, label=label
                )
        axes.set(xlabel="clients", ylabel="ms", title=f"Recommend, {name} retrieval", ylim=(0, None))
        axes.legend()
