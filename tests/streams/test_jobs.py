"""The supervisor's child processes: which are killed, which start again, and which have given up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from infra import priority, processes
from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from streams.heartbeat import Heartbeat, read_heartbeat
from streams.jobs import Jobs
from streams.worker import NEEDS_REFILL
from tests.conftest import wait_until

pytestmark = pytest.mark.e2e


@contextmanager
def kept(settings: Settings, **options: float) -> Iterator[Jobs]:
    jobs = Jobs(settings, **options)
    try:
        yield jobs
    finally:
        for process in processes.listing(settings.state / "logs"):
            processes.stop(process, 0.0)


def pid_of(settings: Settings, name: str) -> int:
    found = processes.find(name, settings.state / "logs")
    return found.pid if found else 0


def test_a_job_that_falls_silent_is_killed_and_started_again(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    with kept(host, silent_s=4.0) as jobs:
        needed = {"ingest": ["streams", "ingest"]}

        def runs(but: int = 0) -> bool:
            jobs.keep(needed)
            beat, pid = read_heartbeat(host.heartbeat_dir, "ingest"), pid_of(host, "ingest")
            return beat is not None and beat.state == "running" and beat.pid == pid != but

        wait_until(runs, "ingest runs")
        first = pid_of(host, "ingest")
        os.kill(first, signal.SIGSTOP)
        wait_until(lambda: runs(but=first), "another ingest runs")
        assert processes.identity_of(first) is None


def test_a_job_that_ignores_its_end_holds_up_nothing_but_its_own_generation(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    ignores = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
    with kept(host, stop_s=1.0) as jobs:
        old = processes.start(
            "replicate-old", [sys.executable, "-c", f"{ignores}; time.sleep(600)"], host.state / "logs"
        )
        wait_until(lambda: old.log.read_text() == "up\n", "it ignores SIGTERM")
        needed = {name: ["streams", "ingest"] for name in ("ingest", "reconcile-old")}
        jobs.keep(needed)
        assert old.alive(), "its end was not waited for"
        assert pid_of(host, "ingest"), "what has nothing to do with it runs"

        def runs() -> bool:
            jobs.keep(needed)
            found = pid_of(host, "reconcile-old") != 0
            assert not (found and old.alive()), "two write to one index"
            return found

        wait_until(runs, "it is killed, and its successor runs")


def test_a_job_that_cannot_be_started_is_tried_again_and_the_others_run(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    (host.state / "logs" / "histories.log").mkdir(parents=True)
    with kept(host) as jobs:
        needed = {name: ["streams", "ingest"] for name in ("histories", "ingest")}
        jobs.keep(needed)
        assert (pid_of(host, "histories"), pid_of(host, "ingest") > 0) == (0, True)
        (host.state / "logs" / "histories.log").rmdir()

        def runs() -> bool:
            jobs.keep(needed)
            return pid_of(host, "histories") > 0

        wait_until(runs, "it is started again")


def test_fresh_rows_go_before_what_is_made_of_them(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    with kept(host) as jobs:
        jobs.keep({"ingest": ["streams", "ingest"], "retrieval-g": ["api", "retrieval", "--generation", "g"]})
        pids = [pid_of(host, name) for name in ("ingest", "retrieval-g")]
        assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [priority.JOB, priority.NICE]


def test_an_older_heartbeat_condemns_no_new_process(settings: Callable[..., Settings]) -> None:
    """A job that ends before its first heartbeat is started again, whatever an earlier one left behind."""
    host = settings(partitions=2)
    Heartbeat("encode-g", 1, state="stopped", reason="needs refill: long ago", status=NEEDS_REFILL).write(
        host.heartbeat_dir
    )
    with kept(host) as jobs:
        pids = set()

        def again() -> bool:
            jobs.keep({"encode-g": ["streams", "no-such-command"]})
            pids.add(pid_of(host, "encode-g"))
            return len(pids - {0}) > 1

        wait_until(again, "it was started twice", 10)
        assert jobs.gave_up("encode-g") == ""


def test_a_job_that_says_that_it_cannot_go_on_is_not_started_again(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    with kept(host) as jobs:
        needed = {"encode-g": ["streams", "encode", "--generation", "g"]}  # there is no bundle

        def given_up() -> bool:
            jobs.keep(needed)
            return jobs.gave_up("encode-g") != ""

        wait_until(given_up, "encode gives up")
        assert "bad bundle" in jobs.gave_up("encode-g")
        jobs.keep(needed)
        assert pid_of(host, "encode-g") == 0
