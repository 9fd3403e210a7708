"""Benchmark `cost`: CPU per request of AIF with all of its work, against sequential COLD and DSSM (experiment 6).

    CPU of a request = online + updates per request x CPU of an update + items refreshed per request x CPU of a refresh
                       + behaviours per request x CPU of a behaviour

- online: 10,000 candidates, a user with 1,000 behaviours (tests/bench/costs_online.py), repetitions interleaved over
  the systems. CPU of the whole process, so AIF's second thread is in it.
- nearline: on real processes behind a real broker, whose CPU for updates and behaviours is in all figures
  (tests/bench/costs_nearline.py; that for a refresh is not told apart). The headline takes the dearer pace, 1,000
  updates per second.
- COLD as published computes its item side online and is charged nothing for updates, which is in its favour; with its
  item groups cached, and for DSSM, an update runs through the same jobs as AIF's with the model's own item side in the
  place of AIF's fold, and a new model refreshes the catalogue just so.
- behaviours are replicated for all three: all read them. Starting a generation's processes (`generation_start_s`), once
  per model, and the jobs' idle running below the pace are reported, not shared out.

Latency: wall time with a retrieval of 10 ms; AIF's user inference runs beside it, the others' after it.
`break_even_updates_per_request` is where AIF's CPU reaches that of COLD over the same transport (`carried`): the
features of COLD's items must reach the host too. `break_even_free_transport` is where it does if they come for nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from api.generations import load
from api.lanes import Lanes
from api.runtime.lane import Cpu
from api.runtime.runtime import Runtime
from encoders.baselines import COLD, DSSM
from encoders.bundle import load_bundle, seeded_bundle
from encoders.config import ModelConfig
from encoders.features import ItemEncoder
from encoders.fold import ItemFold
from index import kernels
from index.histories import HistoriesReader
from tests.bench import costs_nearline, costs_online
from tests.bench.costs_nearline import Nearline, Plan
from tests.bench.costs_online import CANDIDATES, Aif, CachedCold, SequentialCold, SequentialDssm, System, untrained
from tests.bench.report import Report
from tests.bench.scene import Scene
from tests.bench.serving_forms import ColdJoin, cold_items, dssm_items, one_thread
from tests.bench.stack import BenchStack
from tests.bench.world import World

LENGTH = 1_000
RATIOS = (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0)  # item updates per request
HEADLINE = 1.0  # the ratio of `compute_over_*`
REFRESHED = 0.1  # items refreshed per request: a million items, and ten million requests from model to model
REFRESHES = (0.0, 0.1, 1.0, 10.0)
BEHAVIOURS = 1.0  # per request
PACED_BATCH, BACKLOG_BATCH = 16, 512  # items that encode takes at a time
COLOURS = {"aif": "#2f6db3", "cold": "#b33a2f", "cold_cached": "#d98c5f", "dssm": "#4a8f4a"}
NEVER = 1e6  # updates per request that nobody has
Samples = dict[str, list[float]]  # system -> one value per repetition


@dataclasses.dataclass(frozen=True)
class Price:
    """CPU milliseconds of a system per request, update, refreshed item and behaviour."""

    request: float
    update: float
    refresh: float
    behaviour: float

    def at(self, updates: float, refreshed: float = REFRESHED) -> float:
        """CPU milliseconds per request, all work counted."""
        return self.request + updates * self.update + refreshed * self.refresh + BEHAVIOURS * self.behaviour


def run(seed: int, quick: bool) -> None:
    report = Report("cost", seed, quick)
    config = ModelConfig()
    items, users, repetitions = (15_000, 8, 25) if quick else (60_000, 32, 200)
    plan = Plan((3, 3), (5_000, 5_000), 2, 3) if quick else Plan((20, 20, 20), (20_000,) * 5, 15, 20)
    world = World(items, seed)
    with one_thread(), BenchStack() as stack, Runtime(2, device=Cpu(pinned=False)) as runtime:
        bundle = stack.folder / "bundle"
        seeded_bundle(bundle, config, seed)
        nearline = costs_nearline.measure(stack, world, bundle, users, LENGTH, plan)
        generation = load(stack.settings, costs_nearline.FULL, load_bundle(bundle).sha256)
        kernels.warm_up(generation.layout, generation.head_tables)
        histories = HistoriesReader(stack.settings.histories_dir)
        scene = Scene(items, LENGTH, config, seed)
        systems = _systems(scene, Aif(stack.settings, generation, histories, Lanes(runtime)), histories)
        print(f"requests: {repetitions} of each system, in turn", flush=True)
        cpu, wall = _requests(systems, world, users, repetitions)
        stages = _stages(systems, world, users, max(10, repetitions // 4))
        encode = _encode(scene, ItemFold(load_bundle(bundle)), 10 if quick else 40)
    _nearline_figures(report, nearline)
    prices = _prices(cpu, nearline, encode, nearline.paced, PACED_BATCH)
    from_backlog = _prices(cpu, nearline, encode, nearline.backlog, BACKLOG_BATCH)
    _figures(report, cpu, wall, prices, from_backlog)
    report.table("stages", stages)
    report.table("nearline", costs_nearline.table(nearline))
    report.table("encode", encode_table(encode))
    report.table("requests", [_row(prices, "updates_per_request", ratio, ratio, REFRESHED) for ratio in RATIOS])
    report.table(
        "refreshes", [_row(prices, "items_refreshed_per_request", share, HEADLINE, share) for share in REFRESHES]
    )
    report.finish(lambda canvas: _draw(canvas, prices, stages))


# ---- online


def _systems(scene: Scene, aif: Aif, histories: HistoriesReader) -> list[System]:
    cold, dssm = untrained("cold", scene.config, scene), untrained("dssm", scene.config, scene)
    assert isinstance(cold, COLD)
    assert isinstance(dssm, DSSM)
    with torch.inference_mode():
        return [
            aif,
            SequentialCold(cold, scene, histories),
            CachedCold(cold, scene, histories),
            SequentialDssm(dssm, scene, histories),
        ]


def _requests(systems: list[System], world: World, users: int, repetitions: int) -> tuple[Samples, Samples]:
    """CPU and wall milliseconds of whole requests, the systems in turn; the first five do not count."""
    cpu: Samples = {system.name: [] for system in systems}
    wall: Samples = {system.name: [] for system in systems}
    for repetition in range(repetitions + 5):
        retrieve = costs_online.slept(_candidates(world, repetition))
        answers = {}
        for system in systems:
            began, began_cpu = time.perf_counter(), time.process_time()
            answers[system.name] = system.request(f"u{repetition % users}", retrieve)
            spent_cpu, spent = time.process_time() - began_cpu, time.perf_counter() - began
            if repetition >= 5:
                cpu[system.name].append(spent_cpu * 1e3)
                wall[system.name].append(spent * 1e3)
        assert all(len(answer) == costs_online.K for answer in answers.values())
        assert np.array_equal(answers["cold"], answers["cold_cached"]), "the two forms of COLD disagree"
    return cpu, wall


def _stages(systems: list[System], world: World, users: int, repetitions: int) -> list[dict[str, object]]:
    """Median CPU milliseconds of every stage of every system, run one after the other in one thread."""
    spent: dict[tuple[str, str], list[float]] = {}
    for repetition in range(repetitions + 1):
        ids = _candidates(world, repetition)
        for system in systems:
            lap = _Lap()
            system.stages(f"u{repetition % users}", ids, lap)
            for stage, took in lap.took.items():
                if repetition:
                    spent.setdefault((system.name, stage), []).append(took)
    return [
        {"system": system, "stage": stage, "cpu_ms": statistics.median(took), "low": min(took), "high": max(took)}
        for (system, stage), took in spent.items()
    ]


class _Lap:
    """CPU milliseconds of this thread per stage."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self._last = time.thread_time()

    def __call__(self, stage: str) -> None:
        now = time.thread_time()
        self.took[stage] = self.took.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now


def _candidates(world: World, seed: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).permutation(world.items)[:CANDIDATES].astype(np.uint64)


# ---- nearline and the sum


@torch.inference_mode()
def _encode(scene: Scene, fold: ItemFold, repetitions: int) -> dict[tuple[str, int], list[float]]:
    """CPU microseconds per item of each model's item side, as encode would run it, by batch size."""
    encoder = ItemEncoder(scene.spec, scene.config.embedding_dim, scene.config.crosses)
    cold, dssm = untrained("cold", scene.config, scene), untrained("dssm", scene.config, scene)
    assert isinstance(cold, COLD)
    assert isinstance(dssm, DSSM)
    join = ColdJoin(cold)

    def cached_cold(items: list[Any]) -> None:
        groups = cold_items(cold, encoder.columns(items).features)
        join.halves(groups)

    sides: dict[str, Callable[[list[Any]], object]] = {
        "aif": fold.encode,
        "cold_cached": cached_cold,
        "dssm": lambda items: dssm_items(dssm, encoder.columns(items).features),
    }
    spent: dict[tuple[str, int], list[float]] = {}
    for repetition, size in itertools.product(range(repetitions + 1), (PACED_BATCH, BACKLOG_BATCH)):
        batches = [[scene.world.inputs(number % len(scene), repetition) for number in range(size)] for _ in range(4)]
        for name, side in sides.items():
            began = time.thread_time()
            for batch in batches:
                side(batch)
            took = (time.thread_time() - began) * 1e6 / (4 * size)
            if repetition:
                spent.setdefault((name, size), []).append(took)
    return spent


def _prices(
    cpu: Samples, nearline: Nearline, encode: Mapping[tuple[str, int], list[float]], pace: Samples, batch: int
) -> dict[str, Price]:
    """Of every system, from medians, the broker's work included."""
    update = statistics.median(nearline.update(pace)) + statistics.median(pace["broker"])

    def price(system: str) -> Price:
        online, behaviour = statistics.median(cpu[system]), sum(nearline.behaviour.values()) / 1e3
        if (system, batch) not in encode:  # as published: no nearline item side
            return Price(online, 0.0, 0.0, behaviour)
        less, less_refresh = (
            statistics.median(encode["aif", size]) - statistics.median(encode[system, size])
            for size in (batch, BACKLOG_BATCH)
        )
        return Price(online, (update - less) / 1e3, (nearline.refresh - less_refresh) / 1e3, behaviour)

    return {system: price(system) for system in cpu}


def carried(prices: Mapping[str, Price]) -> Price:
    """COLD with features carried to the host as AIF's rows are: an update costs what one of its cached form does."""
    return dataclasses.replace(prices["cold"], update=prices["cold_cached"].update)


def break_even(one: Price, other: Price) -> float:
    """Updates per request at which `one` costs as much as `other`: 0 where it costs more from the start, and at most
    NEVER, where its updates cost no more than the other's.
    """
    ahead, dearer = other.at(0.0) - one.at(0.0), one.update - other.update
    if ahead <= 0:
        return 0.0
    return min(NEVER, ahead / dearer) if dearer > 0 else NEVER


# ---- what is reported


def _nearline_figures(report: Report, found: Nearline) -> None:
    report.figure("update_us_paced", found.update(found.paced), "us CPU")
    report.figure("update_us_backlog", found.update(found.backlog), "us CPU")
    report.figure("broker_us_per_update", found.paced["broker"], "us CPU")
    report.figure("behaviour_us", found.behaviour["histories"], "us CPU")
    report.figure("broker_us_per_behaviour", found.behaviour["broker"], "us CPU")
    report.figure("refresh_us_per_item", found.refresh, "us CPU")
    report.figure("generation_start_s", found.start / 1e6, "s CPU")
    idle = sum(spent for name, spent in found.idle.items() if name != "broker")
    report.figure("idle_ms_per_s", idle / 1e3, "ms CPU")


def _figures(
    report: Report,
    cpu: Samples,
    wall: Samples,
    prices: Mapping[str, Price],
    from_backlog: Mapping[str, Price],
) -> None:
    headline = {system: _headline(prices[system], samples) for system, samples in cpu.items()}
    for system, price in prices.items():
        report.figure(f"online_cpu_ms_{system}", cpu[system], "ms CPU")
        report.figure(f"compute_ms_{system}", headline[system], "ms CPU", price.at(HEADLINE))
        report.figure(f"latency_ms_{system}", wall[system], "ms")
    aif = prices["aif"]
    for rival in [name for name in prices if name != "aif"]:
        ratio = aif.at(HEADLINE) / prices[rival].at(HEADLINE)
        report.figure(f"compute_over_{rival}", _ratios(headline["aif"], headline[rival]), "x", ratio)
        report.figure(f"latency_over_{rival}", _ratios(wall["aif"], wall[rival]), "x")
    for pace, found in (("", prices), ("_from_backlog", from_backlog)):
        same = break_even(found["aif"], carried(found))
        report.figure(f"break_even{pace or '_updates_per_request'}", same, "updates")
        report.figure(f"break_even_free_transport{pace}", break_even(found["aif"], found["cold"]), "updates")
    report.figure("break_even_over_cold_cached", break_even(aif, prices["cold_cached"]), "updates")


def _headline(price: Price, online: list[float]) -> list[float]:
    """All work of a request at the headline's ratio, per repetition of the online part."""
    return [dataclasses.replace(price, request=one).at(HEADLINE) for one in online]


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Repetition by repetition: the two ran one after the other."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _row(prices: Mapping[str, Price], label: str, value: float, ratio: float, refreshed: float) -> dict[str, object]:
    spent = {system: price.at(ratio, refreshed) for system, price in prices.items()}
    return {
        label: value,
        **{f"{system}_ms": took for system, took in spent.items()},
        **{f"over_{system}": spent["aif"] / took for system, took in spent.items() if system != "aif"},
    }


def encode_table(encode: Mapping[tuple[str, int], list[float]]) -> list[dict[str, object]]:
    return [
        {"system": system, "batch": size, "us_per_item": statistics.median(took), "low": min(took), "high": max(took)}
        for (system, size), took in encode.items()
    ]


def _draw(canvas: Any, prices: Mapping[str, Price], stages: list[dict[str, object]]) -> None:
    left, right = canvas.subplots(1, 2)
    ratios = np.geomspace(0.05, 2_000, 200)
    for system, price in prices.items():
        left.plot(ratios, [price.at(ratio) for ratio in ratios], color=COLOURS[system], label=system.replace("_", ", "))
    same = carried(prices)
    dashed = {"color": COLOURS["cold"], "linestyle": "--", "label": "cold, same transport"}
    left.plot(ratios, [same.at(ratio) for ratio in ratios], **dashed)
    even = break_even(prices["aif"], same)
    if 0 < even < ratios[-1]:
        left.plot([even], [same.at(even)], marker="o", color="black")
        left.annotate(f"break-even at {even:.0f}", (even, same.at(even)), textcoords="offset points", xytext=(-92, 8))
    left.set(
        xscale="log",
        yscale="log",
        xlabel="item updates per request",
        ylabel="CPU ms per request",
        title="All work counted",
    )
    left.legend()
    bottom = dict.fromkeys(prices, 0.0)
    shades = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(str(row["stage"]) for row in stages))}
    for row in stages:
        system, stage, took = str(row["system"]), str(row["stage"]), float(str(row["cpu_ms"]))
        right.bar(system, took, bottom=bottom[system], color=shades[stage])
        bottom[system] += took
    right.legend([_patch(colour) for colour in shades.values()], list(shades))
    right.set(ylabel="CPU ms", title="Online stages, 10,000 candidates")


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)
