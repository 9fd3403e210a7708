"""The API's processes: they serve together, are exchanged and replaced, and end; what cannot start says why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.host import NOW, Host, api_workers, catalogue

ITEMS = catalogue(120)
IDS = [item.item_id for item in ITEMS]


def served(host: Host) -> httpx.Client:
    """A client of the host's API, which serves one generation."""
    host.bundle("g1")
    host.write("g1", ITEMS)
    host.activate("g1")
    client = host.start()
    host.ready()
    return client


def workers(host: Host) -> set[int]:
    """Process ids below the API's."""
    assert host._process is not None
    return set(api_workers(host._process.pid))


def test_several_processes_serve_forget_and_end_together(own_host: Callable[..., Host]) -> None:
    """They are told to forget once while they are exchanged, so that those that are to end forget too as long as they
    answer; and once while one is dead and not yet replaced: the others go on."""
    host = own_host(api_processes=2, prefetch_ttl_s=600.0)
    client, process = served(host), host._process
    assert process is not None
    body: dict[str, Any] = {"user_id": "u", "candidates": IDS, "as_of": NOW}
    kept = httpx.Limits(keepalive_expiry=None)
    callers = [httpx.Client(base_url=client.base_url, timeout=30.0, limits=kept) for _ in range(30)]

    def source(own: httpx.Client) -> tuple[str, bool]:
        """Where the user's block came from, and whether the process that answered is to end."""
        time.sleep(0.02)
        answer = own.post("/v1/score", json=body).raise_for_status()
        return answer.json()["user"]["source"], answer.headers.get("connection") == "close"

    for own in callers:
        source(own)
    assert {source(own) for own in callers} == {("cached", False)}
    old = workers(host)
    os.kill(process.pid, signal.SIGHUP)
    host.wait_for(lambda: "processes exchanged" in host.log, 60.0)
    while len(callers) > 10 and not source(callers[-1])[1]:
        callers.pop().close()
    os.kill(process.pid, signal.SIGUSR1)
    ending = [where for where, ends in map(source, callers) if ends]  # one more answer on each connection
    assert "store" in ending or len(ending) < 3  # a slow machine lets them end before
    for own in callers:
        own.close()

    host.wait_for(lambda: not workers(host) & old, 30.0)
    first, second = workers(host)
    os.kill(first, signal.SIGKILL)
    host.wait_for(lambda: not Path(f"/proc/{first}").exists())  # the parent knows
    os.kill(process.pid, signal.SIGUSR1)
    host.wait_for(lambda: host.log.count("Application startup complete") == 5, 60.0)
    assert second in workers(host)
    for _ in range(10):
        with httpx.Client(base_url=client.base_url, timeout=30.0) as fresh:
            assert fresh.post("/v1/score", json=body).is_success
    known = workers(host)
    process.terminate()
    assert process.wait(20) == 0
    assert not [pid for pid in known if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in host.log


def test_processes_are_exchanged_and_replaced_without_a_failed_request(own_host: Callable[..., Host]) -> None:
    """Callers keep their connections and do not retry. A killed process takes its own connections with it: after that
    only new ones are asked for an answer."""
    host = own_host(api_processes=2)
    client = served(host)
    process, before = host._process, workers(host)
    assert process is not None
    assert len(before) == 2
    body = {"user_id": "u", "candidates": IDS, "as_of": NOW}
    wrong, stop, answered = [], threading.Event(), [0] * 4

    def ask(number: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=30.0) as own:
            while not stop.is_set():
                try:
                    answer = own.post("/v1/score", json=body)
                    wrong.extend([] if answer.is_success else [answer.text])
                except httpx.TransportError as error:
                    wrong.append(repr(error))
                answered[number] += 1
                time.sleep(0.001 * number)  # connections that rest are those which a careless end would cut

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            known = workers(host)
            os.kill(process.pid, signal.SIGHUP)
            host.wait_for(lambda known=known: len(workers(host)) == 2 and not workers(host) & known, 90.0)  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert min(answered) > 10
    assert not workers(host) & before

    known = workers(host)
    os.kill(min(known), signal.SIGKILL)
    host.wait_for(lambda: len(workers(host) - known) == 1, 30.0)
    with httpx.Client(base_url=client.base_url, timeout=30.0) as fresh:
        assert fresh.post("/v1/score", json=body).is_success


def test_processes_that_do_not_start_leave_the_old_ones_serving(own_host: Callable[..., Host]) -> None:
    host = own_host(api_processes=2)
    client, process = served(host), host._process
    assert process is not None
    known, shared = workers(host), host.settings.metrics_dir
    away = shared.with_name("away")
    shared.rename(away)
    shared.write_text("no folder")
    os.kill(process.pid, signal.SIGHUP)
    host.wait_for(lambda: "the old ones go on" in host.log, 60.0)
    assert client.post("/v1/score", json={"user_id": "u", "candidates": IDS, "as_of": NOW}).is_success
    host.wait_for(lambda: workers(host) == known)
    shared.unlink()
    away.rename(shared)
    os.kill(min(known), signal.SIGSTOP)  # it does not end when it is told to
    os.kill(process.pid, signal.SIGHUP)
    host.wait_for(lambda: len(workers(host)) == 2 and not workers(host) & known, 90.0)
    with httpx.Client(base_url=client.base_url, timeout=30.0) as fresh:
        assert fresh.get("/readyz").is_success
    assert "a process that does not end is killed" in host.log


def test_sigterm_ends_the_process_with_its_requests_answered(own_host: Callable[..., Host]) -> None:
    host = own_host()
    client = served(host)
    process, answers = host._process, []
    assert process is not None
    body = {"user_id": "u", "candidates": IDS * 150}

    def ask(own: httpx.Client) -> None:
        answers.append(own.post("/v1/score", json=body).status_code)

    callers = [httpx.Client(base_url=client.base_url, timeout=30.0) for _ in range(6)]
    for own in callers:
        assert own.get("/healthz").is_success  # connected
    threads = [threading.Thread(target=ask, args=(own,)) for own in callers]
    for thread in threads:
        thread.start()
    host.wait_for(lambda: len(answers) > 0)  # the others are under way
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert answers == [200] * 6
    for own in callers:
        own.close()
    while time.monotonic() < began + 15:  # new callers are refused, not left waiting
        try:
            assert httpx.get(f"{client.base_url}/healthz").is_success
        except httpx.ConnectError:
            break
    assert process.wait(20) == 0
    assert time.monotonic() - began < 15
    assert "Traceback" not in host.log


def test_a_parent_that_is_killed_leaves_no_process(own_host: Callable[..., Host]) -> None:
    host = own_host(api_processes=2)
    host.start()
    process = host._process
    assert process is not None
    host.wait_for(lambda: len(workers(host)) == 2)
    known = workers(host)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in known):
        assert time.monotonic() < deadline, "a process outlives its parent"
        time.sleep(0.05)
    host._process = None


def test_a_taken_port_is_one_sentence(own_host: Callable[..., Host]) -> None:

    host = own_host()
    with socket.create_server(("127.0.0.1", host.settings.api_port)):
        done = subprocess.run(
            [sys.executable, "-m", "api", "serve"], env=host.environ(), capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert str(host.settings.api_port) in done.stderr
    assert "API_PORT" in done.stderr


@pytest.mark.parametrize("arguments", [["retrieval", "--generation", "nope", "--once"]])
def test_commands_that_cannot_work_say_so(own_host: Callable[..., Host], arguments: list[str]) -> None:

    host = own_host()
    done = subprocess.run(
        [sys.executable, "-m", "api", *arguments], env=host.environ(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("No retrieval index was built")


@pytest.mark.parametrize("command", ["up", "down", "demo", "serve"])
def test_a_state_folder_that_cannot_be_is_one_sentence(own_host: Callable[..., Host], command: str) -> None:
    environ = own_host().environ() | {"FORERANK_STATE": "/dev/null/x", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "api", command], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "/dev/null/x" in done.stderr
    assert done.stderr.strip().count("\n") == 0
