"""Benchmark `rollout`: generations come and go under load, and a large one fills beside a live one.

- switches: 200 requests a second of 500 candidates out of 20,000 items for ten minutes, in an open loop, while every 20
  s a generation is staged, activated, rolled back or activated again, and at random moments, 20 s apart on average, a
  nearline job, the supervisor or one of the two API processes is killed; 100 items a second are updated.
  `mixed_responses` are those whose scores are not the ones of the generation that they name (recomputed with the
  training form from the events, for every 20th answer and for all within half a second of an event); `apart` is the
  least difference that a mixture would make. `failed_requests` are those beyond the ones on a killed process's own
  connections, `lost_requests` those on them. `activate_ms` and `rollback_ms`: from the event's publication until the
  last request was sent that the generation before still answered; an activation loads and warms the generation in that
  time, and may wait for what was killed. `switch_ms`: how long of that some requests were answered by the one, some by
  the other.
- fill: a million items (50,000 with --quick), twice: with nothing else to do but replication, and beside 1,000 updates
  a second. `fill_items_per_s` and `fill_beside_items_per_s` are what the encode process reads, encodes and publishes
  while it fills, by its own heartbeats; `fill_visible_items_per_s` and `fill_beside_visible_items_per_s` count from the
  stage event until the generation may be served: all rows are proven on the host and verified.
  `live_freshness_p99_ms` is due to visible in the live generation during the second fill, `calm_freshness_p99_ms` the
  same before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from encoders.bundle import Bundle, load_bundle, seeded_bundle
from infra.settings import Settings
from streams import rollout
from streams.heartbeat import read_heartbeat
from tests.bench.ingest import write_items
from tests.bench.main_path import RATE
from tests.bench.report import Report
from tests.bench.stack import Arena, BenchStack, wait
from tests.bench.switching import SETTINGS, TOLERANCE, Outcome, switch_under_load
from tests.bench.world import World

_TOGETHER = 10  # updates that are sent at once when the last of them is due: a sleep for each takes a quarter of a core


def run(seed: int, quick: bool) -> None:
    report = Report("rollout", seed, quick)
    outcome = _switches(report, seed, quick)
    _fill(report, seed, 50_000 if quick else 1_000_000)
    report.finish(lambda canvas: _draw(canvas, outcome, report.tables["freshness"]))


def bundles(folder: Path, count: int) -> list[tuple[Path, Bundle]]:
    out = []
    for seed in range(count):
        path = folder / f"bundle-{seed}"
        seeded_bundle(path, seed=seed, precision="fp32")
        out.append((path, load_bundle(path)))
    return out


# ---- switches


def _switches(report: Report, seed: int, quick: bool) -> Outcome:
    world = World(20_000, seed)
    with BenchStack(**SETTINGS) as stack:
        seconds, every_s, kill_every_s = (60.0, 5.0, 10.0) if quick else (600.0, 20.0, 20.0)
        outcome = switch_under_load(
            stack,
            world,
            bundles(stack.folder, 3),
            seconds=seconds,
            every_s=every_s,
            kill_every_s=kill_every_s,
            rate=200.0,
            seed=seed,
        )
    print(f"recomputing {sum(bool(answer.raw) for answer in outcome.load.answers)} answers", flush=True)
    checked = outcome.errors(world)
    answers = outcome.load.answers
    report.figure("requests", len(answers) + len(outcome.load.failures), "")
    report.figure("checked_responses", len(checked), "")
    report.figure("mixed_responses", sum(error > TOLERANCE for _, error in checked), "")
    report.figure("largest_error", max(error for _, error in checked), "logit")
    report.figure("apart", outcome.apart(world, [answer for answer, _ in checked[:: len(checked) // 50 + 1]]), "logit")
    report.figure("lacking_responses", sum(answer.lacks for answer in answers), "")
    report.figure("failed_requests", len(outcome.failures), "")
    report.figure("lost_requests", len(outcome.load.failures) - len(outcome.failures), "")
    report.figure("kills", len(outcome.killed), "")
    for name, action in (("activate_ms", "activate"), ("rollback_ms", "rollback")):
        steps = [step for step in outcome.switched if step.action == action]
        if steps:
            report.figure(name, [outcome.last_before(step) * 1e3 for step in steps], "ms")
    if outcome.switched:
        report.figure("switch_ms", [outcome.spread(step) * 1e3 for step in outcome.switched], "ms")
    late = np.array([(answer.ended - answer.due) * 1e3 for answer in answers])
    for part in (50, 99, 99.9):
        report.figure(f"request_p{part}_ms", float(np.percentile(late, part)), "ms")
    report.table("steps", [{"action": step.action, "generation": step.generation} for step in outcome.steps])
    return outcome


# ---- fill


def _fill(report: Report, seed: int, items: int) -> None:
    world = World(items, seed)
    with BenchStack() as stack:
        (old, _), *staged = bundles(stack.folder, 3)
        asyncio.run(write_items(stack.settings, world, items))
        arena = stack.serve_generation("live", old, limit_s=1_800)
        wait("ingest runs", lambda: _state(stack.settings, "ingest") == "running", 1_800, every_s=0.2)
        index = stack.settings.generation_dir("live") / "retrieval" / "current"
        wait("the live generation has its retrieval index", index.exists, 1_800, every_s=0.2)
        alone = _Filling(stack, "alone", *staged[0])
        wait("generation alone is complete", alone.complete, 1_800, every_s=0.2)
        report.figure("fill_items_per_s", alone.rate(), "1/s")
        report.figure("fill_visible_items_per_s", items / (time.time() - alone.began), "1/s")
        stack.publisher.models([{"action": "retire", "generation": "alone"}])
        gone = stack.settings.generation_dir("alone")
        wait("generation alone is gone", lambda: not gone.exists(), 120, every_s=0.2)
        seconds = 10
        calm, _ = _freshness(stack, arena, world, seconds, 1_000, lambda: True)
        beside = _Filling(stack, "beside", *staged[1])
        live, took = _freshness(stack, arena, world, seconds, 2_000, beside.complete)
        report.figure("fill_beside_items_per_s", beside.rate(), "1/s")
        report.figure("fill_beside_visible_items_per_s", items / (took - beside.began), "1/s")
    for name, latencies in (("calm", calm), ("live", live)):
        for part in (50, 99):
            windows = [float(np.percentile(window, part)) for window in np.array_split(latencies, 5)]
            report.figure(f"{name}_freshness_p{part}_ms", windows, "ms", float(np.percentile(latencies, part)))
    rows = [
        {"when": name, "ms": value}
        for name, latencies in (("calm", calm), ("live", live))
        for value in np.percentile(latencies, np.arange(0, 100.1, 0.5)).tolist()
    ]
    report.table("freshness", rows)


class _Filling:
    """A generation from its stage event on."""

    def __init__(self, stack: BenchStack, name: str, path: Path, bundle: Bundle) -> None:
        self._settings, self._name = stack.settings, name
        self._beats: list[tuple[int, int]] = []  # ms, items
        self.began = time.time()
        uri = path.resolve().as_uri()
        stack.publisher.models([{"action": "stage", "generation": name, "uri": uri, "sha256": bundle.sha256}])

    def complete(self) -> bool:
        """To be asked often: it looks at the heartbeats."""
        beat = read_heartbeat(self._settings.heartbeat_dir, f"encode-{self._name}")
        if beat is not None and beat.state == "filling" and (not self._beats or self._beats[-1][0] != beat.time):
            self._beats.append((beat.time, beat.handled))
        known = rollout.read(self._settings.serving_file).generations.get(self._name)
        return known is not None and known.state == "complete"

    def rate(self) -> float:
        """Items per second that encode read, encoded and published, from the first heartbeat with some to the first
        one with all."""
        first, none = next(beat for beat in self._beats if beat[1])
        last, all_ = next(beat for beat in self._beats if beat[1] == self._beats[-1][1])
        return (all_ - none) / (last - first) * 1e3


def _freshness(
    stack: BenchStack, arena: Arena, world: World, seconds: int, version: int, until: Callable[[], bool]
) -> tuple[np.ndarray, float]:
    """Due to visible, ms, of RATE updates a second, for so long at least and until it is so; and when that was."""
    numbers = np.random.default_rng(version).permutation(world.items)
    due = np.zeros(len(numbers))
    took = 0.0

    def rows() -> Iterator[bytes]:
        nonlocal took
        began = time.time()
        for place, number in enumerate(numbers.tolist()):
            due[place] = began + place / RATE
            if place % _TOGETHER == 0:
                while (early := due[place] + (_TOGETHER - 1) / RATE - time.time()) > 0:
                    time.sleep(early)
                if place % 50 == 0 and not took and until():
                    took = time.time()
            if took and place >= seconds * RATE:
                return
            yield world.event(number, version)

    stack.publisher.items(rows())
    sent = int((due > 0).sum()) - 1
    wait("it is so", lambda: bool(took) or until(), 1_800, every_s=0.1)
    took = took or time.time()
    wait("all updates are visible", lambda: arena.all_at(numbers[:sent], version), 300, every_s=0.2)
    return arena.cold(numbers[:sent])["visible_time"] - due[:sent] * 1e3, took


def _state(settings: Settings, job: str) -> str:
    beat = read_heartbeat(settings.heartbeat_dir, job)
    return "" if beat is None else beat.state


def _draw(canvas: Any, outcome: Outcome, freshness: list[dict[str, Any]]) -> None:
    left, right = canvas.subplots(1, 2)
    answers = outcome.load.answers
    start = min(answer.due for answer in answers)
    names = sorted({answer.generation for answer in answers}, key=lambda name: int(name[1:]))
    for place, name in enumerate(names):
        own = [answer for answer in answers if answer.generation == name]
        late = [(answer.ended - answer.due) * 1e3 for answer in own]
        colour = f"C{place}"
        left.plot([answer.due - start for answer in own], late, ".", markersize=1, color=colour, label=name)
    left.set(xlabel="s", ylabel="ms", yscale="log", title="Requests, by the generation that answered")
    left.legend(fontsize=7, markerscale=8)
    for name, colour in (("calm", "#2f6db3"), ("live", "#b33a2f")):
        own = [row["ms"] for row in freshness if row["when"] == name]
        label = {"calm": "before", "live": "while another generation fills"}[name]
        right.plot(own, np.linspace(0, 100, len(own)), color=colour, label=label)
    right.set(xlabel="ms from due to visible", ylabel="% of updates", xscale="log", title="Freshness of the live one")
    right.legend(fontsize=8)
