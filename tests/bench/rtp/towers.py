"""The user tower alone against the compilers and runtimes that could be in its place."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from tests.bench.peers.environment import PeersError, environment
from tests.bench.report import Report
from tests.bench.rtp.common import Series

_RATIOS_FROM = 200  # behaviours; below, calls count more than what is computed


def measure(report: Report, folder: Path, seed: int, quick: bool) -> None:
    """CPU ms by way and recent behaviours, in turns, and times as much CPU as the generated code the others take (above
    1: it is quicker). A quick run does not make the peers' environment."""
    try:
        python = environment(make=not quick)
    except PeersError as error:
        print(f"other ways to run the user tower are left out: {error}", flush=True)
        return
    command = [str(python), "-m", "tests.bench.peers.towers", str(folder), str(seed), "20" if quick else "200"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    spent: dict[str, Series] = json.loads(run.stdout.splitlines()[-1])
    for length, ways in spent.items():
        windows = {name: np.array([np.median(part) for part in np.array_split(took, 5)]) for name, took in ways.items()}
        for name, medians in windows.items():
            report.figure(f"tower_{name}_{length}_cpu_ms", medians.tolist(), "ms", float(np.median(ways[name])))
        for name in ways if int(length) >= _RATIOS_FROM else ():
            if name != "forerank":
                ratios = windows[name] / windows["forerank"]
                report.figure(f"tower_over_{name}_{length}", ratios.tolist(), "x")
