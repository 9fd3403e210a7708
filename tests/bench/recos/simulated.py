"""The runtime's policy in simulated time (api/runtime/simulate.py): how far that is from the two lanes of the rounds,
and what it says of more lanes than the machine has.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from api.runtime.graph import Graph, Operator
from api.runtime.model import Model
from api.runtime.policy import Policy
from api.runtime.simulate import Arrival, simulate
from tests.bench.recos import load
from tests.bench.report import Report

LANES, LOADS = (2, 8, 64), (0.5, 0.9)  # shares of saturation; with 64 lanes and 0.9 some 10,000 queries a second
STEP_S = 300e-6  # of a lane for each operator, or share of one, that it takes up: docs/recos.md, "How a query runs"
_WAYS = ("runtime", "its fifo", "whole queries")


Costs = dict[str, Any]  # by model, what lanes have seen its operators take in a round (worker.py)


def _models(costs: Costs, slow: float) -> dict[str, Model]:
    """As the worker has captured them, without what they run, and so many times what they took."""
    found = {}
    for name, one in costs.items():
        operators = tuple(
            Operator(print, tuple(inputs), tuple(outputs), cost, rows, blocks)
            for inputs, outputs, cost, rows, blocks in one["operators"]
        )
        graph = Graph(one["inputs"], operators, tuple(one["outputs"]), True, tuple(one["rows"]), one["block"])
        found[name] = Model(graph)
        for rows, seen in one["queries"]:
            for at, seconds in enumerate(seen):
                found[name].learn(at, rows, slow * seconds)
    return found


def arrivals(costs: Costs, peak: float, length: float, seed: int, slow: float = 1.0) -> list[Arrival]:
    """The same queries at the same moments as a worker's."""
    models, moments = _models(costs, slow), load.arrivals("steady", peak, length, seed)
    asked = load.chosen("mix", len(moments), seed + 1)
    return [
        Arrival(at, models[name], costs[name]["queries"][place][0])
        for at, (name, place) in zip(moments, asked, strict=True)
    ]


def slowness(asked: Sequence[Arrival], saturation: float) -> float:
    """Times what lanes have seen, with which two lanes answer so many of such queries a second."""
    work = statistics.fmean(one.model.work(one.rows) for one in asked)
    steps = statistics.fmean(len(one.model.graph.operators) for one in asked)
    return max(0.0, 2 / saturation - steps * STEP_S) / work


def error(asked: Sequence[Arrival], p50: float) -> float:
    """By what share of it the p50 of two simulated lanes differs from the real one, ms."""
    return abs(_took(asked, 2, "runtime")[0] / p50 - 1)


def many(report: Report, costs: Costs, saturation: float, seed: int, quick: bool) -> None:
    """The runtime, and whole queries first come, first served, with few and with many lanes under the same load."""
    slow = slowness(arrivals(costs, saturation, 10.0, seed), saturation)
    rows: list[dict[str, object]] = []
    for lanes, share in itertools.product(LANES, LOADS):
        rate, ratios = share * saturation * lanes / 2, dict[str, list[float]](p50=[], p99=[])
        for own in range(seed, seed + (2 if quick else 5)):
            asked = arrivals(costs, rate, (1_000 if quick else 10_000) / rate, own, slow)
            took = {way: _took(asked, lanes, way) for way in _WAYS}
            for at, name in enumerate(ratios):
                ratios[name].append(took["runtime"][at] / took["whole queries"][at])
            for way, (p50, p99, busy) in took.items():
                row = {"lanes": lanes, "load": share, "queries_per_s": round(rate, 1), "seed": own, "way": way}
                rows.append(row | {"queries": len(asked), "p50_ms": p50, "p99_ms": p99, "busy": busy})
        if share == LOADS[-1]:
            for name, values in ratios.items():
                report.figure(f"simulated_{lanes}_lanes_{name}_over_whole", values, "x")
    report.table("simulated", rows)


def _took(asked: Sequence[Arrival], lanes: int, way: str) -> tuple[float, float, float]:
    """p50 and p99, ms, and the share of the time for which a lane was busy."""
    if way == "whole queries":
        asked = [Arrival(one.at, Model.opaque(print, 1, one.model.work(one.rows))) for one in asked]
    found = simulate(asked, lanes, Policy(fifo=way != "runtime"), STEP_S)
    took = sorted(1e3 * (end - one.at) for end, one in zip(found.ended, asked, strict=True))
    return statistics.median(took), took[int(0.99 * len(took))], found.busy / lanes / max(found.ended)
