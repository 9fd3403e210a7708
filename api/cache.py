"""Prefetched user blocks: computed once per (user, generation, as_of), shared while they are in flight, forgotten by
age and size.

A caller must still check that the user's history has not moved on since (users.py does). Nothing here blocks: the
values are futures.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclasses.dataclass(slots=True)
class _Entry(Generic[V]):
    future: Future[V]
    born: float
    nbytes: int = 0


class FutureCache(Generic[V]):
    """At most `bytes_limit` of finished values, none older than `ttl_s`; the least recently used go first."""

    def __init__(
        self, bytes_limit: int, ttl_s: float, size_of: Callable[[V], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._ttl, self._size_of, self._clock = bytes_limit, ttl_s, size_of, clock
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def start(self, key: Hashable, submit: Callable[[], Future[V]]) -> tuple[Future[V], bool]:
        """The future of `key` and whether this call started it: callers that meet share one computation."""
        with self._lock:
            entry = self._fresh(key)
            if entry is not None:
                return entry.future, False
            future = submit()
            self._entries[key] = _Entry(future, self._clock())
        future.add_done_callback(lambda done: self._finished(key, done))
        return future, True

    def get(self, key: Hashable) -> Future[V] | None:
        with self._lock:
            entry = self._fresh(key)
            return None if entry is None else entry.future

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._remove(key)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def _fresh(self, key: Hashable) -> _Entry[V] | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() - entry.born > self._ttl:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def _finished(self, key: Hashable, future: Future[V]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.future is not future:
                return
            if future.cancelled() or future.exception() is not None:
                self._remove(key)
                return
            entry.nbytes = self._size_of(future.result())
            self._nbytes += entry.nbytes
            self._shrink()

    def _shrink(self) -> None:
        """Age first (entries are in order of use, not of birth, so all are looked at), then size."""
        now = self._clock()
        for key in [key for key, entry in self._entries.items() if now - entry.born > self._ttl]:
            self._remove(key)
        for key in [key for key, entry in self._entries.items() if entry.nbytes]:
            if self._nbytes <= self._limit:
                return
            self._remove(key)

    def _remove(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._nbytes -= entry.nbytes
