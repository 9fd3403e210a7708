"""FutureCache: one computation per key and state, nothing too old, never more bytes than the limit."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.admission import FullError
from api.cache import CacheMetrics, FutureCache
from tests.conftest import wait_until

Cache = FutureCache[str, int, int]  # a state is a number, and so is a value, whose size it is


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def done(value: int) -> Future[int]:
    future: Future[int] = Future()
    future.set_result(value)
    return future


def failed(message: str) -> Future[int]:
    future: Future[int] = Future()
    future.set_exception(ValueError(message))
    return future


def cache_of(limit: int = 100, ttl_s: float = 10.0, clock: Clock | None = None) -> Cache:
    same: Callable[[int, int], bool] = int.__eq__
    return FutureCache(limit, ttl_s, lambda value: value, same, CacheMetrics("test"), clock or Clock())


def ask(cache: Cache, key: str, value: int, state: int = 0) -> tuple[int, str]:
    """What `key` gives, and how it was found; `value` where it has to be made."""
    future, found = cache.start(key, state, lambda: done(value))
    return future.result(0), found


def count(cache: str, name: str, **labels: str) -> float:
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(f"forerank_cache_{name}", {"cache": cache, **labels}) or 0.0


@pytest.mark.parametrize("callers", [8, 1_000])
def test_callers_that_meet_share_one_computation(callers: int) -> None:
    cache = cache_of()
    go, started = threading.Event(), []
    meet = threading.Barrier(callers, timeout=30)
    joined = count("test", "lookups_total", outcome="joined")
    answers: list[tuple[int, str]] = []

    def compute() -> int:
        go.wait(30)
        return 7

    with ThreadPoolExecutor(1) as pool:

        def submit() -> Future[int]:
            started.append(1)
            return pool.submit(compute)

        def call() -> None:
            meet.wait()
            future, found = cache.start("u", 0, submit)
            answers.append((future.result(30), found))

        threads = [threading.Thread(target=call) for _ in range(callers)]
        for one in threads:
            one.start()
        wait_until(
            lambda: count("test", "lookups_total", outcome="joined") == joined + callers - 1, "all but one have joined"
        )
        go.set()
        for one in threads:
            one.join(30)
    assert len(started) == 1
    assert sorted(answers) == [(7, "joined")] * (callers - 1) + [(7, "miss")]


def test_an_entry_ends_with_its_ttl() -> None:
    clock = Clock()
    cache = cache_of(ttl_s=10.0, clock=clock)
    ask(cache, "u", 5)
    clock.now = 10.0
    assert ask(cache, "u", 6) == (5, "hit")
    clock.now = 10.1
    assert cache.hottest(1) == []
    assert ask(cache, "u", 6) == (6, "miss")
    assert (len(cache), cache.nbytes) == (1, 6)


def test_what_is_made_from_another_state_serves_nobody() -> None:
    """Also while it is still being made: who knows more does not wait for who knew less."""
    cache = cache_of()
    late: Future[int] = Future()
    cache.start("u", 1, lambda: late)
    assert ask(cache, "u", 20, state=2) == (20, "miss")
    late.set_result(90)
    assert ask(cache, "u", 30, state=2) == (20, "hit")
    assert (len(cache), cache.nbytes) == (1, 20)
    assert ask(cache, "u", 30, state=3) == (30, "miss")
    assert (len(cache), cache.nbytes) == (1, 30)


def test_what_a_caller_knows_to_be_outdated_is_made_anew_once() -> None:
    cache = cache_of()
    ask(cache, "u", 5)
    old, _ = cache.start("u", 0, Future)
    late: Future[int] = Future()
    assert cache.start("u", 0, lambda: late, instead_of=old) == (late, "renewed")
    assert cache.start("u", 0, Future, instead_of=old) == (late, "joined")
    late.set_result(6)
    assert cache.start("u", 0, Future, instead_of=old) == (late, "hit")
    assert (ask(cache, "u", 0), cache.nbytes) == ((6, "hit"), 6)
    assert cache.start("v", 0, lambda: done(7), instead_of=old)[1] == "miss"


def test_a_failure_reaches_all_who_wait_and_is_forgotten() -> None:
    cache = cache_of()
    late: Future[int] = Future()
    waiting = [cache.start("u", 0, lambda: late)[0] for _ in range(5)]
    late.set_exception(ValueError("no"))
    for one in waiting:
        with pytest.raises(ValueError, match="no"):
            one.result(0)
    assert len(cache) == 0
    with pytest.raises(ValueError, match="again"):
        cache.start("u", 0, lambda: failed("again"))[0].result(0)
    assert ask(cache, "u", 3) == (3, "miss")


def test_the_least_recently_used_goes_first() -> None:
    cache = cache_of(limit=100)
    before = count("test", "evictions_total")
    for name in "abc":
        ask(cache, name, 30)
    ask(cache, "a", 30)  # used again: b is now the oldest
    ask(cache, "d", 30)
    assert sorted(cache.hottest(9)) == ["a", "c", "d"]
    assert count("test", "evictions_total") == before + 1
    assert count("test", "bytes") == cache.nbytes == 90


def test_what_is_larger_than_the_cache_is_shared_but_not_kept() -> None:
    cache = cache_of(limit=100)
    late: Future[int] = Future()
    first, second = (cache.start("u", 0, lambda: late)[0] for _ in range(2))
    late.set_result(101)
    assert (first.result(0), second.result(0), len(cache), cache.nbytes) == (101, 101, 0, 0)


def test_what_goes_is_freed_at_once() -> None:
    """Without a collection: blocks are large, and collections of the oldest objects are rare."""
    clock = Clock()
    cache = cache_of(limit=100, ttl_s=10.0, clock=clock)
    made: list[weakref.ref[Future[int]]] = []

    def submit() -> Future[int]:
        future = done(40)
        made.append(weakref.ref(future))
        return future

    gc.disable()
    try:
        cache.start("u", 0, submit)
        old = cache.start("u", 1, submit)[0]
        cache.start("u", 1, submit, instead_of=old)
        del old
        for _ in range(3):
            cache.start("u", 1, submit)
        clock.now = 7.6
        cache.start("u", 1, submit)  # is made anew
        assert [one() is None for one in made] == [True, True, True, False]
        for key in "vwx":
            cache.start(key, 0, submit)
        assert [one() is None for one in made[3:]] == [True, True, False, False]
    finally:
        gc.enable()


# ---- refresh ahead


def aged(clock: Clock, hits: int) -> Cache:
    """A cache with one value, 5, near its end and used `hits` times."""
    cache = cache_of(ttl_s=10.0, clock=clock)
    ask(cache, "u", 5)
    for _ in range(hits):
        ask(cache, "u", 0)
    clock.now = 7.6
    return cache


def test_a_hot_entry_near_its_end_is_made_anew_once_while_the_old_one_serves() -> None:
    clock = Clock()
    cache = aged(clock, 2)
    late, runs = Future[int](), []

    def submit() -> Future[int]:
        runs.append(1)
        return late

    for _ in range(5):
        future, found = cache.start("u", 0, lambda: pytest.fail("somebody waits"), ahead=submit)
        assert (future.result(0), found) == (5, "hit")
    assert runs == [1]
    clock.now = 9.0
    late.set_result(6)
    assert ask(cache, "u", 0) == (6, "hit")
    assert cache.nbytes == 6
    clock.now = 17.5  # within the TTL of the start of the new one
    assert ask(cache, "u", 0) == (6, "hit")
    clock.now = 17.7
    assert ask(cache, "u", 7) == (7, "miss")


@pytest.mark.parametrize(("hits", "now", "refreshed"), [(1, 7.6, False), (2, 7.6, True), (9, 7.5, False)])
def test_what_is_seldom_used_or_young_is_not_made_anew(hits: int, now: float, refreshed: bool) -> None:
    clock = Clock()
    cache = aged(clock, hits)
    clock.now = now
    assert ask(cache, "u", 6) == (5, "hit")
    assert ask(cache, "u", 0) == (6 if refreshed else 5, "hit")


def no_place() -> Future[int]:
    raise FullError


@pytest.mark.parametrize("refresh", [lambda: failed("no"), no_place])
def test_a_refresh_that_fails_leaves_the_old_value_to_its_end(refresh: Callable[[], Future[int]]) -> None:
    clock = Clock()
    cache = aged(clock, 2)
    for _ in range(3):
        future, found = cache.start("u", 0, refresh)
        assert (future.result(0), found) == (5, "hit")
    clock.now = 10.1
    assert ask(cache, "u", 6) == (6, "miss")


def test_a_refresh_that_failed_is_tried_again() -> None:
    clock = Clock()
    cache = aged(clock, 2)
    cache.start("u", 0, lambda: failed("no"))
    assert ask(cache, "u", 6) == (5, "hit")
    assert ask(cache, "u", 7) == (6, "hit")


def test_what_finds_no_place_changes_nothing() -> None:
    cache = cache_of()
    ask(cache, "u", 5)
    old, _ = cache.start("u", 0, no_place)
    for key, state, instead_of in (("v", 0, None), ("u", 1, None), ("u", 0, old)):
        with pytest.raises(FullError):
            cache.start(key, state, no_place, instead_of)
    assert (ask(cache, "u", 6), len(cache), cache.nbytes) == ((5, "hit"), 1, 5)


def test_what_is_forgotten_is_made_anew_and_what_is_being_made_is_not_kept() -> None:
    cache = cache_of()
    late: Future[int] = Future()
    ask(cache, "u", 5)
    waits, _ = cache.start("v", 0, lambda: late)
    cache.clear()
    assert (len(cache), cache.nbytes, count("test", "bytes")) == (0, 0, 0)
    late.set_result(7)
    assert (waits.result(0), len(cache), cache.nbytes) == (7, 0, 0)
    assert ask(cache, "u", 6) == (6, "miss")


def test_a_refresh_that_ends_late_does_not_replace_what_is_newer() -> None:
    clock = Clock()
    cache = aged(clock, 2)
    late: Future[int] = Future()
    cache.start("u", 0, lambda: late)
    assert ask(cache, "u", 8, state=1) == (8, "miss")
    late.set_result(6)
    assert ask(cache, "u", 0, state=1) == (8, "hit")
    assert cache.nbytes == 8


def test_the_hottest_are_those_with_most_hits_before_and_after_a_refresh() -> None:
    clock = Clock()
    cache = aged(clock, 3)
    for key, hits in (("v", 2), ("w", 5)):
        for _ in range(hits + 1):
            ask(cache, key, 1)
    ask(cache, "u", 6)  # its fourth, which makes it anew
    assert cache.hottest(2) == ["w", "u"]
    assert cache.hottest(9) == ["w", "u", "v"]
    assert cache.hottest(0) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 60), st.floats(0, 4)), max_size=60))
def test_bytes_and_age_hold_whatever_comes(steps: list[tuple[int, int, float]]) -> None:
    clock = Clock()
    cache = cache_of(limit=100, ttl_s=10.0, clock=clock)
    made: dict[tuple[str, int], float] = {}  # (key, value) -> when its making last began
    for key, size, pause in steps:
        clock.now += pause

        def submit(key: int = key, size: int = size) -> Future[int]:
            made[str(key), size] = clock.now
            return done(size)

        future, _ = cache.start(str(key), 0, submit)
        assert clock.now - made[str(key), future.result()] <= 10.0
        assert cache.nbytes <= 100
        assert cache.nbytes == sum(entry.future.result() for entry in cache._entries.values())
