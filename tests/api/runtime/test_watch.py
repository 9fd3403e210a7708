"""What the lanes did: busy time, waiting time by class, what was dropped and why, and timelines."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from prometheus_client import REGISTRY

from api.runtime.runtime import LateError, Runtime
from api.runtime.watch import TRACES_KEPT, Watch
from tests.api.runtime.graphs import Gate, chain, made
from tests.conftest import wait_until

ONE = torch.zeros(1)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"forerank_{name}", labels) or 0.0


def dropped() -> dict[str, float]:
    return {why: value("queries_dropped_total", reason=why) for why in ("refused", "late", "cancelled", "failed")}


def test_who_waits_and_who_is_dropped_is_counted(tmp_path: Path) -> None:
    gate = Gate()

    def fails(k: int, values: list[Any]) -> Any:
        raise ValueError

    watch, short = Watch(1), chain(1e-6)
    before, busy = dropped(), value("lane_busy_seconds_total", lane="0")
    waited = {name: value("query_wait_seconds_sum", priority=name) for name in "789"}
    with Runtime(1, observer=watch) as runtime:
        with pytest.raises(LateError):
            runtime.submit(chain(1.0), ONE, within_s=0.5)
        started = time.monotonic()
        blocker = runtime.submit(chain(1e-6, 1e-6, run=gate), ONE, priority=7)
        assert gate.began.wait(30)
        low = runtime.submit(short, ONE, priority=8)
        answers = [
            runtime.submit(short, ONE, priority=9, within_s=1e-3),
            runtime.submit(short, ONE, priority=9),
            runtime.submit(made([0.1], [[]], fails), ONE, priority=9),
        ]
        came = time.monotonic()
        assert value("query_queue") == 4
        assert answers[1].cancel()
        assert value("query_queue") == 3
        while time.monotonic() < came + 2e-3:
            threading.Event().wait(1e-3)
        held = time.monotonic() - came
        gate.go.set()
        assert blocker.result(30) == 1
        assert low.result(30)
        assert isinstance(answers[0].exception(30), LateError)
        assert isinstance(answers[2].exception(30), ValueError)
        wait_until(lambda: value("query_wait_seconds_count", priority="9") >= 3, "all have left")
    ended = time.monotonic()
    assert {why: count - before[why] for why, count in dropped().items()} == {
        "refused": 1,
        "late": 1,
        "cancelled": 1,
        "failed": 1,
    }
    assert held <= value("lane_busy_seconds_total", lane="0") - busy <= ended - started
    assert value("query_wait_seconds_sum", priority="7") - waited["7"] <= ended - started - held
    assert value("query_wait_seconds_sum", priority="8") - waited["8"] >= held
    assert value("query_wait_seconds_sum", priority="9") - waited["9"] >= 2 * held  # the cancelled one left before
    assert value("query_queue") == 0
    assert not watch.traces
    assert watch.write(low, "x") is None


def test_a_timeline_shows_what_a_query_waited_for(tmp_path: Path) -> None:
    gate = Gate()
    watch = Watch(1, tmp_path / "traces")
    first, second = chain(0.1, 0.1, run=gate), chain(0.1, 0.1, 0.1)
    watch.name(first, "first")
    watch.name(second, "second")
    with Runtime(1, observer=watch) as runtime:
        runtime.submit(chain(0.1), ONE).result(30)  # ended before: in no timeline
        blocker = runtime.submit(first, ONE)
        assert gate.began.wait(30)
        answer = runtime.submit(second, ONE, priority=3)
        gate.go.set()
        answer.result(30)
        blocker.result(30)
        names = [watch.write(answer, "second", "its id") for _ in range(TRACES_KEPT + 3)]
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == names[3:]
    found = msgspec.json.decode((tmp_path / "traces" / str(names[-1])).read_bytes())
    events = [one for one in found["traceEvents"] if one["ph"] == "X"]
    (whole,) = [one for one in events if one["cat"] == "query"]
    assert (whole["name"], whole["args"]["priority"], whole["args"]["id"]) == ("second", 3, "its id")
    own = [one for one in events if one["cat"] == "this"]
    assert [one["name"] for one in own] == ["second 0", "second 1", "second 2"]
    assert [one["name"] for one in events if one["cat"] == "other"] == ["first 0", "first 1"]
    for one in own:
        assert whole["ts"] <= one["ts"]
        assert one["ts"] + one["dur"] <= whole["ts"] + whole["dur"] + 0.01
    lanes = {one["tid"]: one["args"]["name"] for one in found["traceEvents"] if one["ph"] == "M"}
    assert {lanes[one["tid"]] for one in own} == {"lane 0"}
