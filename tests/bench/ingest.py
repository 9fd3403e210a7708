"""Benchmark `ingest`: what packs are worth, and how long ingest is away after a loss. A broker and ingest alone.

- packs: the same number of item updates published and ingested, one event a message and in packs, in turns; events per
  second from the first one published to the last one on `items`, publisher and ingest at work at the same time, and
  ingest's own CPU per event (/proc/<pid>/stat), which does not depend on who else uses the machine
- recovery, with a million items on `items` (100,000 with --quick): `ingest_recovery_s` from the start of the process
  without a store until it runs, all of the state read from `items`; `ingest_restart_s` the same with its store;
  `ingest_takeover_s` from a SIGKILL of it until another host's ingest, which stood by and had followed `items`, runs
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from kafka import KafkaConsumer, TopicPartition

from infra import processes
from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics
from infra.processes import Process
from infra.settings import Settings, environment
from streams import events
from streams.heartbeat import read_heartbeat
from streams.publish import Publisher
from tests.bench.costs_nearline import cpu_us
from tests.bench.report import Report
from tests.bench.stack import wait
from tests.bench.world import World
from tests.conftest import JARS, free_ports


@dataclasses.dataclass(frozen=True)
class Host:
    """One host's ingest."""

    settings: Settings

    def start(self) -> Process:
        environ = {**os.environ, **environment(self.settings)}
        return processes.start(
            "ingest", [sys.executable, "-m", "streams", "ingest"], self.settings.state / "run", environ
        )

    def until(self, process: Process, state: str, limit_s: float) -> None:
        """Waits until the process says so."""

        def said() -> bool:
            assert process.alive(), f"ingest has ended: {process.log.read_text()[-2000:]}"
            beat = read_heartbeat(self.settings.heartbeat_dir, "ingest")
            return beat is not None and beat.pid == process.pid and beat.state == state

        wait(f"ingest of {self.settings.host} is {state}", said, limit_s)


def run(*, seed: int, quick: bool) -> None:
    report = Report("ingest", seed, quick)
    with tempfile.TemporaryDirectory(prefix="forerank-bench-") as name:
        port, controller = free_ports(2)
        with Broker(Path(name) / "kafka", port, controller, jars=JARS) as broker:
            host = Host(Settings(kafka_bootstrap=broker.bootstrap, state=Path(name) / "state", host="bench"))
            _packs(report, host, World(5_000, seed), 5_000 if quick else 20_000, 2 if quick else 5)
            _recovery(report, host, World(1, seed), 100_000 if quick else 1_000_000)
    report.finish(lambda canvas: _draw(canvas, report))


# ---- packs


def _packs(report: Report, host: Host, world: World, count: int, rounds: int) -> None:
    settings = dataclasses.replace(host.settings, topic_prefix="packs.", state=host.settings.state / "packs")
    host = Host(settings)
    ensure_topics(settings)
    rates: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    process = host.start()
    try:
        host.until(process, "running", 300)
        with Publisher(settings) as publisher, _ends_of(settings, "items") as ends:
            version = 0
            for turn in range(2 * (rounds + 1)):
                bulk = turn % 2 == 1
                version += 1
                rows = [world.event(number % world.items, version + number // world.items) for number in range(count)]
                version += count // world.items
                wanted, spent, began = sum(ends()) + count, cpu_us(process), time.perf_counter()
                publisher.publish("items", rows, bulk=bulk)
                wait("all is on items", lambda wanted=wanted: sum(ends()) >= wanted, 300)  # type: ignore[misc]
                if turn > 1:  # the first two warm up
                    rates[bulk].append(count / (time.perf_counter() - began))
                    cpu[bulk].append((cpu_us(process) - spent) / count)
                print(f"packs: turn {turn}, {'packed' if bulk else 'single'}", flush=True)
    finally:
        processes.stop(process, 30.0)
    for bulk, form in ((False, "single"), (True, "packed")):
        report.figure(f"ingested_{form}_per_s", rates[bulk], "1/s")
        report.figure(f"ingest_{form}_cpu_us", cpu[bulk], "us")
    report.figure("pack_gain", [b / a for a, b in zip(rates[False], rates[True], strict=True)], "x")
    report.figure("pack_cpu_gain", [a / b for a, b in zip(cpu[False], cpu[True], strict=True)], "x")


# ---- recovery


def _recovery(report: Report, host: Host, world: World, count: int) -> None:
    settings = dataclasses.replace(host.settings, topic_prefix="recovery.", state=host.settings.state / "one")
    other = dataclasses.replace(settings, host="other", state=host.settings.state / "other")
    ensure_topics(settings)
    began = time.perf_counter()
    asyncio.run(write_items(settings, world, count))
    print(f"recovery: {count:,} items written in {time.perf_counter() - began:.0f} s", flush=True)
    one, two = Host(settings), Host(other)
    process = one.start()
    second = None
    try:
        for name in ("ingest_recovery_s", "ingest_restart_s"):
            began = time.perf_counter()
            if name == "ingest_restart_s":
                processes.stop(process, 60.0)
                began = time.perf_counter()
                process = one.start()
            one.until(process, "running", 1_800)
            report.figure(name, time.perf_counter() - began, "s")
            report.figure(name.replace("_s", "_cpu_s"), cpu_us(process) / 1e6, "s")
            print(f"{name} {time.perf_counter() - began:.1f}", flush=True)
        second = two.start()
        two.until(second, "standby", 300)
        wait("it has followed", lambda: _handled(two) >= count, 1_800, every_s=0.2)
        began = time.perf_counter()
        os.kill(process.pid, signal.SIGKILL)
        two.until(second, "running", 1_800)
        report.figure("ingest_takeover_s", time.perf_counter() - began, "s")
    finally:
        for started in (process, second):
            if started is not None:
                processes.stop(started, 30.0)


def _handled(host: Host) -> int:
    beat = read_heartbeat(host.settings.heartbeat_dir, "ingest")
    return 0 if beat is None else beat.handled


async def write_items(settings: Settings, world: World, count: int) -> None:
    """Records as ingest writes them, of a few hundred contents, which are made beforehand."""
    contents = [
        events.encode(events.item_update(world.event(0, version), None, 1_767_225_600_000)).split(b'"0"', 1)
        for version in range(256)
    ]
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, max_batch_size=256 << 10)
    await producer.start()
    batches = [producer.create_batch() for _ in range(settings.partitions)]
    acks = []
    for number in range(count):
        key, (head, tail) = str(number).encode(), contents[number % 256]
        place = events.partition_of(key, settings.partitions)
        while batches[place].append(timestamp=None, key=key, value=b'%b"%b"%b' % (head, key, tail)) is None:
            acks.append(await producer.send_batch(batches[place], settings.topic("items"), partition=place))
            batches[place] = producer.create_batch()
    for place, batch in enumerate(batches):
        acks.append(await producer.send_batch(batch, settings.topic("items"), partition=place))
    await asyncio.gather(*acks)
    await producer.stop()


@contextlib.contextmanager
def _ends_of(settings: Settings, topic: str) -> Iterator[Callable[[], list[int]]]:
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap, group_id=None, enable_auto_commit=False)
    places = [TopicPartition(settings.topic(topic), partition) for partition in range(settings.partitions)]
    try:
        yield lambda: list(consumer.end_offsets(places).values())
    finally:
        consumer.close()


def _draw(canvas: Any, report: Report) -> None:
    left, right = canvas.subplots(1, 2)
    for axes, names, title in (
        (left, ("ingested_single_per_s", "ingested_packed_per_s"), "Published and ingested, events/s"),
        (right, ("ingest_recovery_s", "ingest_restart_s", "ingest_takeover_s"), "Ingest is away, s"),
    ):
        axes.bar(names, [report.figures[name]["value"] for name in names], color="#2f6db3")
        axes.set(title=title)
        axes.tick_params(axis="x", labelsize=7)
