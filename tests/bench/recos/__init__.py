"""Concurrent inference of four published models: the runtime (api/runtime) against ways to run whole queries.

Every way runs in a process of its own (worker.py), in turns; a round is one turn of each, and a ratio is that of two
turns of one round. Kernels: `eager` is the module in torch, `onnx` ONNX Runtime, `ours` the runtime's forms; runners
that share kernels share a process. Rates of open loops are shares of saturation: what `same-p2` (our kernels, first
come, first served) answers of the mix while more of it comes than that, measured before each.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.peers.environment import ROOT, environment
from tests.bench.recos import load, simulated
from tests.bench.report import Report

Round = dict[str, Any]  # what one round has found
Ask = Callable[[dict[str, Any]], dict[str, Any]]
Cells = dict[tuple[str, ...], dict[str, list[dict[str, float]]]]  # of a load, by runner, its turns

KERNELS = {
    "eager": ("p0", "p1", "p2", "p4", "p5"),
    "onnx": ("p3",),
    "ours": ("recos", "same-p2", "recos-fifo"),
    "exact": ("recos-exact",),
    "repeated": ("recos-repeated",),
}
KERNELS_OF = {runner: kernels for kernels, runners in KERNELS.items() for runner in runners}
WAYS = ("p0", "p1", "p2", "p3", "p4", "p5", "same-p2", "recos")  # in every cell of clients and arrivals
TRIALS = ROOT / ".local" / "state" / "trials"
CLIENTS = (1, 8, 15, 22, 30)
PEAKS = (0.6, 0.9, 1.2)
DEADLINES = 8  # of an open loop's queries: so many times what a query of the mix takes alone
_MORE = 1.3  # times what eight clients are answered: more than can be
HIGH = 20.0  # queries a second of the higher class, in the cell of classes
NEAR = ("near", "steady", "0.9")  # the cell of the order's own figures: so near saturation a turn decides little, ...
TURNS = 4  # ... so that a round has several, each with arrivals and a saturation of its own
PARTS = {"order": "recos-fifo", "kernels_and_blocks": "recos-exact", "less_work": "recos-repeated"}  # switched off
PULSE = ("open", "pulse", "0.9")  # the cell of the timeline


def run(seed: int, quick: bool) -> None:
    """Rounds are kept in `.local/state/trials`: a run that was stopped, or ran out of its MINUTES, goes on with the
    next round when it is started again with the same code."""
    report = Report("recos", seed, quick)
    count, seconds = (2, 0.4) if quick else (5, 1.0)
    until = time.monotonic() + 60 * float(os.environ.get("MINUTES", "inf"))
    kept = TRIALS / f"recos-{_code()}-{seed}{'-quick' if quick else ''}.json"
    done: list[Round] = json.loads(kept.read_text()) if kept.exists() else []
    python = environment()
    with ExitStack() as held:
        workers = {name: held.enter_context(_worker(python, name, seed)) for name in KERNELS}
        while len(done) < count and (not done or time.monotonic() < until):
            print(f"round {len(done) + 1} of {count}", flush=True)
            done.append(_round(workers, seed + len(done), seconds, quick, done))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(done))
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for one in done:
        for cell, runners in one["cells"].items():
            for runner, turns in runners.items():
                cells[tuple(cell.split())][runner] += turns
    peaks = [(float(cell.split()[2]), peak) for one in done for cell, own in one["peaks"].items() for peak in own]
    report.figure("saturation_queries_per_s", [peak / share for share, peak in peaks], "1/s")
    report.figure("alone_mean_ms", done[0]["alone_mean_ms"], "ms")
    report.figure("growth_mib_over_100000_queries", done[0]["growth_mib"], "MiB")
    errors = [max(one["errors"].values()) for one in done]
    report.figure("oracle_max_abs_error", errors, "score", max(errors))
    _tables(report, cells)
    _figures(report, cells)
    _simulated(report, done, seconds, seed, quick)
    report.finish(lambda canvas: _draw(canvas, cells))
    if len(done) < count:
        print(f"{len(done)} of {count} rounds; run it again for the others.")


def _round(workers: dict[str, Ask], seed: int, seconds: float, quick: bool, before: Sequence[Round]) -> Round:
    """Every cell once, and NEAR several times. Saturation is measured before each open loop, for a shared machine's
    speed drifts by the minute; what a query takes alone is what the first round has measured.
    """

    def ask(runner: str, **cell: Any) -> dict[str, Any]:
        return workers[KERNELS_OF[runner]]({"runner": runner, "seed": seed, "model": "mix", **cell})

    def several(name: str, **cell: Any) -> float:
        return statistics.median(float(ask("same-p2", seconds=seconds, **cell)[name]) for _ in range(3))

    def saturation() -> float:
        more = _MORE * several("queries_per_s", clients=8)
        return several("queries_per_s", shape="steady", peak=more, grace_s=0.0)

    first, peaks = before[0] if before else None, defaultdict[str, list[float]](list)
    alone: float = first["alone_mean_ms"] if first else several("mean", clients=1)
    cells: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for model in ("mix",) if quick else (*load.MODELS, "mix"):
        for clients in (1, 8, 30) if quick else CLIENTS:
            for runner in WAYS:
                found = ask(runner, model=model, clients=clients, seconds=seconds)
                cells[f"closed {model} {clients}"][runner].append(found)
    for shape in ("steady",) if quick else ("steady", "pulse", "unimodal", "bimodal"):
        for peak in PEAKS:
            cell = f"open {shape} {peak}"
            peaks[cell].append(peak * saturation())
            for runner in WAYS:
                own = {"shape": shape, "peak": peaks[cell][-1], "seconds": 2 * seconds, "timeline": shape == "pulse"}
                own |= {"within_s": DEADLINES * alone / 1e3} if peak > 1 else {}
                cells[cell][runner].append(ask(runner, **own))
    cell, (_, shape, share) = " ".join(NEAR), NEAR
    for turn in range(1 if quick else TURNS):
        peaks[cell].append(float(share) * saturation())
        own = {"shape": shape, "peak": peaks[cell][-1], "seconds": 2 * seconds, "seed": _seed(seed, turn)}
        for runner in ("recos", "same-p2", *PARTS.values())[:: -1 if turn % 2 else 1]:
            cells[cell][runner].append(ask(runner, **own))
    own = {"shape": "steady", "peak": HIGH, "seconds": 4 * seconds, "of_class": 0}
    for runner in ("recos", "same-p2"):
        cells["classes alone"][runner].append(ask(runner, **own))
        cells["classes beside"][runner].append(ask(runner, **own, clients=8))
    grown = {} if first else workers["ours"]({"runner": "growth", "count": 10_000 if quick else 100_000})
    return {
        "peaks": peaks,
        "alone_mean_ms": alone,
        "cells": cells,
        "errors": workers["ours"]({"runner": "errors"}),
        "costs": workers["ours"]({"runner": "costs"}),
        "growth_mib": first["growth_mib"] if first else grown["mib"],
        "seed": seed,
    }


def _seed(seed: int, turn: int) -> int:
    """Of a round's turn."""
    return seed + 1_000 * turn


def _code() -> str:
    """What rounds of one run must have in common."""
    files = sorted((ROOT / "api" / "runtime").glob("*.py")) + sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


@contextmanager
def _worker(python: Path, kernels: str, seed: int) -> Iterator[Ask]:
    command = [str(python), "-W", "ignore", "-m", "tests.bench.recos.worker", kernels, str(seed)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        send, receive = process.stdin, process.stdout

        def ask(cell: dict[str, Any]) -> dict[str, Any]:
            print(json.dumps(cell), file=send, flush=True)
            return _answer(receive.readline(), command)

        if receive.readline() != "ready\n":
            raise RuntimeError(f"a worker does not start: `{' '.join(command)}` says why")
        yield ask
        send.close()
        process.wait(60)


def _answer(line: str, command: Sequence[str]) -> dict[str, Any]:
    if not line:
        raise RuntimeError(f"a worker has ended: `{' '.join(command)}`")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _tables(report: Report, cells: Cells) -> None:
    names = ("mean", "p50", "p95", "p99", "queries_per_s", "items_per_s", "goodput", "refused", "unfinished", "cores")
    rows: list[dict[str, object]] = []
    for cell, runners in cells.items():
        for runner, turns in runners.items():
            row: dict[str, object] = {"load": " ".join(cell), "runner": runner, "kernels": KERNELS_OF[runner]}
            row |= {name: statistics.median(turn[name] for turn in turns) for name in names}
            row |= {
                f"{name}_{end.__name__}": end(turn[name] for turn in turns) for name in ("p99",) for end in (min, max)
            }
            rows.append(row | {"peak_mib": max(turn["peak_mib"] for turn in turns)})
    report.table("cells", rows)


def _ratios(cells: Cells, cell: tuple[str, ...], name: str, over: str, runner: str = "recos") -> list[float]:
    own, other = cells[cell][runner], cells[cell][over]
    return [mine[name] / theirs[name] for mine, theirs in zip(own, other, strict=True) if theirs[name]]


def _worst(report: Report, figure: str, cells: Cells, which: Sequence[tuple[str, ...]], name: str, over: str) -> None:
    """The highest median of a cell's ratios, where a cell whose range has 1 in it counts as 1."""
    found = []
    for cell in which:
        ratios = _ratios(cells, cell, name, over)
        value = statistics.median(ratios)
        found.append((1.0 if min(ratios) <= 1.0 <= max(ratios) else value, ratios, cell))
    value, ratios, cell = max(found)
    report.figure(figure, ratios, "x", value)
    print(f"    ({' '.join(cell)})", flush=True)


def _figures(report: Report, cells: Cells) -> None:
    closed = [cell for cell in cells if cell[0] == "closed"]
    loads = [cell for cell in cells if cell[0] in ("closed", "open")]
    for over in ("p2", "p3"):
        _worst(report, f"worst_p99_over_{over}", cells, loads, "p99", over)
    many = [cell for cell in closed if int(cell[2]) >= 8]
    _worst(report, "worst_mean_over_p0_from_8_clients", cells, many, "mean", "p0")
    for name in ("p50", "p99"):
        report.figure(f"same_kernels_{name}_over_p2", _ratios(cells, NEAR, name, "same-p2"), "x")
    report.figure("overload_goodput_over_p4", _ratios(cells, ("open", "steady", "1.2"), "goodput", "p4"), "x")
    beside, alone = cells["classes", "beside"]["recos"], cells["classes", "alone"]["recos"]
    pairs = zip(beside, alone, strict=True)
    report.figure("high_priority_p99_over_unloaded", [one["p99"] / other["p99"] for one, other in pairs], "x")
    for part, over in PARTS.items():
        for name in ("p50", "p99", "cpu_ms"):
            report.figure(f"share_{part}_{name}", _ratios(cells, NEAR, name, over), "x")


def _simulated(report: Report, done: Sequence[Round], seconds: float, seed: int, quick: bool) -> None:
    """Of two-lane runs, near saturation and below it, how far simulated time is from them; then more lanes."""
    slow, saturations = list[float](), list[float]()
    for name, cell in {"simulation_error": NEAR, "simulation_error_at_0.6": ("open", "steady", "0.6")}.items():
        errors, key = list[float](), " ".join(cell)
        for one in done:
            for turn, (peak, real) in enumerate(zip(one["peaks"][key], one["cells"][key]["recos"], strict=True)):
                saturations.append(peak / float(cell[-1]))
                answered = simulated.arrivals(one["costs"], saturations[-1], seconds, one["seed"])
                slow.append(simulated.slowness(answered, saturations[-1]))  # when saturation was measured
                asked = simulated.arrivals(one["costs"], peak, 2 * seconds, _seed(one["seed"], turn), slow[-1])
                errors.append(simulated.error(asked, real["p50"]))
        report.figure(name, errors, "of p50")
    report.figure("simulation_slowness", slow, "x what lanes have seen")
    simulated.many(report, done[0]["costs"], statistics.median(saturations), seed, quick)


def _draw(canvas: Any, cells: Cells) -> None:
    models = list(dict.fromkeys(cell[1] for cell in cells if cell[0] == "closed"))
    canvas.set_size_inches(4 * len(models), 10)
    clients, pulse = canvas.subfigures(2, 1, height_ratios=(2, 1))
    axes = clients.subplots(2, len(models), squeeze=False)
    for row, name in enumerate(("mean", "p99")):
        for axis, model in zip(axes[row], models, strict=True):
            counts = [int(cell[2]) for cell in cells if cell[:2] == ("closed", model)]
            for runner in WAYS:
                values = [
                    statistics.median(turn[name] for turn in cells["closed", model, str(count)][runner])
                    for count in counts
                ]
                axis.plot(counts, values, marker="o", label=runner, linewidth=2.5 if runner == "recos" else 1)
            axis.set(title=f"{model}: {name}, ms", xlabel="clients", yscale="log")
    axes[0][0].legend(fontsize=7)
    if PULSE in cells:
        _draw_timeline(pulse.subplots(), cells[PULSE])


def _draw_timeline(axis: Any, runners: dict[str, list[dict[str, Any]]]) -> None:
    """Of all rounds, the median of each moment; behind it the rate of arrivals."""
    for runner in ("p2", "p3", "p4", "same-p2", "recos"):
        lines = np.array([turn["timeline"] for turn in runners[runner]])
        at = (np.arange(lines.shape[1]) + 0.5) / lines.shape[1]
        axis.plot(at, np.nanmedian(lines, axis=0), label=runner, linewidth=2.5 if runner == "recos" else 1)
    share = np.linspace(0, 1, 1_000)
    rate = [load.SHAPES[PULSE[1]](one) for one in share]
    axis.fill_between(share, 0, rate, alpha=0.15, step="mid", transform=axis.get_xaxis_transform(), label="arrivals")
    axis.set(title="mix, pulses of 0.9: mean latency by arrival, ms", xlabel="share of the turn", yscale="log")
    axis.legend(fontsize=7, ncols=6)
