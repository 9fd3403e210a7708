"""Work in the background gets little of a processor that others want; a process that is done with it is as before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.priority import JOB, NICE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads and sessions are Linux's")
_AUTOGROUP = Path("/proc/self/autogroup")
_LOOK = """
import os, pathlib, threading
from infra.priority import Background, lower
def look():
    path = pathlib.Path("/proc/self/autogroup")
    weight = (path.read_text().split() if path.exists() else [])[-1:]  # empty in a session that is in no group
    print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), *weight)
look()
with Background() as background:
    background.submit(look).result()
    look()
look()
"""
_SPIN = """
import time
def spin():
    while time.process_time() < {limit}: pass
"""


def run(code: str, own_session: bool = True) -> list[list[str]]:
    found = subprocess.run(
        [sys.executable, "-c", code], start_new_session=own_session, capture_output=True, text=True, check=True
    )
    return [line.split() for line in found.stdout.splitlines()]


def test_the_thread_steps_back_and_the_process_is_afterwards_as_before() -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    before, thread, main, after = run(_LOOK)
    assert [int(seen[0]) for seen in (before, thread, main, after)] == [mine, max(mine, NICE), mine, mine]
    if _AUTOGROUP.exists():
        assert [seen[1] for seen in (before, thread, main, after)] == ["0", str(NICE), str(NICE), "0"]


def test_a_job_has_a_lower_weight_and_its_background_a_lower_one_still() -> None:
    before, thread, main, after = run(_LOOK.replace("\nlook()", "\nlower(os.getpid())\nlook()", 1))
    assert [int(seen[0]) for seen in (before, thread, main, after)] == [JOB, NICE, JOB, JOB]
    if _AUTOGROUP.exists():
        assert [seen[1] for seen in (before, thread, main, after)] == [str(at) for at in (JOB, NICE, NICE, JOB)]


def test_the_weight_of_a_session_that_is_not_its_own_stays() -> None:
    weights = {tuple(seen[1:]) for seen in run(_LOOK, own_session=False)}
    assert len(weights) == 1


def test_beside_others_it_gets_a_small_part_of_a_processor() -> None:
    processor = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{processor}}})\n"
    spin = _SPIN.format(limit=60)
    behind = pin + spin + "from infra.priority import Background\nwith Background() as b: b.submit(spin).result()"
    ahead = pin + _SPIN.format(limit=2.0) + "spin()"
    quiet = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", behind], **quiet) as one:  # type: ignore[call-overload]
        try:
            while spent(one.pid) < 0.5:
                assert one.poll() is None
            before = spent(one.pid)
            with subprocess.Popen([sys.executable, "-c", ahead], **quiet) as two:  # type: ignore[call-overload]
                assert two.wait(120) == 0
            assert spent(one.pid) - before < 0.8, "of the same processor, while another used two seconds"
        finally:
            one.kill()


def spent(pid: int) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
