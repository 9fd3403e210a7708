"""What a nearline job says about itself: one file per job, written by the job alone, read by whoever wants to know."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec


class Heartbeat(msgspec.Struct):
    """What a job says about itself every second, in `<heartbeat_dir>/<job>.json`. Times in ms, lag in records."""

    job: str
    pid: int
    time: int = 0
    state: str = "starting"
    handled: int = 0
    lag: int = 0
    lag_s: float = 0.0  # the oldest record that waits has waited so long at most
    rate: float = 0.0  # records handled a second, over the last ten seconds
    dead: int = 0  # records sent to a dead-letter topic since the process started
    reason: str = ""
    status: int = 0  # exit status, once stopped

    def write(self, folder: Path) -> None:
        self.time = time.time_ns() // 1_000_000
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{self.job}.json.new"
        new.write_bytes(msgspec.json.encode(self))
        new.replace(folder / f"{self.job}.json")


def read_heartbeat(folder: Path, job: str) -> Heartbeat | None:
    try:
        return msgspec.json.decode((folder / f"{job}.json").read_bytes(), type=Heartbeat)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
