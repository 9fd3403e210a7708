"""In process, one thread: `score` is id table, gather, scores and the best 100 with a ready user block; `user` is
history, rows and fold; `request` is both, each in its thread. The limit of `score` is the sum of three lower bounds
(tests/bench/limits.py), as if nothing overlapped; its kernels are timed bare. In a round each of them has other
candidates.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from api import rtp
from api.prerank import Candidates
from api.schemas import ScoreOptions
from api.service import Service
from api.users import UserSide, infer
from index import kernels, popcount_ir, table
from index.arena import ArenaReader
from index.keys import keys_of_ints
from index.layout import RowLayout, aligned_empty
from tests.bench import limits
from tests.bench.peers.data import Data
from tests.bench.report import Report
from tests.bench.rtp import stores
from tests.bench.rtp.common import CANDIDATES, LENGTH, REQUESTS, USERS, K, interleaved, percentiles
from tests.bench.rtp.growth import joining
from tests.host import Host


def measure(report: Report, host: Host, service: Service, data: Data, rounds: int) -> None:
    generation = service.generations.pin()
    asked, as_of = list(data.requests), data.as_of

    def user(place: int) -> UserSide:
        return infer(generation, service.users.stored(f"u{place % USERS}", as_of))

    sides = [user(place) for place in range(USERS)]
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
    spent = interleaved(rounds, {"score": score, "user": user, "request": prerank, **parts})
    used = interleaved(rounds, {"score": score, **parts}, time.thread_time)
    for name in ("score", "user", "request"):
        percentiles(report, name, spent[name])
    medians = {name: float(np.median(values)) for name, values in spent.items()}
    for name in parts:
        percentiles(report, f"kernel_{name}", spent[name], (50,))
    windows = {name: [float(np.median(window)) for window in np.array_split(own, 5)] for name, own in used.items()}
    ratios = [windows["score"][at] / sum(windows[name][at] for name in parts) for at in range(5)]
    report.figure("over_kernels_ratio", ratios, "x")
    _limits(report, generation.layout, generation.head_tables, medians)
    stores.measure(report, host.settings.state, data, bare.gather_rows, max(20, rounds // 10))


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
        self._joins = [joining((hot, user, head), counts) for hot, user in pairs]
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
