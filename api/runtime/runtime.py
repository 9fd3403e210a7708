"""Queries of any models on a few lanes, operator by operator.

A lane (lane.py: a core, or a stream of a GPU) is driven by a thread that has it run one operator after the other;
between two it asks the backlog what is next, of all queries. An operator that runs in blocks (blocks.py) is shared by
as many free lanes as it is worth, and let go of after a block when a query comes that goes before it. So a short query
waits for a block and not for a whole other query, one that is cancelled or late takes no lane after its current
operator, and the cores have no more threads than there are lanes. Results do not depend on the schedule: the same
operators run on the same blocks, whatever the order.
"""

from __future__ import annotations

import functools
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from api.runtime.backlog import Backlog, Query
from api.runtime.blocks import Blocked, Word
from api.runtime.graph import Operator
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


class _Answer(Future[Any]):
    """Its query ends, and lanes that run blocks of it stop, when it is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: dict[int, Word] = {}  # by lane
        self.gone: Callable[[], None] | None = None  # to be told of it

    def cancel(self) -> bool:
        found = super().cancel()
        if found and self.gone is not None:
            self.gone()
        return found

    def stop(self) -> None:
        for word in list(self.inside.values()):
            word.value = 1


class _Query(Query):
    """With its inputs and its answer, and with its values from its first operator on."""

    __slots__ = ("answer", "bytes", "given", "marks", "model", "rows", "shared", "uses", "values")

    def __init__(
        self, model: Model, rows: int, given: Sequence[Any], priority: int, now: float, deadline: float, lanes: int
    ) -> None:
        shape = model.shape(rows)
        super().__init__(-1, model.graph, model.costs(rows), shape.blocks, priority, now, deadline, lanes)
        self.model, self.rows, self.given = model, rows, given
        self.marks = _NO_MARKS  # of values that may not be there yet: whose lane makes them
        self.answer = _Answer()
        self.values: list[Any] = []
        self.uses: list[int] = []  # by value: operators that have not read it
        self.shared: tuple[list[Any], list[Any]] | None = None  # what blocks read and write
        self.bytes = shape.bytes

    def after(self, step: int, lane: int) -> Sequence[Mark]:
        """Marks of what an operator reads that is not made by this lane: one of each other operator."""
        if not self.marks:
            return ()
        found = [self.marks[value] for value in self.graph.operators[step].inputs if value in self.marks]
        return list(dict.fromkeys(mark for number, mark in found if number != lane))

    def cause(self, step: int, error: Exception) -> Exception:
        """The error of the first step that failed of those whose results one has read, which then failed for what was
        never made, and may be heard first. They have ended, for it has."""
        read = set(self.graph.operators[step].inputs)
        for one in reversed(self.graph.operators[:step]):
            if read.isdisjoint(one.outputs):
                continue
            read.update(one.inputs)
            try:
                for value in one.outputs:
                    if value in self.marks:
                        self.marks[value][1].wait()
            except Exception as earlier:
                error = earlier
        return error

    def some(self, one: Operator, stop: Word) -> int:
        """Runs some of its blocks: how many."""
        assert isinstance(one.run, Blocked)
        assert self.cursor is not None
        assert self.shared is not None
        return one.run.run(*self.shared, self.rows, self.cursor, stop, self.most(time.monotonic()))

    def begin(self) -> None:
        """Its first operator is to run: it takes memory."""
        if not self.values:
            self.values, self.uses = self.graph.begun(self.given, self.rows), list(self.graph.uses)
            self.given = ()

    def enter(self) -> None:
        super().enter()
        if self.shared is None:
            one = self.graph.operators[self.graph.parted]
            self.shared = [self.values[value] for value in one.inputs], [self.values[value] for value in one.outputs]


def _told(error: Exception) -> Exception:
    """With where it was raised as a note, for frames would hold a query's values as long as the error is kept."""
    if error.__traceback__ is not None:
        error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    return error.with_traceback(None)


_NO_MARKS: dict[int, tuple[int, Mark]] = {}
_Begun = tuple[_Query, int, Mark]  # an operator that has not ended


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
        self._wake, self._backlog = threading.Condition(), Backlog(policy or Policy(), lanes)
        self._count, self._closed = 0, False
        self._idle = self._roused = 0  # lanes that wait, and those that wait no more and have not come yet
        self._bytes, self._bytes_max = 0, bytes_max
        self._shared: dict[int, _Query] = {}  # of which a lane runs blocks
        self._stops = [Word() for _ in range(lanes)]  # 1: the lane asks for other work after its current block
        made = self._device.lanes(lanes)
        self._free = sum(lane.depth for lane in made)  # operators that may begin, on lanes that are not lent
        self._lanes = [
            threading.Thread(target=self._drive, args=(number, lane), name=f"lane-{number}")
            for number, lane in enumerate(made)
        ]

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()

    def close(self) -> None:
        """Ends the lanes after their current operators; what has not ended is cancelled."""
        with self._wake:
            self._closed = True
            for stop in self._stops:
                stop.value = 1
            self._wake.notify_all()
        for lane in self._lanes:
            lane.join()
        with self._wake:
            for query in list(self._backlog):
                assert isinstance(query, _Query)
                if not query.answer.cancel():
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
        raises LateError where it could not be met after all, and what an operator has raised, with where as a note. Not
        `strict`: the deadline orders and drops nothing. Tensors are those of inference mode: to be read.
        """
        rows = model.graph.rows_of(inputs) if rows is None or model.graph.parted >= 0 else rows
        now = time.monotonic()
        given, mark = self._device.given(inputs)
        query = _Query(model, rows, given, priority, now, now + within_s, len(self._lanes))
        query.strict = strict
        if mark is not None:
            query.marks = dict.fromkeys(range(model.graph.inputs), (-1, mark))
        with self._wake:
            if self._closed:
                raise CancelledError
            query.number = self._count  # behind all that waits
            if strict and within_s < math.inf and self._backlog.wait_of(query, now) > within_s:
                self._observer.refused()
                raise LateError("the deadline cannot be met with what waits already")
            if self._bytes + query.bytes > self._bytes_max:
                self._observer.refused()
                raise FullError(f"{query.bytes} bytes more are not free")
            self._count += 1
            self._bytes += query.bytes
            self._backlog.add(query, now)
            query.answer.gone = functools.partial(self._cancelled, query.number)
            self._observer.arrived(query.number, model, priority, query.answer)
            self._call(query, self._backlog.lanes_of(query), now)
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
            self._rouse(self._backlog.ready() if self._idle else 0)

    def idle(self) -> bool:
        """Whether nothing waits for a lane."""
        with self._wake:
            return not self._backlog.ready()

    def _rouse(self, lanes: int) -> int:
        """So many idle lanes, or as many as there are and may begin something: how many."""
        count = max(0, min(lanes, self._idle, self._free - self._roused))
        if count:
            self._idle -= count
            self._roused += count
            self._wake.notify(count)
        return count

    def _call(self, query: Query, lanes: int, now: float) -> None:
        """So many lanes for a query: idle ones, then ones that are at what goes after it and have not been told to stop
        for another one. Under the lock."""
        lanes -= self._rouse(lanes)
        if lanes > 0 and self._shared:
            others = {lane: other for lane, other in self._shared.items() if not self._stops[lane].value}
            for lane in self._backlog.behind(query, others, now)[:lanes]:
                self._stops[lane].value = 1

    def _cancelled(self, number: int) -> None:
        with self._wake:
            query = self._backlog.get(number)
            if query is not None:
                assert isinstance(query, _Query)
                self._leave(query, CANCELLED)

    def _drive(self, number: int, lane: Lane) -> None:
        begun = deque[_Begun]()
        taken: tuple[_Query, int] | None = None
        with lane.entered():
            while taken or begun or (taken := self._take(number, lane, wait=True)):
                taken = self._go_on(number, lane, begun, taken)

    def _go_on(
        self, number: int, lane: Lane, begun: deque[_Begun], taken: tuple[_Query, int] | None
    ) -> tuple[_Query, int] | None:
        """Begins an operator or some of its blocks, or waits for the first one that has begun; what is next, if there
        is anything."""
        made: tuple[Any, ...] | Exception | None = None
        mark, took, blocks = None, 0.0, 0
        try:
            if taken is not None:
                query, step = taken
                one = query.graph.operators[step]
                since = time.perf_counter()
                if one.blocks and lane.depth == 1:
                    blocks = query.some(one, self._stops[number])
                else:
                    made, mark = lane.begin(one, query.values, query.after(step, number))
                took = time.perf_counter() - since
            else:
                query, step, waited = begun.popleft()
                took = waited.wait()
        except Exception as error:
            made = error
        if isinstance(made, Exception):
            made = _told(made if taken is not None else query.cause(step, made))
        with self._wake:  # once from operator to operator
            if made is not None:
                self._made(query, step, made, number, mark)
            if mark is not None:
                begun.append((query, step, mark))
            complete = mark is None and self._ended(query, step, took, blocks, number, newest=taken is not None)
            if not complete:
                return self._take(number, lane) if len(begun) < lane.depth else None
            self._rouse(min(1, len(self._backlog)))  # for what this lane would do if it had no answer to put together
        self._answer(query, lane)
        return self._take(number, lane)

    @staticmethod
    def _answer(query: _Query, lane: Lane) -> None:
        if query.answer.set_running_or_notify_cancel():
            try:
                query.answer.set_result(lane.result(lambda: query.graph.result(query.values)))
            except Exception as error:
                query.answer.set_exception(error)

    def _take(self, number: int, lane: Lane, wait: bool = False) -> tuple[_Query, int] | None:
        """What is next; None: the runtime is closed, or nothing can begin and the lane does not `wait`."""
        with self._wake:
            while not self._closed:
                taken = self._backlog.take(number, time.monotonic()) if self._free > 0 else None
                if taken is None and not wait:
                    return None
                if taken is None:
                    self._idle += 1
                    self._wake.wait()
                    self._roused -= 1
                    continue
                query, ready = taken
                assert isinstance(query, _Query)
                error: Exception | None = None
                if ready is not None and not query.answer.cancelled():
                    try:
                        query.begin()
                    except Exception as failed:
                        error = _told(failed)
                    else:
                        if ready.step == query.graph.parted:
                            self._enter(number, lane, query)
                        self._free -= 1
                        self._observer.begin(query.number, ready.step, number)
                        return query, ready.step
                error = error or LateError("the deadline cannot be met any more")
                self._fail(query, None if query.answer.cancelled() else error)
                del query, taken, error  # a lane that waits holds nothing
            return None

    def _enter(self, number: int, lane: Lane, query: _Query) -> None:
        """A lane is to run blocks. Under the lock."""
        if lane.depth > 1:
            query.pass_over()
            return
        query.enter()
        self._stops[number].value = 0
        query.answer.inside[number] = self._stops[number]
        self._shared[number] = query

    def _made(
        self, query: _Query, number: int, made: tuple[Any, ...] | Exception, lane: int, mark: Mark | None
    ) -> None:
        """An operator has given something, which is there after its mark. Under the lock."""
        if isinstance(made, Exception):
            self._fail(query, made)
        if query.ended or isinstance(made, Exception):
            return
        one = query.graph.operators[number]
        for value, own in zip(one.outputs, made, strict=True):
            query.values[value] = own
        if mark is not None:
            query.marks = query.marks | dict.fromkeys(one.outputs, (lane, mark))
        self._follow(query, number, lane)

    def _follow(self, query: _Query, number: int, lane: int) -> None:
        query.follow(number, lane)
        if self._idle or self._shared:
            self._call(query, self._backlog.lanes_of(query) - 1, time.monotonic())  # this lane takes one itself

    def _ended(self, query: _Query, number: int, took: float, blocks: int, lane: int, newest: bool) -> bool:
        """Whether it was the query's last operator; the `newest` of this lane, or the first one. `blocks`: how many of
        it have run, where this lane did not run all of it. Under the lock."""
        self._free += 1
        self._observer.end(lane, newest, blocks)
        one = query.graph.operators[number]
        shared = self._shared.pop(lane, None) is not None
        if shared:
            query.inside -= 1
            del query.answer.inside[lane]
        if query.ended:
            return False
        if query.model.learns and (blocks or not shared):
            if one.blocks:
                assert isinstance(one.run, Blocked)
                took = max(took - one.run.once_s, took / 10) / (blocks or query.blocks)
            query.model.learn(number, query.rows, took)
        if shared:
            if not query.ran(blocks):
                self._rouse(self._backlog.lanes_of(query))
                return False
            self._follow(query, number, lane)
        for value in one.inputs:
            query.uses[value] -= 1
            if not query.uses[value]:
                query.values[value] = None  # its memory is free for the next
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
        query.answer.stop()
        self._backlog.end(query)
        self._bytes -= query.bytes
        self._observer.left(query.number, CANCELLED if query.answer.cancelled() else how)
