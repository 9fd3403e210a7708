"""Queries of any captured models on a few CPU lanes, operator by operator.

A lane is a thread that runs one operator at a time, with one thread inside of it; between two operators it asks the
policy what is next, of all queries. So a short query waits for an operator and not for a whole other query, one that is
cancelled or late takes no lane after its current operator, and the cores have no more threads than there are lanes.
Results do not depend on the schedule: the same operators run on the same inputs, whatever the order.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import torch

from api.runtime.graph import Graph, Operator
from api.runtime.policy import Policy, Ready, hopeless


class LateError(Exception):
    """The query cannot meet its deadline any more, and was dropped."""


class _Query:
    """What is there of a query, and what it still waits for."""

    def __init__(self, number: int, model: Model, inputs: Sequence[Any], priority: int, deadline: float) -> None:
        graph = model.graph
        self.number, self.model, self.priority, self.deadline = number, model, priority, deadline
        self.arrived = time.monotonic()
        self.answer: Future[Any] = Future()
        self.values = graph.begun(inputs)
        self.uses = list(graph.uses)
        self.waits = [len(one.waits) for one in graph.operators]
        self.left = model.work
        self.unfinished = len(graph.operators)

    def ready(self, operator: int, lane: int) -> Ready:
        path = self.model.paths[operator]
        return Ready(self.number, operator, self.priority, self.arrived, self.deadline, self.left, path, lane)


@dataclasses.dataclass(frozen=True)
class Model:
    graph: Graph
    paths: tuple[float, ...]  # of each operator, s: the longest chain of work from it on
    longest: float  # of these
    work: float  # s of all operators

    @classmethod
    def of(cls, graph: Graph) -> Model:
        paths = [0.0] * len(graph.operators)
        for at in reversed(range(len(paths))):
            one = graph.operators[at]
            paths[at] = one.cost + max((paths[after] for after in one.then), default=0.0)
        return cls(graph, tuple(paths), max(paths, default=0.0), sum(one.cost for one in graph.operators))


def opaque(run: Callable[[Any], Any], cost_s: float) -> Model:
    """Work on one input of any type that cannot be looked into, as one operator."""
    return Model.of(Graph(1, {}, (Operator(run, (0,), (1,), (), (), cost_s),), (1,), True, (1, 1)))


class Runtime:
    """Lanes, from `start` to `close`. Thread safe."""

    def __init__(self, lanes: int, policy: Policy | None = None) -> None:
        self._policy, self._wake = policy or Policy(), threading.Condition()
        self._queries: dict[int, _Query] = {}
        self._ready: list[Ready] = []
        self._count, self._closed = 0, False
        self._free = lanes  # that no operator runs on, and that are not lent
        self._lanes = [threading.Thread(target=self._lane, args=(lane,), name=f"lane-{lane}") for lane in range(lanes)]

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()

    def close(self) -> None:
        """Ends the lanes after their current operators; what has not ended is cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for lane in self._lanes:
            lane.join()
        for query in self._queries.values():
            query.answer.cancel()

    def __enter__(self) -> Runtime:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, model: Model, *inputs: Any, priority: int = 0, within_s: float = math.inf) -> Future[Any]:
        """The module's output, in time; `cancel` it, and no other operator of the query begins. Raises LateError where
        the deadline cannot be met by any schedule; the future raises it where it could not be after all.
        """
        now = time.monotonic()
        if hopeless(now + within_s, model.longest, now):
            raise LateError("the deadline is shorter than the model's longest path")
        with self._wake:
            if self._closed:
                raise CancelledError
            query = _Query(self._count, model, inputs, priority, now + within_s)
            self._count += 1
            self._queries[query.number] = query
            first = [at for at, waits in enumerate(query.waits) if not waits]
            self._ready += [query.ready(at, -1) for at in first]
            self._wake.notify(len(first))
        return query.answer

    def idle(self) -> bool:
        """Whether nothing waits for a lane."""
        return not self._ready

    def borrow(self) -> bool:
        """Whether a lane has nothing to do; until `give_back` the caller works in its place, without a hand-over."""
        with self._wake:
            if self._closed or self._free <= len(self._ready):
                return False
            self._free -= 1
            return True

    def give_back(self) -> None:
        with self._wake:
            self._free += 1
            if self._ready:
                self._wake.notify()

    def _lane(self, lane: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (taken := self._take(lane)) is not None:
                query, one = taken
                try:
                    made = one(query.values)
                except Exception as error:
                    with self._wake:
                        self._free += 1
                        self._end(query, error)
                else:
                    self._done(query, one, made, lane)

    def _take(self, lane: int) -> tuple[_Query, Operator] | None:
        """The next operator; None: the runtime is closed."""
        with self._wake:
            while True:
                if self._closed:
                    return None
                now = time.monotonic()
                while self._ready and self._free:
                    chosen = self._ready.pop(self._policy.choose(self._ready, lane, now))
                    query = self._queries.get(chosen.query)
                    if query is None:
                        continue
                    if query.answer.cancelled():
                        self._queries.pop(query.number, None)
                    elif hopeless(query.deadline, chosen.path, now):
                        self._end(query, LateError("the deadline cannot be met any more"))
                    else:
                        one = query.model.graph.operators[chosen.operator]
                        query.left -= one.cost
                        self._free -= 1
                        return query, one
                self._wake.wait()

    def _done(self, query: _Query, one: Operator, made: tuple[Any, ...], lane: int) -> None:
        with self._wake:
            self._free += 1
            if query.number not in self._queries:
                return
            for place, value in zip(one.outputs, made, strict=True):
                query.values[place] = value
            for place in one.inputs:
                query.uses[place] -= 1
                if not query.uses[place]:
                    query.values[place] = None  # its memory is free for the next
            query.unfinished -= 1
            if not query.unfinished:
                self._end(query, None)
                return
            after = 0
            for operator in one.then:
                query.waits[operator] -= 1
                if not query.waits[operator]:
                    self._ready.append(query.ready(operator, lane))
                    after += 1
            self._wake.notify(max(0, after - 1))  # this lane takes one itself

    def _end(self, query: _Query, error: Exception | None) -> None:
        if self._queries.pop(query.number, None) is None or not query.answer.set_running_or_notify_cancel():
            return
        if error is None:
            query.answer.set_result(query.model.graph.result(query.values))
        else:
            query.answer.set_exception(error)
