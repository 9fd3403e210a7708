"""The user side inside one process, against rows and histories that change while it is computed."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import api.users
from api.generations import Generation, load
from api.lanes import Lanes, Rank, Step
from api.runtime.runtime import Runtime
from api.schemas import Query
from api.users import INLINE, Users, UserSide, UserSource, infer
from index.errors import StoreError
from index.keys import keys_of
from tests.conftest import wait_until
from tests.host import HOUR, NOW, Host, Seen, catalogue

ITEMS = catalogue(40)
PAST = [Seen("u", ITEMS[at].item_id, NOW - (40 - at) * HOUR) for at in range(20)]


def test_a_history_row_is_never_of_two_versions(own_host: Callable[..., Host]) -> None:
    """One behaviour's item changes all the time between two forms; each user block is that of one of them."""
    host = own_host()
    bundle = host.bundle("g1")
    forms = [dataclasses.replace(ITEMS[at], item_id="1") for at in (4, 5)]
    keys = keys_of(["1"], host.settings.hash_key.encode())
    source = UserSource(None, None, keys, np.zeros(1, np.uint8), np.array([NOW - HOUR]), ("click",), INLINE, NOW, ())
    host.write("g1", [forms[0]])
    generation = load(host.settings, "g1", bundle.sha256)
    wanted = []
    for version, form in enumerate((*forms, *forms), 2):
        host.write("g1", [dataclasses.replace(form, version=version)])
        wanted.append(infer(generation, source).block.D)
    np.testing.assert_array_equal(wanted[0], wanted[2])
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-4

    fork = multiprocessing.get_context("fork")  # the writer is a process of its own, as in a deployment
    written, arena = fork.RawValue("q", 0), host._writers["g1"]._arena
    rows = []
    for form in wanted[:2]:  # the rows as they are stored, to publish them at full speed
        host.write("g1", [dataclasses.replace(forms[len(rows)], version=10 + len(rows))])
        rows.append(generation.arena.gather_both(keys)[:2])
        np.testing.assert_array_equal(infer(generation, source).block.D, form)

    def change() -> None:
        while True:
            arena.apply(keys, np.ones(1, np.uint8), *rows[written.value % 2])
            written.value += 1

    def read() -> int:
        side = infer(generation, source)
        which = [side.used == 1 and np.array_equal(side.block.D, form) for form in wanted[:2]]
        seen[which.index(True) if any(which) else 2] += side.used
        return min(seen[:2])

    writer = fork.Process(target=change, daemon=True)
    writer.start()
    seen = [0, 0, 0]
    try:
        wait_until(lambda: written.value > 300, "the row changes")
        for _ in range(300):
            read()
        wait_until(lambda: read() > 20, "both forms are seen, however often the writer was at the row")
        assert writer.is_alive()
    finally:
        writer.kill()
        writer.join()
    assert seen[2] == 0, seen
    assert min(seen[:2]) > 20, seen
    assert written.value > 1_000


# ---- shared blocks


class Shared:
    """A host's users in this process, with one lane. `made`: the generations of those that ran."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.may_run = host, threading.Event()
        self.made: list[str] = []
        for seed, name in enumerate(("g1", "g2")):
            host.bundle(name, seed)
            host.write(name, ITEMS)
        host.behave(PAST, {"u": {"segment": "s1", "age": 50}})
        self.generations = [load(host.settings, name, host.bundles[name].sha256) for name in ("g1", "g2")]
        histories = host.reader()
        self.runtime = Runtime(1)
        self.users = Users(host.settings, lambda: histories, Lanes(self.runtime))
        self.runtime.start()
        self.may_run.set()

        def counted(generation: Generation, *arguments: Any) -> UserSide:
            self.may_run.wait(30)
            self.made.append(generation.name)
            return infer(generation, *arguments)

        monkeypatch.setattr(api.users, "infer", counted)

    def ask(self, generation: int = 0, user: str = "u", as_of: int | str | None = NOW) -> UserSide:
        query = Query(user_id=user, as_of=as_of)
        return self.users.begin(self.generations[generation], query, self.users.find(query)).result()


@pytest.fixture
def shared(own_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> Iterator[Shared]:
    one = Shared(own_host(), monkeypatch)
    yield one
    one.may_run.set()
    one.runtime.close()


def at_once(callers: int, call: Callable[[], None]) -> list[threading.Thread]:
    meet = threading.Barrier(callers, timeout=30)

    def run() -> None:
        meet.wait()
        call()

    threads = [threading.Thread(target=run) for _ in range(callers)]
    for one in threads:
        one.start()
    return threads


def test_a_thousand_calls_for_a_cold_user_cost_one_inference(shared: Shared) -> None:
    """Though there is one lane, which any wait on it would block for ever."""
    sides: list[UserSide] = []
    shared.may_run.clear()
    threads = at_once(1_000, lambda: sides.append(shared.ask()))
    wait_until(lambda: shared.users.blocks.hottest(1) != [] and _hits(shared) == 999, "all wait", 30.0)
    shared.may_run.set()
    for one in threads:
        one.join(30)
    assert shared.made == ["g1"]
    assert len(sides) == 1_000
    assert len({id(side.block) for side in sides}) == 1
    assert sorted(side.origin for side in sides) == ["cached"] * 999 + ["store"]


def _hits(shared: Shared) -> int:
    return sum(entry.hits for entry in shared.users.blocks._entries.values())


def test_blocks_are_of_one_generation_user_and_moment(shared: Shared) -> None:
    for generation, name in enumerate(("g1", "g2")):
        side = shared.ask(generation)
        assert (side.origin, side.block.generation) == ("store", name)
    assert shared.ask(user="v").origin == "store"
    assert shared.ask(as_of=NOW - 1).source.as_of == NOW - 1
    assert shared.ask(as_of=None).block.as_of > NOW
    assert len(shared.made) == 5
    for generation, name in enumerate(("g1", "g2")):
        side = shared.ask(generation)
        assert (side.origin, side.block.generation, side.source.as_of) == ("cached", name, NOW)
    assert len(shared.made) == 5


@pytest.mark.parametrize("change", ["behaviour", "profile", "erasure"])
def test_what_is_newer_of_the_user_is_seen_at_once(shared: Shared, change: str) -> None:
    before = shared.ask()
    if change == "behaviour":
        shared.host.behave([Seen("u", ITEMS[30].item_id, NOW - 1)])
    elif change == "profile":
        shared.host.behave([], {"u": {"segment": "s2", "age": 20}})
    else:
        shared.host.erase("u")
    after, again = shared.ask(), shared.ask()
    assert (before.origin, after.origin, again.origin) == ("store", "store", "cached")
    assert after.used == {"behaviour": 21, "profile": 20, "erasure": 0}[change]
    assert np.abs(before.block.P - after.block.P).max() > 1e-4
    fresh = infer(shared.generations[0], shared.users.stored("u", NOW))
    np.testing.assert_array_equal(again.block.D, fresh.block.D)
    np.testing.assert_array_equal(again.block.P, fresh.block.P)


def test_who_acted_while_the_block_is_made_does_not_get_it(shared: Shared) -> None:
    early: list[UserSide] = []
    shared.may_run.clear()
    threads = at_once(3, lambda: early.append(shared.ask()))
    wait_until(lambda: _hits(shared) == 2, "all wait")
    shared.host.behave([Seen("u", ITEMS[30].item_id, NOW - 1)])
    late: list[UserSide] = []
    threads += at_once(3, lambda: late.append(shared.ask()))
    entries = shared.users.blocks._entries
    wait_until(lambda: any((len(one.state.times), one.hits) == (21, 2) for one in entries.values()), "they wait too")
    shared.may_run.set()
    for one in threads:
        one.join(30)
    assert [side.used for side in early] == [20] * 3
    assert [side.used for side in late] == [21] * 3
    assert len(shared.made) == 2


def test_rows_of_the_history_that_change_come_or_go_are_seen(shared: Shared) -> None:
    """Changes of other rows keep the block, though all rows of the history are looked at again."""
    first = shared.ask()
    shared.host.write("g1", [dataclasses.replace(ITEMS[35], version=2)])
    kept = shared.ask()
    assert kept.block is first.block
    assert (kept.origin, kept.source.as_of) == ("cached", NOW)
    shared.host.write("g1", [dataclasses.replace(ITEMS[30], item_id=ITEMS[3].item_id, version=2)])
    changed = shared.ask()
    assert np.abs(changed.block.D - first.block.D).max() > 1e-4
    assert changed.origin == "store"
    shared.host.write("g1", [], deleted=[ITEMS[4].item_id])
    gone = shared.ask()
    assert (gone.used, gone.without_row, gone.seen().behaviours_without_row) == (19, 1, 1)
    shared.host.write("g1", [dataclasses.replace(ITEMS[4], version=10)])
    assert shared.ask().used == 20
    assert shared.ask().block.generation == "g1"


def test_rows_that_change_while_a_block_is_made(shared: Shared) -> None:
    """Those of other items keep it in common. One of the history's, and who comes later has a block of the new row."""
    shared.may_run.clear()
    sides: list[UserSide] = []
    threads: list[threading.Thread] = []
    for version in range(2, 7):
        shared.host.write("g1", [dataclasses.replace(ITEMS[35], version=version)])
        threads += at_once(4, lambda: sides.append(shared.ask()))
    wait_until(lambda: _hits(shared) == 19, "all wait")
    shared.may_run.set()
    for one in threads:
        one.join(30)
    assert len({id(side.block) for side in sides}) == len(shared.made) == 1

    query = Query(user_id="u", as_of=NOW + 1)
    arena = shared.generations[0].arena
    began = shared.users.begin(shared.generations[0], query, shared.users.find(query))
    wait_until(began.future.done, "it is made")
    shared.host.write("g1", [dataclasses.replace(ITEMS[30], item_id=ITEMS[3].item_id, version=2)])
    late = dataclasses.replace(began, found="joined")  # as of one who came before the end, and before the change
    assert not began.result().current(arena)
    assert late.result().current(arena)
    assert len(shared.made) == 3


def test_a_lane_makes_a_side_that_nobody_has_begun_and_waits_for_none(shared: Shared) -> None:
    """The one lane is where it is asked for: a wait would be for ever."""
    query, lanes = Query(user_id="u", as_of=NOW), shared.users._lanes
    source = shared.users.find(query)
    shared.may_run.clear()
    blocked = lanes.submit(Step.FIND, 1, lambda: shared.may_run.wait(30))
    first, second = (shared.users.begin(shared.generations[0], query, source) for _ in range(2))
    assert (first.found, second.found) == ("miss", "joined")
    on_lane = lanes.submit(Step.SCORE, 1, lambda: (second.at_once(), first.at_once(), second.at_once()), Rank.NEXT)
    shared.may_run.set()
    blocked.result(30)
    joined, side, again = on_lane.result(30)
    assert (joined, again) == (None, None)
    assert side is not None
    assert second.result().block is side.block
    assert shared.made == ["g1"]


def test_a_failed_inference_is_told_to_all_and_not_kept(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[str] = []
    shared.may_run.clear()

    def call() -> None:
        try:
            shared.ask()
        except StoreError as error:
            errors.append(str(error))

    def broken(*_: Any) -> UserSide:
        shared.may_run.wait(30)
        raise StoreError("the arena has gone")

    with monkeypatch.context() as patch:
        patch.setattr(api.users, "infer", broken)
        threads = at_once(20, call)
        wait_until(lambda: _hits(shared) == 19, "all wait")
        shared.may_run.set()
        for one in threads:
            one.join(30)
    assert errors == ["the arena has gone"] * 20
    wait_until(lambda: len(shared.users.blocks) == 0, "it is forgotten")
    assert shared.ask().used == 20


def test_users_are_told_when_histories_come(shared: Shared) -> None:
    """Also one of whom the histories know as little as before."""
    histories = shared.users._histories
    shared.users._histories = lambda: None
    assert shared.ask(user="nobody").degraded == ("histories are not available yet",)
    shared.users._histories = histories
    assert shared.ask(user="nobody").degraded == ()


def test_all_memory_of_a_block_counts(shared: Shared) -> None:
    """What is reachable from the entry and owns memory, generation and code aside."""
    side = shared.ask()
    wait_until(lambda: shared.users.blocks.nbytes > 0, "it is counted")
    assert shared.users.blocks.nbytes == side.nbytes
    entry = next(iter(shared.users.blocks._entries.values()))
    owners: dict[int, int] = {}
    left, looked = [entry.state, entry.future.result()], set()
    while left:
        one = left.pop()
        if id(one) in looked or isinstance(one, type):
            continue
        looked.add(id(one))
        if isinstance(one, np.ndarray):
            while isinstance(one.base, np.ndarray):
                one = one.base
            owners[id(one)] = one.nbytes
        else:
            left += gc.get_referents(one)
    assert len(owners) > 10
    assert 0.5 * side.nbytes < sum(owners.values()) <= side.nbytes


def test_a_generation_is_warm_for_the_hottest_users(
    shared: Shared, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moments they are asked for; who cannot be inferred is left out and logged."""
    asked: list[tuple[str, int | None]] = [("hot", NOW), ("warm", None), ("broken", NOW), ("once", NOW)]
    for (user, as_of), times in zip(asked, (5, 4, 3, 1), strict=True):
        for _ in range(times):
            shared.ask(0, user, as_of)
    stored = shared.users.stored

    def failing(user_id: str, as_of: int) -> UserSource:
        if user_id == "broken":
            raise StoreError("unreadable")
        return stored(user_id, as_of)

    with monkeypatch.context() as patch:
        patch.setattr(shared.users, "stored", failing)
        shared.users.warm(shared.generations[1], 3)
    assert shared.made == ["g1"] * 4 + ["g2"] * 2
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", "a user is not warm")]
    for user, as_of in asked:
        side = shared.ask(1, user, as_of)
        assert side.block.generation == "g2"
        assert side.origin == ("cached" if user in ("hot", "warm") else "store")
