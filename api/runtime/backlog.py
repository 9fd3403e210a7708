"""The queries of a runtime that have not ended, and the one ready queue over all their steps. No threads, no clock: the
runtime calls it under its lock, the simulation in simulated time.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator, Sequence

from api.runtime.graph import Plan
from api.runtime.policy import Policy, Ready, hopeless

_REORDER_S = 1e-3  # after which waiting and deadlines may have changed the order ...
_EACH_S = 1e-4  # ... and for each query that waits: to order them takes a hundredth of it
_NEWEST = 0.02  # the share of the newest query in what is usual


class Query:
    """What a query still waits for. `costs`: s of each step of its plan."""

    def __init__(
        self, number: int, plan: Plan, costs: Sequence[float], priority: int, arrived: float, deadline: float
    ) -> None:
        self.number, self.plan, self.costs = number, plan, costs
        self.priority, self.arrived, self.deadline = priority, arrived, deadline
        paths = self.paths = list(costs)
        for at, then in plan.onward:
            paths[at] += paths[then[0]] if len(then) == 1 else max(paths[after] for after in then)
        self.left, self.path = sum(costs), max(paths, default=0.0)
        self.unfinished = len(costs)
        self.ended = False
        self.strict = True  # dropped when it cannot meet its deadline any more
        self.waits = list(plan.waits)
        self.ready = [Ready(at, paths[at], -1) for at in plan.first]

    def follow(self, step: int, lane: int) -> int:
        """How many steps are ready now because what this one makes is there, or will be before they read it."""
        before = len(self.ready)
        for after in self.plan.steps[step].then:
            self.waits[after] -= 1
            if not self.waits[after]:
                self.ready.append(Ready(after, self.paths[after], lane))
        return len(self.ready) - before


class Backlog:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._live: dict[int, Query] = {}
        self._order: list[tuple[tuple[float, ...], Query]] = []  # by urgency, in which no two are equal
        self._ordered = -math.inf
        self._count = 0  # of queries so far
        # s of work of a query, and how much others differ from it: means in which older ones count less
        self._usual = self._spread = 0.0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Query]:
        return iter(self._live.values())

    def ready(self) -> int:
        """Steps whose inputs are there."""
        return sum(len(one.ready) for one in self._live.values())

    def wait_of(self, query: Query, lanes: int, now: float) -> float:
        """How long after now the query will end, as far as what is here tells: the work that goes before its last step
        is shared by the lanes."""
        own = self._urgency(query, now)
        ahead = sum(one.left for one in self._live.values() if self._urgency(one, now) < own)
        return max(query.path, (ahead + query.left) / lanes)

    def add(self, query: Query, now: float) -> None:
        self._live[query.number] = query
        self._count += 1
        newest, difference = max(_NEWEST, 1 / self._count), query.left - self._usual
        self._usual += difference * newest
        if self._count > 1:
            self._spread += (abs(difference) - self._spread) * newest
        insort(self._order, (self._urgency(query, now), query))

    def _urgency(self, query: Query, now: float) -> tuple[float, ...]:
        return self._policy.urgency(query, now, self._usual or query.left or 1.0, self._spread)

    def end(self, query: Query) -> None:
        """It takes no lane any more."""
        query.ended = True
        self._live.pop(query.number, None)
        if not self._live:
            self._order.clear()  # which holds their values

    def take(self, lane: int, now: float) -> tuple[Query, int, int] | None:
        """The next query for a lane, its step, and the lane that made the step's newest input. The step is -1 where the
        query is to be dropped, for it cannot meet its deadline any more."""
        if now - self._ordered > max(_REORDER_S, _EACH_S * len(self._live)):
            self._order = sorted((self._urgency(one, now), one) for one in self._live.values())
            self._ordered = now
        for _, query in self._order:
            if query.ended or not query.ready:
                continue
            chosen = query.ready.pop(self._policy.step(query.ready, lane))
            if query.strict and hopeless(query.deadline, chosen.path, now):
                return query, -1, -1
            query.left -= query.costs[chosen.step]
            query.path = chosen.path
            return query, chosen.step, chosen.lane
        return None
