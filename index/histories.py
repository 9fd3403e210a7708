"""Behaviours and profiles of the host's users: one writer (replicate-histories), read by all API processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class StoredBehaviour(NamedTuple):
    """One record of `behaviours`; times in ms since the epoch, `publish_time` the log append time."""

    user_id: str
    item_id: str
    event_id: str
    action: str
    event_time: int
    publish_time: int
    partition: int
    offset: int


class StoredProfile(NamedTuple):
    """One record of `users`: a profile (`features` is a JSON object), or an erasure (`erased_at`)."""

    user_id: str
    features: bytes | None
    erased_at: int | None
    publish_time: int
    partition: int
    offset: int


@dataclasses.dataclass(frozen=True)
class History:
    """Behaviours of a user, oldest first: item keys u8[L, 2], action codes u1[L], event times i8[L]. `position` is the
    highest offset of `behaviours` applied for this user (-1: none); with `as_of` it fixes what the history contains."""

    keys: NDArray[np.uint64]
    actions: NDArray[np.uint8]
    times: NDArray[np.int64]
    position: int


class HistoriesWriter:
    """The only writer (StoreLockedError otherwise); keeps the newest `length` behaviours per user."""

    def __init__(self, path: Path, length: int, hash_key: bytes) -> None:
        raise NotImplementedError

    def apply(
        self,
        behaviours: Sequence[StoredBehaviour],
        users: Sequence[StoredProfile],
        offsets: Mapping[tuple[str, int], int],
    ) -> None:
        """All of it and the next offsets to read, (topic, partition) -> offset, in one transaction. Records that were
        applied before change nothing."""
        raise NotImplementedError

    def offsets(self) -> dict[tuple[str, int], int]:
        raise NotImplementedError

    def reader(self) -> HistoriesReader:
        """A reader inside the writer's process (LMDB allows one environment per process)."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class HistoriesReader:
    """Fresh at every call. Raises StoreMissingError when there is no store (yet)."""

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    def history(self, user_id: str, as_of: int) -> History:
        """The newest behaviours with event_time <= as_of; empty for an unknown user."""
        raise NotImplementedError

    def profile(self, user_id: str) -> dict[str, Any] | None:
        raise NotImplementedError

    def position(self, user_id: str) -> int:
        raise NotImplementedError

    def actions(self) -> tuple[str, ...]:
        """Names of the action codes."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
