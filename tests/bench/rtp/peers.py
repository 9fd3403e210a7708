"""Peers (tests/bench/peers) answer the same requests on the same data, each in a process of its own, in turns with
Forerank in process: user inference, rows, scores, the best 100. A peer is one thread, Forerank's user inference runs in
a second one; so a peer's figure is the ratio of CPU times, servers' included.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from api.schemas import ScoreOptions
from api.service import Service
from tests.bench.peers.data import Data, write_world
from tests.bench.peers.environment import PeersError, environment, need_redis
from tests.bench.report import Report
from tests.bench.rtp.common import REQUESTS, USERS, K, Series

_ROUNDS = 30  # of all peers and Forerank
_FIGURES = {  # what is the figure of which peer
    "sequential-onnx": "sequential_over_forerank",
    "sequential-torch": "sequential_torch_over_forerank",
    "redis-onnx": "stack_over_forerank",
    "rocksdb-onnx": "rocksdb_over_forerank",
    "feast-onnx": "feast_over_forerank",
    "attention-onnx": "attention_over_forerank",
}


def measure(report: Report, service: Service, data: Data) -> None:
    """Times as much CPU as Forerank each peer takes for the same requests; ranges are over rounds. First every peer's
    scores are held against the training form's, in a small world."""
    try:
        need_redis()
        python = environment()
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
