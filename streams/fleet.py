"""What the API processes of a host have loaded: each says it in a file of its own, and the supervisor asks before it
switches.

Between the API and the supervisor, the other way round than `serving.json`. A file counts while its process lives, told
by pid and start time, so what a killed process left is nobody's word; it is removed when it is found.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from infra.processes import identity_of
from infra.settings import Settings

SILENT_MS = 30_000  # without a word: the process hangs, and nobody waits for it


class Report(msgspec.Struct, frozen=True):
    """What one API process said, `time` in ms since the epoch. `warm`: generations it can serve at once. `failed`:
    generation -> why it cannot.
    """

    pid: int
    identity: str  # of the process, as infra.processes tells them apart
    time: int
    warm: list[str] = []
    failed: dict[str, str] = {}


def tell(settings: Settings, warm: Iterable[str], failed: Mapping[str, str]) -> None:
    """This process' word, in the stead of the one before. Raises OSError."""
    pid = os.getpid()
    report = Report(pid, identity_of(pid) or "", time.time_ns() // 1_000_000, sorted(warm), dict(failed))
    path = _file(settings, pid)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(report))
    new.replace(path)


def leave(settings: Settings) -> None:
    """This process ends: nobody is to wait for it."""
    _file(settings, os.getpid()).unlink(missing_ok=True)


def reports(settings: Settings) -> list[Report]:
    """Those of the processes that live; the files of others are removed."""
    found = []
    for path in sorted(settings.api_dir.glob("*.json")):
        try:
            report = msgspec.json.decode(path.read_bytes(), type=Report)
        except FileNotFoundError:
            continue
        except msgspec.DecodeError:  # of a machine that lost power; a process that lives writes it anew
            path.unlink(missing_ok=True)
            continue
        if identity_of(report.pid) == report.identity:
            found.append(report)
        else:
            path.unlink(missing_ok=True)
    return found


def waits_for(found: Iterable[Report], generation: str, now: int) -> str:
    """Why a switch to the generation has to wait, in words; empty: every process that says anything could serve it."""
    heard = [report for report in found if now - report.time < SILENT_MS]
    for report in heard:
        if generation in report.failed and generation not in report.warm:
            return f"API process {report.pid}: {report.failed[generation]}"
    cold = [str(report.pid) for report in heard if generation not in report.warm]
    return f"API process {', '.join(cold)} has not loaded it yet" if cold else ""


def _file(settings: Settings, pid: int) -> Path:
    return settings.api_dir / f"{pid}.json"
