"""Work that would keep the supervisor's rounds waiting: a bundle to copy, a generation to delete.

One thread does one piece after the other, so no two of them meet in a folder. It writes no state: each round asks for
what it needs, and the one that finds it ended takes over what came of it. A process that ends leaves what is under way,
and the next one begins it anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Errands:
    """For one asking thread. Its own is a daemon: a source that hangs does not keep a process from ending."""

    def __init__(self) -> None:
        self._begun: dict[str, Future[Any]] = {}
        self._asked: set[str] = set()
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="errands", daemon=True).start()

    def ended(self, name: str, work: Callable[[], T]) -> Future[T] | None:
        """The work of this name in the first call after its end; None before, and the first such call begins it."""
        self._asked.add(name)
        if name not in self._begun:
            future: Future[T] = Future()
            self._begun[name] = future
            self._queue.put(lambda: _settle(future, work))
        return self._begun.pop(name) if self._begun[name].done() else None

    def under_way(self, name: str) -> bool:
        """Whether it was begun and nobody has heard of its end."""
        return name in self._begun

    def forget(self) -> None:
        """At the end of a round: of what has ended, all that it did not ask for."""
        self._begun = {name: work for name, work in self._begun.items() if name in self._asked or not work.done()}
        self._asked.clear()

    def close(self) -> None:
        """Waits for nothing; what has not begun by then may never do."""
        self._queue.put(None)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # the round's to raise
        future.set_exception(error)
