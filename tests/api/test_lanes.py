"""Steps on lanes: never more at once than lanes, each done once whatever its deadline, requests before what nobody
waits for yet."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

import api.lanes
from api.lanes import AHEAD_S, Lanes, Rank, Step, lanes_of
from api.runtime.runtime import Runtime
from infra.settings import Settings
from tests.conftest import wait_until


@pytest.fixture
def blocked() -> Iterator[tuple[Lanes, Callable[[], None]]]:
    """One lane that is busy until the second is called."""
    go, began = threading.Event(), threading.Event()
    with Runtime(1) as runtime:
        lanes = Lanes(runtime)

        def block() -> None:
            began.set()
            assert go.wait(30)

        lanes.submit(Step.FIND, 1, block)
        assert began.wait(30)
        yield lanes, go.set
        go.set()


def test_no_more_steps_run_at_once_than_there_are_lanes() -> None:
    """Whoever does them: lanes, or callers in place of a lane without work."""
    lock, meet, running, most, who = threading.Lock(), threading.Barrier(12, timeout=30), 0, 0, set[bool]()

    def step() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            who.add(threading.current_thread().name.startswith("lane"))
        time.sleep(1e-3)  # the GIL is released, as kernels do
        with lock:
            running -= 1

    with Runtime(2) as runtime:
        lanes = Lanes(runtime)

        def caller() -> None:
            meet.wait()
            for _ in range(20):
                waiting = lanes.submit(Step.INFER, 1, step)
                lanes.run(Step.FIND, 1, step)
                waiting.result(30)

        threads = [threading.Thread(target=caller) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lanes.run(Step.FIND, 1, step)
        assert (most, who, running) == (2, {True, False}, 0)
        wait_until(lambda: runtime._free == 2, "all lanes are free")


def test_a_step_whose_deadline_has_passed_is_done_all_the_same(blocked: tuple[Lanes, Callable[[], None]]) -> None:
    lanes, go = blocked
    done = list[str]()
    soon = time.perf_counter() + 0.02  # more than the step takes: it is late only when the lane comes to it
    steps = [
        lanes.submit(Step.FIND, 1, lambda: done.append("request")),
        lanes.submit(Step.FIND, 1, lambda: done.append("late by then"), until=soon),
        lanes.submit(Step.FIND, 1, lambda: done.append("late"), until=0.0),
    ]
    while time.perf_counter() < soon:
        threading.Event().wait(0.005)
    go()
    for one in steps:
        one.result(30)
    assert sorted(done[:2]) == ["late", "late by then"]
    assert done[2:] == ["request"]


def test_requests_go_first_and_what_somebody_waits_for_is_a_request(
    blocked: tuple[Lanes, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.lanes, "AHEAD_S", 60.0)
    lanes, go = blocked
    done = list[str]()
    steps = [lanes.submit(Step.FIND, 1, lambda: done.append("request"))]
    ahead, hurried = (
        lanes.submit(Step.INFER, 1, lambda name=name: done.append(name), Rank.AHEAD) for name in ("ahead", "hurried")
    )
    steps += [lanes.submit(Step.FIND, 1, lambda: done.append("request"))]
    lanes.hurry(hurried)
    steps += [lanes.submit(Step.SCORE, 1, lambda: done.append("last step"), Rank.NEXT), ahead, hurried]
    go()
    for one in steps:
        one.result(30)
    assert (done[0], done[-1], len(done)) == ("last step", "ahead", 5)


def test_requests_keep_nothing_waiting_for_ever(blocked: tuple[Lanes, Callable[[], None]]) -> None:
    """Each request brings the next one, so that there always is one."""
    lanes, go = blocked
    end, count = time.monotonic() + 30, 0

    def request() -> None:
        nonlocal count
        count += 1
        if not ahead.done() and time.monotonic() < end:
            lanes.submit(Step.FIND, 1, request)

    lanes.submit(Step.FIND, 1, request)
    began = time.monotonic()
    ahead = lanes.submit(Step.INFER, 1, lambda: None, Rank.AHEAD)
    go()
    ahead.result(60)
    assert time.monotonic() - began >= AHEAD_S
    assert time.monotonic() < end
    assert count > 1


def test_a_step_is_done_once_and_its_error_is_told(blocked: tuple[Lanes, Callable[[], None]]) -> None:
    lanes, go = blocked
    done = list[str]()

    def fails() -> None:
        done.append(threading.current_thread().name)
        raise ValueError("no such row")

    step = lanes.submit(Step.INFER, 1, fails, Rank.AHEAD)
    lanes.hurry(step)
    lanes.help(step)
    lanes.help(step)
    after = lanes.submit(Step.FIND, 1, lambda: None, Rank.AHEAD)
    go()
    after.result(30)
    with pytest.raises(ValueError, match="no such row"):
        step.result(0)
    with pytest.raises(ValueError, match="no such row"):
        lanes.run(Step.FIND, 1, fails)
    assert len(done) == 2
    assert done[0] == threading.current_thread().name


def test_a_closed_runtime_cancels_what_has_not_begun() -> None:
    runtime = Runtime(1)
    lanes = Lanes(runtime)
    step = lanes.submit(Step.FIND, 1, lambda: None)
    runtime.start()
    step.result(30)
    runtime.close()
    with pytest.raises(CancelledError):
        lanes.run(Step.FIND, 1, lambda: None)
    never = Runtime(1)
    step = Lanes(never).submit(Step.FIND, 1, lambda: None)
    never._lanes.clear()
    never.close()
    with pytest.raises(CancelledError):
        step.result(30)


def test_the_lanes_of_all_processes_are_no_more_than_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(api.lanes, "_QUOTA", tmp_path / "cpu.max")
    assert [lanes_of(Settings(api_processes=count)) for count in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert lanes_of(Settings(lanes=3, api_processes=8)) == 3
    for quota, lanes in (("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert lanes_of(Settings()) == lanes
