"""The heavy steps of requests, on a few lanes that all of them share (api/runtime).

A step is one operator. It releases the GIL for most of its time and waits for nothing: what it needs is there when it
is submitted, and whoever wants its result waits in a thread of his own. So the processes of a host compute on no more
cores than they were given, however many requests there are, and who is next is the policy's choice.

Guarantee: a step that is submitted is done, once, unless the runtime is closed. A deadline orders, it drops nothing.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from api.runtime.model import Model
from api.runtime.runtime import Runtime
from infra.settings import Settings

T = TypeVar("T")
AHEAD_S = 0.02
_USUAL = 1_000  # candidates or behaviours that a step's first guess is for
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Rank(enum.IntEnum):
    """The classes of the policy, and a lower one that it does not see: a queue of what nobody waits for yet would make
    each of its choices dearer."""

    NEXT = -1  # a request's last step, or one that is late: what is nearly done holds memory
    REQUEST = 0  # as queries of other models have it that say nothing
    AHEAD = 1  # nobody waits for it yet; it comes when nothing else does, or has waited for AHEAD_S


class Step(enum.Enum):
    """By what costs are known. The value is what one of usual size is taken to cost, s, before any has run."""

    INFER = 1.4e-3
    FIND = 4e-3  # candidates and their rows, and their scores where the user is there by then
    SCORE = 3e-3


class _Task(Future[T]):
    """A step on its way, which the first one who takes it does: a lane, or a caller who needs it."""

    def __init__(self, step: Step, size: int, work: Callable[[], T], rank: Rank) -> None:
        super().__init__()
        self.step, self.size, self.rank, self.since = step, size, rank, time.monotonic()
        self._work: Callable[[], T] | None = work
        self._taken = threading.Lock()

    def take(self) -> bool:
        return self._taken.acquire(blocking=False)

    def run(self) -> None:
        """After `take`."""
        work, self._work = self._work, None  # what it holds goes with it, wherever this task still waits
        assert work is not None
        try:
            found = work()
        except BaseException as error:
            self.set_exception(error)
        else:
            self.set_result(found)


class Lanes:
    """Gives steps to a runtime. Thread safe."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.models = {step: Model.opaque(self._run, 1, step.value, _USUAL, learns=False) for step in Step}
        self._ahead: deque[_Task[Any]] = deque()
        self._lock = threading.Lock()

    def submit(
        self,
        step: Step,
        size: int,
        work: Callable[[], T],
        rank: Rank = Rank.REQUEST,
        until: float = math.inf,
    ) -> Future[T]:
        """`size`: of what the step takes, by which its cost is known; `until`: when it is to be done at the latest
        (`time.perf_counter`). Raises CancelledError where the runtime is closed, and so does the future."""
        task = _Task(step, size, work, rank)
        if rank is Rank.AHEAD:
            with self._lock:
                self._ahead.append(task)
        else:
            self._place(task, rank, until)
        self._promote()
        return task

    def run(
        self, step: Step, size: int, work: Callable[[], T], rank: Rank = Rank.REQUEST, until: float = math.inf
    ) -> T:
        """`submit` for a caller who waits; he works himself, in place of a lane that has nothing to do."""
        if not self._runtime.borrow():
            return self.submit(step, size, work, rank, until).result()
        try:
            began = time.perf_counter()
            found = work()
            self.models[step].learn(0, size, time.perf_counter() - began)
            return found
        finally:
            self._runtime.give_back()
            self._promote()

    def hurry(self, future: Future[Any]) -> None:
        """Somebody waits for what was submitted ahead."""
        if isinstance(future, _Task) and self._is_request(future):
            self._place(future, Rank.REQUEST, math.inf)

    def help(self, future: Future[Any]) -> None:
        """For a caller on a lane who needs the result next: he does the step himself, unless somebody has begun it."""
        if isinstance(future, _Task):
            self._run(future)

    def _place(self, task: _Task[Any], rank: Rank, until: float) -> None:
        within_s = until - time.perf_counter()
        answer = self._runtime.submit(
            self.models[task.step], task, priority=rank, within_s=within_s, rows=task.size, strict=False
        )
        answer.add_done_callback(lambda answer: self._closed(task, answer))

    @staticmethod
    def _closed(task: _Task[Any], answer: Future[Any]) -> None:
        if answer.cancelled() and task.take():
            task.cancel()

    def _run(self, task: _Task[Any]) -> None:
        if task.take():
            began = time.perf_counter()
            task.run()
            self.models[task.step].learn(0, task.size, time.perf_counter() - began)
        self._promote()

    def _promote(self) -> None:
        """What is ahead becomes a request where nothing else waits for a lane, and in time. Looked for whenever a step
        comes or ends: only others can keep one waiting."""
        while self._ahead:
            with self._lock:
                if not self._ahead:
                    return
                first = self._ahead[0]
                waits = first.rank is Rank.AHEAD and not first.done()
                if waits and not self._runtime.idle() and time.monotonic() - first.since < AHEAD_S:
                    return
                self._ahead.popleft()
            self.hurry(first)

    def _is_request(self, task: _Task[Any]) -> bool:
        """Whether it becomes one by this call."""
        with self._lock:
            was, task.rank = task.rank, min(task.rank, Rank.REQUEST)
        return was is Rank.AHEAD and not task.done()


def lanes_of(settings: Settings) -> int:
    """Of one API process: so many that those of all of them are no more than the cores."""
    return settings.lanes or max(1, cores() // settings.api_processes)


def cores() -> int:
    """That this process may use: its affinity, and the quota of its control group (v2)."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text().split()
        count = min(count, int(quota) // int(period))
    return max(1, count)
