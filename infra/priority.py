"""Work that leaves the processors to whoever else wants them: a generation that is filled, beside one that is served.

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
NICE = 10  # a tenth of the usual weight, so it never comes to a stop
_AUTOGROUP = Path("/proc/self/autogroup")


class Background:
    """One thread of low priority. `close` ends it, and the process is as it was. Elsewhere than on Linux it is a thread
    like others.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "background", initializer=_step_back)
        _weigh(NICE)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        return self._pool.submit(work)

    def close(self) -> None:
        """Waits for the work in hand."""
        self._pool.shutdown()
        _weigh(0)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _step_back() -> None:
    if sys.platform == "linux":  # where a priority is a thread's
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _weigh(nice: int) -> None:
    """The session's weight, if the session is this process's own. Does nothing on a kernel without them."""
    if os.getsid(0) != os.getpid() or not _AUTOGROUP.exists():
        return
    for _ in range(20):
        try:
            _AUTOGROUP.write_text(str(nice))
        except BlockingIOError:  # without rights, once in a tenth of a second on the whole machine
            time.sleep(0.1)
        except OSError:
            return
        else:
            return
