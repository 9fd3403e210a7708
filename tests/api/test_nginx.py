"""A real nginx before the API's processes: a user's requests meet in one of them, and a killed one fails none."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra import nginx
from infra.settings import Settings, SettingsError
from tests.api.test_serve import IDS, served, workers
from tests.conftest import answered, debian_program, free_ports, wait_until
from tests.host import NOW, Host, Seen

USERS = [f"user {number}/ü" if number % 2 else f"u{number}" for number in range(24)]
PROCESSES = 3


@pytest.fixture
def behind(own_host: Callable[..., Host], tmp_path: Path) -> Iterator[tuple[Host, str]]:
    """A host with several processes and histories of USERS, and the address of an nginx before it."""
    program = debian_program("nginx", "nginx-light")
    host = own_host(api_processes=PROCESSES, api_sockets=str(tmp_path / "s"), prefetch_ttl_s=600.0)
    host.behave([Seen(user, IDS[at], NOW - 1_000) for at, user in enumerate(USERS)])
    served(host)
    host.wait_for(lambda: all(accepts(host.settings.api_socket(place)) for place in range(PROCESSES)), 60.0)
    (port,) = free_ports(1)
    folder = tmp_path / "nginx"
    folder.mkdir()
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    made = nginx.config(host.settings, f"127.0.0.1:{port}")
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; worker_processes 1; user root;"
        f"events {{ worker_connections 256; }} http {{ access_log off; {temporary}\n{made} }}"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(
            lambda: answered(lambda: httpx.get(f"{url}/readyz").is_success),
            "nginx answers",
            20.0,
            lambda: process.poll() is None or pytest.fail((folder / "log").read_text()),
            lambda: (folder / "log").read_text(),
        )
        yield host, url
    finally:
        process.terminate()
        process.wait(20)


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as caller:
        return caller.connect_ex(str(path)) == 0


def quoted(user: str) -> str:
    return urllib.parse.quote(user, safe="")


def score(client: httpx.Client, user: str, headers: dict[str, str] | None = None) -> str:
    """Where the user's block came from."""
    body: dict[str, Any] = {"user_id": user, "candidates": IDS[:5], "as_of": NOW}
    answer = client.post("/v1/score", json=body, headers=headers)
    assert answer.is_success, answer.text
    source: str = answer.json()["user"]["source"]
    return source


def test_a_users_requests_meet_in_one_process(behind: tuple[Host, str]) -> None:
    _, url = behind
    with httpx.Client(base_url=url, timeout=30.0) as client:
        for user in USERS:
            assert client.post(f"/v1/users/{quoted(user)}/prefetch", json={"as_of": NOW}).status_code == 202
        sources = [score(client, user, {"X-Forerank-User": quoted(user)}) for user in USERS]
        assert sources == ["prefetched"] * len(USERS)
        apart = [score(client, user) for user in USERS]  # right without the header, too, but inferred anew by most
    assert {"prefetched", "store"} <= set(apart)


def test_the_query_names_the_user_of_binary_requests(behind: tuple[Host, str]) -> None:
    host, url = behind
    numbers = b"".join(int(one).to_bytes(8, "little") for one in IDS if one.isdigit())
    kind = {"content-type": "application/octet-stream"}
    with httpx.Client(base_url=url, timeout=30.0) as client:
        answers = [
            client.post("/v1/score", params={"user_id": user}, content=numbers, headers=kind) for user in USERS * 2
        ]
    assert [one.status_code for one in answers] == [200] * len(answers)
    metrics = host.client.get("/metrics").text
    (missed,) = [
        line for line in metrics.splitlines() if line.startswith("forerank_cache_lookups_total{") and '"miss"' in line
    ]
    assert float(missed.split()[-1]) == len(USERS)  # none twice


def test_a_killed_process_fails_no_request(behind: tuple[Host, str]) -> None:
    host, url = behind
    wrong, stop, answers = [], threading.Event(), [0] * 3

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=30.0) as client:
            while not stop.is_set():
                for user in USERS:
                    try:
                        score(client, user, {"X-Forerank-User": quoted(user)})
                    except (AssertionError, httpx.TransportError) as error:
                        wrong.append(repr(error))
                answers[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(answers))]
    for thread in threads:
        thread.start()
    try:
        host.wait_for(lambda: min(answers) > 0, 60.0)
        known = workers(host)
        os.kill(min(known), signal.SIGKILL)
        host.wait_for(lambda: len(workers(host) - known) == 1, 60.0)
        before = list(answers)
        host.wait_for(lambda: all(now > then for now, then in zip(answers, before, strict=True)), 60.0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []

    known = workers(host)
    os.kill(min(known), signal.SIGKILL)
    host.wait_for(lambda: len(workers(host) - known) == 1, 60.0)
    (coming,) = workers(host) - known
    os.kill(coming, signal.SIGSTOP)  # does not serve yet
    try:
        with httpx.Client(base_url=url, timeout=30.0) as client:
            for user in USERS:
                score(client, user, {"X-Forerank-User": quoted(user)})
    finally:
        os.kill(coming, signal.SIGCONT)


def test_a_slow_process_keeps_its_users(behind: tuple[Host, str]) -> None:
    host, url = behind

    def ask(user: str) -> str:
        with httpx.Client(base_url=url, timeout=60.0) as client:
            return score(client, user, {"X-Forerank-User": quoted(user)})

    assert [ask(user) for user in USERS] == ["store"] * len(USERS)
    slow = min(workers(host))
    with ThreadPoolExecutor(len(USERS)) as pool:
        os.kill(slow, signal.SIGSTOP)
        try:
            answers = [pool.submit(ask, user) for user in USERS]
            done, waiting = wait(answers, 3.0)
        finally:
            os.kill(slow, signal.SIGCONT)
        assert done
        assert waiting
        assert [answer.result() for answer in answers] == ["cached"] * len(USERS)
    assert [ask(user) for user in USERS] == ["cached"] * len(USERS), "it was not left out afterwards"


def test_without_sockets_there_is_nothing_to_choose_from() -> None:
    with pytest.raises(SettingsError, match="FORERANK_API_SOCKETS"):
        nginx.config(Settings(), "8000")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FORERANK_")}
    done = subprocess.run(
        [sys.executable, "-m", "infra.nginx"], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_folder_that_cannot_hold_sockets_is_one_sentence(own_host: Callable[..., Host], tmp_path: Path) -> None:
    for folder in ("/dev/null/x", str(tmp_path / ("long" * 30))):
        environ = own_host(api_sockets=folder).environ()
        done = subprocess.run(
            [sys.executable, "-m", "api", "serve"], env=environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert "FORERANK_API_SOCKETS" in done.stderr
        assert done.stderr.strip().count("\n") == 0
