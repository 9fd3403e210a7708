"""Some of the newest requests of this host, on disk: what new generations are scored with before they are served.

After the reply of a request is made, `Recorder.offer` hands what is needed to score it again to a thread, or drops it:
no request waits for the disk. The files, `<ns since the epoch>-<pid>.req` in `state/requests`, appear whole, and all
processes of the host together keep the newest of them only. Each holds the time, the moment the user was seen at, the
user's id (or the profile and behaviours that were sent along) and the candidates' keys; neither rows nor attributes.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from api.prerank import Answer
from api.schemas import InlineUser, Query
from infra import telemetry
from infra.settings import Settings

LOG = logging.getLogger(__name__)
KEPT = 128  # files of a host
_WAITING = 8
_END = ".req"


class Recorded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Exactly one of `user_id` and `user` is there."""

    time: int  # ms since the epoch
    as_of: int
    candidates: bytes  # keys, u8[n, 2]
    user_id: str | None = None
    user: InlineUser | None = None

    @classmethod
    def of(cls, answer: Answer, query: Query) -> Recorded:
        return cls(
            time=time.time_ns() // 1_000_000,
            as_of=answer.side.source.as_of,
            candidates=answer.candidates.keys.tobytes(),
            user_id=None if query.user_id is None else str(query.user_id),
            user=query.user,
        )

    @property
    def keys(self) -> NDArray[np.uint64]:
        return np.frombuffer(self.candidates, "<u8").astype(np.uint64).reshape(-1, 2)

    @property
    def query(self) -> Query:
        return Query(user_id=self.user_id, user=self.user, as_of=self.as_of)


class Recorder:
    """At most `record_per_s` requests a second of one process. Thread safe."""

    def __init__(self, settings: Settings) -> None:
        self._folder, self._per_s = settings.requests_dir, settings.record_per_s
        self._due = 0.0
        self._queue: queue.Queue[tuple[Answer, Query] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="recording", daemon=True)
        outcomes = telemetry.counter("forerank_recorded", "Requests recorded, by what became of them", ("outcome",))
        self._kept, self._dropped, self._failed = (outcomes.labels(name) for name in ("kept", "dropped", "failed"))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def offer(self, answer: Answer, query: Query) -> None:
        """Records it if one is due; never waits. Two threads at once may both find one due."""
        now = time.monotonic()
        if not self._per_s or now < self._due:
            return
        self._due = now + 1 / self._per_s
        try:
            self._queue.put_nowait((answer, query))
        except queue.Full:
            self._dropped.inc()

    def _write_all(self) -> None:
        said = ""
        while (found := self._queue.get()) is not None:
            try:
                self._write(Recorded.of(*found))
                self._kept.inc()
            except OSError as error:  # a full disk costs records, not requests
                self._failed.inc()
                if said != str(error):
                    LOG.error("a request was not recorded", extra={"error": str(error)})
                said = str(error)
            del found

    def _write(self, recorded: Recorded) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.iterdir())[: 1 - KEPT]:  # also what a full disk or a kill left unfinished
            path.unlink(missing_ok=True)
        name = f"{time.time_ns()}-{os.getpid()}"
        new = self._folder / f"{name}.new"
        new.write_bytes(msgspec.msgpack.encode(recorded))
        new.rename(self._folder / f"{name}{_END}")


def newest(folder: Path, most: int, after: str = "") -> Iterator[tuple[str, Recorded]]:
    """Names and contents of the newest records, the oldest of them first; only those later than that of a name. One
    that has gone meanwhile, or that another version wrote, is left out."""
    for path in [path for path in _files(folder) if path.name > after][-most:]:
        try:
            yield path.name, msgspec.msgpack.decode(path.read_bytes(), type=Recorded)
        except (FileNotFoundError, msgspec.DecodeError):
            continue


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_END}"))
