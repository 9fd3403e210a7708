"""The running system for a benchmark: a broker of its own, the supervisor's jobs, and API processes; all on free ports
and in a folder that goes away. Everything it starts it stops.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from encoders.bundle import Bundle, load_bundle
from index.arena import ArenaReader
from index.keys import keys_of_ints
from index.layout import RowLayout
from infra import processes
from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics
from infra.settings import Settings, environment
from streams import rollout
from streams.publish import Publisher
from tests.conftest import JARS, free_ports


def wait(what: str, there: Callable[[], bool], limit_s: float, every_s: float = 0.02) -> None:
    """Raises TimeoutError where it does not come true."""
    deadline = time.monotonic() + limit_s
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {limit_s:.0f} s")
        time.sleep(every_s)


class BenchStack:
    """Use in `with`. `settings` are those of all its processes."""

    def __init__(self, **settings: Any) -> None:
        """`settings` that differ from the usual ones of a benchmark."""
        self._own = settings
        self._held = contextlib.ExitStack()

    def __enter__(self) -> BenchStack:
        with contextlib.ExitStack() as starting:
            folder = Path(starting.enter_context(tempfile.TemporaryDirectory(prefix="forerank-bench-")))
            port, controller, api = free_ports(3)
            broker = Broker(folder / "kafka", port, controller, jars=JARS)
            starting.enter_context(broker)
            usual: dict[str, Any] = {"host": "bench", "prefetch_bytes": 0}  # every request infers its user
            self.settings = Settings(
                kafka_bootstrap=broker.bootstrap, state=folder / "state", api_port=api, **(usual | self._own)
            )
            self.folder = folder
            ensure_topics(self.settings)
            starting.callback(self._end)
            self.supervise()
            self.publisher = starting.enter_context(Publisher(self.settings))
            self._held = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def start(self, name: str, *arguments: str) -> processes.Process:
        environ = {"OMP_NUM_THREADS": "1", **os.environ, **environment(self.settings)}
        return processes.start(name, [sys.executable, "-m", *arguments], self.folder / "run", environ)

    def supervise(self) -> None:
        """Starts the supervisor, again where it was killed."""
        self.start("supervise", "streams", "supervise")

    def supervisor(self) -> processes.Process | None:
        return processes.find("supervise", self.folder / "run")

    def _end(self) -> None:
        supervisor = self.supervisor()
        if supervisor:
            processes.stop(supervisor, 30.0)
        processes.stop_all(processes.listing(self.settings.state / "logs"), 10.0)  # of one that had only begun

    @contextlib.contextmanager
    def api(self, *arguments: str) -> Iterator[httpx.Client]:
        """An API process, by default the product's own; a client once it is ready."""
        process = self.start("api", *(arguments or ("api", "serve")))
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{self.settings.api_port}", timeout=30) as client:
                wait("the API is ready", lambda: _ready(client), 90)
                yield client
        finally:
            processes.stop(process, 30.0)

    def job(self, name: str) -> processes.Process:
        """One of the supervisor's jobs."""
        found = processes.find(name, self.settings.state / "logs")
        assert found is not None, f"{name} does not run"
        return found

    def serve_generation(self, name: str, bundle: Path, limit_s: float = 180) -> Arena:
        """Stages a bundle, waits until it is served; its arena."""
        loaded = load_bundle(bundle)
        self.publisher.models(
            [
                {
                    "action": "stage",
                    "generation": name,
                    "uri": bundle.resolve().as_uri(),
                    "sha256": loaded.sha256,
                    "activate_when_complete": True,
                }
            ]
        )
        wait(
            f"generation {name} is active",
            lambda: rollout.read(self.settings.serving_file).active == name,
            limit_s,
            every_s=0.1,
        )
        return Arena(self.settings, name, loaded)


class Arena:
    """What a benchmark looks at in a generation's rows."""

    def __init__(self, settings: Settings, name: str, bundle: Bundle) -> None:
        self.reader = ArenaReader.open(settings.generation_dir(name) / "n2o", RowLayout.from_json(bundle.manifest.row))

    def cold(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Cold records of integer ids, zero where there is no row."""
        return self.reader.gather_cold(keys_of_ints(np.asarray(numbers, np.uint64)))[0]

    def all_at(self, numbers: Sequence[int] | np.ndarray, version: int) -> bool:
        return bool((self.cold(numbers)["version"] >= version).all())

    def covered(self) -> int:
        """Records of `items` covered so far."""
        return int((self.reader.progress().covered + 1).sum())


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").is_success
    except httpx.TransportError:
        return False
