"""The same policy in simulated time: many lanes and queries without a machine of that size, and tests without threads.

An operator takes its cost, a lane is never interrupted, placing an operator takes `place_s`.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

from api.runtime.policy import Policy, Ready, hopeless
from api.runtime.runtime import Model


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A query that comes at a moment (s), in time order."""

    at: float
    model: Model
    priority: int = 0
    within_s: float = math.inf


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the queries, in the order of their coming."""

    ended: tuple[float, ...]  # s; NaN of one that was dropped
    busy: float  # s of all lanes together
    moves: int  # operators that took an input from another lane


def simulate(arrivals: Sequence[Arrival], lanes: int, policy: Policy, place_s: float = 0.0) -> Outcome:
    ended = [math.nan] * len(arrivals)
    left = [query.model.work for query in arrivals]
    waits = [[len(one.waits) for one in query.model.graph.operators] for query in arrivals]
    unfinished = [len(query.model.graph.operators) for query in arrivals]
    dropped = set[int]()
    ready: list[Ready] = []
    free = list(range(lanes))
    running: list[tuple[float, int, int, int]] = []  # end, lane, query, operator
    busy, moves, coming, now = 0.0, 0, 0, 0.0

    def add(query: int, operator: int, lane: int) -> None:
        one = arrivals[query]
        deadline, path = one.at + one.within_s, one.model.paths[operator]
        ready.append(Ready(query, operator, one.priority, one.at, deadline, left[query], path, lane))

    while coming < len(arrivals) or running or ready:
        while free and ready:
            lane = free.pop(0)
            chosen = ready.pop(policy.choose(ready, lane, now))
            query = chosen.query
            if query in dropped or hopeless(chosen.deadline, chosen.path, now):
                dropped.add(query)
                free.insert(0, lane)
                continue
            cost = arrivals[query].model.graph.operators[chosen.operator].cost
            left[query] -= cost
            moves += chosen.lane not in (-1, lane)
            busy += cost + place_s
            heapq.heappush(running, (now + cost + place_s, lane, query, chosen.operator))
        following = [running[0][0]] if running else []
        if coming < len(arrivals):
            following.append(arrivals[coming].at)
        if not following:
            break
        now = max(now, min(following))
        while coming < len(arrivals) and arrivals[coming].at <= now:
            for operator, before in enumerate(waits[coming]):
                if not before:
                    add(coming, operator, -1)
            coming += 1
        while running and running[0][0] <= now:
            _, lane, query, operator = heapq.heappop(running)
            free.append(lane)
            if query in dropped:
                continue
            unfinished[query] -= 1
            if not unfinished[query]:
                ended[query] = now
            for after in arrivals[query].model.graph.operators[operator].then:
                waits[query][after] -= 1
                if not waits[query][after]:
                    add(query, after, lane)
    return Outcome(tuple(ended), busy, moves)
