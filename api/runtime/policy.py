"""Which ready operator a free lane takes: a pure function of what is ready, used by the runtime and the simulation.

A smaller urgency goes first. Classes come before all else, so low-priority work waits while there is any of a higher
class. Within a class the query with the least work left goes first, which finishes most queries soonest; but its work
left counts the less the longer it has waited, so that nobody starves, and a query that would miss its deadline if it
waited any longer goes before all that can wait. Of one query's operators that of the longest path goes first, and of
equals one whose inputs this lane has just made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

AGEING = 0.5  # s of work that a second of waiting outweighs


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """An operator whose inputs are there. Times in s; `deadline` and `arrived` on the clock of `now`."""

    query: int
    operator: int
    priority: int  # the class; 0 is the highest
    arrived: float
    deadline: float  # infinite without one
    left: float  # work of the query that has not begun
    path: float  # the longest chain of work from this operator on
    lane: int  # which made its newest input; -1: none


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """`ageing` 0 is shortest work first, infinite (or `fifo`) first come, first served."""

    ageing: float = AGEING
    fifo: bool = False

    def urgency(self, one: Ready, lane: int, now: float) -> tuple[float, ...]:
        if self.fifo:
            return (one.arrived, one.query, one.operator)
        slack = one.deadline - now - one.path
        late = 0 if slack <= one.path else 1
        weight = one.left - self.ageing * (now - one.arrived)
        return (one.priority, late, weight, one.query, -one.path, one.lane != lane, one.operator)

    def choose(self, ready: Sequence[Ready], lane: int, now: float) -> int:
        """Its place in `ready`, which is not empty."""
        return min(range(len(ready)), key=lambda at: self.urgency(ready[at], lane, now))


def hopeless(deadline: float, path: float, now: float) -> bool:
    """Whether a query cannot meet its deadline even if it never waited: to be refused or dropped at once."""
    return now + path > deadline
