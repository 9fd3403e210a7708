"""The processes of one host, as `python -m api up`, `down` and the demo run them: broker, nearline jobs, API.

Each is a command of its own package and outlives this one (infra.processes). What was started here is written down, so
that `down` stops that and nothing else; data stay. A start that fails stops what it has started itself.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from api.serve import ServeError, check_port
from infra import processes, running
from infra.settings import Settings, environment

API, JOBS, _BROKER = "api", "supervise", "Kafka"
_BROKER_MARK = "broker-started"
_START_S = 60.0
_ORDER_S = 10.0


class StackError(RuntimeError):
    """The stack cannot be started or stopped; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """`folder` holds pids and logs; `settings` are those of the processes."""

    settings: Settings
    folder: Path
    _started: dict[str, int] = dataclasses.field(default_factory=dict)  # by this object: name -> where its log begins

    @property
    def url(self) -> str:
        return f"http://{self.settings.api_host}:{self.settings.api_port}"

    def environ(self) -> dict[str, str]:
        return {**os.environ, **environment(self.settings)}

    def command(self, *arguments: str, quiet: bool = True) -> str:
        """Runs `python -m ...` to its end; its standard error is the user's unless `quiet`. Returns its output."""
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=self.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
        )
        try:
            output, errors = child.communicate()
        except KeyboardInterrupt:  # which the child got too: it may have something to put in order
            try:
                child.wait(_ORDER_S)
            finally:
                child.kill()
            raise
        if child.returncode:
            said = [line for line in (errors or "").splitlines() if line.strip()]
            reason = said[-1] if said else f"`python -m {' '.join(arguments)}` ended with status {child.returncode}"
            raise StackError(reason)
        return output

    def broker_up(self) -> bool:
        """Whether it had to be started."""
        started = not os.environ.get("KAFKA_BOOTSTRAP") and not self._broker_runs()
        self.folder.mkdir(parents=True, exist_ok=True)
        if started:
            (self.folder / _BROKER_MARK).touch()
            self._started[_BROKER] = 0
        self.command("infra.kafka", "up", quiet=not started)
        return started

    def topics_up(self) -> None:
        self.command("infra.kafka", "topics")

    def jobs_up(self) -> bool:
        """Whether the nearline jobs had to be started; `jobs_ready` says when they are."""
        return self._start(JOBS, "streams", "supervise")

    def jobs_ready(self) -> None:
        """Returns once the supervisor has accepted broker and state, and runs jobs. Raises StackError."""
        logs = self.settings.state / "logs"
        self.wait_for(lambda: bool(processes.listing(logs)), _START_S, "the nearline jobs run")

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

        def answers() -> bool:
            process = processes.find(API, self.folder)
            own = process is not None and _listens(process.pid, self.settings.api_port)
            return own and httpx.get(f"{self.url}/healthz", timeout=2.0).is_success

        self.wait_for(answers, _START_S, "the API answers")
        return started

    def check(self) -> None:
        """Raises StackError where one of the two has ended, with its last words."""
        for name in (JOBS, API):
            if processes.find(name, self.folder) is None:
                log = self.folder / f"{name}.log"
                said = _last_words(log, self._started.get(name, 0)) or f"{name} gave no reason."
                raise StackError(f"{said} ({name} has ended; its log is {log})")

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
        return self._stop((API, JOBS, _BROKER))

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Where the body fails or is interrupted, stops what this object started, and only that."""
        try:
            yield
        except BaseException:
            self._stop([name for name in (API, JOBS, _BROKER) if name in self._started])
            raise

    def running(self) -> list[str]:
        """Names of what `up` or the demo started and is alive."""
        found = [name for name in (API, JOBS) if processes.find(name, self.folder) is not None]
        broker = (self.folder / _BROKER_MARK).exists() and processes.find("kafka", self.settings.kafka_dir) is not None
        return found + [_BROKER] * broker

    def _stop(self, names: Collection[str]) -> list[str]:
        stopped = []
        for name in names:
            process = processes.find(name, self.folder)
            if process is not None:
                processes.stop(process, 30.0)
                stopped.append(name)
        if _BROKER in names and (self.folder / _BROKER_MARK).exists():
            if processes.find("kafka", self.settings.kafka_dir) is not None:
                self.command("infra.kafka", "down")
                stopped.append(_BROKER)
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
        log = self.folder / f"{name}.log"
        began = log.stat().st_size if log.exists() else 0
        processes.start(name, [sys.executable, "-m", *arguments], self.folder, self.environ())
        self._started[name] = began
        return True


def stack_of(settings: Settings) -> Stack:
    """The stack that runs now, which may be the demo's, or that of these settings."""
    return Stack(running.running(settings), running.folder_of(settings))


def _last_words(log: Path, begin: int) -> str:
    """The last line that was written to `log` after `begin`; a log that was set aside meanwhile begins anew."""
    try:
        text = log.read_bytes()
    except FileNotFoundError:
        return ""
    lines = text[begin if begin <= len(text) else 0 :].decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _listens(pid: int, port: int) -> bool:
    """Whether this process holds a socket that listens on the port, as Linux tells it."""
    listening = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()  # number, local address:port, remote, state, ..., inode
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                listening.add(f"socket:[{fields[9]}]")
    try:
        held = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return False  # it has ended, or closes one just now
    return bool(listening & held)
