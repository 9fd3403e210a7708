"""SIGKILL of encode in the middle of a fill, and a group that is far behind: in the end, exactly the right rows. And a
bundle that does not fit the items.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaProducer

from encoders.bundle import Bundle
from infra.settings import Settings
from streams import events
from streams.fill import BULK_LAG
from streams.groups import group_admin
from streams.heartbeat import read_heartbeat
from streams.worker import BAD_BUNDLE
from tests.conftest import wait_until
from tests.streams.chain import Chain, check_rows, item_body, oracle, running_chain

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]
ITEMS = 12_000


def flow(count: int, start: int, random: np.random.Generator) -> list[Mapping[str, object]]:
    """As ingest lets them through: each item's versions ascend; some are deletions, some cannot be encoded."""
    out: list[Mapping[str, object]] = []
    for at in range(start, start + count):
        name, kind = f"item {random.integers(ITEMS)}", random.random()
        if kind < 0.1:
            out.append({"item_id": name, "version": at, "deleted": True})
        else:
            out.append(item_body(name, at, random, **({"embedding": [0.5]} if kind < 0.12 else {})))
    return out


def write(chain: Chain, bodies: list[Mapping[str, object]]) -> None:
    """To `items`, in ingest's place."""
    settings = chain.settings
    producer = KafkaProducer(bootstrap_servers=settings.kafka_bootstrap, linger_ms=20)
    for body in bodies:
        item = events.item_update(events.encode(body), None, 0)
        key = item.item_id.encode()
        place = events.partition_of(key, settings.partitions)
        producer.send(settings.topic("items"), events.encode(item), key, partition=place)
    producer.close()


def committed(chain: Chain, generation: str = "one") -> list[int]:
    with group_admin(chain.settings) as groups:
        return groups.committed(chain.settings.topic(f"encode-{generation}"), chain.settings.topic("items"))


def test_a_fill_that_is_killed_and_a_group_that_is_far_behind_end_with_the_right_rows(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(1)
    first = flow(40_000, 1, random)
    with running_chain(settings(partitions=2, session_timeout_ms=2_000), bundle_path) as chain:
        chain.add_generation("one")
        write(chain, first)
        chain.start("replicate:one")
        for turn in range(2):
            before = sum(chain.end_offsets("rows.one"))
            chain.start("encode:one")
            wait_until(lambda before=before: sum(chain.end_offsets("rows.one")) > before + 2, "it fills")  # type: ignore[misc]
            chain.kill("encode:one")
            assert committed(chain) == [-1, -1], f"turn {turn}: killed too late, the fill was over"
        assert not chain.filled("one")
        chain.start("encode:one")
        wait_until(lambda: chain.filled("one"), "the fill is proven")
        check_rows(chain, "one", bundle, oracle(first))

        wait_until(lambda: chain.running("encode:one"), "encode is in its group")
        assert chain.kill("encode:one", signal.SIGTERM) == 0
        ends = chain.end_offsets("items")
        assert committed(chain) == ends
        second = flow(BULK_LAG + 5_000, 100_000, random)
        write(chain, second)
        chain.start("encode:one")
        wait_until(lambda: chain.running("encode:one"), "encode is in its group again")
        assert committed(chain) == chain.end_offsets("items")  # before Faust read a record
        assert "catching up" in chain.log("encode:one").read_text()
        ends = chain.end_offsets("items")
        progress = lambda: chain.progress("one")  # noqa: E731
        wait_until(lambda: (progress().covered + 1).tolist() == ends, "all is covered")  # type: ignore[union-attr]
        check_rows(chain, "one", bundle, oracle([*first, *second]))


def test_a_bundle_that_cannot_encode_half_of_the_first_items_ends_the_fill_without_dead_letters(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(2)

    def bodies(count: int, unfit: int, start: int) -> list[Mapping[str, object]]:
        changes = [{"embedding": [0.5]}] * unfit + [{}] * (count - unfit)
        order = random.permutation(count)
        return [item_body(f"item {start + at}", 1, random, **changes[place]) for at, place in enumerate(order)]

    with running_chain(settings(partitions=2, session_timeout_ms=2_000), bundle_path) as chain:

        def filled(generation: str) -> None:
            chain.add_generation(generation)
            chain.start(f"replicate:{generation}", f"encode:{generation}")
            wait_until(lambda: chain.filled(generation), "the fill is proven")
            check_rows(chain, generation, bundle, oracle(written))

        def dead() -> int:
            return len(chain.read("items.dlq"))

        written = bodies(63, 63, 1)
        write(chain, written)
        filled("few")
        assert dead() == 63, "too few items to judge a bundle by"

        wait_until(lambda: chain.running("encode:few"), "encode is in its group")
        assert chain.kill("encode:few", signal.SIGTERM) == 0
        written += bodies(137, 37, 1_000)
        write(chain, written[63:])
        chain.add_generation("half")
        chain.start("encode:half")
        wait_until(lambda: chain.ended("encode:half") is not None, "the job ends")
        assert chain.ended("encode:half") == BAD_BUNDLE
        beat = read_heartbeat(chain.settings.heartbeat_dir, "encode-half")
        assert beat is not None
        assert beat.reason == (
            "bad bundle: it cannot encode 100 of the first 200 items, the first: "
            "embedding has 1 values, the bundle needs 8"
        )
        assert committed(chain, "half") == [-1, -1]
        assert dead() == 63

        written += bodies(3_000, 30, 2_000)
        write(chain, written[200:])
        filled("most")
        assert dead() == 63 + 130, "those held back, and those after them"
