"""FutureCache: one computation per key, nothing too old, never more bytes than the limit."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.cache import FutureCache


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def done(value: int) -> Future[int]:
    future: Future[int] = Future()
    future.set_result(value)
    return future


def cache_of(limit: int = 100, ttl_s: float = 10.0, clock: Clock | None = None) -> FutureCache[int]:
    return FutureCache(limit, ttl_s, lambda value: value, clock or Clock())


def test_callers_that_meet_share_one_computation() -> None:
    cache = cache_of()
    go, started = threading.Event(), []

    def compute() -> int:
        go.wait(10)
        return 7

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(8) as callers:

        def ask() -> tuple[int, bool]:
            def submit() -> Future[int]:
                started.append(1)
                return pool.submit(compute)

            future, first = cache.start("u", submit)
            return future.result(10), first

        asked = [callers.submit(ask) for _ in range(8)]
        go.set()
        answers = [one.result(10) for one in asked]
    assert {value for value, _ in answers} == {7}
    assert sum(first for _, first in answers) == 1 == len(started)


def test_an_entry_ends_with_its_ttl() -> None:
    clock = Clock()
    cache = cache_of(ttl_s=10.0, clock=clock)
    cache.start("u", lambda: done(5))
    clock.now = 10.0
    assert cache.get("u") is not None
    clock.now = 10.1
    assert cache.get("u") is None
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_failed_computation_is_forgotten() -> None:
    cache = cache_of()

    def fail() -> Future[int]:
        future: Future[int] = Future()
        future.set_exception(ValueError("no"))
        return future

    future, _ = cache.start("u", fail)
    with pytest.raises(ValueError, match="no"):
        future.result()
    assert cache.get("u") is None


def test_the_least_recently_used_goes_first() -> None:
    cache = cache_of(limit=100)
    for name in "abc":
        cache.start(name, lambda: done(30))
    assert cache.get("a") is not None  # used again: b is now the oldest
    cache.start("d", lambda: done(30))
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]


def test_a_replaced_entry_is_not_counted_when_it_finishes_late() -> None:
    cache = cache_of()
    late: Future[int] = Future()
    cache.start("u", lambda: late)
    cache.drop("u")
    cache.start("u", lambda: done(3))
    late.set_result(90)
    assert cache.nbytes == 3
    assert len(cache) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 60), st.floats(0, 4)), max_size=60))
def test_bytes_and_age_hold_whatever_comes(steps: list[tuple[int, int, float]]) -> None:
    clock = Clock()
    cache = cache_of(limit=100, ttl_s=10.0, clock=clock)
    born: dict[int, tuple[float, int]] = {}
    for key, size, pause in steps:
        clock.now += pause
        future, started = cache.start(key, lambda size=size: done(size))  # type: ignore[misc]
        if started:
            born[key] = (clock.now, size)
        assert clock.now - born[key][0] <= 10.0
        assert future.result() == born[key][1]
        assert cache.nbytes <= 100
        there = [key for key in born if (found := cache.get(key)) is not None and found.result() == born[key][1]]
        assert cache.nbytes == sum(born[key][1] for key in there)
