"""The processes of one host, as `python -m api up`, `down` and the demo run them: broker, nearline jobs, API.

Each is a command of its own package and outlives this one (infra.processes). What was started here is written down, so
that `down` stops that and nothing else; data stay.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from api.serve import ServeError, check_port
from infra import processes, running
from infra.settings import Settings, environment

API, JOBS = "api", "supervise"
_BROKER_MARK = "broker-started"
_START_S = 60.0


class StackError(RuntimeError):
    """The stack cannot be started or stopped; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """`folder` holds pids and logs; `settings` are those of the processes."""

    settings: Settings
    folder: Path

    @property
    def url(self) -> str:
        return f"http://{self.settings.api_host}:{self.settings.api_port}"

    def environ(self) -> dict[str, str]:
        return {**os.environ, **environment(self.settings)}

    def command(self, *arguments: str, quiet: bool = True) -> str:
        """Runs `python -m ...` to its end; its standard error is the user's unless `quiet`. Returns its output."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            env=self.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in (done.stderr or "").splitlines() if line.strip()]
            reason = said[-1] if said else f"`python -m {' '.join(arguments)}` ended with status {done.returncode}"
            raise StackError(reason)
        return done.stdout

    def broker_up(self) -> bool:
        """Whether it had to be started."""
        started = not os.environ.get("KAFKA_BOOTSTRAP") and not self._broker_runs()
        self.folder.mkdir(parents=True, exist_ok=True)
        if started:
            (self.folder / _BROKER_MARK).touch()
        self.command("infra.kafka", "up", quiet=not started)
        return started

    def topics_up(self) -> None:
        self.command("infra.kafka", "topics")

    def jobs_up(self) -> bool:
        """Whether the nearline jobs had to be started."""
        return self._start(JOBS, "streams", "supervise")

    def check_port(self) -> None:
        """Raises StackError where the API does not run and its port is taken by somebody else."""
        if processes.find(API, self.folder) is None:
            try:
                check_port(self.settings)
            except ServeError as error:
                raise StackError(str(error)) from error

    def api_up(self) -> bool:
        """Whether the API had to be started; it answers now, ready or not."""
        self.check_port()
        started = self._start(API, "api", "serve")
        self.wait_for(lambda: httpx.get(f"{self.url}/healthz", timeout=2.0).is_success, _START_S, "the API answers")
        return started

    def check(self) -> None:
        """Raises StackError where one of the two has ended."""
        for name in (JOBS, API):
            if processes.find(name, self.folder) is None:
                raise StackError(f"{name} has ended; its log says why: {self.folder / f'{name}.log'}")

    def wait_for(self, there: Callable[[], bool], limit_s: float, what: str) -> None:
        """Asks until it is there. Raises StackError when a process ends or the time is over."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                if there():
                    return
            except httpx.TransportError:
                pass  # not listening yet
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"Not within {limit_s:.0f} s: {what}. The logs are in {self.folder}.")
            time.sleep(0.05)

    def down(self) -> list[str]:
        """Stops what `up` or the demo started; returns the names."""
        stopped = []
        for name in (API, JOBS):
            process = processes.find(name, self.folder)
            if process is not None:
                processes.stop(process, 30.0)
                stopped.append(name)
        if (self.folder / _BROKER_MARK).exists():
            if self._broker_runs():
                self.command("infra.kafka", "down")
                stopped.append("Kafka")
            (self.folder / _BROKER_MARK).unlink()
        return stopped

    def _broker_runs(self) -> bool:
        try:
            self.command("infra.kafka", "status")
        except StackError:
            return False
        return True

    def _start(self, name: str, *arguments: str) -> bool:
        if processes.find(name, self.folder) is not None:
            return False
        processes.start(name, [sys.executable, "-m", *arguments], self.folder, self.environ())
        return True


def stack_of(settings: Settings) -> Stack:
    """The stack that runs now, which may be the demo's, or that of these settings."""
    return Stack(running.running(settings), running.folder_of(settings))
