"""Detached processes: found again by who they are, stopped for sure, strangers left alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra import processes
from tests.conftest import wait_until

_SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
_STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)",
]


def test_start_find_list_stop(tmp_path: Path) -> None:
    one = processes.start("one", _SLEEP, tmp_path)
    two = processes.start("two", _SLEEP, tmp_path)
    try:
        assert one.alive()
        assert processes.find("one", tmp_path) == one
        assert processes.listing(tmp_path) == [one, two]
        wait_until(lambda: one.log.read_text() == "up\n", "the job is up", 10)
        with pytest.raises(processes.ProcessError, match="already running"):
            processes.start("one", _SLEEP, tmp_path)
        assert processes.stop(one)
        assert not one.alive()
        assert not one.file.exists()
        assert processes.listing(tmp_path) == [two]
    finally:
        for process in processes.listing(tmp_path):
            processes.stop(process)


def test_it_outlives_the_command_that_started_it(tmp_path: Path) -> None:
    code = f"import infra.processes, pathlib; infra.processes.start('job', {_SLEEP!r}, pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    job = processes.find("job", tmp_path)
    assert job is not None
    assert os.getsid(job.pid) == job.pid  # Ctrl-C in the starting terminal does not reach it
    assert processes.stop(job)


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    job = processes.start("stubborn", _STUBBORN, tmp_path)
    wait_until(lambda: job.log.read_text().strip(), "its child's pid", 10)
    child = int(job.log.read_text())
    assert not processes.stop(job, deadline_s=0.2)
    assert not job.alive()
    wait_until(lambda: processes.identity_of(child) is None, "the child is gone", 10)


def test_a_stranger_with_the_recorded_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(_SLEEP, stdout=subprocess.DEVNULL)
    try:
        record = {"name": "job", "pid": stranger.pid, "identity": "another start time", "folder": str(tmp_path)}
        (tmp_path / "job.json").write_text(json.dumps(record))
        assert processes.find("job", tmp_path) is None
        assert processes.stop(processes.Process("job", stranger.pid, "another start time", tmp_path))
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_one_that_was_killed_is_not_alive_and_can_be_started_again(tmp_path: Path) -> None:
    job = processes.start("job", _SLEEP, tmp_path)
    os.kill(job.pid, signal.SIGKILL)
    wait_until(lambda: not job.alive(), "the job has ended", 10)
    assert processes.find("job", tmp_path) is None
    again = processes.start("job", _SLEEP, tmp_path)
    assert again.pid != job.pid
    processes.stop(job)  # the record of the newer one must survive
    assert processes.find("job", tmp_path) == again
    processes.stop(again)


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(processes.ProcessError, match="job could not be started"):
        processes.start("job", [str(tmp_path / "nothing")], tmp_path)
    assert processes.listing(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"name": "job", "pid": "x", "identity": "y"}'])
def test_a_damaged_record_is_no_process(tmp_path: Path, content: str) -> None:
    (tmp_path / "job.json").write_text(content)
    assert processes.listing(tmp_path) == []


def test_a_large_log_is_set_aside(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    with log.open("wb") as file:
        file.truncate(17 << 20)
    job = processes.start("job", [sys.executable, "-c", "print('new')"], tmp_path)
    wait_until(lambda: not job.alive(), "the job has ended", 10)
    assert log.read_text() == "new\n"
    assert (tmp_path / "job.log.1").stat().st_size == 17 << 20
