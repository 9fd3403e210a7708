"""Processes that outlive the command that started them: the broker, the nearline jobs, the API.

Each has `<name>.json` (pid and identity) and `<name>.log` in a folder. A process is taken for the recorded one only
while both its pid and its start time agree, so a reused pid is never signalled. Used by the supervisor, the demo,
`make down` and the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

_LOG_BYTES = 16 << 20  # a log larger than this is set aside (once) when its process starts again
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class ProcessError(RuntimeError):
    """A process could not be started or did not end; the message is one sentence for the user."""


@dataclass(frozen=True)
class Process:
    name: str
    pid: int
    identity: str  # start time, unique with the pid until the machine is started again
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    def alive(self) -> bool:
        _reap(self.pid)
        return identity_of(self.pid) == self.identity


def identity_of(pid: int) -> str | None:
    """What tells this process from a later one with the same pid; None if there is none or it is a zombie."""
    if Path("/proc/self/stat").exists():  # Linux
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *fields = text[text.rindex(")") + 2 :].split()
        return None if state in "ZX" else f"{boot}/{fields[18]}"
    found = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = found.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def start(name: str, argv: Sequence[str], folder: Path, environ: Mapping[str, str] | None = None) -> Process:
    """Start `argv` in a session of its own, output to the log. Raises ProcessError if one of that name is alive."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a process")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    running = find(name, folder)
    if running:
        raise ProcessError(f"{name} is already running (pid {running.pid}).")
    log = folder / f"{name}.log"
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    try:
        with log.open("ab") as output:
            child = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if environ is None else dict(environ),
                start_new_session=True,
            )
    except OSError as error:
        raise ProcessError(f"{name} could not be started: {error}.") from error
    pid, child.returncode = child.pid, 0  # from here on the file stands for it; Popen would warn that it still runs
    process = Process(name, pid, identity_of(pid) or "ended", folder)
    temporary = process.file.with_suffix(".json.tmp")
    temporary.write_text(json.dumps({**asdict(process), "folder": str(folder), "argv": list(argv)}))
    temporary.replace(process.file)
    return process


def find(name: str, folder: Path) -> Process | None:
    """The live process of that name, else None."""
    process = _read(folder.absolute() / f"{name}.json")
    return process if process and process.alive() else None


def listing(folder: Path) -> list[Process]:
    """All live processes of the folder, by name."""
    found = (_read(path) for path in sorted(folder.absolute().glob("*.json")))
    return [process for process in found if process and process.alive()]


def end(process: Process, *, kill: bool = False) -> bool:
    """SIGTERM, or SIGKILL to its whole session; waits for nothing. False if it is not alive any more (a stranger with
    its pid is left alone).
    """
    if not process.alive():
        return False
    try:
        if kill:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    return True


def stop(process: Process, deadline_s: float = 15.0) -> bool:
    """SIGTERM, and after the deadline SIGKILL to its whole session. True if it ended by itself; its file is removed.

    Raises ProcessError if even that did not end it within five seconds (a process in uninterruptible sleep).
    """
    willing = not end(process) or _ended(process, deadline_s)
    if not willing:
        end(process, kill=True)
        if not _ended(process, 5.0):
            raise ProcessError(f"{process.name} (pid {process.pid}) did not end, not even by SIGKILL.")
    recorded = _read(process.file)
    if recorded == process:
        process.file.unlink(missing_ok=True)
    return willing


def stop_all(found: Sequence[Process], deadline_s: float = 15.0) -> None:
    """`stop` of all of them at once. Raises ProcessError where one does not end."""
    if found:
        with ThreadPoolExecutor(len(found)) as threads:
            list(threads.map(lambda process: stop(process, deadline_s), found))


def _ended(process: Process, deadline_s: float) -> bool:
    deadline = time.monotonic() + deadline_s
    while process.alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _reap(pid: int) -> None:
    """Collect the exit status if it was our child, so that it does not stay a zombie."""
    with contextlib.suppress(ChildProcessError):  # started by another process
        os.waitpid(pid, os.WNOHANG)


def _read(path: Path) -> Process | None:
    try:
        found = json.loads(path.read_text())
        return Process(found["name"], int(found["pid"]), found["identity"], path.parent)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # no record, or not one of ours
