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
import functools
import io
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
import polars as pl
import torch
from numpy.typing import NDArray
from rocksdict import (
    BlockBasedOptions,
    CuckooTableOptions,
    DataBlockIndexType,
    DBCompressionType,
    Options,
    PlainTableFactoryOptions,
    Rdict,
    SliceTransform,
    WriteBatch,
)

from api import arrow, rtp
from api.prerank import Candidates
from api.schemas import ScoreOptions
from api.service import Service
from api.users import infer
from encoders import lsh
from encoders.bundle import load_bundle
from encoders.config import ModelConfig
from encoders.data.synthetic import LARGE, generate
from encoders.fold import ItemFold
from index import kernels, popcount_ir, table
from index.arena import ArenaReader, ArenaWriter, Progress
from index.keys import keys_of_ints
from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from infra import priority
from infra.settings import Settings, environment
from tests.bench import http_load, limits, users
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
_BLOCK = 500  # rows of a block
_SETTLED = 25_000  # rows from which on an arena's least room counts no more

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
        _users(report, folder, seed, 20 if quick else 200)
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


def _interleaved(
    rounds: int, work: dict[str, Callable[[int], object]], clock: Callable[[], float] = time.perf_counter
) -> Series:
    """Milliseconds of each, one after the other in every round, each at a place of its own, so that none finds in the
    cache what the one before has read; the first tenth does not count. Ratios of work in one thread are of its CPU time
    (`time.thread_time`), which other programs on the machine lengthen less."""
    spent: Series = {name: [] for name in work}
    first = max(2, rounds // 10)
    for place in range(rounds + first):
        for turn, (name, do) in enumerate(work.items()):
            began = clock()
            do(place + 3 * turn)
            if place >= first:
                spent[name].append((clock() - began) * 1e3)
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
    bare = _Bare(generation.arena, [side.tables for side in sides], generation.head_tables, asked)

    def score(place: int) -> None:
        ids = asked[place % REQUESTS]
        keys = Candidates.of_integers(ids).keys
        rows = generation.arena.gather(keys)
        scores = rtp.score(generation, sides[place % USERS], rows.hot)
        rtp.ranked(scores, K, keys, lambda places: ids[places])

    def prerank(place: int) -> None:
        options = ScoreOptions(user_id=f"u{place % USERS}", as_of=as_of, k=K)
        service.merger.score(asked[place % REQUESTS], options)

    parts = {"gather": bare.gather, "counts": bare.counts, "join": bare.join, "best": bare.best}
    others = {"user": lambda place: infer(generation, sources[place % USERS]), "request": prerank}
    spent = _interleaved(rounds, {"score": score, **others, **parts})
    used = _interleaved(rounds, {"score": score, **parts}, time.thread_time)
    for name in ("score", "user", "request"):
        _percentiles(report, name, spent[name])
    medians = {name: float(np.median(values)) for name, values in spent.items()}
    for name in parts:
        _percentiles(report, f"kernel_{name}", spent[name], (50,))
    windows = {name: [float(np.median(window)) for window in np.array_split(own, 5)] for name, own in used.items()}
    ratios = [windows["score"][at] / sum(windows[name][at] for name in parts) for at in range(5)]
    report.figure("over_kernels_ratio", ratios, "x")
    _limits(report, generation.layout, generation.head_tables, medians)
    _stores(report, host.settings.state, data, bare, max(20, rounds // 10))


def _limits(report: Report, layout: RowLayout, head: kernels.HeadTables, medians: dict[str, float]) -> None:
    machine = limits.measure()
    report.figure("stream_gb_per_s", machine.stream_gb_per_s, "GB/s")
    report.figure("clock_ghz", machine.clock_ghz, "GHz")
    report.figure("fma_g_per_s", machine.fma_g_per_s, "G/s")
    report.figure("popcount_bits_per_cycle", machine.popcount_bits, "")
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
    """The kernels as machine code alone, for the same users and requests as `score`: every array is there and every
    address is known before a round, so that what is left of `score` is all that Python and NumPy do between them, and
    the memory that they ask for."""

    def __init__(
        self,
        arena: ArenaReader,
        users: list[kernels.UserTables],
        head: kernels.HeadTables,
        asked: list[NDArray[np.uint64]],
    ) -> None:
        self._arena, self._keys = arena, [keys_of_ints(ids) for ids in asked]
        rows = [arena.gather(keys).hot for keys in self._keys]
        self._gathers = self._gathering(arena, rows[0].dtype)
        fields, counts = rows[0].dtype.fields, np.empty((CANDIDATES, len(head.T)), np.int32)
        assert fields is not None
        size, signature = rows[0]["signature"].shape[1], fields["signature"][1]
        counting = popcount_ir.compiled(size, len(head.edges), len(users[0].window.lengths))
        limits = popcount_ir.limits_of(size, head.edges)
        self._held = rows, limits, counts, users, head  # alive as long as their addresses
        pairs = [(hot, users[at % USERS]) for at, hot in enumerate(rows)]
        self._counts = [
            functools.partial(
                counting,
                *(hot.ctypes.data + signature, hot.itemsize, len(hot), user.window.weight),
                *(array.ctypes.data for array in (user.window.data, user.window.lengths, limits, counts)),
            )
            for hot, user in pairs
        ]
        self._joins = [_joining((hot, user, head), counts) for hot, user in pairs]
        self._scores = [kernels.score(hot, user, head) for hot, user in pairs]

    def _gathering(self, arena: ArenaReader, kind: np.dtype[Any]) -> list[Callable[[], object]]:
        files, size = arena._files, np.uint64(kind.itemsize)
        hot, _, entries = map(np.uint64, files.addresses)
        version_at, records = arena._version_at, np.uint64(files.records)
        mask, words = np.uint64(files.entries - 1), np.empty(CANDIDATES, np.uint64)
        out = aligned_empty(CANDIDATES, kind)
        self._gathered = files, words, out  # alive as long as their addresses
        into = np.uint64(out.ctypes.data)
        before = (entries, mask, hot, size, version_at, hot, size, records)
        return [functools.partial(table.gather, *before, keys, 0, words, into) for keys in self._keys]

    def gather(self, place: int) -> None:
        self._gathers[place % REQUESTS]()

    def gather_rows(self, place: int) -> None:
        """With all that the arena's reader does around the kernel."""
        self._arena.gather(self._keys[place % REQUESTS])

    def counts(self, place: int) -> None:
        self._counts[place % REQUESTS]()

    def join(self, place: int) -> None:
        self._joins[place % REQUESTS](place)

    def best(self, place: int) -> None:
        values = self._scores[place % REQUESTS]
        np.flatnonzero(values >= np.partition(values, CANDIDATES - K)[CANDIDATES - K])


def _stores(report: Report, folder: Path, data: Data, bare: _Bare, rounds: int) -> None:
    """Hot records by the arena's `gather` against RocksDB's call for many keys, in turns. RocksDB holds nothing but
    these 192 bytes per key, in the forms that one would tune, mapped, compacted and warm; the best of them counts."""
    forms = {name: _Rocks(folder / name, options, data) for name, options in _forms().items()}
    work: dict[str, Callable[[int], object]] = {name: rocks.get for name, rocks in forms.items()}
    spent = _interleaved(rounds, {"arena": bare.gather_rows} | work, time.thread_time)
    for rocks in forms.values():
        rocks.close()
    for name, values in spent.items():
        report.figure(f"store_{name}_cpu_ms", values, "ms")
    best = min(forms, key=lambda name: float(np.median(spent[name])))
    report.figure("gather_over_rocksdb", (np.array(spent[best]) / spent["arena"]).tolist(), "x")


def _forms() -> dict[str, Options]:
    """RocksDB's tables for reads of single keys."""
    blocks, plain, cuckoo = (Options(raw_mode=True) for _ in range(3))
    small = BlockBasedOptions()
    small.set_block_size(1024)
    small.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    small.set_data_block_hash_ratio(0.75)
    small.disable_cache()  # mapped blocks that are not compressed need none
    blocks.set_block_based_table_factory(small)
    hashed = PlainTableFactoryOptions()
    hashed.user_key_length = 8
    plain.set_prefix_extractor(SliceTransform.create_fixed_prefix(8))
    plain.set_plain_table_factory(hashed)
    cuckoo.set_cuckoo_table_factory(CuckooTableOptions())
    forms = {"blocks": blocks, "plain": plain, "cuckoo": cuckoo}
    for options in forms.values():
        options.create_if_missing(True)
        options.set_compression_type(DBCompressionType.none())
        options.set_allow_mmap_reads(True)
        options.set_max_open_files(-1)
    return forms


class _Rocks:
    """The hot records in a RocksDB of their own; keys are the ids' eight bytes, ready before they are asked for."""

    def __init__(self, folder: Path, options: Options, data: Data) -> None:
        self._folder, size = folder, data.layout.hot.itemsize
        self._rocks = Rdict(str(folder), options)
        for at in range(0, len(data.hot), _PART):
            raw, batch = data.hot[at : at + _PART].tobytes(), WriteBatch(raw_mode=True)
            for place in range(0, len(raw), size):
                batch.put((at + place // size).to_bytes(8, "big"), raw[place : place + size])
            self._rocks.write(batch)
        self._rocks.flush()
        self._rocks.compact_range(None, None)
        self._names: list[list[str | int | float | bytes | bool]] = [
            [number.to_bytes(8, "big") for number in ids.tolist()] for ids in data.requests
        ]
        for names in self._names:
            found = self._rocks.get(names)
            assert isinstance(found, list)
            assert None not in found, "RocksDB holds other keys"

    def get(self, place: int) -> None:
        self._rocks.get(self._names[place % REQUESTS])

    def close(self) -> None:
        self._rocks.close()
        shutil.rmtree(self._folder)


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
    _loop(report, host, data, binary, texts, rounds)


_BODY = 16_000_000  # bytes, nearly as many as are taken
_WAITS = 1_000  # for a version that does not come


def _loop(report: Report, host: Host, data: Data, binary: list[bytes], texts: list[bytes], rounds: int) -> None:
    """The longest callback of the event loop during one request: what others have to wait for. In CPU time
    (tests/bench/stand_in.py); ranges are over requests, the value is their median."""
    ids, as_of = data.requests[0], data.as_of
    stream = io.BytesIO()
    pl.DataFrame({"candidates": ids}).write_ipc_stream(stream)
    query, form = f"/v1/score?user_id=u0&as_of={as_of}", "application/octet-stream"
    traced = json.dumps({"user_id": "u0", "as_of": as_of, "include": ["trace"], "candidates": ids.tolist()}).encode()
    asked = {
        "binary": binary[0],
        "binary_all": http_load.request(query, ids.astype("<u8").tobytes(), form),
        "json": texts[0],
        "json_trace_all": http_load.request("/v1/score", traced, "application/json"),
        "arrow_all": http_load.request(query, stream.getvalue(), arrow.MEDIA),
        "body_16mb": http_load.request("/v1/score", b" " * (_BODY - len(traced)) + traced, "application/json"),
    }
    with _server(host, "tests.bench.stand_in", "watched") as (port, _), contextlib.ExitStack() as held:
        connection = http_load.Connection(port)

        def longest() -> float:
            return float(connection.ask(http_load.get("/longest"))[1])

        for name, request in asked.items():
            found = []
            for _ in range(min(rounds, 60)):
                longest()
                connection.ask(request)
                found.append(longest())
            report.figure(f"loop_longest_{name}_ms", found[len(found) // 10 :], "ms")
        for count, more in ((1, 1), (_WAITS, _WAITS - 1)):
            for waiter in [http_load.Connection(port) for _ in range(more)]:
                held.callback(waiter.close)
                waiter.send(http_load.get("/v1/items/0?wait_for=99&timeout_ms=10000"))
            found = []
            for _ in range(20):
                time.sleep(0.05)  # some looks of the waits, 10 ms apart
                found.append(longest())
            report.figure(f"loop_longest_{count}_waits_ms", found[5:], "ms")


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
    """Process: what encode and replicate do, without Kafka, on the same rows again and again, and at a job's priority;
    `written` counts them from 0 on, when the store is open."""
    os.setsid()
    priority.lower(os.getpid())
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
    report.figure("memory_over_record", _over_records(reader, layout, items), "x")
    report.figure("id_table_bytes_per_item", reader.size().table_bytes / items, "B")
    report.figure("open_warm_arena_s", opened, "s")
    arena = path / "arena"
    shutil.rmtree(arena)
    began = time.perf_counter()
    N2OWriter(path, layout, 2, host.settings.hash_key.encode()).close()
    report.figure("rebuild_arena_s", time.perf_counter() - began, "s")
    report.figure("memory_over_record_rebuilt", _over_records(ArenaReader.open(path, layout), layout, items), "x")
    shutil.rmtree(arena)
    _arena_growth(report, path, layout, items)


def _over_records(reader: ArenaReader, layout: RowLayout, items: int) -> float:
    """Bytes of the record files per byte of the rows' own records."""
    size = reader.size()
    return (size.hot_bytes + size.cold_bytes) / items / (layout.hot.itemsize + layout.cold.itemsize)


def _arena_growth(report: Report, path: Path, layout: RowLayout, items: int) -> None:
    """An arena that begins empty and gets its rows a block at a time: the most it takes per row, from
    25,000 on, and the CPU time of all of it."""
    writer = ArenaWriter.create(path, layout, 1, 0)
    writer.publish(1, 0, Progress.empty(1))
    reader = ArenaReader.open(path, layout)
    hot, cold = (aligned_empty(_BLOCK, kind) for kind in (layout.hot, layout.cold))
    hot.view(np.uint8)[:], cold.view(np.uint8)[:] = 0, 0
    kinds, over = np.full(_BLOCK, table.PUT, np.uint8), 0.0
    used = time.process_time()
    for at in range(0, items, _BLOCK):
        writer.apply(keys_of_ints(np.arange(at, at + _BLOCK, dtype=np.uint64)), kinds, hot, cold)
        if writer.items >= _SETTLED:
            over = max(over, _over_records(reader, layout, writer.items))
    report.figure("grow_arena_cpu_s", time.process_time() - used, "s")
    report.figure("memory_over_record_worst", over, "x")


# ---- the user phase


def _users(report: Report, folder: Path, seed: int, rounds: int) -> None:
    """CPU time by (recent, long-term) behaviours, whose rows are there; in turns."""
    made = {sizes: users.phases(folder, *sizes, seed) for sizes in users.SIZES}
    work = {f"{name}_{recent}_{length}": do for (recent, length), two in made.items() for name, do in two.items()}
    for name, spent in _interleaved(rounds, work, time.thread_time).items():
        report.figure(f"user_{name}_cpu_ms", [float(np.median(part)) for part in np.array_split(spent, 5)], "ms")


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
    """All but SimTier's counts, which are given, or zero, as machine code alone."""
    hot, user, head = arrays
    given = np.zeros((len(hot), len(head.T)), np.int32) if counts is None else counts
    slots, out = np.zeros(kernels.CROSS_SLOTS, np.uint16), np.empty(len(hot), np.float32)
    kernels.place_crosses(slots, user)
    code, arguments = kernels.joining(hot, given, user, head, slots, out)
    held = (arrays, given, slots, out)  # alive as long as their addresses

    def join(_: int, held: object = held) -> None:
        code(*arguments)

    return join


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
    for panel, (name, x, lines, unit) in zip(panels, plots, strict=True):
        rows = tables[name]
        for key, label in lines.items():
            panel.plot([row[x] for row in rows], [row[key] for row in rows], marker="o", markersize=3, label=label)
        panel.set(xlabel=x, ylabel=unit, ylim=(0, None))
        if x in ("length", "items", "bits", "clients"):
            panel.set_xscale("log")
        panel.legend(fontsize=8)
