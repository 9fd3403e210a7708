"""Which query a free lane serves next, and by which step: pure functions, used by the runtime and the simulation.

A smaller urgency goes first. Classes come before all else, so low-priority work waits while there is any of a higher
class. Within a class a query that would miss its deadline if it waited any longer goes before all that can wait; of
others the one with the least work left, which finishes most queries soonest. What is left counts the less the longer a
query has waited, by the square of the time, so that the last ones come hardly later than first come, first served would
have them; docs/recos.md has other forms. Where all are about alike no other order than that one gains anything. Of one
query's steps that of the longest path goes first, and of equals one whose inputs this lane has just made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

AGEING = 0.0125
ALIKE = 0.3  # of the work of a usual query: by how much others differ that are alike


class Waiting(Protocol):
    """A query that has not ended. Times in s, on one clock."""

    number: int  # in the order of arrival
    priority: int  # the class; 0 is the highest
    arrived: float
    deadline: float  # infinite without one
    path: float  # the longest chain of work that has not begun

    @property
    def left(self) -> float:
        """Work that has not begun."""


class Ready(NamedTuple):
    """An operator whose inputs are there, a step of its query."""

    step: int
    path: float  # s, the longest chain of work from it on
    lane: int  # which made its newest input; -1: none


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """A query that has waited as long as the lanes take for t usual ones goes before one that has just come and has
    `ageing` t^2 times the work of a usual one less. `ageing` 0 is shortest work first; `fifo` first come, first
    served."""

    ageing: float = AGEING
    fifo: bool = False

    def urgency(self, one: Waiting, now: float, lanes: int, usual: float, spread: float) -> tuple[float, ...]:
        """`usual`: s of work of a usual query; `spread`: by how much others usually differ from it."""
        if self.fifo:
            return (one.number,)
        late = one.deadline - now <= 2 * one.path
        if spread < ALIKE * usual and self.ageing:
            return (one.priority, not late, 0.0, one.number)
        waited = lanes * (now - one.arrived) / usual
        return (one.priority, not late, one.left - self.ageing * usual * waited**2, one.number)

    def step(self, ready: Sequence[Ready], lane: int) -> int:
        """Its place in `ready`, which is not empty."""
        if self.fifo:
            return 0
        best, first = 0, ready[0]
        for at in range(1, len(ready)):  # a loop costs a fifth of `min` with a key
            one = ready[at]
            if one.path > first.path or (
                one.path == first.path and (one.lane != lane, one.step) < (first.lane != lane, first.step)
            ):
                best, first = at, one
        return best


def hopeless(deadline: float, path: float, now: float) -> bool:
    """Whether a query cannot meet its deadline even if it never waited: to be refused or dropped at once."""
    return now + path > deadline
