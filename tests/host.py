"""A host as the nearline jobs leave it, without Kafka: a real bundle, its rows in RocksDB and arena, histories in LMDB,
and the real API process in front of them. For tests of the API and for benchmarks of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from encoders.bundle import Bundle, seeded_bundle
from encoders.config import ModelConfig
from encoders.fold import Behaviours, ItemFold, reference_scores
from index.histories import HistoriesReader, HistoriesWriter, StoredBehaviour, StoredProfile
from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from infra.admin import admin_token
from infra.settings import Settings, environment
from streams import rollout
from tests.conftest import answered, wait_until
from tests.rows import batch_of

NOW = 1_780_000_000_000  # ms; the newest behaviour of the tests' users
HOUR = 3_600_000
PARTITIONS = 2


@dataclasses.dataclass(frozen=True)
class CatalogueItem:
    item_id: str
    features: dict[str, Any]
    embedding: np.ndarray
    crosses: list[str]
    attributes: dict[str, Any]
    version: int = 1


@dataclasses.dataclass(frozen=True)
class Seen:
    """A behaviour as the tests write it."""

    user_id: str
    item_id: str
    time: int
    action: str = "click"


def catalogue(count: int, seed: int = 0) -> list[CatalogueItem]:
    """Every third id is not a number; every eleventh item has no crosses; some lack an attribute."""
    random = np.random.default_rng(seed)
    out = []
    for at in range(count):
        category, brand = int(random.integers(32)), int(random.integers(128))
        attributes: dict[str, Any] = {"in_stock": bool(at % 2), "title": f"thing {at} ü"}
        if at % 7:
            attributes["bid"] = float(np.round(random.uniform(0.1, 3.0), 2))
        out.append(
            CatalogueItem(
                item_id=f"sku-{at}-ß" if at % 3 == 0 else str(at),
                features={"category": f"c{category}", "brand": f"b{brand}", "price": float(random.uniform(1, 99))},
                embedding=random.standard_normal(128).astype(np.float32),
                crosses=[] if at % 11 == 0 else [f"category:{category}", f"brand:{brand}"],
                attributes=attributes,
            )
        )
    return out


class Host:
    """Writes what the nearline jobs would write, and runs the API. `settings.state` is the test's own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.items: dict[str, CatalogueItem] = {}  # of the newest `write` to any generation
        self.bundles: dict[str, Bundle] = {}
        self.serving = rollout.Serving()
        self._histories: HistoriesWriter | None = None
        self._behaviours = self._profiles = 0
        self._offsets: dict[str, int] = {}
        self._writers: dict[str, N2OWriter] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._client: httpx.Client | None = None

    # what the jobs do

    def bundle(
        self, generation: str, seed: int = 0, precision: Any = "fp32", config: ModelConfig | None = None
    ) -> Bundle:
        folder = self.settings.generation_dir(generation) / "bundle"
        made = seeded_bundle(folder, config, seed, precision=precision)
        self.bundles[generation] = made
        layout = RowLayout.from_json(made.manifest.row)
        path = self.settings.generation_dir(generation) / "n2o"
        self._writers[generation] = N2OWriter(path, layout, PARTITIONS, self.settings.hash_key.encode())
        self._offsets[generation] = 0
        return made

    def lose(self, generation: str) -> None:
        """Deletes its index; what is written next goes into a new one."""
        folder = self.settings.generation_dir(generation)
        self._writers.pop(generation).close()
        shutil.rmtree(folder / "n2o")
        layout = RowLayout.from_json(self.bundles[generation].manifest.row)
        self._writers[generation] = N2OWriter(folder / "n2o", layout, PARTITIONS, self.settings.hash_key.encode())
        self._offsets[generation] = 0

    def write(self, generation: str, items: Sequence[CatalogueItem], deleted: Sequence[str] = ()) -> None:
        """Rows of items and deletions, one block in partition 0."""
        bundle = self.bundles[generation]
        layout = RowLayout.from_json(bundle.manifest.row)
        encoded = ItemFold(bundle).encode(items)
        assert not any(encoded.errors)
        n, gone = len(items), len(deleted)
        hot, cold = aligned_empty(n + gone, layout.hot), aligned_empty(n + gone, layout.cold)
        hot.view(np.uint8)[:], cold.view(np.uint8)[:] = 0, 0
        for name in ("joint", "bridge", "signature", "crosses"):
            hot[name][:n] = getattr(encoded, name)
        for name in ("vector", "attributes"):
            cold[name][:n] = getattr(encoded, name)
        self.put(
            generation,
            [item.item_id for item in items] + list(deleted),
            hot,
            cold,
            versions=[item.version for item in items] + [9] * gone,
            attributes=[_json(item.attributes) for item in items] + [b"{}"] * gone,
            deleted=gone,
        )
        self.items |= {item.item_id: item for item in items}

    def put(
        self,
        generation: str,
        ids: Sequence[str],
        hot: NDArray[Any],
        cold: NDArray[Any],
        versions: Sequence[int] | None = None,
        attributes: Sequence[bytes] | None = None,
        deleted: int = 0,
    ) -> None:
        """Ready records of as many ids, the last `deleted` of which are deletions, as one block in partition 0."""
        n, start = len(ids), self._offsets[generation]
        for name, ago in (("event_time", 300), ("publish_time", 200), ("encode_time", 100)):
            cold[name] = time.time_ns() // 1_000_000 - ago
        batch = batch_of(ids, start, hot, cold, versions, attributes, deleted)
        self._writers[generation].apply([(batch, start)])
        self._offsets[generation] += n

    def activate(self, generation: str) -> None:
        """As the supervisor does once the generation is complete."""
        states = {
            name: rollout.GenerationState(
                generation=name,
                state="active" if name == generation else "former",
                offset=at,
                uri="file:///nowhere",
                sha256=self.bundles[name].sha256,
                staged_ends=[self._offsets[name], 0],
                covered=[self._offsets[name] - 1, -1],
                progress=1.0,
            )
            for at, name in enumerate(self.bundles)
        }
        self.serving = rollout.Serving(active=generation, previous=self.serving.active, generations=states)
        rollout.write(self.settings.serving_file, self.serving)

    def prepare(self, generation: str) -> None:
        """As the supervisor does before it switches."""
        made = rollout.GenerationState(
            generation=generation,
            state="complete",
            offset=len(self.serving.generations),
            uri="file:///nowhere",
            sha256=self.bundles[generation].sha256,
            progress=1.0,
        )
        known = {**self.serving.generations, generation: made}
        self.serving = rollout.prepare(msgspec.structs.replace(self.serving, generations=known), generation)
        rollout.write(self.settings.serving_file, self.serving)

    def behave(self, behaviours: Sequence[Seen], profiles: dict[str, dict[str, Any] | None] | None = None) -> None:
        """Behaviours and profiles (None erases) into the histories."""
        if self._histories is None:
            path, length = self.settings.histories_dir, self.settings.history_length
            self._histories = HistoriesWriter(path, length, self.settings.hash_key.encode())
        stored = [
            StoredBehaviour(
                one.user_id,
                one.item_id,
                f"e{self._behaviours + at}",
                one.action,
                one.time,
                one.time,
                0,
                self._behaviours + at,
            )
            for at, one in enumerate(behaviours)
        ]
        users = [
            StoredProfile(name, None if features is None else _json(features), None, NOW, 0, self._profiles + at)
            for at, (name, features) in enumerate((profiles or {}).items())
        ]
        self._behaviours += len(behaviours)
        self._profiles += len(users)
        offsets = {("behaviours", 0): self._behaviours, ("users", 0): self._profiles}
        self._histories.apply(stored, users, offsets)

    def erase(self, user_id: str) -> None:
        """The user and all behaviours so far."""
        assert self._histories is not None
        erasure = StoredProfile(user_id, None, NOW, NOW, 0, self._profiles)
        self._profiles += 1
        self._histories.apply([], [erasure], {("users", 0): self._profiles})

    def reader(self) -> HistoriesReader:
        """Of the histories in this process: LMDB opens an environment once, so this one has the writer's."""
        writer, reader = self._histories, HistoriesReader.__new__(HistoriesReader)
        assert writer is not None
        reader._env, reader._tables = writer._env, writer._tables
        return reader

    def retrieval(self, generation: str) -> None:
        """One build by the command itself."""
        self.command("retrieval", "--generation", generation, "--once")

    # what a user of the host does

    def environ(self) -> dict[str, str]:
        return {**os.environ, **environment(self.settings), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "api", *arguments], env=self.environ(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> httpx.Client:
        """The API process; returns when it answers."""
        log = (self.settings.state / "api.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "api", "serve"], env=self.environ(), stdout=log, stderr=log
        )
        log.close()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self.settings.api_port}", timeout=30.0)
        self.wait_for(lambda: self.client.get("/healthz").is_success, 90.0)
        return self._client

    @property
    def client(self) -> httpx.Client:
        assert self._client is not None
        return self._client

    @property
    def rights(self) -> dict[str, str]:
        """Headers of a caller who may change what is served."""
        return {"authorization": f"Bearer {admin_token(self.settings)}"}

    @property
    def log(self) -> str:
        return (self.settings.state / "api.log").read_text()

    def wait_for(self, there: Callable[[], bool], limit_s: float = 20.0) -> None:
        wait_until(lambda: answered(there), "what is waited for", limit_s, self._check, lambda: self.log)

    def _check(self) -> None:
        assert self._process is None or self._process.poll() is None, self.log

    def ready(self) -> None:
        self.wait_for(lambda: self.client.get("/readyz").is_success)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for writer in self._writers.values():
            writer.close()
        if self._histories is not None:
            self._histories.close()

    # what the answer should be

    def reference(
        self, generation: str, user: Sequence[Seen], profile: dict[str, Any] | None, ids: Sequence[str], as_of: int
    ) -> np.ndarray:
        """Training form's scores f4[len(ids)] from the items as written and the user's behaviours, oldest first."""
        bundle = self.bundles[generation]
        past = sorted((one for one in user if one.time <= as_of), key=lambda one: one.time)
        there = [one for one in past[-self.settings.history_length :] if one.item_id in self.items]
        rows = ItemFold(bundle).encode([self.items[one.item_id] for one in there])
        behaviours = Behaviours(
            vectors=rows.vector,
            signatures=rows.signature,
            crosses=rows.crosses,
            actions=bundle.manifest.features.action_codes([one.action for one in there]),
            times=np.array([one.time for one in there], np.int64),
        )
        return reference_scores(bundle, profile, behaviours, [self.items[one] for one in ids], as_of)


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def api_workers(parent: int) -> list[int]:
    """Processes below `python -m api serve` that have taken its socket."""
    found = []
    children: list[str] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            children += (task / "children").read_text().split()
    for child in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just been reaped
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found
