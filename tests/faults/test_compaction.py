"""Deletions, forced compaction and a generation that is filled later: nothing old comes back, ever."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from encoders.bundle import Bundle
from infra.settings import Settings
from tests.conftest import wait_until
from tests.streams.chain import Chain, check_rows, item_body, oracle, running_chain

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
EAGER = {
    "items": {
        "segment.ms": "1000",
        "min.cleanable.dirty.ratio": "0.001",
        "min.compaction.lag.ms": "0",
        "max.compaction.lag.ms": "1000",
        "delete.retention.ms": "100",
    }
}


def compact(chain: Chain, keys: set[bytes], random: np.random.Generator, published: list[dict[str, object]]) -> None:
    """Writes fillers, which roll the segments, until `items` holds exactly one record of each of `keys`."""

    def compacted() -> bool:
        version = 10_000 + len(published)
        fillers = [item_body(f"filler {k}", version, random) for k in range(20)]
        published.extend(fillers)
        chain.publish(fillers)
        found = [record.key for record in chain.read("items") if not record.key.startswith(b"filler")]
        return sorted(found) == sorted(keys)

    wait_until(compacted, "compaction", 90)


def test_a_generation_filled_after_compaction_has_the_newest_versions_and_no_deleted_item(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(1)
    published: list[dict[str, object]] = []
    with running_chain(settings(partitions=2), bundle_path, overrides=EAGER) as chain:
        chain.add_generation("one")
        chain.start("ingest", "encode:one", "replicate:one")

        def publish(bodies: list[dict[str, object]]) -> None:
            published.extend(bodies)
            chain.publish(bodies)

        publish([item_body(f"{k}", version, random) for version in (3, 17, 16, 5) for k in range(30)])
        publish([{"item_id": f"{k}", "version": 18, "deleted": True} for k in range(10)])
        publish([item_body(f"{k}", 17, random) for k in range(10)])  # older than the deletion
        publish([item_body("9", 19, random)])  # newer than the deletion
        chain.settle("one")
        compact(chain, {str(k).encode() for k in range(30)}, random, published)
        chain.add_generation("two")
        chain.start("encode:two", "replicate:two")
        wait_until(lambda: chain.filled("two"), "the second generation's fill is proven")
        chain.settle("one", "two")
        for generation in ("one", "two"):
            check_rows(chain, generation, bundle, oracle(published))

        # the deletions' days are over: tombstones, and compaction removes every trace
        chain.kill("ingest", signal.SIGTERM)
        short = Chain.__new__(Chain)
        short.__dict__ = chain.__dict__ | {"settings": _days(chain.settings, 1e-6)}
        short.start("ingest")
        compact(short, {str(k).encode() for k in range(9, 30)}, random, published)
        chain.add_generation("three")
        chain.start("encode:three", "replicate:three")
        wait_until(lambda: chain.filled("three"), "the third generation's fill is proven")
        chain.settle("one", "two", "three")
        for generation in ("one", "two", "three"):
            check_rows(chain, generation, bundle, oracle(published))


def _days(settings: Settings, days: float) -> Settings:
    import dataclasses

    return dataclasses.replace(settings, tombstone_days=days)
