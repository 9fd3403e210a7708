"""How many computations of a kind may run at once. Who comes when all places are taken is told so at once and never
waits: a queue in front of something slow only makes it slower for everyone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from api.problems import ProblemError
from infra import telemetry

if TYPE_CHECKING:
    from prometheus_client import Counter

P = ParamSpec("P")
T = TypeVar("T")


def refusals(kind: str) -> Counter:
    """Counts what was refused."""
    refused = telemetry.counter("forerank_refused", "What found no free place, by kind", ("kind",))
    return refused.labels(kind)


class FullError(Exception):
    """As many run as may."""


@contextmanager
def overloaded(why: str) -> Iterator[None]:
    """What a caller is told where as many run as may: ProblemError 503."""
    try:
        yield
    except FullError as error:
        raise ProblemError(503, "overloaded", f"{why}; try again") from error


class Admission:
    """At most `places` at once. Thread safe; made before the process' threads start."""

    def __init__(self, kind: str, places: int) -> None:
        self._free = threading.Semaphore(places)
        self._refused = refusals(kind)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place as long as the context lasts. Raises FullError."""
        self._take()
        try:
            yield
        finally:
            self._free.release()

    def admit(self, submit: Callable[P, Future[T]], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        """Has something started by `submit`; its place is free again when it has ended. Raises FullError."""
        self._take()
        try:
            future = submit(*arguments, **named)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return future

    def _take(self) -> None:
        if not self._free.acquire(blocking=False):
            self._refused.inc()
            raise FullError
