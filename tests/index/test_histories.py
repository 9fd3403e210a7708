"""Histories and profiles against an oracle; freshness in other processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.errors import HistoriesError, StoreLockedError, StoreMissingError
from index.histories import HistoriesReader, HistoriesWriter, StoredBehaviour, StoredProfile
from index.keys import keys_of
from tests.index.processes import Process
from tests.index.rows import reader_of

KEY = b"hash key"
ROOT = Path(__file__).parent.parent.parent
FAR = 1 << 62


@dataclasses.dataclass
class User:
    events: list[StoredBehaviour]
    erased_at: int = -1
    position: int = -1
    profile: StoredProfile | None = None


class Oracle:
    def __init__(self, length: int) -> None:
        self.length = length
        self.users: dict[str, User] = {}
        self.offsets: dict[tuple[str, int], int] = {}

    def user(self, name: str) -> User:
        return self.users.setdefault(name, User([]))

    def apply(self, behaviours: list[StoredBehaviour], users: list[StoredProfile]) -> None:
        for one in users:
            user = self.user(one.user_id)
            if one.erased_at is not None:
                user.erased_at = max(user.erased_at, one.erased_at)
                user.events = [event for event in user.events if event.publish_time > user.erased_at]
                if user.profile is not None and user.profile.publish_time <= user.erased_at:
                    user.profile = None
            elif one.publish_time > user.erased_at and (user.profile is None or one.offset > user.profile.offset):
                user.profile = one
        for event in behaviours:
            user = self.user(event.user_id)
            if event.offset <= user.position:
                continue
            user.position = event.offset
            if event.publish_time > user.erased_at and event.event_id not in {old.event_id for old in user.events}:
                user.events.append(event)
        for user in self.users.values():
            user.events.sort(key=lambda event: (event.event_time, event.offset))
            del user.events[: -self.length]


def check(reader: HistoriesReader, oracle: Oracle, as_of: int = FAR) -> None:
    actions = reader.actions()
    for name, user in oracle.users.items():
        events = [event for event in user.events if event.event_time <= as_of]
        history = reader.history(name, as_of)
        assert history.times.tolist() == [event.event_time for event in events]
        assert history.keys.tolist() == keys_of([event.item_id for event in events], KEY).tolist()
        assert [actions[code] for code in history.actions] == [event.action for event in events]
        assert history.position == user.position
        wanted = None if user.profile is None else json.loads(user.profile.features or b"")
        assert reader.profile(name) == wanted


@st.composite
def applies(draw: st.DrawFn) -> list[tuple[list[StoredBehaviour], list[StoredProfile]]]:
    """Batches in log order; event times come in order mostly, late and early ones too, and event ids repeat."""
    out = []
    offset = published = 0
    for _ in range(draw(st.integers(1, 6))):
        behaviours, users = [], []
        for _ in range(draw(st.sampled_from([0, 1, 3, 30, 150]))):
            offset += 1
            published += draw(st.integers(0, 1))
            late = draw(st.sampled_from([0, 0, 0, 0, 1, 40, -5, 10_000]))
            number = offset if draw(st.integers(0, 9)) else draw(st.integers(1, offset))
            user = draw(st.sampled_from(["u", "u", "u", "uu", "üser"]))
            action = draw(st.sampled_from(["click", "buy"]))
            behaviours.append(
                StoredBehaviour(user, f"i{offset}", f"e{number}", action, offset - late, published, 0, offset)
            )
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            user = draw(st.sampled_from(["u", "uu", "u3"]))
            offset += 1
            if draw(st.booleans()):
                users.append(StoredProfile(user, b'{"n": %d}' % offset, None, published, 0, offset))
            else:
                users.append(StoredProfile(user, None, draw(st.integers(0, published + 1)), published, 0, offset))
        out.append((behaviours, users))
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(log=applies(), length=st.sampled_from([1, 7, 100, 120, 1000]), data=st.data())
def test_any_log_gives_the_oracles_histories(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[tuple[list[StoredBehaviour], list[StoredProfile]]],
    length: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("histories")
    writer = HistoriesWriter(path, length, KEY)
    oracle = Oracle(length)
    for at, (behaviours, users) in enumerate(log):
        writer.apply(behaviours, users, {("behaviours", 0): at})
        oracle.apply(behaviours, users)
        if data.draw(st.integers(0, 3)) == 0:  # all of it again, after a crash before the commit
            for again, _ in log[: at + 1]:
                writer.apply(again, [], {("behaviours", 0): 0})
            writer.apply([], users, {})
        if data.draw(st.integers(0, 3)) == 0:
            writer.close()
            writer = HistoriesWriter(path, length, KEY)
        check(reader_of(writer), oracle, data.draw(st.sampled_from([FAR, 20, 100])))
    assert writer.offsets() == {("behaviours", 0): len(log) - 1}
    writer.close()
    shutil.rmtree(path)


def event(number: int, time_: int, user: str = "u", published: int | None = None) -> StoredBehaviour:
    return StoredBehaviour(
        user, "1", f"e{number}", "click", time_, time_ if published is None else published, 0, number
    )


def test_erasure_outlives_what_arrives_late_and_nothing_else(tmp_path: Path) -> None:
    writer = HistoriesWriter(tmp_path, 100, KEY)
    reader = reader_of(writer)
    writer.apply([event(at, at) for at in range(10)], [StoredProfile("u", b'{"a":1}', None, 5, 0, 0)], {})
    writer.apply([], [StoredProfile("u", None, 6, 9, 0, 1)], {})
    assert reader.history("u", FAR).times.tolist() == [7, 8, 9]
    assert reader.profile("u") is None
    writer.apply([event(10, 3), event(11, 3, published=7)], [StoredProfile("u", b'{"a":2}', None, 6, 0, 2)], {})
    assert reader.history("u", FAR).times.tolist() == [3, 7, 8, 9]  # published after the erasure, of an earlier time
    assert reader.profile("u") is None
    writer.apply([], [StoredProfile("u", b'{"a":3}', None, 7, 0, 3)], {})
    assert reader.profile("u") == {"a": 3}
    writer.apply([], [StoredProfile("u", None, 4, 9, 0, 4)], {})  # an earlier erasure takes nothing more
    assert reader.profile("u") == {"a": 3}
    assert len(reader.history("u", FAR).times) == 4
    writer.apply([event(12, 3)], [StoredProfile("v", None, 6, 9, 0, 5)], {})
    writer.apply([event(13, 3, "v")], [], {})  # erased before anything was known
    assert reader.history("v", FAR).times.tolist() == []
    assert reader.history("v", FAR).position == 13
    writer.close()


def test_chunks_that_hold_nothing_of_the_newest_are_dropped(tmp_path: Path) -> None:
    writer = HistoriesWriter(tmp_path, 250, KEY)
    for start in range(0, 3000, 30):
        writer.apply([event(at, at) for at in range(start, start + 30)], [], {})
    with writer._env.begin() as txn:
        stored = txn.stat(writer._tables.chunks)["entries"]
    assert stored <= 4
    assert reader_of(writer).history("u", FAR).times.tolist() == list(range(2750, 3000))
    writer.close()


def test_more_actions_than_codes_share_the_last(tmp_path: Path) -> None:
    writer = HistoriesWriter(tmp_path, 1000, KEY)
    many = [event(at, at)._replace(action=f"a{at}") for at in range(300)]
    writer.apply(many[:200], [], {})
    writer.apply(many[200:], [], {})
    reader = reader_of(writer)
    names = [reader.actions()[code] for code in reader.history("u", FAR).actions]
    assert names == [f"a{at}" for at in range(255)] + ["other"] * 45
    writer.close()


def test_another_hash_key_is_refused(tmp_path: Path) -> None:
    HistoriesWriter(tmp_path, 10, KEY).close()
    with pytest.raises(HistoriesError, match="another hash_key"):
        HistoriesWriter(tmp_path, 10, b"other")
    HistoriesWriter(tmp_path, 20, KEY).close()  # nothing of the refused one remains, not even its lock


def test_one_writer_and_no_store_yet(tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError):
        HistoriesReader(tmp_path)
    writer = HistoriesWriter(tmp_path, 10, KEY)
    with pytest.raises(StoreLockedError):
        HistoriesWriter(tmp_path, 10, KEY)
    assert reader_of(writer).history("nobody", FAR).times.tolist() == []
    assert reader_of(writer).history("nobody", FAR).position == -1
    assert reader_of(writer).profile("nobody") is None
    assert reader_of(writer).actions() == ()
    assert writer.offsets() == {}
    writer.close()
    reader = HistoriesReader(tmp_path)
    assert reader.history("nobody", FAR).position == -1
    reader.close()


def test_a_damaged_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(HistoriesError):
        HistoriesWriter(tmp_path, 10, KEY)
    with pytest.raises(StoreMissingError):
        HistoriesReader(tmp_path)


def test_other_processes_see_a_behaviour_within_100_ms(tmp_path: Path) -> None:
    writer = HistoriesWriter(tmp_path, 10_000, KEY)
    writer.apply([event(at, at) for at in range(9_000)], [], {})
    watchers = [Process("watcher", tmp_path, "u") for _ in range(3)]
    try:
        for number in range(9_000, 9_200):
            now = int(time.time() * 1000)
            writer.apply([event(number, now)], [], {("behaviours", 0): number + 1})
        deadline = time.monotonic() + 10
        seen = [watcher.stop() for watcher in watchers]
        assert time.monotonic() < deadline
    finally:
        for watcher in watchers:
            watcher.kill()
    for one in seen:
        assert one["position"] == 9_199
        assert one["seen"] > 50
        assert one["latest_ms"] < 100
    writer.close()


def test_killed_writers_leave_whole_transactions(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from index.histories import HistoriesWriter\n"
        "from tests.index.test_histories import event\n"
        "writer = HistoriesWriter(Path(sys.argv[1]), 5000, b'hash key')\n"
        "first = writer.offsets().get(('b', 0), 0)\n"
        "for turn in range(first, 10**6):\n"
        "    writer.apply([event(2 * turn, turn), event(2 * turn + 1, turn, 'v')], [], {('b', 0): turn + 1})\n"
        "    if turn == first: print('ready', flush=True)\n"
    )
    turns = []
    for delay in (0.02, 0.1, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reader = HistoriesReader(tmp_path)
        with reader._env.begin() as txn:
            stored = txn.get(b"offsets", b"[]", db=reader._tables.meta)
        ((_, _, turn),) = json.loads(stored)
        for user in ("u", "v"):
            assert reader.history(user, FAR).times.tolist() == list(range(turn))[-5000:]
        reader.close()
        turns.append(turn)
    assert turns == sorted(set(turns))
