"""How fresh the rows of this host are, for replicate, which sees all four times of a row.

`forerank_oldest_item_age_seconds{generation}`: how long ago the event of the row was whose item has not been published
for longest. `forerank_hop_seconds{hop}`: what each hop of an item event takes, from one of a row's times to another:

    event    event_time -> publish_time    until the publisher had it on `item-updates`
    publish  publish_time -> encode_time   ingest, `items`, and the wait for the encoder
    encode   encode_time -> visible_time   `rows.<generation>`, replicate, RocksDB and arena
    visible  event_time -> visible_time    all of them
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index.arena import ArenaReader, Progress
from index.n2o import RowBatch
from infra.telemetry import gauge, histogram

HOPS = ("event", "publish", "encode", "visible")
SAMPLE = 16  # rows of one batch of blocks, at 13 us each: to count all of them would cost more than to write them
OLDEST = "Time since the event of the item that has not been published for longest"
_SCAN_S = 60.0
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 600.0, 3600.0)


class Hops:
    """The histogram, made before the job's threads are."""

    def __init__(self) -> None:
        meaning = "What a hop of an item event takes, from a sample of the rows that became visible"
        seconds = histogram("forerank_hop_seconds", meaning, ("hop",), _BUCKETS)
        self._seconds = [seconds.labels(hop) for hop in HOPS]

    def observe(self, batches: Sequence[RowBatch], before: Progress, visible: int) -> None:
        """Blocks that are in the index since `visible` (ms), which was at `before` until then. Left out are rows of a
        fill, whose events may be years old, and blocks that the index had already.
        """
        new = [one for one in batches if before.filled[one.partition] and one.covered > before.covered[one.partition]]
        if not new:
            return
        times = np.concatenate([_times(batch) for batch in new])
        for row in _seconds_of(times[:: -(-len(times) // SAMPLE) or 1], visible).tolist():
            for hop, seconds in zip(self._seconds, row, strict=True):
                hop.observe(seconds)


def _times(batch: RowBatch) -> NDArray[np.int64]:
    """event, publish and encode time i8[n, 3] of the block's rows that are no deletions."""
    names = ("event_time", "publish_time", "encode_time")
    return np.stack([batch.cold[name][~batch.deleted] for name in names], axis=1)


def _seconds_of(times: NDArray[np.int64], visible: int) -> NDArray[np.float64]:
    """Per row and hop f8[n, 4]; 0 where a host's clock is behind that of the host before it."""
    event, published, encoded = times.T
    hops = np.stack((published - event, encoded - published, visible - encoded, visible - event), axis=1)
    return hops.clip(0) / 1e3


async def watch_oldest(generation: str, arena: ArenaReader) -> None:
    """Sets the age of the oldest item every minute, 0 without items."""
    age = gauge("forerank_oldest_item_age_seconds", OLDEST, ("generation",)).labels(generation)
    while True:
        oldest = await asyncio.to_thread(arena.oldest)
        age.set(0 if oldest is None else max(0.0, time.time() - oldest / 1e3))
        await asyncio.sleep(_SCAN_S)
