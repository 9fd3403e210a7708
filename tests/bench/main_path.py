"""Benchmark `main_path`: the whole path on this machine, broker, nearline jobs and API on the same cores.

128-float embeddings, d = h = 64, n = 16, b = 128, 8 partitions, one process per job.

- freshness: single-item updates at 1,000/s; from the moment an update was due to be published (a producer that stalls
  gets no discount) to the row's `visible_time`, stamped by the writer at publication; `freshness_observed_*` is the
  same by the clock of a reader that polls the arena, for every hundredth update.
- pipeline: ingest is stopped, a backlog of single-item events is published, ingest goes on; rows visible per second
  from the first row of the backlog to the last.
- recommend: 10,000 candidates of a 10 ms stand-in for a remote retrieval, users with 1,000 behaviours, one client;
  the round trip as the client sees it, and the stages as the response names them. The built-in retrieval is apart.
- parity: served scores against the training form's forward pass on the same inputs.
- set-up: a fresh clone, `make demo` until it has printed its first recommendation (full runs only).
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from encoders.bundle import load_bundle, seeded_bundle
from encoders.fold import Behaviours, ItemFold, reference_scores
from tests.bench.report import Report
from tests.bench.stack import Arena, BenchStack, wait
from tests.bench.world import World, as_of, ms
from tests.conftest import ROOT, free_ports

RATE = 1_000  # updates per second
STAGES = ("user", "retrieval", "gather", "score", "top_k", "total")


def run(seed: int, quick: bool) -> None:
    report = Report("main_path", seed, quick)
    world = World(items=20_000 if quick else 60_000, seed=seed)
    with BenchStack() as stack:
        bundles = {precision: stack.folder / precision for precision in ("fp16", "fp32")}
        for precision, folder in bundles.items():
            seeded_bundle(folder, seed=seed, precision=precision)  # type: ignore[arg-type]
        users = 8 if quick else 32
        print(f"publishing {world.items} items and {users} users with 1,000 behaviours", flush=True)
        stack.publisher.items(world.event(number, 1) for number in range(world.items))
        stack.publisher.users({"user_id": f"u{user}", "features": world.profile(user)} for user in range(users))
        stack.publisher.behaviours(row for user in range(users) for row in world.history(user, 1_000))
        arena = stack.serve_generation("fp16", bundles["fp16"])
        with stack.api("tests.bench.stand_in", "retrieval", str(world.items), str(seed)) as client:
            wait("the histories are complete", lambda: _seen(client, users - 1) == 1_000, 120, every_s=0.2)
            _recommend(report, client, users, 100 if quick else 500)
        with stack.api() as client:
            _built_in(report, client, users, 50 if quick else 200)
            report.figure("parity_max_abs_error_fp16", _parity(client, world, bundles["fp32"]), "logit")
        latencies = _freshness(report, stack, arena, world, 15 if quick else 60)
        _pipeline(report, stack, arena, world, [10_000] * 2 if quick else [20_000] * 3)
        stack.serve_generation("fp32", bundles["fp32"])
        with stack.api() as client:
            fresh = World(world.items, seed)
            report.figure("parity_max_abs_error_fp32", _parity(client, fresh, bundles["fp32"]), "logit")
    if not quick:
        report.figure("set_up_s", _set_up(), "s")
    report.finish(lambda canvas: _draw(canvas, latencies, report.tables["recommend_stages"]))


# ---- freshness and throughput


def _freshness(report: Report, stack: BenchStack, arena: Arena, world: World, seconds: int) -> np.ndarray:
    """Due to visible of every update, ms."""
    count = min(RATE * seconds, world.items)
    numbers = np.random.default_rng(2).permutation(world.items)[:count]
    rows = [world.event(int(number), 2) for number in numbers]
    watch = _Watch(arena, numbers)
    print(f"freshness: {count} updates at {RATE}/s", flush=True)
    with watch:
        stack.publisher.items(watch.paced(rows))
        wait("all updates are visible", lambda: arena.all_at(numbers, 2), 60)
        wait("the observer has seen its samples", lambda: not watch.waiting, 60)
    cold = arena.cold(numbers)
    latencies = cold["visible_time"] - watch.due_ms
    windows = np.array_split(latencies, max(2, seconds // 10))  # in the order of sending
    for percentile in (50, 99):
        ranges = [float(np.percentile(window, percentile)) for window in windows]
        report.figure(f"freshness_p{percentile}_ms", ranges, "ms", float(np.percentile(latencies, percentile)))
        seen = float(np.percentile(watch.observed, percentile))
        report.figure(f"freshness_observed_p{percentile}_ms", seen, "ms")
    report.figure("freshness_rate_per_s", watch.rate, "1/s")
    hops = {
        "due to publish": cold["publish_time"] - watch.due_ms,
        "publish to encode": cold["encode_time"] - cold["publish_time"],
        "encode to visible": cold["visible_time"] - cold["encode_time"],
    }
    report.table(
        "freshness_hops",
        [
            {"hop": hop, "p50_ms": float(np.percentile(spent, 50)), "p99_ms": float(np.percentile(spent, 99))}
            for hop, spent in hops.items()
        ],
    )
    return latencies


class _Watch:
    """Paces updates, and sees every hundredth become visible as a reader does. Use in `with`."""

    def __init__(self, arena: Arena, numbers: np.ndarray) -> None:
        self._arena, self._numbers = arena, numbers
        self.due_ms = np.zeros(len(numbers))
        self.waiting: dict[int, float] = {}  # item -> when it was due, seconds since the epoch
        self.observed: list[float] = []
        self.rate = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._observe)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def paced(self, rows: list[bytes]) -> Iterator[bytes]:
        began = time.time()
        self.due_ms[:] = (began + np.arange(len(rows)) / RATE) * 1e3
        for place, row in enumerate(rows):
            due = began + place / RATE
            while (early := due - time.time()) > 0:
                time.sleep(early)
            if place % 100 == 50:
                self.waiting[int(self._numbers[place])] = due
            yield row
        self.rate = len(rows) / (time.time() - began)

    def _observe(self) -> None:
        while not self._stop.wait(0.002):
            waiting = list(self.waiting)
            if not waiting:
                continue
            versions = self._arena.cold(waiting)["version"]
            now = time.time()
            for number in np.array(waiting)[versions >= 2].tolist():
                self.observed.append((now - self.waiting.pop(number)) * 1e3)


def _pipeline(report: Report, stack: BenchStack, arena: Arena, world: World, sizes: list[int]) -> None:
    rates = [_backlog(stack, arena, world, size, version) for version, size in enumerate(sizes, 3)]
    report.figure("pipeline_items_per_s", rates, "items/s")


def _backlog(stack: BenchStack, arena: Arena, world: World, size: int, version: int) -> float:
    """Rows per second out of a backlog of `size` updates."""
    rows = [world.event(number, version) for number in range(size)]
    before = arena.covered()
    ingest = stack.job("ingest")
    os.kill(ingest.pid, signal.SIGSTOP)
    try:
        stack.publisher.items(rows)
    finally:
        os.kill(ingest.pid, signal.SIGCONT)
    wait("the backlog begins to arrive", lambda: arena.covered() > before, 60, every_s=0.005)
    began, first = time.perf_counter(), arena.covered()
    wait("the backlog has arrived", lambda: arena.covered() >= before + size, 120, every_s=0.01)
    rate = (before + size - first) / (time.perf_counter() - began)
    assert arena.all_at(range(size), version)
    return rate


# ---- requests


def _recommend(report: Report, client: httpx.Client, users: int, requests: int) -> None:
    trips, spent = _ask(client, users, requests)
    for percentile in (50, 99):
        windows = [float(np.percentile(window, percentile)) for window in np.array_split(trips, 5)]
        report.figure(f"recommend_p{percentile}_ms", windows, "ms", float(np.percentile(trips, percentile)))
    serial = sum(spent[stage] for stage in STAGES if stage != "total")
    report.figure("parallel_gain", (serial / spent["total"]).tolist(), "x")
    report.table("recommend_stages", _stage_table(spent, trips))


def _built_in(report: Report, client: httpx.Client, users: int, requests: int) -> None:
    wait(
        "the retrieval index is there",
        lambda: client.post("/v1/recommend", json={"user_id": "u0", "as_of": as_of(), "k": 1}).is_success,
        120,
        every_s=0.2,
    )
    trips, spent = _ask(client, users, requests)
    report.figure("recommend_built_in_p50_ms", float(np.percentile(trips, 50)), "ms")
    report.figure("recommend_built_in_p99_ms", float(np.percentile(trips, 99)), "ms")
    report.table("recommend_built_in_stages", _stage_table(spent, trips))


def _ask(client: httpx.Client, users: int, requests: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Round trips in ms over one kept connection, and the stages of each; the first twenty do not count."""
    url = client.base_url
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=30)
    trips, stages = [], []
    for place in range(requests + 20):
        body = json.dumps({"user_id": f"u{place % users}", "as_of": as_of(), "k": 100})
        began = time.perf_counter()
        connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        raw = response.read()
        trips.append((time.perf_counter() - began) * 1e3)
        answer = json.loads(raw)
        if response.status != 200:
            raise RuntimeError(f"recommend answered {response.status}: {answer}")
        stages.append(answer["stages_ms"])
    connection.close()
    return np.array(trips[20:]), {stage: np.array([each[stage] for each in stages[20:]]) for stage in STAGES}


def _stage_table(spent: dict[str, np.ndarray], trips: np.ndarray) -> list[dict[str, object]]:
    return [
        {"stage": stage, "p50_ms": float(np.percentile(values, 50)), "p99_ms": float(np.percentile(values, 99))}
        for stage, values in [*spent.items(), ("round trip", trips)]
    ]


def _seen(client: httpx.Client, user: int) -> int:
    body = {"user_id": f"u{user}", "as_of": as_of(), "candidates": ["1"]}
    answer = client.post("/v1/score", json=body).json()["user"]
    return int(answer["behaviours_used"] + answer["behaviours_without_row"])


def _parity(client: httpx.Client, world: World, bundle_folder: Path) -> list[float]:
    """Largest absolute difference per user between served scores and the training form (fp32 weights and inputs)."""
    bundle = load_bundle(bundle_folder)
    fold = ItemFold(bundle)
    out = []
    for user, length in enumerate((0, 1, 30, 500, 1_000, 3_000)):
        history = world.history(1_000 + user, length)
        numbers = list(range(user, world.items, world.items // 400))
        seen = sorted({*numbers, *(int(behaviour["item_id"]) for behaviour in history)})
        version = _versions(client, seen)
        inputs = {number: world.inputs(number, version[number]) for number in seen}
        rows = fold.encode([inputs[int(behaviour["item_id"])] for behaviour in history])
        codes = {name: code for code, name in enumerate(bundle.manifest.features.actions, 1)}
        behaviours = Behaviours(
            rows.vector,
            rows.signature,
            rows.crosses,
            np.array([codes[behaviour["action"]] for behaviour in history], np.uint8),
            np.array([ms(behaviour["event_time"]) for behaviour in history], np.int64),
        )
        profile = world.profile(user) if user % 2 else None
        body = {
            "user": {
                "features": profile or {},
                "behaviours": [
                    {name: behaviour[name] for name in ("item_id", "action", "event_time")} for behaviour in history
                ],
            },
            "as_of": as_of(),
            "candidates": numbers,
        }
        answer = client.post("/v1/score", json=body).json()
        assert answer["ids"] == numbers
        wanted = reference_scores(bundle, profile, behaviours, [inputs[number] for number in numbers], as_of())
        out.append(float(np.abs(np.array(answer["scores"]) - wanted).max()))
    return out


def _versions(client: httpx.Client, numbers: list[int]) -> dict[int, int]:
    """The row versions that are served now."""
    found: dict[int, int] = {}
    for start in range(0, len(numbers), 5_000):
        chunk = numbers[start : start + 5_000]
        body = {"user": {"behaviours": []}, "as_of": as_of(), "candidates": chunk, "include": ["trace"]}
        answer = client.post("/v1/score", json=body).json()
        found |= dict(zip(answer["ids"], answer["trace"]["versions"], strict=True))
    return found


# ---- set-up


def _set_up() -> float:
    """Seconds from a fresh clone to the demo's first recommendation."""
    print("set-up: make demo in a fresh clone", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="forerank-clone-", dir=ROOT.parent))
    kafka, controller, api = free_ports(3)
    environ = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "KAFKA_BOOTSTRAP")}
    environ |= {
        "FORERANK_KAFKA_PORT": str(kafka),
        "FORERANK_KAFKA_CONTROLLER_PORT": str(controller),
        "API_PORT": str(api),
    }
    began = time.perf_counter()
    try:
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "forerank")], check=True)
        with subprocess.Popen(
            ["make", "demo"], cwd=folder / "forerank", env=environ, stdout=subprocess.PIPE, text=True
        ) as demo:
            took = 0.0
            for line in demo.stdout or ():
                print("    " + line, end="", flush=True)
                if not took and line.startswith("Best of"):
                    took = time.perf_counter() - began
        if demo.returncode or not took:
            raise RuntimeError(f"make demo ended with status {demo.returncode}")
        return took
    finally:
        subprocess.run(["make", "down"], cwd=folder / "forerank", env=environ, check=False)
        shutil.rmtree(folder)


def _draw(canvas: Any, latencies: np.ndarray, stages: list[dict[str, object]]) -> None:
    left, right = canvas.subplots(1, 2)
    ordered = np.sort(latencies)
    left.plot(ordered, np.linspace(0, 100, len(ordered)), color="#2f6db3")
    for limit, percentile in ((50, 50), (250, 99)):
        left.plot([limit], [percentile], marker="x", color="#b33a2f")
        left.annotate(
            f"goal p{percentile} {limit} ms ",
            (limit, percentile),
            textcoords="offset points",
            xytext=(6 if percentile == 50 else 0, -12),
            ha="left" if percentile == 50 else "right",
        )
    left.set(xlabel="due to visible, ms", ylabel="% of updates", title=f"Freshness at {RATE} updates/s", xlim=(0, 300))
    names = [str(row["stage"]) for row in stages][::-1]
    for key, shade in (("p99_ms", "#bcd2ea"), ("p50_ms", "#2f6db3")):
        right.barh(names, [float(str(row[key])) for row in stages][::-1], color=shade, label=key.removesuffix("_ms"))
    right.set(xlabel="ms", title="Recommend, 10,000 candidates, 10 ms retrieval")
    right.legend()
