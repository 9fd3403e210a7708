"""Values computed once and shared: by callers that meet while one is computed, and by later ones until it is too old,
made from something else than they know, or pushed out by size.

Nothing here blocks: the values are futures, so a caller waits in its own thread and never in a pool whose place the
computation itself may need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, Literal, TypeVar

from api.admission import FullError
from infra import telemetry

K = TypeVar("K", bound=Hashable)
S = TypeVar("S")
V = TypeVar("V")
Found = Literal["hit", "joined", "renewed", "miss"]
_REFRESH_AT = 0.75  # of the TTL: how old an entry is when it is computed anew in the background
_REFRESH_HITS = 3  # how often it was used by then


class CacheMetrics:
    """What a cache counts. Made before the process' threads start."""

    def __init__(self, cache: str) -> None:
        labels = ("cache", "outcome")
        lookups = telemetry.counter("forerank_cache_lookups", "Look-ups: hit, joined, renewed or miss", labels)
        outcomes: tuple[Found, ...] = ("hit", "joined", "renewed", "miss")
        self.lookups = {found: lookups.labels(cache, found) for found in outcomes}
        refreshed = telemetry.counter("forerank_cache_refreshes", "Entries computed anew ahead of expiry", ("cache",))
        self.refreshes = refreshed.labels(cache)
        evictions = telemetry.counter("forerank_cache_evictions", "Entries pushed out by the bytes limit", ("cache",))
        self.evictions = evictions.labels(cache)
        held = telemetry.gauge("forerank_cache_bytes", "Bytes of values, of all live processes", ("cache",), total=True)
        self.nbytes = held.labels(cache)


@dataclasses.dataclass(slots=True, eq=False)
class _Entry(Generic[S, V]):
    """`state`: what the value was made from. `earlier`: hits of those that this entry followed. `next`: what is to
    replace it, once asked for."""

    future: Future[V]
    state: S
    born: float
    earlier: int = 0
    hits: int = 0
    nbytes: int = 0
    next: _Entry[S, V] | None = None


class FutureCache(Generic[K, S, V]):
    """At most `bytes_limit` of finished values, none older than `ttl_s`; the least recently used go first.

    A value serves callers whose state is the `same` as the one it was made from. Thread safe.
    """

    def __init__(
        self,
        bytes_limit: int,
        ttl_s: float,
        size_of: Callable[[V], int],
        same: Callable[[S, S], bool],
        metrics: CacheMetrics,
        clock: Callable[[], float] = time.monotonic,
        refresh_at: float = _REFRESH_AT,
        refresh_hits: int = _REFRESH_HITS,
    ) -> None:
        """`refresh_at`, `refresh_hits`: at what share of the TTL, and used how often, an entry is computed anew in the
        background."""
        self._limit, self._ttl, self._size_of, self._same, self._clock = bytes_limit, ttl_s, size_of, same, clock
        self._metrics, self._refresh_at, self._refresh_hits = metrics, refresh_at, refresh_hits
        self._entries: OrderedDict[K, _Entry[S, V]] = OrderedDict()
        self._nbytes = 0
        self._swept = clock()
        self._lock = threading.Lock()

    def start(
        self,
        key: K,
        state: S,
        submit: Callable[[], Future[V]],
        instead_of: Future[V] | None = None,
        ahead: Callable[[], Future[V]] | None = None,
    ) -> tuple[Future[V], Found]:
        """The future of `key` made from `state`, and how it was found; callers that meet share one computation, which
        `submit` starts.

        `instead_of`: one that was given before and that the caller knows to be outdated; the first who says so has it
        replaced (renewed). A hot entry near its end is also started anew, but its old value is given until the new one
        is there; `ahead` starts that, by default `submit` too. Raises FullError where `submit` does, which leaves all
        as it was; an entry that would be started anew ahead of its end serves on.
        """
        with self._lock:
            entry = self._fresh(key)
            if entry is not None and not self._same(entry.state, state):
                entry = None
            if entry is not None and entry.future is not instead_of:
                future, started = entry.future, None
                found: Found = "hit" if future.done() and not _failed(future) else "joined"
                if self._hit(entry):
                    with contextlib.suppress(FullError):
                        started = (ahead or submit)()
                if started is not None:
                    entry.next = _Entry(started, state, self._clock(), entry.hits + entry.earlier)
            else:
                future = started = submit()
                found = "miss" if entry is None else "renewed"
                used = 0 if entry is None else entry.hits + entry.earlier
                self._put(key, _Entry(future, state, self._clock(), used))
        if started is not None:  # the callback knows the key alone: with the entry it would be a cycle
            started.add_done_callback(functools.partial(self._finished, key))
        self._metrics.lookups[found].inc()
        if started is not future and started is not None:
            self._metrics.refreshes.inc()
        return future, found

    def clear(self) -> None:
        """Forgets everything; what is being computed reaches those who wait for it, and nobody else."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0
        self._metrics.nbytes.set(0)

    def hottest(self, count: int) -> list[K]:
        """The keys with most hits, most first."""
        with self._lock:
            now = self._clock()
            hits = [(one.hits + one.earlier, key) for key, one in self._entries.items() if now - one.born <= self._ttl]
        return [key for _, key in heapq.nlargest(count, hits, key=lambda each: each[0])]

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def _fresh(self, key: K) -> _Entry[S, V] | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() - entry.born > self._ttl or _failed(entry.future):
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def _hit(self, entry: _Entry[S, V]) -> bool:
        """Counts it; whether the entry is to be made anew, which is said once."""
        entry.hits += 1
        old = self._clock() - entry.born > self._refresh_at * self._ttl
        return old and entry.next is None and entry.hits >= self._refresh_hits and entry.future.done()

    def _put(self, key: K, new: _Entry[S, V]) -> None:
        """In the place of whatever is there."""
        self._remove(key)
        self._entries[key] = new

    def _finished(self, key: K, future: Future[V]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.next is not None and entry.next.future is future:
                if _failed(future):
                    entry.next = None  # the old value goes on until it ends, and the next hit may try again
                    return
                entry = entry.next
                self._put(key, entry)
            if entry is None or entry.future is not future:
                return  # replaced or gone meanwhile
            if _failed(future):
                self._remove(key)
                return
            entry.nbytes = self._size_of(future.result())
            self._nbytes += entry.nbytes
            evicted = self._shrink()
            nbytes = self._nbytes
        self._metrics.nbytes.set(nbytes)
        if evicted:
            self._metrics.evictions.inc(evicted)

    def _shrink(self) -> int:
        """Age first, which looks at all and so only now and then; then size. How many went by size."""
        now, evicted = self._clock(), 0
        if now - self._swept > self._ttl / 8:
            self._swept = now
            for key in [key for key, entry in self._entries.items() if now - entry.born > self._ttl]:
                self._remove(key)
        while self._nbytes > self._limit:
            self._remove(next(key for key, entry in self._entries.items() if entry.nbytes))
            evicted += 1
        return evicted

    def _remove(self, key: K) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._nbytes -= entry.nbytes


def _failed(future: Future[V]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
