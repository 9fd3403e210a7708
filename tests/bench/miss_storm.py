"""Benchmark `miss_storm`: under full load all caches of an API process are emptied (SIGUSR1), while the feature service
that crosses come from becomes ten times slower; requests that degrade against requests that wait.

One API process, four closed-loop clients, 2,000 candidates in binary form, users in turn. `degrading` requests name a
deadline of 50 ms, `waiting` ones of 10 s, so that they wait until a fetch ends; all else is the same. Storms of both
are interleaved: calm (all crosses kept), then the storm, then until nobody is served without.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from infra.settings import Settings
from tests.bench.http_load import BINARY, Connection, request
from tests.bench.report import Report
from tests.bench.stack import wait
from tests.conftest import free_ports
from tests.host import HOUR, NOW, Host, Seen, catalogue
from tests.remote_features import feature_service

ITEMS, CANDIDATES, CLIENTS, PAST = 4_000, 2_000, 4, 200
USUAL_MS, SLOW_MS = 20, 200
DEADLINES_MS = {"degrading": 50, "waiting": 10_000}
COLOURS = {"degrading": "#2f6db3", "waiting": "#b33a2f"}
Sample = tuple[float, float, bool]  # seconds since the storm's begin, ms, whether served without crosses


def run(seed: int, quick: bool) -> None:
    report = Report("miss_storm", seed, quick)
    users, storms, storm_s = (100, 1, 3.0) if quick else (600, 5, 10.0)
    pasts = {f"u{user}": _past(seed + user) for user in range(users)}
    samples: dict[str, list[list[Sample]]] = {way: [] for way in DEADLINES_MS}
    with tempfile.TemporaryDirectory(prefix="forerank-bench-") as folder, feature_service(pasts) as service:
        settings = Settings(
            kafka_bootstrap=f"127.0.0.1:{free_ports(1)[0]}",
            state=Path(folder),
            api_port=free_ports(1)[0],
            cross_source=str(service.base_url),
        )
        host = Host(settings)
        try:
            _fill(host, pasts, seed)
            for _ in range(storms):
                for way, deadline_ms in DEADLINES_MS.items():
                    samples[way].append(_storm(host, service, list(pasts), deadline_ms, storm_s))
        finally:
            host.close()
    for way, rounds in samples.items():
        for name, (low, high) in {"calm": (-1e9, 0.0), "storm": (0.0, storm_s)}.items():
            during = [[one for one in each if low <= one[0] < high] for each in rounds]
            for part in (50, 99):
                values = [float(np.percentile([ms for _, ms, _ in one], part)) for one in during]
                report.figure(f"{way}_{name}_p{part}_ms", values, "ms")
            seconds = [max(at for at, *_ in one) - min(at for at, *_ in one) for one in during]
            rates = [len(one) / took for one, took in zip(during, seconds, strict=True)]
            report.figure(f"{way}_{name}_requests_per_s", rates, "1/s")
            shares = [100 * sum(without for *_, without in one) / len(one) for one in during]
            report.figure(f"{way}_{name}_degraded_percent", shares, "%")
        clean = [max((at for at, _, without in one if without), default=0.0) for one in rounds]
        report.figure(f"{way}_last_degraded_s", clean, "s")
    report.table("over_time", _over_time(samples))
    report.finish(lambda canvas: _draw(canvas, report.tables["over_time"]))


def _past(seed: int) -> list[tuple[str, str, int]]:
    numbers = np.random.default_rng(seed).integers(0, ITEMS, PAST).tolist()
    return [(str(number), "click", NOW - (PAST - at) * HOUR) for at, number in enumerate(numbers)]


def _fill(host: Host, pasts: dict[str, list[tuple[str, str, int]]], seed: int) -> None:
    items = catalogue(ITEMS, seed)
    for at, item in enumerate(items):
        object.__setattr__(item, "item_id", str(at))
    host.bundle("g1", seed, "fp16")
    host.write("g1", items)
    host.behave([Seen(user, item, at, action) for user, past in pasts.items() for item, action, at in past])
    host.activate("g1")
    host.start()
    host.ready()


def _storm(host: Host, service: httpx.Client, users: Sequence[str], deadline_ms: int, storm_s: float) -> list[Sample]:
    """All samples of one storm, from a second before it. Raises what a client raised."""
    service.put("/delay", params={"ms": USUAL_MS})
    load = _Load(host.settings.api_port, users, deadline_ms)
    with load:
        wait("all crosses are kept", load.settled, 120)
        calm = load.mark()
        wait("a calm second", lambda: time.perf_counter() - calm > 1.0, 10)
        service.put("/delay", params={"ms": SLOW_MS})
        assert host._process is not None
        began = load.mark()
        os.kill(host._process.pid, signal.SIGUSR1)
        wait("the storm", lambda: time.perf_counter() - began > storm_s, storm_s + 10)
        wait("nobody is served without any more", load.settled, 120)
    return [(at - began, ms, without) for at, ms, without in load.samples if at >= calm]


class _Load:
    """Closed-loop clients, until the end of `with`, which raises what one of them raised."""

    def __init__(self, port: int, users: Sequence[str], deadline_ms: int) -> None:
        ids = np.random.default_rng(0).permutation(ITEMS)[:CANDIDATES].astype("<u8").tobytes()
        path = f"/v1/score?k=100&as_of={NOW}&deadline_ms={deadline_ms}&user_id="
        self._requests = [request(path + user, ids, BINARY) for user in users]
        self._port, self._stop, self._settled_from = port, threading.Event(), 2 * len(users)
        self.samples: list[Sample] = []
        self._failed: list[Exception] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._failed:
            raise self._failed[0]

    def mark(self) -> float:
        """Now, from when on `settled` looks."""
        self._settled_from = len(self.samples) + 2 * len(self._requests)
        return time.perf_counter()

    def settled(self) -> bool:
        """Whether every user was asked for, and the newest answers lack nothing."""
        count = len(self.samples)
        newest = self.samples[max(0, count - 2 * len(self._requests)) : count]
        return bool(self._failed) or (count >= self._settled_from and not any(without for *_, without in newest))

    def _ask(self, number: int) -> None:
        connection, place = Connection(self._port), number
        try:
            while not self._stop.is_set():
                began = time.perf_counter()
                head, _ = connection.ask(self._requests[place % len(self._requests)])
                ended = time.perf_counter()
                self.samples.append((ended, (ended - began) * 1e3, _degraded(head)))
                place += CLIENTS if place < len(self._requests) else 1
        except (OSError, RuntimeError) as error:
            self._failed.append(error)
        finally:
            connection.close()


def _degraded(head: bytes) -> bool:
    """Without crosses, or with old ones."""
    said = [line for line in head.lower().splitlines() if line.startswith(b"forerank-degraded:")]
    return any(b"crosses" in line for line in said)


def _over_time(samples: dict[str, list[list[Sample]]]) -> list[dict[str, object]]:
    """p99 and degraded share by quarters of a second, all storms of a way together."""
    rows: list[dict[str, object]] = []
    for way, rounds in samples.items():
        every = [one for each in rounds for one in each]
        for start in np.arange(-1.0, max(at for at, *_ in every), 0.25).tolist():
            own = [(ms, without) for at, ms, without in every if start <= at < start + 0.25]
            if own:
                p99 = float(np.percentile([ms for ms, _ in own], 99))
                share = 100 * sum(without for _, without in own) / len(own)
                rows.append({"way": way, "at_s": start, "p99_ms": p99, "degraded_percent": share, "n": len(own)})
    return rows


def _draw(canvas: Any, rows: list[dict[str, Any]]) -> None:
    left, right = canvas.subplots(1, 2)
    for way, colour in COLOURS.items():
        own = [row for row in rows if row["way"] == way]
        at = [row["at_s"] for row in own]
        left.plot(at, [row["p99_ms"] for row in own], color=colour, label=way)
        right.plot(at, [row["degraded_percent"] for row in own], color=colour)
    left.axhline(DEADLINES_MS["degrading"], color="grey", linestyle=":")
    left.set(xlabel="s since the storm's begin", ylabel="p99, ms", yscale="log", title="Latency (dotted: deadline)")
    left.legend()
    right.set(xlabel="s since the storm's begin", ylabel="% of requests", title="Served without crosses")
