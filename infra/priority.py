"""Work that leaves the processors to whoever else wants them: the nearline jobs to the API, and to the jobs that keep a
served generation fresh whatever fills, verifies or indexes one.

Two things decide on Linux, each where the other has no effect. Within a control group (a container, a systemd unit) it
is the thread's nice value. Elsewhere the kernel may first share the processors among sessions (`sched_autogroup`), and
each job is one: then only the session's weight counts. Nobody without rights may take back a nice value, so the work
has a thread of its own, which ends with it; the session's weight is anybody's to restore.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
JOB = 5  # of a nearline job: a third of the weight that requests have
NICE = 10  # of what runs in the background: a tenth, so it never comes to a stop
_AUTOGROUP = Path("/proc/self/autogroup")


def lower(pid: int, nice: int = JOB) -> None:
    """A process that has just begun gives way, and its session with it if that is its own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, nice)
            if os.getsid(pid) == pid:
                _weigh(nice, Path(f"/proc/{pid}/autogroup"))


class Background:
    """One thread of low priority. `close` ends it, and the process is as it was. Elsewhere than on Linux it is a thread
    like others.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "background", initializer=_step_back)
        self._own = os.getsid(0) == os.getpid()  # another one's session keeps its weight
        self._before = _weight()
        if self._own:
            _weigh(NICE)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        return self._pool.submit(work)

    def close(self) -> None:
        """Waits for the work in hand."""
        self._pool.shutdown()
        if self._own:
            _weigh(self._before)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _step_back() -> None:
    if sys.platform == "linux":  # where a priority is a thread's
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _weight() -> int:
    """The session's."""
    with suppress(OSError, IndexError, ValueError):  # no such kernel; the session is in no group
        return int(_AUTOGROUP.read_text().split()[-1])
    return 0


def _weigh(nice: int, session: Path = _AUTOGROUP) -> None:
    """Does nothing on a kernel that does not weigh sessions."""
    for _ in range(20):
        try:
            session.write_text(str(nice))
        except BlockingIOError:  # without rights, once in a tenth of a second on the whole machine
            time.sleep(0.1)
        except OSError:
            return
        else:
            return
