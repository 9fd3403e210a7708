"""From the bulk reading of a fill to Faust as one sequence, while items change: encode is killed when the proof is sent
and nothing committed, then when the group's offsets are committed and the group not joined. In the end every row is
what the bundle makes of the newest record of its item on `items`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from encoders.bundle import Bundle
from infra.settings import Settings
from streams import events
from streams.encode import prepare
from streams.events import Item
from streams.groups import group_admin
from streams.heartbeat import read_heartbeat
from streams.publish import Publisher
from streams.worker import Job
from tests.conftest import wait_until
from tests.faults.killed import killed_at, until_killed
from tests.streams.chain import EMBEDDING, Chain, Expected, check_rows, item_body, oracle, patch_body, running_chain

ITEMS = 12_000


def encode_until(settings: Settings, generation: str, last: int) -> None:
    """The job, which kills itself after that step."""
    name = f"encode-{generation}"
    Job.start(settings, name, name, lambda job: prepare(job, generation, killed_at(last)))


class Changes:
    """Publishes updates, deletions and patches, without an end; in `with`. `bodies`: all of them."""

    def __init__(self, settings: Settings, version: int) -> None:
        self._settings, self._version, self._random = settings, version, np.random.default_rng(version)
        self.bodies: list[Mapping[str, object]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish)

    def __enter__(self) -> Changes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _publish(self) -> None:
        with Publisher(self._settings) as publisher:
            while not self._stop.wait(0.05):
                some = [self._body() for _ in range(50)]
                self.bodies += some
                publisher.publish("items", some)

    def _body(self) -> Mapping[str, object]:
        self._version += 1
        name, kind = f"item {self._random.integers(ITEMS + 500)}", self._random.random()
        if kind < 0.2:
            return {"item_id": name, "version": self._version, "deleted": True}
        if kind < 0.4:
            return patch_body(name, self._version, self._random)
        return item_body(name, self._version, self._random)


def newest(chain: Chain) -> Expected:
    """The compacted `items`: of each key the last record."""
    last = {record.key: record.value for record in chain.read("items")}
    items = [events.item(value) for value in last.values()]
    live = {item.item_id: item for item in items if not item.deleted and _fits(item)}
    return Expected(live, {item.item_id for item in items} - set(live), set())


def _fits(item: Item) -> bool:
    return item.embedding is not None and len(item.embedding) == 4 * EMBEDDING


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_hand_over_from_a_fill_to_faust_while_items_change(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    random = np.random.default_rng(1)
    first = [item_body(f"item {number}", 1, random) for number in range(ITEMS)]
    with running_chain(settings(partitions=2, session_timeout_ms=2_000), bundle_path) as chain:

        def committed() -> list[int]:
            with group_admin(chain.settings) as groups:
                return groups.committed(chain.settings.topic("encode-one"), chain.settings.topic("items"))

        def killed_after(step: int) -> None:
            before = sum(chain.end_offsets("items"))
            until_killed(encode_until, chain.settings, "one", step)
            wait_until(lambda: sum(chain.end_offsets("items")) > before, "items changed meanwhile")

        chain.add_generation("one")
        chain.start("ingest", "replicate:one")
        chain.publish(first, bulk=True)
        wait_until(lambda: sum(chain.end_offsets("items")) == ITEMS, "ingest has written them", 90)
        with Changes(chain.settings, 1) as changes:
            killed_after(1)
            assert committed() == [-1, -1]
            killed_after(2)
            there = committed()
            assert min(there) > 0
            wait_until(lambda: chain.filled("one"), "the fill is proven")
            behind = sum(chain.end_offsets("items")) - sum(there)
            wait_until(lambda: sum(chain.end_offsets("items")) > sum(there) + behind, "items change in the gap")
            chain.start("encode:one")
            wait_until(lambda: chain.running("encode:one"), "encode is in its group")
            beat = read_heartbeat(chain.settings.heartbeat_dir, "encode-one")
            reached = beat.handled if beat else 0
            wait_until(lambda: _handled(chain) > reached + 500, "it follows")
        assert "filling" not in chain.log("encode:one").read_text()
        chain.settle("one")
        expected = oracle([*first, *changes.bodies])
        compacted = newest(chain)
        assert set(compacted.items) == set(expected.items)
        assert len(compacted.gone) > 100
        check_rows(chain, "one", bundle, expected)
        check_rows(chain, "one", bundle, compacted)
        assert (chain.progress("one").covered + 1).tolist() == chain.end_offsets("items")  # type: ignore[union-attr]


def _handled(chain: Chain) -> int:
    beat = read_heartbeat(chain.settings.heartbeat_dir, "encode-one")
    return beat.handled if beat else 0
