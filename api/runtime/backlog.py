"""The queries of a runtime that have not ended, and the one ready queue over all their steps. No threads, no clock: the
runtime calls it under its lock, the simulation in simulated time.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from api.runtime.blocks import Cursor
from api.runtime.graph import ONCE_S, Graph
from api.runtime.policy import Policy, Ready, hopeless

_REORDER_S = 1e-3  # after which waiting and deadlines may have changed the order ...
_EACH_S = 1e-4  # ... and for each query that waits: to order them takes a hundredth of it
_SHARE_S = 10e-3  # for which a lane runs blocks without asking whether there is something better
_JOIN_S = 10 * ONCE_S  # of work left in blocks for each lane that shares it: a share costs a sixth of this ...
_CROWDED = 1.5  # ... unless more queries, of its class or higher, are here for each lane: one of its own costs less
_NEWEST = 0.02  # the share of the newest query in what is usual


class Query:
    """What a query still waits for. `costs`: s of each operator, or of one of its blocks.

    Made by whoever asks, on a core whose caches a model has emptied: so it is small, and has only what its place in the
    order needs.
    """

    __slots__ = (
        "_block_s",
        "_others_s",
        "_path_s",
        "arrived",
        "blocks",
        "costs",
        "cursor",
        "deadline",
        "done",
        "ended",
        "graph",
        "inside",
        "number",
        "path",
        "paths",
        "priority",
        "ready",
        "strict",
        "through",
        "unfinished",
        "waits",
    )

    def __init__(
        self,
        number: int,
        graph: Graph,
        costs: Sequence[float],
        blocks: int,
        priority: int,
        arrived: float,
        deadline: float,
        lanes: int,
    ) -> None:
        """`lanes` that there are to share its blocks."""
        self.number, self.graph, self.costs = number, graph, costs
        self.priority, self.arrived, self.deadline = priority, arrived, deadline
        paths = self.paths = list(costs)
        parted, block_s, self._path_s = graph.parted, 0.0, 0.0  # s that each block adds to its path
        if parted >= 0:
            block_s = costs[parted]
            self._path_s = block_s / min(lanes, blocks, _sharing(blocks * block_s))
            paths[parted] = self._path_s * blocks
        for at, then in graph.onward:
            paths[at] += paths[then[0]] if len(then) == 1 else max(paths[after] for after in then)
        self.path = max(paths, default=0.0)
        self.blocks, self.done = blocks, 0  # all, and those that have ended
        self.cursor: Cursor | None = None  # which have begun, from the first one on
        self.through = False  # all have ended
        self.inside = 0  # lanes that run blocks
        self._block_s, self._others_s = block_s, sum(costs) - block_s
        self.unfinished = len(costs)
        self.ended = False
        self.strict = True  # dropped when it cannot meet its deadline any more
        self.waits = list(graph.waits)
        self.ready = [Ready(at, paths[at], -1) for at in graph.first]

    @property
    def left(self) -> float:
        """s of work that has not begun."""
        return self._others_s + self._block_s * self._left()

    def _left(self) -> int:
        """Blocks that have not begun."""
        return self.blocks if self.cursor is None else self.cursor.left()

    def enter(self) -> None:
        """A lane is to run blocks."""
        self.inside += 1
        if self.cursor is None:
            self.cursor = Cursor(self.blocks)

    def most(self, now: float) -> int:
        """Blocks that a lane runs without asking whether there is something better."""
        seconds = min(_SHARE_S, self.deadline - now) if self.strict else _SHARE_S
        return max(1, int(seconds / max(self._block_s, 1e-9)))

    def pass_over(self) -> None:
        """A lane is to run all of them at once."""
        self.cursor = Cursor(self.blocks)
        self.cursor.next.value = self.blocks

    def follow(self, step: int, lane: int) -> None:
        """Operators are ready now because what this one makes is there, or will be before they read it."""
        for after in self.graph.then[step]:
            self.waits[after] -= 1
            if not self.waits[after]:
                self.ready.append(Ready(after, self.paths[after], lane))

    def lanes(self, join: bool) -> int:
        """How many could do something for it; `join`: together."""
        count = len(self.ready)
        for one in self.ready:
            if one.step == self.graph.parted:
                count += self._blocks(join) - 1
        return count

    def _blocks(self, join: bool) -> int:
        """That are left, as far as each is worth one more lane."""
        left = self._left()
        others = max(0, self.inside - 1)  # have begun their part of it, which is no longer left
        most = _sharing((left + others) * self._block_s) if join else 1
        return max(0, min(left, most - self.inside))

    def path_of(self, ready: Ready) -> float:
        """s of the longest chain of work from a step on that has not begun."""
        if ready.step != self.graph.parted:
            return ready.path
        return ready.path - self._path_s * (self.blocks - self._left())

    def take(self, policy: Policy, lane: int, join: bool) -> Ready | None:
        """An operator that is ready and worth another lane. That which runs in blocks stays so while there are any."""
        parted = self.graph.parted
        ready = self.ready if self._blocks(join) else [one for one in self.ready if one.step != parted]
        if not ready:
            return None
        chosen = ready[policy.step(ready, lane)]
        if chosen.step != parted:
            self._others_s -= self.costs[chosen.step]
            self.ready.remove(chosen)
        return chosen

    def ran(self, blocks: int) -> bool:
        """Blocks have run; whether these were the last ones."""
        self.done += blocks
        if self.through or self.done < self.blocks:
            return False
        self.through = True
        self.ready = [one for one in self.ready if one.step != self.graph.parted]
        return True


def _sharing(work_s: float) -> int:
    """How many lanes are worth it to share the blocks."""
    return max(1, math.ceil(work_s / _JOIN_S))


class Backlog:
    def __init__(self, policy: Policy, lanes: int) -> None:
        self._policy, self._lanes = policy, lanes
        self._live: dict[int, Query] = {}
        self._classes = Counter[int]()  # of these
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
        """How many lanes could do something."""
        return sum(map(self.lanes_of, self._live.values()))

    def lanes_of(self, query: Query) -> int:
        """How many could do something for it."""
        return query.lanes(self._join(query))

    def _join(self, query: Query) -> bool:
        """Whether lanes share it."""
        most = _CROWDED * self._lanes
        if len(self._live) <= most:
            return True
        return sum(own for priority, own in self._classes.items() if priority <= query.priority) <= most

    def wait_of(self, query: Query, now: float) -> float:
        """How long after now the query will end, as far as what is here tells: the work that goes before its last step
        is shared by the lanes."""
        own = self._urgency(query, now)
        ahead = sum(one.left for one in self._live.values() if self._urgency(one, now) < own)
        return max(query.path, (ahead + query.left) / self._lanes)

    def add(self, query: Query, now: float) -> None:
        self._live[query.number] = query
        self._classes[query.priority] += 1
        self._count += 1
        newest, difference = max(_NEWEST, 1 / self._count), query.left - self._usual
        self._usual += difference * newest
        if self._count > 1:
            self._spread += (abs(difference) - self._spread) * newest
        insort(self._order, (self._urgency(query, now), query))

    def _urgency(self, query: Query, now: float) -> tuple[float, ...]:
        return self._policy.urgency(query, now, self._lanes, self._usual or query.left or 1.0, self._spread)

    def get(self, number: int) -> Query | None:
        """One that has not ended."""
        return self._live.get(number)

    def end(self, query: Query) -> None:
        """It takes no lane any more."""
        query.ended = True
        if self._live.pop(query.number, None):
            self._classes[query.priority] -= 1
        if not self._live:
            self._order.clear()  # which holds their values

    def behind(self, query: Query, lanes: Mapping[int, Query], now: float) -> list[int]:
        """Of the lanes that run blocks, those to be stopped for a query, the last ones first: they are at queries of a
        lower class, or at ones that can wait while this one cannot. All others ask again soon by themselves."""
        own = self._urgency(query, now)[:2]
        found = sorted(((self._urgency(other, now), lane) for lane, other in lanes.items()), reverse=True)
        return [lane for urgency, lane in found if urgency[:2] > own]

    def take(self, lane: int, now: float) -> tuple[Query, Ready | None] | None:
        """The next query for a lane, and an operator of it; none where the query is to be dropped, for it cannot meet
        its deadline any more."""
        if now - self._ordered > max(_REORDER_S, _EACH_S * len(self._live)):
            self._order = sorted((self._urgency(one, now), one) for one in self._live.values())
            self._ordered = now
        for _, query in self._order:
            if query.ended or not query.ready:
                continue
            chosen = query.take(self._policy, lane, self._join(query))
            if chosen is None:
                continue
            path = query.path_of(chosen)
            if query.strict and hopeless(query.deadline, path, now):
                return query, None
            query.path = path
            return query, chosen
        return None
