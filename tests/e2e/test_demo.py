"""`python -m api demo`, `up` and `down` as a newcomer runs them, against the real broker: on a small data set made by
hand, and on MovieLens 100K.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from api.stack import stack_of
from infra import processes
from infra.settings import Settings, environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MOVIES, USERS, RATINGS = 60, 30, 25
WORDS = ("Blue", "Lost", "Night", "River", "Stone", "Winter")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in MovieLens' CSV form."""
    folder, random = tmp_path_factory.mktemp("small-set"), np.random.default_rng(4)
    movies = [
        f'{at},"{WORDS[at % 6]} {WORDS[at // 6 % 6]} {at} ({1960 + at})",{("Comedy", "Drama", "War")[at % 3]}'
        for at in range(1, MOVIES + 1)
    ]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")
    ratings = [
        f"{user},{movie},{3 + 2 * (movie % 3 == user % 3)},{1_000_000 + user * 100 + place}"
        for user in range(1, USERS + 1)
        for place, movie in enumerate(random.choice(np.arange(1, MOVIES + 1), RATINGS, replace=False).tolist())
    ]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    return folder


@pytest.fixture
def small(settings: Callable[..., Settings]) -> Iterator[Settings]:
    """Settings whose stack is stopped afterwards."""
    one = settings(partitions=2)
    yield one
    run(one, "down")


def run(one: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environment(one), "KAFKA_BOOTSTRAP": one.kafka_bootstrap, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "api", *arguments], env=environ, capture_output=True, text=True, timeout=280, check=False
    )


def running(one: Settings) -> dict[str, int]:
    """Names and pids of the stack's processes."""
    return {process.name: process.pid for process in processes.listing(stack_of(one).folder)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("source", "items", "behaviours"),
    [("data", MOVIES, USERS * RATINGS), pytest.param("ml100k", 1_682, 100_000, marks=pytest.mark.data)],
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
    if source == "data":
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
def test_a_taken_port_is_said_before_anything_starts(small: Settings, data: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", small.api_port)):
        done = run(small, command, *([str(data)] if command == "demo" else []))
    assert done.returncode == 1
    assert str(small.api_port) in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert running(small) == {}


def test_a_data_set_that_is_not_there(small: Settings) -> None:
    done = run(small, "demo", "/nowhere/at-all")
    assert (done.returncode, done.stderr.strip()) == (1, "DATA=/nowhere/at-all is not a folder.")
