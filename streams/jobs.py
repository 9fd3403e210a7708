"""A host's jobs as child processes: kept running, started again when they end or fall silent, later each time.

Their pids are on disk (infra/processes.py), so that a supervisor that was killed finds them again.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path

from infra import priority, processes
from infra.settings import Settings, environment
from streams.heartbeat import read_heartbeat
from streams.worker import BAD_BUNDLE

LOG = logging.getLogger(__name__)
_SILENT_S = 30.0  # without a heartbeat: the process hangs
_BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
_VERIFY_S = 600.0  # a verification that takes longer hangs
_BESIDE = ("verify-", "retrieval-", "shadow-")  # what no fresh row waits for
_STEADY_S = 60.0  # a job that ran so long starts again without delay
_STOP_S = 10.0


class Jobs:
    """Of the state folder of `settings`."""

    def __init__(self, settings: Settings, silent_s: float = _SILENT_S, stop_s: float = _STOP_S) -> None:
        self._settings, self._folder = settings, settings.state / "logs"
        self._silent_s, self._stop_s = silent_s, stop_s
        root = str(Path(__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environ = {
            "OMP_NUM_THREADS": "1",  # the jobs share the machine with the API
            **os.environ,
            **environment(settings),
            "FORERANK_STATE": str(settings.state.absolute()),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self._started: dict[str, float] = {}
        self._pids: dict[str, int] = {}  # of the newest process
        self._failures: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._gave_up: dict[str, str] = {}
        self._ending: dict[processes.Process, float] = {}  # told to end -> when they are killed

    def keep(self, needed: dict[str, list[str]], held: Collection[str] = ()) -> None:
        """Starts those that do not run, and stops those of ours that are not needed; neither of the `held` ones. Waits
        for no end: each call looks again.
        """
        alive = {process.name: process for process in processes.listing(self._folder)}
        self._ending = {process: due for process, due in self._ending.items() if alive.get(process.name) == process}
        for name, process in alive.items():
            if name in needed:
                self._pids[name] = process.pid
            if process in self._ending:
                self._end(process)
            elif name not in needed and name not in held:
                self._started.pop(name, None)
                self._end(process, self._stop_s)
            elif name in needed and self._silent(name, process):
                LOG.error("%s gives no sign of life; it is killed", name)
                self._end(process)
        # of a generation whose job ends none is started: replicate and reconcile write the same index
        busy = {_generation_of(process.name) for process in self._ending}
        for name, arguments in needed.items():
            if name not in alive and name not in held and _generation_of(name) not in busy:
                self._start(name, arguments)

    def _end(self, process: processes.Process, within_s: float = 0.0) -> None:
        if process not in self._ending:
            self._ending[process] = time.monotonic() + within_s
            processes.end(process)
        elif time.monotonic() > self._ending[process]:
            processes.end(process, kill=True)

    def gave_up(self, name: str) -> str:
        """Why a job ended for which a new start is no help; empty: it did not."""
        return self._gave_up.get(name, "")

    def stop(self) -> None:
        processes.stop_all(processes.listing(self._folder), _STOP_S)

    def _start(self, name: str, arguments: list[str]) -> None:
        now = time.monotonic()
        if name in self._started and name not in self._due:
            if self._given_up(name):
                return
            steady = now - self._started[name] > _STEADY_S
            self._failures[name] = 0 if steady else min(self._failures.get(name, 0) + 1, len(_BACKOFF_S) - 1)
            self._due[name] = now + _BACKOFF_S[self._failures[name]]
            LOG.warning("%s has ended; started again in %.1f s", name, _BACKOFF_S[self._failures[name]])
        if name in self._gave_up or now < self._due.get(name, 0.0):
            return
        self._due.pop(name, None)
        self._started[name] = now
        try:
            process = processes.start(name, [sys.executable, "-m", *arguments], self._folder, self._environ)
        except processes.ProcessError as error:  # no memory for another one, say: the others go on
            LOG.error("%s", error)
            return
        priority.lower(process.pid, priority.NICE if name.startswith(_BESIDE) else priority.JOB)
        self._pids[name] = process.pid

    def _given_up(self, name: str) -> bool:
        beat = read_heartbeat(self._settings.heartbeat_dir, name)
        own = beat is not None and beat.pid == self._pids.get(name)  # an older process's says nothing about this one
        if beat is not None and own and beat.state == "stopped" and beat.status == BAD_BUNDLE:
            self._gave_up[name] = beat.reason
        return name in self._gave_up

    def _silent(self, name: str, process: processes.Process) -> bool:
        if name.startswith("verify-"):
            return time.monotonic() - self._started.setdefault(name, time.monotonic()) > _VERIFY_S
        if name.startswith(_BESIDE):  # they have no heartbeat
            return False
        beat = read_heartbeat(self._settings.heartbeat_dir, name)
        if beat is not None and beat.pid == process.pid:
            return time.time() - beat.time / 1000 > self._silent_s
        return time.monotonic() - self._started.setdefault(name, time.monotonic()) > 2 * self._silent_s


def _generation_of(job: str) -> str:
    """What jobs of no generation have is their own name."""
    return job.partition("-")[2] or job
