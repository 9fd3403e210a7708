"""Benchmark `lanes`: recommendations through HTTP with the heavy steps of requests on lanes, against the commit before
them, where each request's thread took its own steps beside all others'.

Two real servers over one state, 1 to 30 closed-loop clients, in turns of a second; no block is kept, so every request
infers its user (1,000 behaviours). `built-in`: 2,000 candidates of the built-in retrieval. `remote`: 10,000 of a
stand-in for a remote retrieval that takes 10 ms. BEFORE= names another commit. A ratio is lanes over before, of two
turns; its range is over turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench import http_load
from tests.bench.peers.data import Data, write_world
from tests.bench.report import Report
from tests.bench.rtp import common
from tests.bench.rtp.server import server
from tests.bench.stack import wait
from tests.conftest import ROOT

BEFORE = "432079d"
USERS, K = 32, 100
CLIENTS = (1, 2, 4, 8, 15, 22, 30)
FIGURES = ("p50_ms", "p95_ms", "p99_ms", "requests_per_s", "cpu_ms")
COLOURS = {"before": "#b33a2f", "lanes": "#2f6db3"}
Row = dict[str, Any]


def run(seed: int, quick: bool) -> None:
    report = Report("lanes", seed, quick)
    items, rounds, seconds = (20_000, 6, 0.5) if quick else (100_000, 12, 1.0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="forerank-lanes-") as made:
        folder = Path(made)
        before = _checkout(folder / "before")
        write_world(folder / "world", items, USERS, common.LENGTH, seed, common.CANDIDATES, common.REQUESTS)
        host = common.host_of(folder / "state", Data(folder / "world"))
        host.retrieval(common.GENERATION)
        bodies = [json.dumps({"user_id": f"u{user}", "k": K}).encode() for user in range(USERS)]
        asked = [http_load.request("/v1/recommend", body, http_load.JSON) for body in bodies]
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


class _Clients:
    """Closed-loop clients, each a thread with a connection to every server; all ask that one whose turn it is."""

    def __init__(self, ports: Mapping[str, int], requests: Sequence[bytes], count: int) -> None:
        self._ports, self._requests = ports, requests
        self._way, self._stop = next(iter(ports)), False
        self._trips: list[list[tuple[str, float]]] = [[] for _ in range(count)]
        self._failed: list[Exception] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def __enter__(self) -> _Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()

    def turn(self, way: str, pid: int, seconds: float) -> Row:
        """Of trips that ended within so long, once every client has come over from the other server."""
        self._way = way
        begun = [len(trips) for trips in self._trips]
        wait("all have come over", lambda: self._came_over(way, begun), 60)
        begun, began, used = [len(trips) for trips in self._trips], time.perf_counter(), http_load.cpu_seconds(pid)
        time.sleep(seconds)
        found = [ms for trips, first in zip(self._trips, begun, strict=True) for _, ms in trips[first:]]
        took, used = time.perf_counter() - began, http_load.cpu_seconds(pid) - used
        if self._failed:
            raise self._failed[0]
        p50, p95, p99 = np.percentile(found, [50, 95, 99]).tolist()
        rate, cpu = len(found) / took, 1e3 * used / len(found)
        return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "requests_per_s": rate, "cpu_ms": cpu}

    def _came_over(self, way: str, begun: list[int]) -> bool:
        newest = zip(self._trips, begun, strict=True)
        return bool(self._failed) or all(len(trips) > first and trips[-1][0] == way for trips, first in newest)

    def _ask(self, number: int) -> None:
        connections, place = {way: http_load.Connection(port) for way, port in self._ports.items()}, number
        try:
            while not self._stop:
                way = self._way
                self._trips[number].append((way, connections[way].timed(self._requests[place % len(self._requests)])))
                place += 1
        except (OSError, RuntimeError) as error:
            self._failed.append(error)
        for connection in connections.values():
            connection.close()


def _point(
    ways: dict[str, tuple[int, int]], count: int, requests: Sequence[bytes], rounds: int, seconds: float
) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {way: [] for way in ways}
    with _Clients({way: port for way, (port, _) in ways.items()}, requests, count) as clients:
        for turn in range(rounds):
            for way in (list(ways), list(ways)[::-1])[turn % 2]:
                found[way].append({"clients": count} | clients.turn(way, ways[way][1], seconds))
    for row in _medians(found):
        print(
            "  " + "  ".join(f"{key} {row[key]:.4g}" for key in ("clients", *FIGURES)) + f"  {row['way']}", flush=True
        )
    return found


def _medians(pair: dict[str, list[Row]]) -> list[Row]:
    out = []
    for way, rounds in pair.items():
        row: Row = {"clients": rounds[0]["clients"], "way": way}
        for figure in FIGURES:
            values = [one[figure] for one in rounds]
            row |= {figure: statistics.median(values), f"{figure}_low": min(values), f"{figure}_high": max(values)}
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
