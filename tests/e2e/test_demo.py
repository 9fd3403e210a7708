"""`python -m api demo`, `up` and `down` as a newcomer runs them, against the real broker: on a small data set made by
hand, and on MovieLens 100K.
"""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api.stack import Stack, StackError, stack_of
from infra import processes
from infra.kafka.broker import Broker
from infra.settings import Settings
from tests.conftest import JARS, free_ports
from tests.e2e.conftest import MOVIES, RATINGS, USERS, environ_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def small(settings: Callable[..., Settings]) -> Iterator[Settings]:
    """Settings whose stack is stopped afterwards."""
    one = settings(partitions=2)
    yield one
    run(one, "down")


def run(one: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api", *arguments],
        env=environ_of(one),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def running(one: Settings) -> dict[str, int]:
    """Names and pids of the stack's processes."""
    return {process.name: process.pid for process in processes.listing(stack_of(one).folder)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("source", "items", "behaviours"),
    [("films", MOVIES, USERS * RATINGS), pytest.param("ml100k", 1_682, 100_000, marks=pytest.mark.data)],
)
def test_the_demo_from_nothing_and_again(
    small: Settings, request: pytest.FixtureRequest, source: str, items: int, behaviours: int
) -> None:
    data = request.getfixturevalue(source)
    first = run(small, "demo", str(data))
    assert first.returncode == 0, first.stderr
    assert f"{items:,} items" in first.stdout
    assert f"{behaviours:,} behaviours" in first.stdout
    ranked = re.findall(r"^ +(\d+) +(-?\d+\.\d+)  (\S.*?\S) {2,}(\d+)$", first.stdout, flags=re.M)
    assert [int(rank) for rank, *_ in ranked] == list(range(1, 11))
    scores = [float(score) for _, score, *_ in ranked]
    assert scores == sorted(scores, reverse=True)
    if source == "films":
        assert all(title.split()[-1] == movie for _, _, title, movie in ranked)
    changes = re.findall(r"(changed|restored) +score +(\S+) -> +(\S+) +visible after +(\d+) ms", first.stdout)
    assert [what for what, *_ in changes] == ["changed", "restored"]
    (_, before, between, _), (_, between_again, after, _) = changes
    assert between == between_again
    assert before == after == f"{scores[0]:.4f}"
    assert between == f"{scores[-1]:.4f}"
    assert "no-such-item" in first.stdout

    url = re.search(r"http://\S+:\d+", first.stdout)
    assert url is not None
    assert httpx.get(f"{url[0]}/readyz").is_success
    before_again = running(small)
    assert set(before_again) == {"api", "supervise"}
    again = run(small, "demo", str(data))
    assert again.returncode == 0, again.stderr
    assert "trained before" in again.stdout
    assert "published before" in again.stdout
    assert re.findall(r"^ +\d+ +-?\d+\.\d+ .*$", again.stdout, flags=re.M) == re.findall(
        r"^ +\d+ +-?\d+\.\d+ .*$", first.stdout, flags=re.M
    )
    assert running(small) == before_again

    assert run(small, "down").stdout.startswith("Stopped api, supervise;")
    assert running(small) == {}
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url[0]}/healthz")
    restarted = run(small, "demo", str(data))
    assert restarted.returncode == 0, restarted.stderr
    assert "published before" in restarted.stdout


def test_up_and_down_touch_only_their_own(small: Settings) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = run(small, "up")
        assert started.returncode == 0, started.stderr
        first = running(small)
        assert set(first) == {"api", "supervise"}
        answer = httpx.get(f"http://127.0.0.1:{small.api_port}/readyz")
        assert (answer.status_code, "no model event" in answer.json()["detail"]) == (503, True)
        assert run(small, "up").returncode == 0
        assert running(small) == first
        assert run(small, "down").returncode == 0
        assert running(small) == {}
        assert run(small, "down").stdout.strip() == "Nothing was running."
        assert stranger.poll() is None
    finally:
        stranger.communicate(b"\n")


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_taken_port_is_said_before_anything_starts(small: Settings, films: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", small.api_port)):
        done = run(small, command, *([str(films)] if command == "demo" else []))
    assert done.returncode == 1
    assert str(small.api_port) in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert running(small) == {}


def test_a_data_set_that_is_not_there(small: Settings) -> None:
    done = run(small, "demo", "/nowhere/at-all")
    assert (done.returncode, done.stderr.strip()) == (1, "DATA=/nowhere/at-all is not a folder.")


def test_a_folder_that_is_no_data_set_stops_nothing(small: Settings, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    other = processes.start("supervise", argv, stack_of(small).folder)
    (tmp_path / "photos").mkdir()
    done = run(small, "demo", str(tmp_path / "photos"))
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"DATA={tmp_path / 'photos'} is not a data set in MovieLens' form")
    assert (done.stdout, done.stderr.strip().count("\n")) == ("", 0)
    assert other.alive()


def test_a_start_that_fails_gives_the_reason_and_stops_what_it_started(small: Settings) -> None:
    small.state.mkdir(parents=True)
    (small.state / "cluster.json").write_text('{"cluster": "another", "prefix": "", "partitions": 2}')
    done = run(small, "up")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{small.state} belongs to other topics")
    assert done.stderr.strip().count("\n") == 0
    assert running(small) == {}


def test_what_ran_before_a_failed_start_goes_on(small: Settings) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    stack = Stack(small, stack_of(small).folder)
    before = processes.start("supervise", argv, stack.folder)
    new = None

    def start() -> None:
        nonlocal new
        with stack.undone_on_failure():
            assert not stack.jobs_up()
            assert stack.api_up()
            new = processes.find("api", stack.folder)
            raise StackError("of the next step")

    with pytest.raises(StackError, match="of the next step"):
        start()
    assert before.alive()
    assert new is not None
    assert not new.alive()


def test_another_program_that_answers_on_the_port_is_not_our_api(small: Settings) -> None:
    """It takes the port between the look at it and the start."""

    class Late(Stack):
        def check_port(self) -> None:
            pass

    class Healthz(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    stack = Late(small, stack_of(small).folder)
    processes.start("supervise", [sys.executable, "-c", "import time; time.sleep(600)"], stack.folder)
    with http.server.HTTPServer(("127.0.0.1", small.api_port), Healthz) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert httpx.get(f"{stack.url}/healthz").is_success
            with pytest.raises(StackError, match=f"cannot listen on 127.0.0.1:{small.api_port}"):
                stack.api_up()
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def local(tmp_path: Path, broker: Broker) -> Iterator[dict[str, str]]:
    """Variables of a host with a Kafka of its own; `broker` has downloaded it."""
    (tmp_path / "kafka").mkdir()
    (tmp_path / "kafka" / "jars").symlink_to(JARS / "jars")
    ports = free_ports(3)
    named = ("FORERANK_KAFKA_PORT", "FORERANK_KAFKA_CONTROLLER_PORT", "API_PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FORERANK_", "KAFKA_", "API_"))}
    environ = kept | dict(zip(named, map(str, ports), strict=True))
    environ |= {"FORERANK_KAFKA_DIR": str(tmp_path / "kafka"), "FORERANK_STATE": str(tmp_path / "state")}
    environ |= {"FORERANK_PARTITIONS": "2", "OMP_NUM_THREADS": "1"}
    yield environ
    command(environ, "api", "down")


def command(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environ, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_wiped_kafka_is_a_new_beginning(local: dict[str, str], tmp_path: Path) -> None:
    assert command(local, "api", "up").returncode == 0
    refused = command(local, "infra.kafka", "wipe")
    assert refused.returncode == 1
    assert "Nothing was wiped" in refused.stderr
    assert command(local, "api", "down").stdout.startswith("Stopped api, supervise, Kafka;")
    assert (tmp_path / "state" / "cluster.json").exists()
    wiped = command(local, "infra.kafka", "wipe")
    assert (wiped.returncode, f"derived from it in {tmp_path / 'state'}" in wiped.stdout) == (0, True)
    again = command(local, "api", "up")
    assert again.returncode == 0, again.stderr


def test_an_interrupted_start_leaves_nothing_behind(local: dict[str, str], tmp_path: Path) -> None:
    up = subprocess.Popen(
        [sys.executable, "-m", "api", "up"],
        env=local,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while processes.find("kafka", tmp_path / "kafka") is None:
        assert time.monotonic() < deadline
        assert up.poll() is None
        time.sleep(0.02)
    os.killpg(up.pid, signal.SIGINT)  # as a terminal does it
    _, errors = up.communicate(timeout=60)
    assert up.returncode == 130
    assert errors.splitlines()[-1] == "Stopped."
    assert processes.find("kafka", tmp_path / "kafka") is None
