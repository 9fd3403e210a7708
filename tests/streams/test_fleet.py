"""What API processes say they have loaded: whose word counts, and what a switch waits for."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from infra.settings import Settings
from streams import fleet
from streams.fleet import SILENT_MS, Report
from tests.conftest import wait_until

NOW = 1_000_000_000


def report(pid: int, *warm: str, ago_ms: int = 0, **failed: str) -> Report:
    return Report(pid, "i", NOW - ago_ms, list(warm), failed)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], ""),
        ([report(1, "a", "b"), report(2, "b")], ""),
        ([report(1, "b"), report(2, "a"), report(3)], "API process 2, 3 has not loaded it yet"),
        ([report(1), report(2, b="the bundle is damaged")], "API process 2: the bundle is damaged"),
        ([report(1, "b"), report(2, a="of another one")], "API process 2 has not loaded it yet"),
        ([report(1, "b"), report(2, ago_ms=SILENT_MS)], ""),
        ([report(1, "b"), report(2, ago_ms=SILENT_MS, b="long ago")], ""),
        ([report(1, "b"), report(2, ago_ms=SILENT_MS - 1)], "API process 2 has not loaded it yet"),
    ],
)
def test_a_switch_waits_for_all_who_say_anything(found: list[Report], said: str) -> None:
    assert fleet.waits_for(found, "b", NOW) == said


def test_the_word_of_a_process_counts_while_it_lives(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path)
    assert fleet.reports(settings) == []
    child = multiprocessing.get_context("spawn").Process(target=_tell_and_stay, args=(settings,))
    child.start()
    try:
        fleet.tell(settings, {"b", "a"}, {"c": "why"})
        wait_until(lambda: len(fleet.reports(settings)) == 2, "the child's word")
        mine, its = sorted(fleet.reports(settings), key=lambda one: one.pid != os.getpid())
        assert (mine.warm, mine.failed, its.pid, its.warm) == (["a", "b"], {"c": "why"}, child.pid, ["x"])
        child.kill()
        child.join()
        assert [one.pid for one in fleet.reports(settings)] == [os.getpid()]
    finally:
        child.kill()
        child.join()
    assert [path.name for path in settings.api_dir.iterdir()] == [f"{os.getpid()}.json"]
    fleet.leave(settings)
    fleet.leave(settings)
    assert fleet.reports(settings) == []


def test_what_an_earlier_process_of_the_same_pid_or_a_crash_of_the_machine_left_is_removed(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path)
    fleet.tell(settings, ["a"], {})
    path = settings.api_dir / f"{os.getpid()}.json"
    path.write_bytes(path.read_bytes().replace(b'"identity":"', b'"identity":"another boot'))
    (settings.api_dir / "77.json").write_bytes(b"\0\0")
    assert fleet.reports(settings) == []
    assert list(settings.api_dir.iterdir()) == []


def _tell_and_stay(settings: Settings) -> None:
    fleet.tell(settings, ["x"], {})
    multiprocessing.Event().wait()
