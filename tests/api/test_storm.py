"""A storm of misses on real processes: all caches emptied under full load, and a feature service that takes ten
times a request's deadline."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator

import httpx
import msgspec
import numpy as np
import pytest

from api import arrow
from api.crosses import MISSING, OLD
from api.prerank import CROSSES_SHARE
from infra.settings import Settings
from tests.bench.http_load import BINARY, JSON, Connection, request
from tests.conftest import free_ports, wait_until
from tests.host import HOUR, NOW, Host, Seen, catalogue
from tests.remote_features import feature_service

ITEMS = catalogue(200)
IDS = [item.item_id for item in ITEMS]
USERS = [f"u{at}" for at in range(150)]
USUAL_MS, SLOW_MS = 5, 500
SLACK_MS = 20.0


def past_of(user: str) -> list[Seen]:
    random = np.random.default_rng(int(user[1:]))
    picked = random.integers(0, len(ITEMS), 30)
    return [Seen(user, IDS[at], NOW - (30 - place) * HOUR) for place, at in enumerate(picked)]


@pytest.fixture(scope="module")
def service() -> Iterator[httpx.Client]:
    users = {user: [(one.item_id, one.action, one.time) for one in past_of(user)] for user in USERS}
    with feature_service(users) as client:
        yield client


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, service: httpx.Client) -> Iterator[Host]:
    settings = Settings(
        kafka_bootstrap=f"127.0.0.1:{free_ports(1)[0]}",  # nobody listens: the broker is away
        state=tmp_path_factory.mktemp("host"),
        api_port=free_ports(1)[0],
        api_processes=2,
        cross_source=str(service.base_url),
    )
    one = Host(settings)
    try:
        one.bundle("g1")
        one.write("g1", ITEMS)
        one.behave([seen for user in USERS for seen in past_of(user)])
        one.activate("g1")
        one.start()
        one.ready()
        yield one
    finally:
        one.close()


def counted(host: Host) -> float:
    """Answers without crosses, as `/metrics` has them."""
    name = f'forerank_degraded_total{{what="{MISSING}"}} '
    lines = host.client.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_every_form_of_answer_says_what_it_lacks(host: Host, service: httpx.Client) -> None:
    service.put("/delay", params={"ms": 20_000})  # beyond the time limit of a fetch: nothing is ever there
    body = {"user_id": "u1", "as_of": NOW, "candidates": ["1", "2"], "deadline_ms": 10}
    answer = host.client.post("/v1/score", json=body)
    assert answer.json()["degraded"] == [MISSING]
    assert len(answer.json()["scores"]) == 2
    query: dict[str, str | int] = {"user_id": "u1", "as_of": NOW, "deadline_ms": 10}
    binary = host.client.post(
        "/v1/score", params=query, content=np.array([1, 2], "<u8").tobytes(), headers={"content-type": BINARY}
    )
    assert binary.headers["forerank-degraded"] == MISSING
    streamed = host.client.post("/v1/score", json=body, headers={"accept": arrow.MEDIA})
    assert streamed.headers["content-type"] == arrow.MEDIA
    assert f'"degraded":["{MISSING}"]'.encode() in streamed.content
    explained = host.client.get("/v1/explain", params={"user_id": "u1", "item_id": "1", "as_of": str(NOW)}).json()
    assert explained["degraded"] == [MISSING]
    for wrong in ("0", "nan", "-1", "1e9", "soon", ""):
        refused = host.client.post(
            "/v1/score", params=query | {"deadline_ms": wrong}, content=b"", headers={"content-type": BINARY}
        )
        assert (refused.status_code, refused.json()["field"]) == (422, "deadline_ms")
    assert host.client.post("/v1/score", json=body | {"deadline_ms": 0}).json()["field"] == "deadline_ms"
    inline = body | {"user": {"behaviours": [{"item_id": "1", "event_time": NOW}]}}
    del inline["user_id"]
    assert host.client.post("/v1/score", json=inline).json()["degraded"] == []


class Load:
    """Four clients who ask for one user after the other, as fast as they are answered."""

    def __init__(self, port: int) -> None:
        self.answers, self.degraded, self.failed = 0, 0, list[str]()
        self.newest = deque[bool](maxlen=2 * len(USERS))  # whether they were degraded
        self.ms: list[tuple[float, bool]] = []  # and whether it was degraded
        self._port, self._lock, self._stop = port, threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        bodies = [
            msgspec.json.encode({"user_id": user, "as_of": NOW, "candidates": IDS, "k": 10})
            for user in USERS[number:] + USERS[:number]
        ]
        wanted = [request("/v1/score", body, JSON) for body in bodies]
        connection = Connection(self._port)
        try:
            for place in range(1 << 30):
                if self._stop.is_set():
                    return
                began = time.perf_counter()
                answer = msgspec.json.decode(connection.ask(wanted[place % len(wanted)])[1])
                with self._lock:
                    self.ms.append(((time.perf_counter() - began) * 1e3, bool(answer["degraded"])))
                    self.answers += 1
                    self.degraded += MISSING in answer["degraded"]
                    self.newest.append(bool(answer["degraded"]))
                    if len(answer["ids"]) != 10 or not set(answer["degraded"]) <= {MISSING, OLD}:
                        self.failed.append(str(answer))
        except (OSError, RuntimeError) as error:
            self.failed.append(repr(error))
        finally:
            connection.close()

    def settled(self) -> bool:
        return len(self.newest) == self.newest.maxlen and not any(self.newest)


def test_a_storm_of_misses_costs_crosses_and_no_request(host: Host, service: httpx.Client) -> None:
    service.put("/delay", params={"ms": USUAL_MS})
    process, known = host._process, counted(host)
    assert process is not None
    with Load(host.settings.api_port) as load:
        wait_until(load.settled, "every user's crosses are kept", 120.0, log=lambda: str(load.failed))
        before = load.degraded
        calm = float(np.median([ms for ms, _ in load.ms[-len(USERS) :]]))
        load.ms.clear()
        service.put("/delay", params={"ms": SLOW_MS})
        os.kill(process.pid, signal.SIGUSR1)
        wait_until(lambda: load.degraded > before, "some are served without", 60.0, log=lambda: str(load.failed))
        wait_until(load.settled, "nobody is served without any more", 120.0, log=lambda: str(load.failed))
    slowest, storm = max(ms for ms, _ in load.ms), [ms for ms, without in load.ms if without]
    median = float(np.median(storm))
    print(f"{len(storm)} of {len(load.ms)} degraded, median {median:.1f} ms, calm {calm:.1f}, slowest {slowest:.1f}")
    assert load.failed == []
    assert load.degraded > before
    assert counted(host) - known == load.degraded
    assert slowest < SLOW_MS, "nobody waits for a fetch"
    assert median < calm + CROSSES_SHARE * host.settings.deadline_ms + SLACK_MS
