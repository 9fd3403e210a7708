"""The whole stack as a user runs it: real broker, `python -m streams supervise`, `python -m api serve`. One for each
module.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from infra.admin import admin_token
from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics
from infra.settings import Settings, environment
from tests.conftest import answered, free_ports, wait_until

HISTORY_LENGTH = 60
MOVIES, USERS, RATINGS, SITTING = 60, 30, 25, 5
_WORDS = ("Blue", "Lost", "Night", "River", "Stone", "Winter")


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in MovieLens' CSV form, whose users rate a few films on each of several days."""
    folder, random = tmp_path_factory.mktemp("small-set"), np.random.default_rng(4)
    movies = [
        f'{at},"{_WORDS[at % 6]} {_WORDS[at // 6 % 6]} {at} ({1960 + at})",{("Comedy", "Drama", "War")[at % 3]}'
        for at in range(1, MOVIES + 1)
    ]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")
    ratings = [
        f"{user},{movie},{3 + 2 * (movie % 3 == user % 3)},{1_000_000 + place // SITTING * 86_400 + user * 100 + place}"
        for user in range(1, USERS + 1)
        for place, movie in enumerate(random.choice(np.arange(1, MOVIES + 1), RATINGS, replace=False).tolist())
    ]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    return folder


def environ_of(settings: Settings) -> dict[str, str]:
    """The environment of a command that uses these settings, the test's broker among them."""
    return {
        **os.environ,
        **environment(settings),
        "KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "OMP_NUM_THREADS": "1",
    }


@dataclasses.dataclass
class Running:
    """Processes with their logs, and the clients of a user of the host."""

    settings: Settings
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], env=environ_of(self.settings), stdout=log, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.api_port}"

    def log(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()[-3_000:]}" for path in sorted(self.folder.glob("*.log")))

    def wait_for(self, there: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        wait_until(lambda: answered(there), what, limit_s, self._check, self.log)

    def _check(self) -> None:
        for name, process in self.processes.items():
            assert process.poll() is None, f"{name} has ended: {self.log()}"

    def records(self, topic: str, count: int, limit_s: float = 30.0) -> list[Any]:
        """At least `count` records of a topic (without prefix), read from its beginning."""
        name = self.settings.topic(topic)
        consumer = KafkaConsumer(bootstrap_servers=self.settings.kafka_bootstrap, enable_auto_commit=False)
        try:
            places = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name)]
            consumer.assign(places)
            consumer.seek_to_beginning(*places)
            found: list[Any] = []
            deadline = time.monotonic() + limit_s
            while len(found) < count:
                assert time.monotonic() < deadline, f"{topic} holds {len(found)} records, not {count}"
                for batch in consumer.poll(timeout_ms=200).values():
                    found.extend(batch)
            return found
        finally:
            consumer.close(autocommit=False)

    def send_raw(self, topic: str, key: bytes | None, value: bytes | None, partition: int) -> None:
        """A record as a client that keeps no rule would send it."""
        producer = KafkaProducer(bootstrap_servers=self.settings.kafka_bootstrap, acks="all")
        try:
            producer.send(self.settings.topic(topic), value, key, None, partition).get(10)
        finally:
            producer.close()


@pytest.fixture(scope="module")
def running(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("stack")
    name = uuid.uuid4().hex[:8]
    settings = Settings(
        kafka_bootstrap=broker.bootstrap,
        topic_prefix=f"e{name}.",
        partitions=3,
        state=folder / "state",
        host=f"host-{name}",
        api_port=free_ports(1)[0],
        history_length=HISTORY_LENGTH,
        retrieval_interval_s=0.5,
    )
    ensure_topics(settings)
    one = Running(settings, folder)
    try:
        one.start("supervise", "streams", "supervise")
        one.start("api", "api", "serve")
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30.0) as one:
        running.wait_for(lambda: one.get("/healthz").is_success, "the API answers", 90.0)
        one.headers["authorization"] = f"Bearer {admin_token(running.settings)}"
        yield one
