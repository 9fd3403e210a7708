"""The same policy and backlog in simulated time: many lanes and queries without a machine of that size, and tests
without threads.

An operator takes its cost and `place_s`, as often as a lane takes it up; one in blocks is shared and let go of as the
runtime's lanes do that.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

from api.runtime.backlog import Backlog, Query
from api.runtime.model import Model
from api.runtime.policy import Policy


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A query that comes at a moment (s), in time order."""

    at: float
    model: Model
    rows: int = 1
    priority: int = 0
    within_s: float = math.inf


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the queries, in the order of their coming."""

    ended: tuple[float, ...]  # s; NaN of one that was refused or dropped
    busy: float  # s of all lanes together
    moves: int  # steps that took an input from another lane


def simulate(
    arrivals: Sequence[Arrival], lanes: int, policy: Policy, place_s: float = 0.0, refuse: bool = False
) -> Outcome:
    """`refuse`: what cannot meet its deadline with what waits already is not taken, as the runtime has it."""
    ended = [math.nan] * len(arrivals)
    backlog = Backlog(policy, lanes)
    free = list(range(lanes))
    running: list[tuple[float, int, Query, int]] = []  # end, lane, query, operator
    shared: dict[int, Query] = {}  # by lane, of which it runs blocks ...
    most = [0] * lanes  # ... and how many more before it asks for other work ...
    told = set[int]()  # ... if it has not been told to do so after its current one
    busy, moves, coming, now = 0.0, 0, 0, 0.0

    def call(query: Query, wanted: int) -> None:
        if wanted > len(free):
            others = {lane: other for lane, other in shared.items() if lane not in told}
            told.update(backlog.behind(query, others, now)[: wanted - len(free)])

    while True:
        while free and (taken := backlog.take(free[0], now)) is not None:
            query, ready = taken
            if ready is None:
                backlog.end(query)
                continue
            lane = free.pop(0)
            moves += ready.lane not in (-1, lane)
            took = query.costs[ready.step] + place_s
            if ready.step == query.graph.parted:
                query.enter()
                _draw(query)
                shared[lane], most[lane] = query, query.most(now) - 1
            busy += took
            heapq.heappush(running, (now + took, lane, query, ready.step))
        following = [running[0][0]] if running else []
        if coming < len(arrivals):
            following.append(arrivals[coming].at)
        if not following:
            return Outcome(tuple(ended), busy, moves)
        now = max(now, min(following))
        while coming < len(arrivals) and arrivals[coming].at <= now:
            one = arrivals[coming]
            costs, blocks = one.model.costs(one.rows), one.model.shape(one.rows).blocks
            query = Query(coming, one.model.graph, costs, blocks, one.priority, one.at, one.at + one.within_s, lanes)
            if not refuse or backlog.wait_of(query, now) <= one.within_s:
                backlog.add(query, now)
                call(query, backlog.lanes_of(query))
            coming += 1
        while running and running[0][0] <= now:
            _, lane, query, step = heapq.heappop(running)
            complete = lane not in shared or query.ran(1)
            if lane in shared:
                if most[lane] and lane not in told and not query.ended and _draw(query):
                    most[lane] -= 1
                    busy += query.costs[step]
                    heapq.heappush(running, (now + query.costs[step], lane, query, step))
                    continue
                del shared[lane]
                told.discard(lane)
                query.inside -= 1
            free.append(lane)
            if query.ended or not complete:
                continue
            query.follow(step, lane)
            call(query, backlog.lanes_of(query))
            query.unfinished -= 1
            if not query.unfinished:
                backlog.end(query)
                ended[query.number] = now


def _draw(query: Query) -> bool:
    """Whether there was a block that had not begun."""
    assert query.cursor is not None
    return query.cursor.take() < query.blocks
