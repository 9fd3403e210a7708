"""Benchmark `rtp`: a request of 10,000 candidates, from their ids to the best 100, against what the machine can do.

An index of 1M rows (d = h = 64, n = 16, b = 128, fp16; tests/bench/peers/data.py), users with 1,000 behaviours, all
timings interleaved in one run. In process, one thread: `score` is id table, gather, scores and the best 100 with a
ready user block; `user` is history, rows and fold. Its limit is the sum of three lower bounds (tests/bench/limits.py),
as if nothing overlapped; its kernels are timed bare. In a round each of them has other candidates.
Through HTTP: another process asks over one kept connection; `overhead` is the round trip where every answer is ready.
Peers (full runs; tests/bench/peers) answer the same requests on the same data, each in a process of its own, in turns
with Forerank in process: user inference, rows, scores, the best 100. A peer is one thread, Forerank's user inference
runs in a second one; so a peer's figure is the ratio of CPU times, servers' included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from rocksdict import AccessType, Options, Rdict

from api import rtp
from api.prerank import Candidates
from api.schemas import ScoreOptions
from api.service import Service
from api.users import infer
from encoders import lsh
from encoders.bundle import load_bundle
from encoders.config import ModelConfig
from encoders.data.synthetic import LARGE, generate
from encoders.fold import ItemFold
from index import kernels, popcount_ir
from index.arena import ArenaReader, ArenaWriter, Progress
from index.keys import keys_of_ints
from index.layout import RowLayout, aligned_empty
from index.n2o import ROW, N2OWriter
from infra.settings import Settings, environment
from tests.bench import http_load, limits
from tests.bench.lsh_bits import Case, arrays_of
from tests.bench.peers.data import Data, write_world
from tests.bench.peers.environment import PeersError
from tests.bench.peers.environment import environment as environment_of_peers
from tests.bench.report import Report
from tests.bench.serving_forms import Rows
from tests.bench.world import World
from tests.conftest import free_ports
from tests.host import Host, Seen
from tests.rows import batch_of

CANDIDATES, LENGTH, K = 10_000, 1_000, 100
USERS, REQUESTS = 8, 16
GENERATION = "g1"
_PART = 50_000  # rows written together

Series = dict[str, list[float]]


def run(seed: int, quick: bool) -> None:
    report = Report("rtp", seed, quick)
    items, rounds = (50_000, 60) if quick else (1_000_000, 400)
    folder = Path(tempfile.mkdtemp(prefix="forerank-rtp-"))
    torch.set_num_threads(1)
    try:
        write_world(folder / "world", items, USERS, LENGTH, seed, CANDIDATES, REQUESTS)
        data = Data(folder / "world")
        host = _host(folder / "state", data)
        print(f"{items:,} rows, {USERS} users with {LENGTH:,} behaviours", flush=True)
        service = Service(host.settings)
        service.start()
        try:
            _in_process(report, host, service, data, rounds)
            if not quick:
                _peers(report, service, data)
        finally:
            service.stop()
        _http(report, host, data, rounds, quick)
        _store(report, host, items)
        _growth(report, folder, seed, quick)
    finally:
        shutil.rmtree(folder)
    report.finish(lambda canvas: _draw(canvas, report.tables))


# ---- the world


def _host(state: Path, data: Data) -> Host:
    """The data's rows in RocksDB and arena, histories, one generation that is active. Its writers are closed."""
    state.mkdir()
    settings = Settings(
        kafka_bootstrap=f"127.0.0.1:{free_ports(1)[0]}",
        state=state,
        api_port=free_ports(1)[0],
        candidates_max=2 * CANDIDATES,
        prefetch_bytes=0,  # every request infers its user
    )
    host, layout = Host(settings), data.layout
    assert host.bundle(GENERATION, seed=data.seed, precision="fp16").sha256 == data.bundle.sha256
    for at in range(0, len(data.hot), _PART):
        part = slice(at, at + _PART)
        count = len(data.hot[part])
        hot, cold = aligned_empty(count, layout.hot), aligned_empty(count, layout.cold)
        hot[:], cold.view(np.uint8)[:] = data.hot[part], 0
        cold["vector"] = data.vector[part]
        host.put(GENERATION, [str(number) for number in range(at, at + count)], hot, cold)
    for user, profile in enumerate(data.profiles):
        history = data.world.history(user, LENGTH)
        behaviours = [
            Seen(f"u{user}", one["item_id"], at, one["action"])
            for one, at in zip(history, data.users[user].times.tolist(), strict=True)
        ]
        host.behave(behaviours, {f"u{user}": profile})
    host.activate(GENERATION)
    host.close()
    return host


def _rows(layout: RowLayout, count: int, random: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random hot and cold records; an item has four crosses of 400 on average."""
    hot, cold = aligned_empty(count, layout.hot), aligned_empty(count, layout.cold)
    hot.view(np.uint8)[:], cold.view(np.uint8)[:] = 0, 0
    hot["joint"] = 0.3 * random.standard_normal((count, layout.width), dtype=np.float32)
    weights = random.random((count, layout.bridges), dtype=np.float32)
    hot["bridge"] = weights / weights.sum(axis=1, keepdims=True)
    hot["signature"] = random.integers(0, 256, (count, layout.bits // 8), dtype=np.uint8)
    used = random.random((count, layout.crosses)) < 0.7
    hot["crosses"] = random.integers(1, 401, (count, layout.crosses)) * used
    cold["vector"] = random.standard_normal((count, layout.dim), dtype=np.float32)
    cold["attributes"] = 1
    return hot, cold


def _interleaved(rounds: int, work: dict[str, Callable[[int], object]]) -> Series:
    """Milliseconds of each, one after the other in every round, each at a place of its own, so that none finds in the
    cache what the one before has read; the first tenth does not count."""
    spent: Series = {name: [] for name in work}
    first = max(2, rounds // 10)
    for place in range(rounds + first):
        for turn, (name, do) in enumerate(work.items()):
            began = time.perf_counter()
            do(place + 3 * turn)
            if place >= first:
                spent[name].append((time.perf_counter() - began) * 1e3)
    return spent


def _percentiles(report: Report, name: str, values: list[float], which: tuple[int, ...] = (50, 99)) -> None:
    for percentile in which:
        windows = [float(np.percentile(window, percentile)) for window in np.array_split(values, 5)]
        report.figure(f"{name}_p{percentile}_ms", windows, "ms", float(np.percentile(values, percentile)))


# ---- in process


def _in_process(report: Report, host: Host, service: Service, data: Data, rounds: int) -> None:
    generation = service.generations.pin()
    asked, as_of = list(data.requests), data.as_of
    sources = [service.users.stored(f"u{user}", as_of) for user in range(USERS)]
    sides = [infer(generation, source) for source in sources]
    bare = _Bare(generation.arena, sides[0].tables, generation.head_tables, asked)
    rocks = _Rocks(host, asked)

    def score(place: int) -> None:
        ids = asked[place % REQUESTS]
        keys = Candidates.of_integers(ids).keys
        rows = generation.arena.gather(keys)
        scores = rtp.score(generation, sides[place % USERS], rows.hot)
        rtp.ranked(scores, K, keys, lambda places: ids[places])

    def prerank(place: int) -> None:
        options = ScoreOptions(user_id=f"u{place % USERS}", as_of=as_of, k=K)
        service.merger.score(asked[place % REQUESTS], options)

    spent = _interleaved(
        rounds,
        {
            "score": score,
            "user": lambda place: infer(generation, sources[place % USERS]),
            "request": prerank,
            "gather": bare.gather,
            "counts": bare.counts,
            "join": bare.join,
            "best": bare.best,
        },
    )
    stores = _interleaved(max(5, rounds // 20), {"arena": bare.gather_both, "rocksdb": rocks.get})
    rocks.close()
    for name in ("score", "user", "request"):
        _percentiles(report, name, spent[name])
    medians = {name: float(np.median(values)) for name, values in spent.items()}
    for name in ("gather", "counts", "join", "best"):
        _percentiles(report, f"kernel_{name}", spent[name], (50,))
    report.figure(
        "over_kernels_ratio",
        medians["score"] / sum(medians[name] for name in ("gather", "counts", "join", "best")),
        "x",
    )
    _limits(report, generation.layout, generation.head_tables, medians)
    whole = np.array(stores["rocksdb"]) / stores["arena"]
    report.figure("gather_over_rocksdb", whole.tolist(), "x")


def _limits(report: Report, layout: RowLayout, head: kernels.HeadTables, medians: dict[str, float]) -> None:
    machine = limits.measure()
    report.figure("stream_gb_per_s", machine.stream_gb_per_s, "GB/s")
    report.figure("clock_ghz", machine.clock_ghz, "GHz")
    report.figure("fma_g_per_s", machine.fma_g_per_s, "G/s")
    products = layout.width * (layout.bridges + len(head.T)) + sum(
        before * after for before, after in zip(head.sizes[:-1], head.sizes[1:], strict=True)
    )
    parts = machine.score_ms(CANDIDATES, layout.hot.itemsize, LENGTH, layout.bits, products)
    for name, value in parts.items():
        report.figure(f"limit_{name.replace('-', '_')}_ms", value, "ms")
    report.figure("limit_ms", sum(parts.values()), "ms")
    report.figure("over_limit_ratio", medians["score"] / sum(parts.values()), "x")
    report.figure("simtier_roof_share", parts["popcounts"] / medians["counts"], "")


class _Bare:
    """The project's kernels as machine code alone, on memory that is there."""

    def __init__(
        self, arena: ArenaReader, user: kernels.UserTables, head: kernels.HeadTables, asked: list[NDArray[np.uint64]]
    ) -> None:
        self._arena, self._user, self._head = arena, user, head
        self._keys = [keys_of_ints(ids) for ids in asked]
        self._hot = [arena.gather(keys).hot for keys in self._keys]
        hot = self._hot[0]
        assert hot.dtype.fields is not None
        self._signature = hot.dtype.fields["signature"][1]
        self._counts = np.empty((CANDIDATES, len(head.T)), np.int32)
        self._joins = [_joining((rows, user, head), self._counts) for rows in self._hot]
        self._scores = [kernels.score(rows, user, head) for rows in self._hot]

    def gather(self, place: int) -> None:
        self._arena.gather(self._keys[place % REQUESTS])

    def gather_both(self, place: int) -> None:
        """Whole rows, as RocksDB gives them."""
        self._arena.gather_both(self._keys[place % REQUESTS])

    def counts(self, place: int) -> None:
        hot, size = self._hot[place % REQUESTS], self._hot[0]["signature"].shape[1]
        first = hot.ctypes.data + self._signature
        popcount_ir.counts(first, hot.itemsize, len(hot), size, self._user.window, self._head.edges, self._counts)

    def join(self, place: int) -> None:
        self._joins[place % REQUESTS](place)

    def best(self, place: int) -> None:
        kernels.best(self._scores[place % REQUESTS], K)


class _Rocks:
    """The same rows out of RocksDB, by its call for many keys; all of it is in memory and was read before."""

    def __init__(self, host: Host, asked: list[NDArray[np.uint64]]) -> None:
        path = host.settings.generation_dir(GENERATION) / "n2o" / "rocks"
        self._own = tempfile.mkdtemp(prefix="forerank-rtp-rocks-")
        options = Options(raw_mode=True)
        options.set_max_open_files(-1)
        self._rocks = Rdict(str(path), options, access_type=AccessType.secondary(self._own))
        self._names: list[list[str | int | float | bytes | bool]] = [
            [ROW + str(number).encode() for number in ids.tolist()] for ids in asked
        ]
        for names in self._names:
            found = self._rocks.get(names)
            assert isinstance(found, list)
            assert None not in found, "RocksDB holds other keys"

    def get(self, place: int) -> None:
        self._rocks.get(self._names[place % REQUESTS])

    def close(self) -> None:
        self._rocks.close()
        shutil.rmtree(self._own)


# ---- through HTTP


def _http(report: Report, host: Host, data: Data, rounds: int, quick: bool) -> None:
    asked, as_of = list(data.requests), data.as_of
    binary = [
        http_load.request(
            f"/v1/score?user_id=u{at % USERS}&as_of={as_of}&k={K}",
            ids.astype("<u8").tobytes(),
            "application/octet-stream",
        )
        for at, ids in enumerate(asked)
    ]
    texts = [
        http_load.request("/v1/score", _body(f"u{at % USERS}", as_of, ids.tolist()), "application/json")
        for at, ids in enumerate(asked)
    ]
    names = [
        http_load.request(
            "/v1/score", _body(f"u{at % USERS}", as_of, [str(number) for number in ids.tolist()]), "application/json"
        )
        for at, ids in enumerate(asked)
    ]
    with _server(host, "api", "serve") as (port, pid), _server(host, "tests.bench.stand_in", "ready") as (ready, _):
        served, there = http_load.Connection(port), http_load.Connection(ready)
        for connection in (served, there):  # with it the collections of the start are counted
            connection.ask(binary[0])
        before = _collections(port)
        spent = _interleaved(
            rounds,
            {
                "http": lambda at: served.ask(binary[at % REQUESTS]),
                "http_json": lambda at: served.ask(texts[at % REQUESTS]),
                "http_json_strings": lambda at: served.ask(names[at % REQUESTS]),
                "http_overhead": lambda at: there.ask(binary[at % REQUESTS]),
                "http_json_overhead": lambda at: there.ask(texts[at % REQUESTS]),
            },
        )
        for name in ("http", "http_json", "http_json_strings"):
            _percentiles(report, name, spent[name])
        for name in ("http_overhead", "http_json_overhead"):
            windows = [float(np.median(part)) for part in np.array_split(spent[name], 5)]
            report.figure(f"{name}_ms", windows, "ms", float(np.median(spent[name])))
        folder = host.settings.state / "requests"
        folder.mkdir()
        for at, one in enumerate(binary):
            (folder / f"{at:03}").write_bytes(one)
        _under_nearline(report, host, served, binary, rounds)
        rows = [
            _clients(port, pid, count, folder, 3 if quick else 8)
            for count in ((1, 8) if quick else (1, 2, 4, 8, 16, 32))
        ]
        report.table("clients", rows)
        _pauses(report, _collections(port) - before)
        report.figure("requests_per_s_per_core", [float(row["per_core"]) for row in rows], "1/s")
    processes = []
    for count in (1, 2) if quick else (1, 2, 3, 4):
        with _server(host, "api", "serve", processes=count) as (port, pid):
            row = _clients(port, pid, 8, folder, 3 if quick else 8)
            own = http_load.private_mib(pid)
            processes.append(row | {"processes": count, "private_mib_each": max(own)})
    report.table("processes", processes)


def _pauses(report: Report, found: NDArray[np.float64]) -> None:
    """Of the garbage collector in both processes, while they answered all requests until now."""
    count, short, seconds = found.tolist()
    report.figure("gc_pauses", count, "")
    report.figure("gc_pauses_over_3ms", count - short, "")
    report.figure("gc_pause_mean_ms", seconds / max(1, count) * 1e3, "ms")


def _collections(port: int) -> NDArray[np.float64]:
    """[3]: all until now, those of 3 ms at most, and their seconds."""
    found = dict.fromkeys(("count", 'bucket{le="0.003"}', "sum"), 0.0)
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
        name, _, value = line.partition(" ")
        if (what := name.removeprefix("forerank_gc_pause_seconds_")) in found:
            found[what] = float(value)
    return np.array(list(found.values()))


def _body(user: str, as_of: int, ids: list[Any]) -> bytes:
    return json.dumps({"user_id": user, "as_of": as_of, "k": K, "candidates": ids}).encode()


@contextlib.contextmanager
def _server(host: Host, *command: str, processes: int = 1) -> Iterator[tuple[int, int]]:
    """(port, process id) of an API over the host's state."""
    port = free_ports(1)[0]
    environ = {**os.environ, **environment(host.settings), "API_PORT": str(port), "API_PROCESSES": str(processes)}
    log = (host.settings.state / f"{command[-1]}.log").open("ab")
    process = subprocess.Popen([sys.executable, "-m", *command], env=environ, stdout=log, stderr=log)
    log.close()
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").is_success:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not serve; its log is in {host.settings.state}")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


def _clients(port: int, pid: int, clients: int, folder: Path, seconds: int) -> dict[str, Any]:
    """Closed-loop clients in a process of their own, for so long."""
    command = [sys.executable, "-m", "tests.bench.http_load", str(port), str(clients), str(seconds), str(folder)]
    subprocess.run([*command[:-2], "1", str(folder)], check=True, capture_output=True)  # warms every thread up
    before = http_load.cpu_seconds(pid)
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    used = http_load.cpu_seconds(pid) - before
    return {
        "clients": clients,
        "requests_per_s": found["count"] / found["seconds"],
        "per_core": found["count"] / used,
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
    }


def _under_nearline(report: Report, host: Host, served: http_load.Connection, asked: list[bytes], rounds: int) -> None:
    """p99 of round trips while another process encodes and writes rows as fast as it can, against without it; in
    turns."""
    context = multiprocessing.get_context("spawn")
    go, stop, written = context.Event(), context.Event(), context.Value("q", -1)
    path = host.settings.generation_dir(GENERATION)
    worker = context.Process(target=_encode_and_write, args=(path, host.settings.hash_key, go, stop, written))
    worker.start()
    deadline = time.monotonic() + 120
    while written.value < 0:  # until the store is open
        assert worker.is_alive(), "the writer has ended"
        assert time.monotonic() < deadline, "the writer does not start"
        time.sleep(0.05)
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    try:
        for turn in range(6):
            (go.set if turn % 2 else go.clear)()
            time.sleep(0.5)
            before = written.value
            trips = [served.timed(asked[at % REQUESTS]) for at in range(max(30, rounds // 2))]
            (beside if turn % 2 else alone).append(trips)
            assert (written.value > before) == bool(turn % 2), "rows were written in the wrong turn"
    finally:
        stop.set()
        go.set()
        worker.join(30)
    assert worker.exitcode == 0, "the writer has failed"
    p99 = [float(np.percentile(np.concatenate(part), 99)) for part in (alone, beside)]
    report.figure("http_alone_p99_ms", [float(np.percentile(part, 99)) for part in alone], "ms", p99[0])
    report.figure("http_under_nearline_p99_ms", [float(np.percentile(part, 99)) for part in beside], "ms", p99[1])
    report.figure("p99_under_nearline_ratio", p99[1] / p99[0], "x")


def _encode_and_write(path: Path, hash_key: str, go: Any, stop: Any, written: Any) -> None:
    """Process: what encode and replicate do, without Kafka, on the same rows again and again; `written` counts them
    from 0 on, when the store is open."""
    bundle = load_bundle(path / "bundle")
    layout, fold, world = RowLayout.from_json(bundle.manifest.row), ItemFold(bundle), World(2_000, 1)
    torch.set_num_threads(1)
    inputs, ids = [world.inputs(number, 1) for number in range(500)], [str(number) for number in range(500)]
    writer = N2OWriter(path / "n2o", layout, 2, hash_key.encode())
    offset, version = int(writer.rows_offsets()[0]), 2
    written.value = 0
    while not stop.is_set():
        if not go.wait(0.1):
            continue
        encoded = fold.encode(inputs)
        rows = Rows(encoded.joint, encoded.bridge, encoded.signature, encoded.crosses, encoded.vector)
        batch = batch_of(ids, offset, rows.hot(layout), rows.cold(layout), [version] * len(ids))
        writer.apply([(batch, offset)])
        offset, version = offset + 500, version + 1
        written.value += 500
    writer.close()


# ---- peers


_ROUNDS = 30  # of all peers and Forerank
_FIGURES = {  # what is the figure of which peer
    "sequential-onnx": "sequential_over_forerank",
    "sequential-torch": "sequential_torch_over_forerank",
    "redis-onnx": "stack_over_forerank",
    "rocksdb-onnx": "rocksdb_over_forerank",
    "feast-onnx": "feast_over_forerank",
    "attention-onnx": "attention_over_forerank",
}


def _peers(report: Report, service: Service, data: Data) -> None:
    """Times as much CPU as Forerank each peer takes for the same requests; ranges are over rounds. First every peer's
    scores are held against the training form's, in a small world."""
    try:
        python = environment_of_peers()
    except PeersError as error:
        print(f"peers are left out: {error}", flush=True)
        return
    small = data.folder.with_name("small-world")
    write_world(small, items=500, users=3, length=40, seed=data.seed, candidates=200, requests=3)
    subprocess.run([str(python), "-m", "tests.bench.peers", "check", str(small)], check=True, stderr=subprocess.DEVNULL)
    with contextlib.ExitStack() as held:
        peers = {name: held.enter_context(_peer(python, name, data.folder)) for name in _FIGURES}
        spent: Series = {name: [] for name in ("forerank", *peers)}
        cpu: Series = {name: [] for name in spent}
        for place in range(_ROUNDS + 3):
            options = ScoreOptions(user_id=f"u{place % USERS}", as_of=data.as_of, k=K)
            ids = data.requests[place % REQUESTS]
            used, began = time.process_time(), time.perf_counter()
            answer = service.merger.score(ids, options)
            ms, cpu_ms = (time.perf_counter() - began) * 1e3, (time.process_time() - used) * 1e3
            best = set(ids[answer.places].tolist())
            found = {"forerank": (ms, cpu_ms)}
            for name, peer in peers.items():
                own = peer(place % REQUESTS)
                found[name] = own["ms"], own["cpu_ms"]
                if not name.startswith("attention") and len(best & set(own["top"])) < K - 1:
                    raise RuntimeError(
                        f"{name} ranks otherwise: {len(best & set(own['top']))} of the best {K} are the same"
                    )
            for name, (own_ms, own_cpu) in found.items() if place >= 3 else ():
                spent[name].append(own_ms)
                cpu[name].append(own_cpu)
    medians = {name: float(np.median(values)) for name, values in spent.items()}
    report.table(
        "peers",
        [
            {
                "peer": name,
                "p50_ms": medians[name],
                "low_ms": min(spent[name]),
                "high_ms": max(spent[name]),
                "cpu_ms": float(np.median(cpu[name])),
            }
            for name in spent
        ],
    )
    for name, figure in _FIGURES.items():
        ratios = np.array(cpu[name]) / np.array(cpu["forerank"])
        report.figure(figure, ratios.tolist(), "x", float(np.median(cpu[name]) / np.median(cpu["forerank"])))


@contextlib.contextmanager
def _peer(python: Path, name: str, folder: Path) -> Iterator[Callable[[int], dict[str, Any]]]:
    """A function that has the peer answer a request."""
    command = [str(python), "-m", "tests.bench.peers", name, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first.startswith("ready"):
            raise RuntimeError(f"the peer {name} does not start: `{' '.join(command)}` says why")
        print(f"  {name}: {first.removeprefix('ready ').strip()}", flush=True)
        send, receive = process.stdin, process.stdout

        def ask(place: int) -> dict[str, Any]:
            print(place, file=send, flush=True)
            answer: dict[str, Any] = json.loads(receive.readline())
            return answer

        yield ask
        send.close()
        process.wait(60)


# ---- memory and opening


def _store(report: Report, host: Host, items: int) -> None:
    path = host.settings.generation_dir(GENERATION) / "n2o"
    layout = RowLayout.of_manifest(path.parent / "bundle" / "manifest.json")
    opened = []
    for _ in range(5):
        began = time.perf_counter()
        reader = ArenaReader.open(path, layout)
        opened.append(time.perf_counter() - began)
    size = reader.size()
    record = layout.hot.itemsize + layout.cold.itemsize
    report.figure("memory_over_record", (size.hot_bytes + size.cold_bytes) / items / record, "x")
    report.figure("id_table_bytes_per_item", size.table_bytes / items, "B")
    report.figure("open_warm_arena_s", opened, "s")
    arena = path / "arena"
    shutil.rmtree(arena)
    began = time.perf_counter()
    N2OWriter(path, layout, 2, host.settings.hash_key.encode()).close()
    report.figure("rebuild_arena_s", time.perf_counter() - began, "s")


# ---- growth


def _growth(report: Report, folder: Path, seed: int, quick: bool) -> None:
    random, rounds = np.random.default_rng(seed), 5 if quick else 30
    counts = (1_000, 2_000, 5_000, 10_000, 20_000)
    rows = [_scored(count, Case(), random, rounds) | {"candidates": count} for count in counts]
    report.table("candidates", rows)
    lengths = (100, 300, 1_000, 3_000, 10_000)
    cases = {length: arrays_of(Case(window=length), CANDIDATES, random) for length in lengths}
    whole = {length: arrays_of(Case(window=length, counted=length), CANDIDATES, random) for length in lengths}
    spent = _interleaved(rounds, {str(length): _scoring(case) for length, case in cases.items()})
    counting = _interleaved(rounds, {str(length): _scoring(case) for length, case in whole.items()})
    joins = _interleaved(rounds, {str(length): _joining(case) for length, case in cases.items()})
    report.table(
        "length",
        [
            {
                "length": length,
                "score_ms": float(np.median(spent[str(length)])),
                "counting_all_ms": float(np.median(counting[str(length)])),
                "without_simtier_ms": float(np.median(joins[str(length)])),
            }
            for length in lengths
        ],
    )
    report.figure(
        "din_growth_ratio", (np.array(joins[str(lengths[-1])]) / np.median(joins[str(lengths[0])])).tolist(), "x"
    )
    report.figure("simtier_sample_rms", _sample_errors(seed, quick), "in log1p(count)")
    report.table("bits", [_scored(CANDIDATES, Case(bits=b), random, rounds) | {"bits": b} for b in (64, 128, 256, 512)])
    sizes = (10_000, 50_000) if quick else (10_000, 100_000, 1_000_000, 5_000_000)
    report.table("items", [_gathered(folder, size, seed, rounds) for size in sizes])


def _sample_errors(seed: int, quick: bool) -> list[float]:
    """Of users of the marketplace with up to 10,000 behaviours, the root mean square over items and tiers of what
    counting a sample changes in log1p(count)."""
    world = dataclasses.replace(LARGE, users=20, items=10_000, examples=2_000, past=4_000 if quick else 8_000)
    data, random = generate(world, seed), np.random.default_rng(seed)
    centre = data.items.embeddings.mean(axis=0)
    own = lsh.signatures(data.items.embeddings, centre, lsh.projection(data.items.embeddings.shape[1], 128, seed))
    pairs = random.integers(0, len(own), (2, 200, 1))
    edges = lsh.tier_edges(lsh.matches(own[pairs[0, :, 0]], own[pairs[1, :, 0]]), ModelConfig().tiers, 128)
    candidates, errors = own[random.integers(0, len(own), 500)], []
    for user in range(world.users):
        window = own[data.log.item[data.log.user == user]]
        if len(window) < world.past // 2:
            continue
        sample, weight = lsh.thinned(window, 0)
        every, some = (lsh.tier_counts(lsh.matches(candidates, one), edges) for one in (window, sample))
        change = np.log1p(lsh.weighted(some, weight)) - np.log1p(every)
        errors.append(float(np.sqrt((change**2).mean())))
    return errors


def _scoring(arrays: tuple[Any, Any, Any]) -> Callable[[int], object]:
    hot, user, head = arrays
    return lambda _: kernels.score(hot, user, head)


def _joining(arrays: tuple[Any, Any, Any], counts: NDArray[np.int32] | None = None) -> Callable[[int], object]:
    """All but SimTier's counts, which are given, or zero."""
    hot, user, head = arrays
    given = np.zeros((len(hot), len(head.T)), np.int32) if counts is None else counts
    slots, out = np.zeros(kernels.CROSS_SLOTS, np.uint16), np.empty(len(hot), np.float32)
    kernels.place_crosses(slots, user)
    return lambda _: kernels.join(hot, given, user, head, slots, out)


def _scored(candidates: int, case: Case, random: np.random.Generator, rounds: int) -> dict[str, Any]:
    spent = _interleaved(rounds, {"score": _scoring(arrays_of(case, candidates, random))})["score"]
    return {"score_ms": float(np.median(spent)), "low_ms": min(spent), "high_ms": max(spent)}


def _gathered(folder: Path, items: int, seed: int, rounds: int) -> dict[str, Any]:
    """Gathering from an arena of so many rows, whose ids are 0, 1, ..."""
    layout, path, random = RowLayout(), folder / f"items-{items}", np.random.default_rng(seed)
    writer = ArenaWriter.create(path, layout, 1, items)
    for at in range(0, items, _PART):
        count = min(_PART, items - at)
        hot, cold = _rows(layout, count, random)
        writer.apply(keys_of_ints(np.arange(at, at + count, dtype=np.uint64)), np.ones(count, np.uint8), hot, cold)
    writer.publish(1, 1, Progress.empty(1))
    reader = ArenaReader.open(path, layout)
    keys = [
        keys_of_ints(random.choice(items, min(items, CANDIDATES), replace=False).astype(np.uint64)) for _ in range(8)
    ]
    spent = _interleaved(rounds, {"gather": lambda place: reader.gather(keys[place % 8])})["gather"]
    shutil.rmtree(path)
    return {"items": items, "gather_ms": float(np.median(spent)), "low_ms": min(spent), "high_ms": max(spent)}


def _draw(canvas: Any, tables: dict[str, list[dict[str, Any]]]) -> None:
    panels = canvas.subplots(2, 3).ravel()
    canvas.set_size_inches(13, 7)
    plots = [
        ("candidates", "candidates", {"score_ms": "score"}, "ms"),
        (
            "length",
            "length",
            {"counting_all_ms": "counting all", "score_ms": "score", "without_simtier_ms": "without SimTier"},
            "ms",
        ),
        ("bits", "bits", {"score_ms": "score"}, "ms"),
        ("items", "items", {"gather_ms": "id table and gather"}, "ms"),
        ("clients", "clients", {"p50_ms": "p50", "p99_ms": "p99"}, "ms"),
        ("processes", "processes", {"requests_per_s": "8 clients"}, "requests/s"),
    ]
    for panel, (table, x, lines, unit) in zip(panels, plots, strict=True):
        rows = tables[table]
        for key, label in lines.items():
            panel.plot([row[x] for row in rows], [row[key] for row in rows], marker="o", markersize=3, label=label)
        panel.set(xlabel=x, ylabel=unit, ylim=(0, None))
        if x in ("length", "items", "bits", "clients"):
            panel.set_xscale("log")
        panel.legend(fontsize=8)
