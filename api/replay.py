"""Recorded requests scored by two generations with the same `as_of`: how far apart their scores are.

For verification, before a generation may be served, and for the shadow, beside one that is served; both in processes of
their own. Users come from the host's histories as they are now, and so do their crosses, also where those of requests
come from a feature service: both generations are given the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from api import rtp
from api.generations import Generation
from api.problems import ProblemError
from api.recording import Recorded
from api.schemas import Query
from api.users import UserSource, infer
from index import kernels

BEST = 100


@dataclasses.dataclass(frozen=True)
class Scored:
    """One request: the scores f4[n] by both generations of the candidates that have a row in both."""

    live: NDArray[np.float32]
    new: NDArray[np.float32]

    @property
    def overlap(self) -> float:
        """Share of the best 100 that are the same; of the best half where fewer than 200 have scores."""
        k = min(BEST, (len(self.live) + 1) // 2)
        best = (set(kernels.best(scores, k)[:k].tolist()) for scores in (self.live, self.new))
        return len(set.intersection(*best)) / k


@dataclasses.dataclass
class Moments:
    """Mean and squares about it of all scores so far, exact also where the mean is large (Chan, Golub, LeVeque)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, scores: NDArray[np.float32]) -> None:
        exact = scores.astype(np.float64)
        mean, both = float(exact.mean()), self.count + len(exact)
        apart = mean - self.mean
        self.squares += float(np.square(exact - mean).sum()) + apart * apart * self.count * len(exact) / both
        self.mean += apart * len(exact) / both
        self.count = both

    @property
    def deviation(self) -> float:
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0


@dataclasses.dataclass
class Comparison:
    """Of all requests so far, in sums: nothing of a request is kept."""

    requests: int = 0
    not_finite: int = 0  # scores of the new generation
    overlaps: float = 0.0
    live: Moments = dataclasses.field(default_factory=Moments)
    new: Moments = dataclasses.field(default_factory=Moments)

    def add(self, scored: Scored) -> None:
        if not len(scored.live):
            return
        self.requests += 1
        wrong = int(np.count_nonzero(~np.isfinite(scored.new)))
        self.not_finite += wrong
        if wrong or not np.isfinite(scored.live).all():
            return
        self.overlaps += scored.overlap
        self.live.add(scored.live)
        self.new.add(scored.new)

    @property
    def shift(self) -> float | None:
        """Of the mean, in standard deviations of the live generation's scores; None where those do not differ."""
        deviation = self.live.deviation
        return (self.new.mean - self.live.mean) / deviation if deviation else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the live generation's; None where its scores do not differ."""
        deviation = self.live.deviation
        return self.new.deviation / deviation if deviation else None

    @property
    def overlap(self) -> float | None:
        return self.overlaps / self.requests if self.live.count else None


def score(request: Recorded, live: Generation, new: Generation, find: Callable[[Query], UserSource]) -> Scored | None:
    """None for a request that cannot be scored any more, and where its user's profile cannot be read."""
    keys = request.keys
    try:
        source = find(request.query)
        sides = [infer(generation, source) for generation in (live, new)]
    except ProblemError:
        return None
    gathered = [generation.arena.gather(keys) for generation in (live, new)]
    both = gathered[0].found & gathered[1].found
    scores = [
        rtp.score(generation, side, one.hot[both])
        for generation, side, one in zip((live, new), sides, gathered, strict=True)
    ]
    return Scored(*scores)
