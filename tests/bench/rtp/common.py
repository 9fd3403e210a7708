"""What the parts of `rtp` share: the world, its sizes, and timings in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from index.layout import aligned_empty
from infra.settings import Settings
from tests.bench.peers.data import Data
from tests.bench.report import Report
from tests.conftest import free_ports
from tests.host import Host, Seen

CANDIDATES, LENGTH, K = 10_000, 1_000, 100
USERS, REQUESTS = 8, 16
GENERATION = "g1"
PART = 50_000  # rows written together

Series = dict[str, list[float]]


def host_of(state: Path, data: Data) -> Host:
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
    for at in range(0, len(data.hot), PART):
        part = slice(at, at + PART)
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


def interleaved(
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


def percentiles(report: Report, name: str, values: list[float], which: tuple[int, ...] = (50, 99)) -> None:
    for percentile in which:
        windows = [float(np.percentile(window, percentile)) for window in np.array_split(values, 5)]
        report.figure(f"{name}_p{percentile}_ms", windows, "ms", float(np.percentile(values, percentile)))
