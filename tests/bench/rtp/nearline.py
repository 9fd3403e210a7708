"""Round trips beside a nearline job at full speed."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoders.bundle import load_bundle
from encoders.fold import ItemFold
from index.layout import RowLayout
from index.n2o import N2OWriter
from infra import priority
from tests.bench import http_load
from tests.bench.report import Report
from tests.bench.rtp.common import GENERATION, REQUESTS
from tests.bench.scene import Rows
from tests.bench.world import World
from tests.host import Host
from tests.rows import batch_of


def measure(report: Report, host: Host, served: http_load.Connection, asked: list[bytes], rounds: int) -> None:
    """p99 of round trips while another process encodes and writes rows as fast as it can, against without it; in
    turns."""
    context = multiprocessing.get_context("spawn")
    go, stop, written = context.Event(), context.Event(), context.Value("q", -1)
    path = host.settings.generation_dir(GENERATION)
    worker = context.Process(target=_encode_and_write, args=(path, host.settings.hash_key, go, stop, written))
    worker.start()
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    try:
        deadline = time.monotonic() + 120
        while written.value < 0:  # until the store is open
            assert worker.is_alive(), "the writer has ended"
            assert time.monotonic() < deadline, "the writer does not start"
            time.sleep(0.05)
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
