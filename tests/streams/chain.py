"""The three hops as real processes on the real broker, and a single-threaded oracle of what they must end with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from kafka import KafkaConsumer, TopicPartition

from encoders.bundle import Bundle, seeded_bundle
from encoders.config import ModelConfig
from encoders.features import Categorical, FeatureSpec, Numeric
from encoders.fold import EncodedItems, ItemFold
from index.arena import ArenaReader, Progress
from index.errors import StoreError
from index.keys import keys_of
from index.layout import RowLayout
from index.n2o import N2OReader
from infra.kafka.topics import ensure_rows_topic, ensure_topics
from infra.settings import Settings, environment
from streams import events
from streams.events import Item, ItemPatch
from streams.heartbeat import read_heartbeat
from streams.publish import Publisher
from tests.conftest import wait_until

ROOT = Path(__file__).parent.parent.parent
EMBEDDING = 8
CONFIG = ModelConfig(
    width=8, dim=8, bridges=4, bits=16, crosses=3, embedding_dim=EMBEDDING, heads=2, hidden=16, tier_edges=(6, 8, 10)
)
FEATURES = FeatureSpec(
    item_categories=(Categorical("category", 16),),
    item_numerics=(Numeric("price", 10.0, 5.0),),
    crosses=("red", "blue"),
    actions=("click",),
    attributes=("bid",),
)


def item_body(item_id: str, version: int, random: np.random.Generator, **changes: object) -> dict[str, object]:
    body: dict[str, object] = {
        "item_id": item_id,
        "version": version,
        "event_time": f"2026-01-01T00:00:{version % 60:02d}Z",
        "crosses": ["red", "other"][: int(random.integers(0, 3))],
        "features": {"category": f"c{random.integers(20)}", "price": round(float(random.normal(10, 5)), 3)},
        "embedding": [round(float(value), 4) for value in random.normal(size=EMBEDDING)],
        "attributes": {"bid": round(float(random.random()), 3), "title": f"{item_id} v{version}"},
    }
    return body | changes


def patch_body(item_id: str, version: int, random: np.random.Generator) -> dict[str, object]:
    """Mostly of attributes alone, as prices and stock come."""
    patch: dict[str, object] = {"attributes": {"bid": round(float(random.random()), 3), "stock": version}}
    if random.random() < 0.2:
        patch["features"] = {"price": round(float(random.normal(10, 5)), 3)}
    elif random.random() < 0.1:
        patch = {"crosses": ["blue"], "attributes": {"title": f"{item_id} patched"}}
    time_ = f"2026-01-01T00:01:{version % 60:02d}Z"
    return {"item_id": item_id, "version": version, "event_time": time_, "patch": patch}


class Chain:
    """Topics, a bundle, and the jobs of one host; each job is a process that can be killed and started again."""

    def __init__(
        self, settings: Settings, bundle: Path, overrides: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        self.settings, self._bundle = settings, bundle
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        ensure_topics(settings, overrides)

    def add_generation(self, generation: str) -> None:
        ensure_rows_topic(self.settings, generation)
        shutil.copytree(self._bundle, self.settings.generation_dir(generation) / "bundle")

    def start(self, *jobs: str) -> None:
        """`ingest`, `histories`, `encode:<generation>`, `replicate:<generation>`."""
        for job in jobs:
            name, _, generation = job.partition(":")
            arguments = [sys.executable, "-m", "streams", name, *(["--generation", generation] if generation else [])]
            environ = {**os.environ, **environment(self.settings), "OMP_NUM_THREADS": "1"}
            with self.log(job).open("ab") as log:
                self._processes[job] = subprocess.Popen(arguments, cwd=ROOT, env=environ, stdout=log, stderr=log)

    def log(self, job: str) -> Path:
        self.settings.state.mkdir(parents=True, exist_ok=True)
        return self.settings.state / f"{job.replace(':', '-')}.out"

    def kill(self, job: str, number: signal.Signals = signal.SIGKILL) -> int:
        process = self._processes.pop(job)
        process.send_signal(number)
        return process.wait(30)

    def pid(self, job: str) -> int:
        return self._processes[job].pid

    def ended(self, job: str) -> int | None:
        return self._processes[job].poll()

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait(30)
        self._processes.clear()

    def running(self, job: str) -> bool:
        """The job's process is in its group. Fails if it has ended."""
        process = self._processes[job]
        assert process.poll() is None, f"{job} has ended:\n{self.log(job).read_text()[-3000:]}"
        beat = read_heartbeat(self.settings.heartbeat_dir, job.replace(":", "-"))
        return beat is not None and beat.pid == process.pid and beat.state == "running"

    def publish(self, bodies: Sequence[Mapping[str, object] | bytes], bulk: bool = False) -> None:
        with Publisher(self.settings) as publisher:
            result = publisher.publish("items", bodies, bulk=bulk)
        assert result.rejected == 0, result.errors

    def read(self, topic: str) -> list[Any]:
        """All records of a topic, partition by partition."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.settings.kafka_bootstrap, group_id=None, enable_auto_commit=False
        )
        name = self.settings.topic(topic)
        try:
            tps = [TopicPartition(name, partition) for partition in sorted(consumer.partitions_for_topic(name) or ())]
            consumer.assign(tps)
            starts, ends = consumer.beginning_offsets(tps), consumer.end_offsets(tps)
            for tp in tps:
                consumer.seek(tp, starts[tp])
            out: dict[Any, list[Any]] = {tp: [] for tp in tps}
            deadline = time.monotonic() + 30
            while any(consumer.position(tp) < ends[tp] for tp in tps):
                for tp, records in consumer.poll(timeout_ms=200).items():
                    out[tp] += [record for record in records if record.offset < ends[tp]]
                assert time.monotonic() < deadline
            return [record for tp in tps for record in out[tp]]
        finally:
            consumer.close()

    def end_offsets(self, topic: str) -> list[int]:
        consumer = KafkaConsumer(
            bootstrap_servers=self.settings.kafka_bootstrap, group_id=None, enable_auto_commit=False
        )
        try:
            tps = [TopicPartition(self.settings.topic(topic), p) for p in range(self.settings.partitions)]
            found = consumer.end_offsets(tps)
            return [found[tp] for tp in tps]
        finally:
            consumer.close()

    def layout(self) -> RowLayout:
        return RowLayout.from_json(json.loads((self._bundle / "manifest.json").read_bytes())["row"])

    def progress(self, generation: str) -> Progress | None:
        try:
            return self.arena(generation).progress()
        except StoreError:
            return None

    def arena(self, generation: str) -> ArenaReader:
        return ArenaReader.open(self.settings.generation_dir(generation) / "n2o", self.layout())

    def filled(self, generation: str) -> bool:
        found = self.progress(generation)
        assert found is None or not found.mismatch.any(), "the fill proof does not agree"
        return found is not None and bool(found.filled.all())

    def settle(self, *generations: str, deadline_s: float = 90.0) -> None:
        """Waits until everything published has gone through all hops."""
        sent = self.end_offsets("item-updates")
        beat = lambda: read_heartbeat(self.settings.heartbeat_dir, "ingest")  # noqa: E731

        def ingested() -> bool:
            self.running("ingest")
            found = beat()
            return found is not None and found.state == "running" and _committed(self.settings) == sent

        wait_until(ingested, "ingest has everything", deadline_s)
        ends = self.end_offsets("items")
        for generation in generations:

            def covered(generation: str = generation) -> bool:
                self.running(f"encode:{generation}")
                self.running(f"replicate:{generation}")
                found = self.progress(generation)
                return found is not None and bool((found.covered + 1 >= ends).all())  # ingest may write tombstones

            wait_until(covered, f"{generation} has covered all of items", deadline_s)


def _committed(settings: Settings) -> list[int]:
    from streams.groups import group_admin

    with group_admin(settings) as groups:
        return [max(0, n) for n in groups.committed(settings.topic("ingest"), settings.topic("item-updates"))]


@contextmanager
def running_chain(settings: Settings, bundle: Path, **options: Any) -> Iterator[Chain]:
    chain = Chain(settings, bundle, **options)
    try:
        yield chain
    finally:
        chain.stop()


def make_bundle(path: Path) -> Bundle:
    return seeded_bundle(path, CONFIG, features=FEATURES, precision="fp32")


@dataclasses.dataclass
class Expected:
    """What the rows must be. `items`: live items; `gone`: ids that must have no row; `refused`: ids of patches that met
    no item.
    """

    items: dict[str, Item]
    gone: set[str]
    refused: set[str]


class _Leaves:
    """An item as (version, value) per leaf, and the newest whole update or deletion."""

    def __init__(self, item: Item) -> None:
        self.base, self.newest, self.deleted = -1, (-1, 0), False
        self.leaves: dict[str, tuple[int, Any]] = {}
        self.take(item)

    def take(self, item: Item) -> None:
        if item.version <= self.base:
            return
        self.base, self.deleted = item.version, item.deleted
        self.newest = max(self.newest, (item.version, item.event_time), key=lambda pair: pair[0])
        newer = {leaf: found for leaf, found in self.leaves.items() if found[0] > item.version}
        self.leaves = {leaf: (item.version, value) for leaf, value in _named(item).items()} | newer

    def patch(self, patch: ItemPatch) -> bool:
        """Whether it was acceptable."""
        late = {leaf for leaf, (version, _) in self.leaves.items() if version >= patch.version}
        named = {leaf: (patch.version, value) for leaf, value in _named(patch).items() if leaf not in late}
        if patch.version <= self.base or not named:
            return True
        if self.deleted:
            return False
        self.leaves |= named
        self.newest = max(self.newest, (patch.version, patch.event_time), key=lambda pair: pair[0])
        return True

    def item(self, name: str) -> Item:
        version, time_ = self.newest
        groups: dict[str, Any] = {"features": {}, "attributes": {}}
        for leaf, (_, value) in self.leaves.items():
            group, dot, inner = leaf.partition(".")
            if dot:
                groups[group][inner] = value
            else:
                groups[group] = value
        return Item(name, version, time_, 0, self.deleted, **groups)


def _named(event: Item | ItemPatch) -> dict[str, Any]:
    found = {f"features.{name}": value for name, value in event.features.items()}
    found |= {f"attributes.{name}": value for name, value in event.attributes.items()}
    found |= {name: getattr(event, name) for name in ("crosses", "embedding") if getattr(event, name) is not None}
    return found


def oracle(bodies: Sequence[Mapping[str, object] | bytes]) -> Expected:
    """One thread, one dict: of every leaf the newest version, the first of equal ones; what cannot be encoded has no
    row.
    """
    known: dict[str, _Leaves] = {}
    refused: set[str] = set()
    for body in bodies:
        event = events.item_update(body if isinstance(body, bytes) else json.dumps(body).encode(), None, 0)
        before = known.get(event.item_id)
        if isinstance(event, ItemPatch):
            if before is None or not before.patch(event):
                refused.add(event.item_id)
        elif before is None:
            known[event.item_id] = _Leaves(event)
        else:
            before.take(event)
    newest = {name: leaves.item(name) for name, leaves in known.items()}
    live = {
        name: item
        for name, item in newest.items()
        if not item.deleted and item.embedding is not None and len(item.embedding) == 4 * EMBEDDING
    }
    return Expected(live, set(newest) - set(live), refused)


def check_rows(chain: Chain, generation: str, bundle: Bundle, expected: Expected) -> None:
    """Every row of the index against the oracle: which there are, and every column of each, in RocksDB and in the
    arena.
    """
    folder = chain.settings.generation_dir(generation) / "n2o"
    ids, hash_key = sorted(expected.items), chain.settings.hash_key.encode()
    items = [expected.items[name] for name in ids]
    reader = N2OReader(folder)
    try:
        assert sorted(reader.ids()) == ids, "which rows there are"
        for name, item, stored in zip(ids, items, reader.get(ids), strict=True):
            assert stored is not None
            assert (stored.version, stored.event_time) == (item.version, item.event_time), name
            assert stored.attributes == item.attributes, name
    finally:
        reader.close()
    arena = chain.arena(generation)
    keys = keys_of(ids, hash_key)
    hot, (cold, found) = arena.gather(keys), arena.gather_cold(keys)
    assert hot.found.all()
    assert found.all()
    assert arena.size().items == len(ids)
    assert cold["version"].tolist() == [item.version for item in items]
    columns = _encoded(bundle, items)
    for name, got in (("joint", hot.hot["joint"]), ("bridge", hot.hot["bridge"]), ("vector", cold["vector"])):
        np.testing.assert_allclose(got, getattr(columns, name), atol=1e-5, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(hot.hot["signature"], columns.signature)
    np.testing.assert_array_equal(hot.hot["crosses"], columns.crosses)
    np.testing.assert_array_equal(cold["attributes"], columns.attributes)
    if expected.gone:
        assert not arena.gather(keys_of(sorted(expected.gone), hash_key)).found.any(), "items that must be gone"


def _encoded(bundle: Bundle, items: Sequence[Item]) -> EncodedItems:
    columns = ItemFold(bundle).encode(items)
    assert columns.errors == [None] * len(items)
    return columns
