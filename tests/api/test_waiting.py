"""`wait_for`: answers when a version is visible, through the real process, and the waiters' own limits."""

from __future__ import annotations

import asyncio
import dataclasses
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import httpx
import msgspec
import numpy as np
import pytest
from starlette.types import Message

from api.generations import Generation, load
from api.problems import ProblemError
from api.waiting import WAITS_MAX, Waiters, Wish
from index.keys import keys_of
from streams import rollout
from tests.host import CatalogueItem, Host, catalogue

ITEMS = catalogue(20)
LONG = {"timeout_ms": "10000"}


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def started(own_host: Callable[..., Host]) -> Host:
    host = own_host()
    host.bundle("g1")
    host.write("g1", ITEMS)
    host.activate("g1")
    host.start()
    host.ready()
    return host


def newer(item_id: str, version: int) -> CatalogueItem:
    return dataclasses.replace(ITEMS[1], item_id=item_id, version=version)


def ask(host: Host, item_id: str, **parameters: Any) -> httpx.Response:
    return host.client.get(f"/v1/items/{item_id}", params=parameters)


def test_a_wait_is_answered_when_its_version_is_visible(
    own_host: Callable[..., Host], pool: ThreadPoolExecutor
) -> None:
    host = started(own_host)
    assert ask(host, "1", wait_for=1).json()["version"] == 1, "what is visible is answered at once"
    waits: list[tuple[int, Future[httpx.Response]]] = [
        (version, pool.submit(ask, host, "1", wait_for=version, **LONG)) for version in (5, 6, 5, 6)
    ]
    new = pool.submit(ask, host, "new", wait_for=0, **LONG)
    gone = pool.submit(ask, host, "2", wait_for=9, deleted=1, **LONG)
    over = pool.submit(ask, host, "4", wait_for=9, deleted=1, **LONG)  # its deletion is overtaken by version 10
    # more waits than request threads, and requests go on
    assert host.client.post("/v1/score", json={"user_id": "u", "candidates": ["1"]}, timeout=5.0).is_success
    assert not any(wait.done() for _, wait in waits)
    host.write("g1", [newer("1", 5)])
    assert [wait.result(20).json()["version"] for version, wait in waits if version == 5] == [5, 5]
    assert not new.done()
    assert not gone.done()
    host.write("g1", [newer("1", 8), newer("new", 1), newer("4", 10)], deleted=["2"])
    assert [wait.result(20).json()["version"] for version, wait in waits if version == 6] == [8, 8]
    assert new.result(20).json()["version"] == 1
    assert (gone.result(20).status_code, gone.result().content) == (204, b"")
    assert (over.result(20).status_code, over.result().json()["version"]) == (200, 10)
    assert ask(host, "2").status_code == 404


def test_what_is_visible_instead_is_said_after_the_time(own_host: Callable[..., Host]) -> None:
    host = started(own_host)
    for parameters, said in (
        ({"wait_for": 2, "timeout_ms": 0}, "version 1 is visible"),
        ({"wait_for": 2, "timeout_ms": 30}, "version 1 is visible"),
        ({"wait_for": 1, "deleted": 1, "timeout_ms": 30}, "version 1 is visible"),
    ):
        answer = ask(host, "1", **parameters)
        assert (answer.status_code, answer.headers["content-type"]) == (504, "application/problem+json")
        assert answer.json()["type"].endswith(":not-visible-yet")
        assert said in answer.json()["detail"]
    answer = ask(host, "no", wait_for=1, timeout_ms=0)
    assert answer.status_code == 504
    assert "no row of the item is visible" in answer.json()["detail"]


def test_a_version_is_visible_under_a_canary_when_both_generations_have_it(own_host: Callable[..., Host]) -> None:
    host = own_host()
    for seed, name in enumerate(("g1", "g2")):
        host.bundle(name, seed=seed)
        host.write(name, ITEMS)
    host.activate("g1")
    host.prepare("g2")
    host.serving = msgspec.structs.replace(host.serving, next=None, canary=rollout.Canary("g2", 0.5))
    rollout.write(host.settings.serving_file, host.serving)
    host.start()
    host.ready()
    assert ask(host, "1", wait_for=1).json()["generation"] == "g1"
    host.write("g1", [newer("1", 5)])
    host.wait_for(lambda: ask(host, "1").json()["version"] == 5)
    answer = ask(host, "1", wait_for=5, timeout_ms=0)
    assert answer.status_code == 504
    assert "version 1 is visible in generation g2" in answer.json()["detail"]
    host.write("g2", [newer("1", 5)])
    found = ask(host, "1", wait_for=5, **LONG).json()
    assert (found["generation"], found["version"]) == ("g1", 5)
    host.write("g1", [newer("1", 6)])
    host.serving = msgspec.structs.replace(host.serving, canary=rollout.Canary("g2", 0.0))
    rollout.write(host.settings.serving_file, host.serving)
    assert ask(host, "1", wait_for=6, **LONG).json()["version"] == 6, "a canary without users is not waited for"


def test_one_wait_too_many_is_refused_and_those_who_leave_make_room(own_host: Callable[..., Host]) -> None:
    host = started(own_host)
    target = f"GET /v1/items/1?wait_for=99&timeout_ms=10000 HTTP/1.1\r\nhost: {host.settings.api_host}\r\n\r\n"
    callers: list[socket.socket] = []
    try:
        with selectors.DefaultSelector() as ready:
            for _ in range(WAITS_MAX + 1):
                callers.append(socket.create_connection((host.settings.api_host, host.settings.api_port)))
                callers[-1].sendall(target.encode())
                ready.register(callers[-1], selectors.EVENT_READ)
            first = ready.select(9.0)  # before the others' time is over
        refused, answer = cast(socket.socket, first[0][0].fileobj), b""
        refused.settimeout(9.0)
        while b"}" not in answer:  # head and body may come apart
            answer += refused.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after:" in answer
        assert b":overloaded" in answer
    finally:
        for caller in callers:
            caller.close()
    host.wait_for(lambda: ask(host, "1", wait_for=99, timeout_ms=0).status_code == 504)
    assert "Traceback" not in host.log


@pytest.fixture
def generation(own_host: Callable[..., Host]) -> tuple[Host, Generation]:
    """Rows without an API process."""
    host = own_host()
    made = host.bundle("g1")
    host.write("g1", ITEMS)
    return host, load(host.settings, "g1", made.sha256)


def test_the_task_runs_only_while_someone_waits(generation: tuple[Host, Generation]) -> None:
    host, there = generation
    key = keys_of(["1"], host.settings.hash_key.encode())
    looks: list[int] = []

    def answering() -> list[Generation]:
        looks.append(threading.get_ident())
        return [there]

    async def stays() -> Message:
        return await asyncio.Future()

    async def leaves() -> Message:
        return {"type": "http.disconnect"}

    async def scenario() -> None:
        waiters = Waiters(answering)
        assert await waiters.granted(key, Wish(1, False, 5_000), stays) is there
        with pytest.raises(ProblemError, match="gone"):
            await waiters.granted(key, Wish(2, False, 5_000), leaves)
        many = [waiters.granted(key, Wish(2, False, 50), stays) for _ in range(250)]
        looks.clear()
        for refusal in await asyncio.gather(*many, return_exceptions=True):
            assert isinstance(refusal, ProblemError)
            assert refusal.body.status == 504
        assert len(looks) <= 7, "one look for all of them each 10 ms"
        async with asyncio.timeout(5):
            await asyncio.gather(*[one for one in asyncio.all_tasks() if one is not asyncio.current_task()])
        assert not waiters._waiting

    asyncio.run(scenario())
    assert threading.get_ident() not in looks, "the event loop does not look itself"


def test_a_host_that_serves_nothing_says_so(generation: tuple[Host, Generation]) -> None:
    def answering() -> list[Generation]:
        raise ProblemError(503, "not-ready", "no model event has activated a generation yet")

    async def stays() -> Message:
        return await asyncio.Future()

    async def scenario() -> None:
        with pytest.raises(ProblemError, match="no model event"):
            await Waiters(answering).granted(np.zeros((1, 2), np.uint64), Wish(1, False, 5_000), stays)

    asyncio.run(scenario())
