"""SIGKILL of ingest, encode and replicate while updates flow: in the end, exactly the right rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaProducer

from encoders.bundle import Bundle
from infra.settings import Settings
from streams import events
from tests.conftest import wait_until
from tests.streams.chain import Chain, check_rows, item_body, oracle, patch_body, running_chain

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]
UPDATES, ITEMS = 20_000, 3_000


def flow(random: np.random.Generator) -> list[Mapping[str, object]]:
    """Updates and patches out of order, with duplicates, stale versions, deletions, items that come back, and items
    without a row.
    """
    out: list[Mapping[str, object]] = []
    for at in range(UPDATES):
        name = f"item {random.integers(ITEMS)}"
        version = int(at / 4 + random.normal(0, 300)) + 2_000  # the newest version is often followed by older ones
        kind = random.random()
        if kind < 0.1 and out:
            out.append(out[int(random.integers(len(out)))])  # a duplicate, often a stale one
        elif kind < 0.2:
            out.append({"item_id": name, "version": version, "deleted": True})
        elif kind < 0.23:
            out.append(item_body(name, version, random, embedding=[0.5]))
        elif kind < 0.5:
            out.append(patch_body(name, version, random))
        else:
            out.append(item_body(name, version, random))
    return out


@pytest.mark.parametrize("seed", [1])
def test_killing_every_job_in_flow_ends_with_the_right_rows(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, seed: int
) -> None:
    random = np.random.default_rng(seed)
    updates = flow(random)
    victims = ["ingest", "encode:one", "replicate:one"] * 3
    random.shuffle(victims)
    with running_chain(settings(partitions=4, session_timeout_ms=2_000), bundle_path) as chain:
        chain.add_generation("one")
        chain.start("ingest", "encode:one", "replicate:one")
        for job in ("ingest", "encode:one", "replicate:one"):
            wait_until(lambda job=job: chain.running(job), f"{job} runs")  # type: ignore[misc]
        share = -(-UPDATES // len(victims))
        for turn, victim in enumerate(victims):
            publisher = threading.Thread(
                target=_publish, args=(chain, updates[turn * share : (turn + 1) * share], turn)
            )
            publisher.start()
            try:
                _kill_at_work(chain, victim, random)
                chain.start(victim)
            finally:
                publisher.join()
        chain.settle("one", deadline_s=150)
        expected = oracle(updates)
        check_rows(chain, "one", bundle, expected)
        dead = {record.key.decode() for record in chain.read("item-updates.dlq")}
        assert dead == {f"bad {turn}" for turn in range(len(victims))} | expected.refused


def test_killing_ingest_in_the_middle_of_packs_loses_and_repeats_nothing(
    settings: Callable[..., Settings], bundle_path: Path
) -> None:
    """Every update is newer than those before it, so each must be on `items`; some are patches of what went before."""
    random = np.random.default_rng(5)
    updates: list[Mapping[str, object]] = [item_body(f"item {k}", k, random) for k in range(ITEMS)]
    for at in range(ITEMS, 2 * UPDATES):
        name = f"item {random.integers(ITEMS)}"
        updates.append(patch_body(name, at, random) if random.random() < 0.5 else item_body(name, at, random))
    bad = b'{"item_id": "bad"}'
    with running_chain(settings(partitions=2, session_timeout_ms=2_000), bundle_path) as chain:
        chain.publish(updates, bulk=True)
        producer = KafkaProducer(bootstrap_servers=chain.settings.kafka_bootstrap)
        value = events.pack([bad, events.encode(updates[-1])])
        producer.send(chain.settings.topic("item-updates"), value, partition=0, headers=[(events.PACK, b"2")])
        producer.close()
        assert sum(chain.end_offsets("item-updates")) < len(updates) / 20, "they are packed"
        for _ in range(3):
            chain.start("ingest")
            _kill_at_work(chain, "ingest", random)
        chain.start("ingest")
        chain.settle()
        written: dict[str, list[int]] = {}
        last: dict[str, events.Item] = {}
        for record in chain.read("items"):
            item = events.item(record.value)
            written.setdefault(item.item_id, []).append(item.version)
            last[item.item_id] = item
        accepted = {(str(body["item_id"]), body["version"]) for body in updates}
        assert {(name, version) for name, versions in written.items() for version in versions} == accepted
        repeated = sum(map(len, written.values())) - len(accepted)
        assert repeated <= 3 * (4096 + events.MAX_PACK), "no more than what was sent and not remembered at a kill"
        for name, wanted in oracle(updates).items.items():
            found = last[name]
            assert (found.version, found.features, found.attributes, found.crosses, found.embedding) == (
                wanted.version,
                wanted.features,
                wanted.attributes,
                wanted.crosses,
                wanted.embedding,
            ), name
        dead = chain.read("item-updates.dlq")
        assert {record.value for record in dead} >= {bad}
        assert {dict(record.headers)["error_type"] for record in dead} <= {b"malformed", b"wrong_partition"}


def _publish(chain: Chain, updates: list[Mapping[str, object]], turn: int) -> None:
    """With a broken event in the middle."""
    key = f"bad {turn}".encode()
    broken = KafkaProducer(bootstrap_servers=chain.settings.kafka_bootstrap)
    chain.publish(updates[: len(updates) // 2])
    topic, place = chain.settings.topic("item-updates"), events.partition_of(key, chain.settings.partitions)
    broken.send(topic, b'{"item_id": "bad', key, partition=place)
    chain.publish(updates[len(updates) // 2 :])
    broken.close()


def _kill_at_work(chain: Chain, victim: str, random: np.random.Generator) -> None:
    """Kills it at some moment while its own output grows."""

    def written() -> int:
        if victim == "ingest":
            return sum(chain.end_offsets("items"))
        if victim.startswith("encode"):
            return sum(chain.end_offsets("rows.one"))
        found = chain.progress("one")
        return 0 if found is None else int((found.covered + 1).sum())

    enough = written() + int(random.integers(1, 5 if victim.startswith("encode") else 200))
    wait_until(lambda: written() > enough, f"{victim} works", 90)
    chain.kill(victim)
