"""CPU of the nearline jobs, measured on real processes behind a real broker. Part of benchmark `cost`.

CPU seconds come from /proc/<pid>/stat, before and after N thousand events have become visible, divided by N:

- an item update through ingest, encode and replicate, at 1,000 updates per second (small batches, and the jobs' idle
  running is in it) and from a backlog (large batches); a behaviour through replicate-histories at the same pace
- a new generation: its encode and replicate processes until the generation is complete. What they cost with an empty
  catalogue is starting; the rest, divided by the items, is the refresh of one item
- idle: CPU per second of all jobs while nothing happens. The broker's CPU stands apart everywhere
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from encoders.bundle import Bundle, load_bundle
from index.histories import HistoriesReader
from infra import processes
from infra.processes import Process
from streams import rollout
from tests.bench.stack import Arena, BenchStack, wait
from tests.bench.world import World

JOBS = ("ingest", "encode", "replicate")
PACE = 1_000  # events per second
EMPTY, FULL = "empty", "full"  # the generations: staged before and after the items
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is published."""

    paced_s: Sequence[int]  # seconds at PACE, one per repetition
    backlogs: Sequence[int]  # updates, one per repetition
    behaviours_s: int
    idle_s: int


@dataclasses.dataclass(frozen=True)
class Nearline:
    """Microseconds of CPU. Per update: one list entry per repetition."""

    paced: dict[str, list[float]]  # JOBS and "broker"
    backlog: dict[str, list[float]]
    behaviour: dict[str, float]  # "histories" and "broker"
    refresh: float  # per item of the catalogue
    start: float  # of a generation's two processes
    idle: dict[str, float]  # per second: JOBS, "histories" and "broker"

    def update(self, pace: dict[str, list[float]]) -> list[float]:
        """Of one update through all jobs, per repetition."""
        return [sum(parts) for parts in zip(*(pace[job] for job in JOBS), strict=True)]


def measure(stack: BenchStack, world: World, bundle: Path, users: int, length: int, plan: Plan) -> Nearline:
    """Leaves the stack with generation FULL complete, and `users` users with `length` behaviours each."""
    start = _generation(stack, EMPTY, bundle)
    arena = Arena(stack.settings, EMPTY, load_bundle(bundle))
    print(f"publishing {world.items} items, and {users} users with {length} behaviours", flush=True)
    _updates(stack, arena, [world.event(number, 1) for number in range(world.items)], 0)
    stack.publisher.users({"user_id": f"u{user}", "features": world.profile(user)} for user in range(users))
    stack.publisher.behaviours(row for user in range(users) for row in world.history(user, length))
    wait("the histories are complete", lambda: _stored(stack, users, length), 120, every_s=0.2)

    versions = iter(range(2, 1_000))
    paced = [_per_update(stack, arena, world, PACE * seconds, next(versions), PACE) for seconds in plan.paced_s]
    backlog = [_per_update(stack, arena, world, size, next(versions), 0) for size in plan.backlogs]
    behaviour = _behaviours(stack, world, users, plan.behaviours_s)
    idle = _idle(stack, plan.idle_s)
    refresh = (_generation(stack, FULL, bundle) - start) / world.items
    return Nearline(_columns(paced), _columns(backlog), behaviour, refresh, start, idle)


def cpu_us(process: Process) -> float:
    """CPU time that a process has used, all its threads."""
    text = Path(f"/proc/{process.pid}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S * 1e6


def stage(stack: BenchStack, name: str, bundle: Path) -> Bundle:
    """Publishes a generation and waits until this host has all its rows; whether it is served is not awaited."""
    loaded = load_bundle(bundle)
    event = {"action": "stage", "generation": name, "uri": bundle.resolve().as_uri(), "sha256": loaded.sha256}
    stack.publisher.models([event])
    wait(f"generation {name} is complete", lambda: _state(stack, name) in ("complete", "active"), 300, every_s=0.05)
    return loaded


def _generation(stack: BenchStack, name: str, bundle: Path) -> float:
    """CPU of a new generation's processes until it is complete."""
    stage(stack, name, bundle)
    return sum(cpu_us(stack.job(f"{job}-{name}")) for job in ("encode", "replicate"))


def _state(stack: BenchStack, name: str) -> str:
    known = rollout.read(stack.settings.serving_file).generations.get(name)
    return known.state if known else ""


def _processes(stack: BenchStack) -> dict[str, Process]:
    broker = processes.find("kafka", stack.folder / "kafka")
    assert broker is not None
    jobs = {
        "ingest": "ingest",
        "encode": f"encode-{EMPTY}",
        "replicate": f"replicate-{EMPTY}",
        "histories": "histories",
    }
    return {**{job: stack.job(name) for job, name in jobs.items()}, "broker": broker}


def _spent(stack: BenchStack) -> dict[str, float]:
    return {name: cpu_us(process) for name, process in _processes(stack).items()}


def _per_update(stack: BenchStack, arena: Arena, world: World, count: int, version: int, pace: int) -> dict[str, float]:
    numbers = [number % world.items for number in range(count)]
    rows = [world.event(number, version) for number in numbers]
    before = _spent(stack)
    _updates(stack, arena, rows, pace)
    after = _spent(stack)
    assert arena.all_at(numbers[: world.items], version)
    return {name: (after[name] - before[name]) / count for name in (*JOBS, "broker")}


def _updates(stack: BenchStack, arena: Arena, rows: list[bytes], pace: int) -> None:
    """Publishes them and waits until all are visible."""
    before = arena.covered()
    stack.publisher.items(_paced(rows, pace) if pace else rows)
    wait("all updates are visible", lambda: arena.covered() >= before + len(rows), 180, every_s=0.05)


def _paced(rows: Sequence[Any], pace: int) -> Iterator[Any]:
    began = time.monotonic()
    for place, row in enumerate(rows):
        while (early := began + place / pace - time.monotonic()) > 0:
            time.sleep(early)
        yield row


def _behaviours(stack: BenchStack, world: World, users: int, seconds: int) -> dict[str, float]:
    """Of users of their own, so that those of the requests keep their length."""
    each = PACE * seconds // users
    by_user = [world.history(users + user, each) for user in range(users)]
    rows = [row for together in zip(*by_user, strict=True) for row in together]
    before = _spent(stack)
    stack.publisher.behaviours(_paced(rows, PACE))
    wait("the behaviours are there", lambda: _stored(stack, 2 * users, each, users), 60, every_s=0.05)
    after = _spent(stack)
    return {name: (after[name] - before[name]) / len(rows) for name in ("histories", "broker")}


def _stored(stack: BenchStack, end: int, length: int, first: int = 0) -> bool:
    """Have the users first..end all their behaviours?"""
    if not (stack.settings.histories_dir / "data.mdb").exists():
        return False
    reader = HistoriesReader(stack.settings.histories_dir)
    try:
        return all(len(reader.history(f"u{user}", 1 << 60).keys) >= length for user in range(first, end))
    finally:
        reader.close()


def _idle(stack: BenchStack, seconds: int) -> dict[str, float]:
    before = _spent(stack)
    time.sleep(seconds)
    after = _spent(stack)
    return {name: (after[name] - before[name]) / seconds for name in before}


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def table(found: Nearline) -> list[dict[str, object]]:
    """One row per job, microseconds of CPU."""
    rows: list[dict[str, object]] = [
        {
            "job": name,
            "update_paced_us": statistics.median(found.paced[name]),
            "update_backlog_us": statistics.median(found.backlog[name]),
            "behaviour_us": 0.0,
            "idle_us_per_s": found.idle[name],
        }
        for name in JOBS
    ]
    broker = (statistics.median(found.paced["broker"]), statistics.median(found.backlog["broker"]))
    for name, (paced, backlog) in (("histories", (0.0, 0.0)), ("broker", broker)):
        rows.append(
            {
                "job": name,
                "update_paced_us": paced,
                "update_backlog_us": backlog,
                "behaviour_us": found.behaviour[name],
                "idle_us_per_s": found.idle[name],
            }
        )
    return rows
