"""Queries of any models on a few lanes, operator by operator.

A lane (lane.py: a core, or a stream of a GPU) is driven by a thread that has it run one step after the other; between
two steps it asks the backlog what is next, of all queries. So a short query waits for a step and not for a whole other
query, one that is cancelled or late takes no lane after its current step, and the cores have no more threads than there
are lanes. Results do not depend on the schedule: the same operators run on the same inputs, whatever the order.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from api.runtime.backlog import Backlog, Query
from api.runtime.lane import Cpu, Device, Lane, Mark
from api.runtime.model import Model
from api.runtime.policy import Policy
from api.runtime.watch import CANCELLED, DONE, FAILED, LATE, Observer


class RefusedError(Exception):
    """The runtime takes no such query now; the message is one sentence."""


class LateError(RefusedError):
    """The query cannot meet its deadline, or could not any more, and was dropped."""


class FullError(RefusedError):
    """Its values would go beyond the limit of bytes."""


class _Query(Query):
    """With its values and its answer."""

    def __init__(
        self, number: int, model: Model, inputs: Sequence[Any], rows: int, priority: int, now: float, deadline: float
    ) -> None:
        plan = model.graph.plan(rows)
        super().__init__(number, plan, model.costs(plan, rows), priority, now, deadline)
        self.model, self.rows = model, rows
        self.marks: dict[int, tuple[int, Mark]] = {}  # of slots that may not be there yet: whose lane makes them
        self.answer: Future[Any] = Future()
        self.slots = model.graph.begun(inputs, plan)
        self.uses = list(plan.uses)
        self.bytes = model.graph.bytes_of(rows)

    def after(self, step: int, lane: int) -> Sequence[Mark]:
        """Marks of what a step reads that is not made by this lane: one of each other step."""
        if not self.marks:
            return ()
        found = [self.marks[slot] for slot in self.plan.steps[step].inputs if slot in self.marks]
        return list(dict.fromkeys(mark for number, mark in found if number != lane))


_Begun = tuple[_Query, int, Mark]  # a step that has not ended


class Runtime:
    """Lanes, from `start` to `close`. Thread safe. The `observer` hears what they do."""

    def __init__(
        self,
        lanes: int,
        policy: Policy | None = None,
        bytes_max: float = math.inf,
        observer: Observer | None = None,
        device: Device | None = None,
    ) -> None:
        """`device`: of which the lanes are; None: cores."""
        self._observer, self._device = observer or Observer(), device or Cpu()
        self._wake, self._backlog = threading.Condition(), Backlog(policy or Policy())
        self._count, self._closed, self._idle = 0, False, 0
        self._bytes, self._bytes_max = 0, bytes_max
        made = [self._device.lane() for _ in range(lanes)]
        self._free = sum(lane.depth for lane in made)  # steps that may begin, on lanes that are not lent
        self._lanes = [
            threading.Thread(target=self._drive, args=(number, lane), name=f"lane-{number}")
            for number, lane in enumerate(made)
        ]

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()

    def close(self) -> None:
        """Ends the lanes after their current steps; what has not ended is cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for lane in self._lanes:
            lane.join()
        with self._wake:
            for query in list(self._backlog):
                assert isinstance(query, _Query)
                query.answer.cancel()
                self._leave(query, CANCELLED)

    def __enter__(self) -> Runtime:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bytes_held(self) -> int:
        """Of the queries that have not ended: what their values may take."""
        return self._bytes

    def submit(
        self,
        model: Model,
        *inputs: Any,
        priority: int = 0,
        within_s: float = math.inf,
        rows: int | None = None,
        strict: bool = True,
    ) -> Future[Any]:
        """The module's output, in time; `cancel` it, and no other step of the query begins. `rows`: for inputs that are
        no tensors. Raises LateError where by what waits already the deadline cannot be met, FullError; the future
        raises LateError where it could not be met after all. Not `strict`: the deadline orders and drops nothing.
        """
        rows = model.graph.rows_of(inputs) if rows is None else rows
        now = time.monotonic()
        given, mark = self._device.given(inputs)
        query = _Query(-1, model, given, rows, priority, now, now + within_s)
        query.strict = strict
        if mark is not None:
            slots = [slot for places in query.plan.places[: model.graph.inputs] for slot in places]
            query.marks = dict.fromkeys(slots, (-1, mark))
        with self._wake:
            if self._closed:
                raise CancelledError
            query.number = self._count  # behind all that waits
            if strict and within_s < math.inf and self._backlog.wait_of(query, len(self._lanes), now) > within_s:
                self._observer.refused()
                raise LateError("the deadline cannot be met with what waits already")
            if self._bytes + query.bytes > self._bytes_max:
                self._observer.refused()
                raise FullError(f"{query.bytes} bytes more are not free")
            self._count += 1
            self._bytes += query.bytes
            self._backlog.add(query, now)
            self._observer.arrived(query.number, model, priority, query.answer)
            self._rouse(len(query.ready))
        return query.answer

    def borrow(self) -> bool:
        """Whether a lane has nothing to do; until `give_back` the caller works in its place, without a hand-over."""
        with self._wake:
            if self._closed or self._free <= self._backlog.ready():
                return False
            self._free -= 1
            return True

    def give_back(self) -> None:
        with self._wake:
            self._free += 1
            self._rouse(self._backlog.ready())

    def idle(self) -> bool:
        """Whether nothing waits for a lane."""
        with self._wake:
            return not self._backlog.ready()

    def _rouse(self, steps: int) -> None:
        if self._idle and steps > 0:
            self._wake.notify(steps)

    def _drive(self, number: int, lane: Lane) -> None:
        begun = deque[_Begun]()
        taken: tuple[_Query, int] | None = None
        with lane.entered():
            while taken or begun or (taken := self._take(number, wait=True)):
                taken = self._go_on(number, lane, begun, taken)

    def _go_on(
        self, number: int, lane: Lane, begun: deque[_Begun], taken: tuple[_Query, int] | None
    ) -> tuple[_Query, int] | None:
        """Begins a step, or waits for the first one that has begun; the next step, if there is one."""
        made: tuple[Any, ...] | Exception | None = None
        mark, took = None, 0.0
        try:
            if taken is not None:
                query, step = taken
                since = time.perf_counter()
                made, mark = lane.begin(query.plan.steps[step], query.slots, query.after(step, number))
                took = time.perf_counter() - since
            else:
                query, step, waited = begun.popleft()
                took = waited.wait()
        except Exception as error:
            made = error
        with self._wake:  # once from step to step
            if made is not None:
                self._made(query, step, made, number, mark)
            if mark is not None:
                begun.append((query, step, mark))
            complete = mark is None and self._ended(query, step, took, number, newest=taken is not None)
            if not complete:
                return self._take(number) if len(begun) < lane.depth else None
            if self._idle:
                self._wake.notify()  # for what this lane would do if it had no answer to put together
        self._answer(query, lane)
        return self._take(number)

    @staticmethod
    def _answer(query: _Query, lane: Lane) -> None:
        if query.answer.set_running_or_notify_cancel():
            try:
                query.answer.set_result(lane.result(lambda: query.model.graph.result(query.slots, query.plan)))
            except Exception as error:
                query.answer.set_exception(error)

    def _take(self, lane: int, wait: bool = False) -> tuple[_Query, int] | None:
        """The next step; None: the runtime is closed, or nothing can begin and the lane does not `wait`."""
        with self._wake:
            while not self._closed:
                taken = self._backlog.take(lane, time.monotonic()) if self._free > 0 else None
                if taken is None and not wait:
                    return None
                if taken is None:
                    self._idle += 1
                    self._wake.wait()
                    self._idle -= 1
                    continue
                query, step, _ = taken
                assert isinstance(query, _Query)
                if step >= 0 and not query.answer.cancelled():
                    self._free -= 1
                    self._observer.begin(query.number, query.plan.steps[step], lane)
                    return query, step
                cancelled = query.answer.cancelled()
                self._fail(query, None if cancelled else LateError("the deadline cannot be met any more"))
                del query, taken  # a lane that waits holds nothing
            return None

    def _made(
        self, query: _Query, number: int, made: tuple[Any, ...] | Exception, lane: int, mark: Mark | None
    ) -> None:
        """A step has given something, which is there after its mark. Under the lock."""
        if isinstance(made, Exception):
            self._fail(query, made)
        if query.ended or isinstance(made, Exception):
            return
        step = query.plan.steps[number]
        for slot, value in zip(step.outputs, made, strict=True):
            query.slots[slot] = value
        if mark is not None:
            query.marks |= dict.fromkeys(step.outputs, (lane, mark))
        self._rouse(query.follow(number, lane) - 1)  # this lane takes one itself

    def _ended(self, query: _Query, number: int, took: float, lane: int, newest: bool) -> bool:
        """Whether it was the query's last step; the `newest` of this lane, or the first one. Under the lock."""
        self._free += 1
        self._observer.end(lane, newest)
        if query.ended:
            return False
        step = query.plan.steps[number]
        if query.model.learns:
            query.model.learn(step.operator, query.model.rows(query.plan, number, query.rows), took)
        for slot in step.inputs:
            query.uses[slot] -= 1
            if not query.uses[slot]:
                query.slots[slot] = None  # its memory is free for the next
        query.unfinished -= 1
        if query.unfinished:
            return False
        self._leave(query, DONE)
        return True

    def _fail(self, query: _Query, error: Exception | None) -> None:
        """Drops it; None: its caller has cancelled it. Under the lock, so what hears of the answer must not wait."""
        if not query.ended:
            self._leave(query, LATE if isinstance(error, LateError) else FAILED)
            if query.answer.set_running_or_notify_cancel():
                query.answer.set_exception(error or CancelledError())

    def _leave(self, query: _Query, how: str) -> None:
        self._backlog.end(query)
        self._bytes -= query.bytes
        self._observer.left(query.number, CANCELLED if query.answer.cancelled() else how)
