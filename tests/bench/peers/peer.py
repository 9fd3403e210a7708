"""What all peers share: a request is answered in steps, each timed, and ends with the ids of the best."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.fold import reference_scores
from tests.bench.peers.data import Data

F4 = NDArray[np.float32]
U8 = NDArray[np.uint64]

BEST = 100  # ids of an answer


class Lap:
    """Milliseconds of each step, between the calls that name it."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + (now - self._last) * 1e3
        self._last = now


class Peer(ABC):
    """Scores candidates for users of a `Data`. `settings` tells what it was tuned to."""

    settings: dict[str, Any]
    tolerance: float  # most error of its scores against the network's own

    def __init__(self, data: Data) -> None:
        self.data = data

    @abstractmethod
    def scores(self, user: int, ids: U8, lap: Lap) -> F4:
        """Of the ids, in order; the user side is part of it."""

    def expected(self, user: int, ids: U8) -> F4:
        """What `scores` is held against: the training form's forward pass, without a store or a fold."""
        data = self.data
        items = [data.world.inputs(int(one), 1) for one in ids]
        return reference_scores(data.bundle, data.profiles[user], data.users[user], items, data.as_of)

    def top(self, place: int, lap: Lap) -> list[int]:
        """Answer request number `place`: ids of the best, best first, the smaller one of equals."""
        ids = self.data.requests[place]
        scores = self.scores(self.data.user(place), ids, lap)
        best = np.argpartition(scores, len(scores) - BEST)[len(scores) - BEST :]
        best = best[np.lexsort((ids[best], -scores[best]))]
        answer: list[int] = ids[best].tolist()
        lap("top")
        return answer

    def server_cpu_ms(self) -> float:
        """CPU that a server of the peer has used so far."""
        return 0.0

    def close(self) -> None:  # noqa: B027  most have nothing to end
        """End what was started, delete what was written."""
