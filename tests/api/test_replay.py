"""What recorded requests say of two generations, and the recording itself."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from api.prerank import Answer
from api.recording import KEPT, Recorder, newest
from api.replay import Comparison, Scored
from api.schemas import InlineUser, Query
from infra.settings import Settings
from streams import rollout
from streams.rollout import Shadow
from tests.api.conftest import USERS, behaviours_of
from tests.conftest import wait_until
from tests.host import NOW, CatalogueItem, Host, Seen, catalogue


def scored(live: Any, new: Any) -> Scored:
    return Scored(np.asarray(live, np.float32), np.asarray(new, np.float32))


def answer_of(count: int, as_of: int = NOW) -> Answer:
    """What of an answer is recorded."""
    keys = np.arange(2 * count, dtype=np.uint64).reshape(-1, 2)
    found = SimpleNamespace(
        candidates=SimpleNamespace(keys=keys), side=SimpleNamespace(source=SimpleNamespace(as_of=as_of))
    )
    return cast("Answer", found)


def test_shift_spread_and_overlap_are_those_of_all_scores_at_once() -> None:
    random = np.random.default_rng(1)
    found, live, new = Comparison(), [], []
    for count in (1, 7, 500, 2_000):
        one = (random.normal(5_000, 2, count) + 3 * len(live)).astype(np.float32)
        other = (one * 0.5 + random.normal(0, 0.1, count)).astype(np.float32)
        live.append(one)
        new.append(other)
        found.add(scored(one, other))
    all_live, all_new = np.concatenate(live).astype(np.float64), np.concatenate(new).astype(np.float64)
    assert found.requests == 4
    assert found.shift == pytest.approx((all_new.mean() - all_live.mean()) / all_live.std(), rel=1e-9)
    assert found.spread == pytest.approx(all_new.std() / all_live.std(), rel=1e-9)
    best = [
        set(np.argsort(-one)[:k]) & set(np.argsort(-other)[:k])
        for one, other, k in zip(live, new, (1, 4, 100, 100), strict=True)
    ]
    wanted = np.mean([len(same) / k for same, k in zip(best, (1, 4, 100, 100), strict=True)])
    assert found.overlap == pytest.approx(wanted)


def test_nothing_to_compare_and_numbers_that_are_none() -> None:
    found = Comparison()
    found.add(scored([], []))
    assert (found.requests, found.shift, found.spread, found.overlap) == (0, None, None, None)
    found.add(scored([2.0, 2.0], [1.0, 3.0]))  # the live scores do not differ
    assert (found.requests, found.shift, found.spread, found.overlap) == (1, None, None, 0.0)
    found.add(scored([1.0, 2.0], [np.nan, np.inf]))
    assert (found.requests, found.not_finite) == (2, 2)


def test_the_ring_keeps_the_newest_and_reads_what_is_whole(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path, record_per_s=1e9)
    recorder = Recorder(settings)
    recorder.start()
    user = InlineUser(features={"segment": "s1"})
    settings.requests_dir.mkdir()
    unfinished = settings.requests_dir / "1-1.new"
    unfinished.write_bytes(b"of a process that was killed")
    try:
        for at in range(KEPT + 20):
            query = Query(user=user) if at % 2 else Query(user_id=at)
            recorder.offer(answer_of(3, at), query)
            wait_until(lambda at=at: any(one.as_of == at for _, one in newest(settings.requests_dir, 1)), "recorded")  # type: ignore[misc]
    finally:
        recorder.stop()
    assert not unfinished.exists(), "there is a user in it"
    (settings.requests_dir / "999.req").write_bytes(b"torn")
    (settings.requests_dir / "998.new").write_bytes(b"not there yet")
    found = dict(newest(settings.requests_dir, 10_000))
    assert [one.as_of for one in found.values()] == list(range(20, KEPT + 20))
    names = list(found)
    assert list(dict(newest(settings.requests_dir, 10_000, after=names[-2]))) == names[-1:]
    first, second = list(found.values())[:2]
    assert (first.user_id, first.user, second.user_id, second.user) == ("20", None, None, user)
    assert first.keys.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert first.query == Query(user_id="20", as_of=20)


def test_what_cannot_be_written_in_time_is_dropped_and_nobody_waits(tmp_path: Path) -> None:
    """The writer has not begun yet: what it cannot take goes, and what it can is written when it does."""
    settings = Settings(state=tmp_path, record_per_s=1e9)
    recorder = Recorder(settings)
    before = recorder._dropped._value.get()
    for _ in range(100):
        recorder.offer(answer_of(1), Query(user_id="u"))
    recorder.start()
    recorder.stop()
    kept = len(list(newest(settings.requests_dir, 100)))
    assert 0 < kept < 20
    assert recorder._dropped._value.get() - before == 100 - kept


def test_a_process_records_so_many_a_second_and_none_where_it_must_not(tmp_path: Path) -> None:
    for per_s, most in ((0.0, 0), (0.001, 1)):
        settings = dataclasses.replace(Settings(state=tmp_path / str(per_s)), record_per_s=per_s)
        recorder = Recorder(settings)
        recorder.start()
        for _ in range(50):
            recorder.offer(answer_of(1), Query(user_id="u"))
        recorder.stop()
        assert len(list(newest(settings.requests_dir, 100))) == most


@pytest.mark.e2e
@pytest.mark.parametrize("per_s", [1000.0, 0.0])
def test_each_form_of_a_ranking_request_is_recorded_with_what_scores_it_again(
    own_host: Callable[..., Host], per_s: float
) -> None:
    host = own_host(record_per_s=per_s)
    items = catalogue(200)
    host.bundle("g1")
    host.write("g1", items)
    host.behave(behaviours_of(items), dict(USERS))
    host.activate("g1")
    host.retrieval("g1")
    client = host.start()
    host.ready()
    ids = [item.item_id for item in items]
    folder = host.settings.requests_dir
    numbers = np.array([int(one) for one in ids if one.isdigit()], "<u8")
    sent: list[tuple[Callable[[], Any], int]] = [
        (lambda: client.post("/v1/score", json={"user_id": "anna", "candidates": ids, "as_of": NOW}), len(ids)),
        (lambda: client.post("/v1/recommend", json={"user_id": "anna", "retrieve": 50, "as_of": NOW}), 50),
        (
            lambda: client.post(
                "/v1/score?user_id=anna",
                content=numbers.tobytes(),
                headers={"content-type": "application/octet-stream"},
            ),
            len(numbers),
        ),
    ]
    for at, (send, count) in enumerate(sent):
        assert send().status_code == 200
        if not per_s:
            continue
        wait_until(lambda at=at: len(list(newest(folder, 10))) == at + 1, "it is recorded")  # type: ignore[misc]
        (_, one) = list(newest(folder, 10))[-1]
        assert (one.user_id, len(one.keys)) == ("anna", count)
        assert abs(one.time - time.time() * 1000) < 60_000
    assert folder.exists() is bool(per_s)
    assert msgspec.json.decode(client.get("/v1/generations").content)["active"] == "g1"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_shadow_scores_what_is_asked_for_in_a_process_of_its_own(own_host: Callable[..., Host]) -> None:
    """g2 is g1 again, g3 another model; g1 serves all the while."""
    host = own_host(record_per_s=1000.0)
    items = catalogue(300)
    for name, seed in (("g3", 3), ("g2", 1), ("g1", 1)):
        host.bundle(name, seed)
        host.write(name, items)
    host.behave(behaviours_of(items), dict(USERS))
    host.activate("g1")
    client = host.start()
    host.ready()
    ids = [item.item_id for item in items]

    def ask() -> None:
        answer = client.post("/v1/score", json={"user_id": "anna", "candidates": ids, "as_of": NOW}).json()
        assert answer["generation"] == "g1"

    def shadow_of(name: str) -> Shadow | None:
        return rollout.read_shadow(host.settings.shadow_file(name))

    def seen(name: str) -> bool:
        found = shadow_of(name)
        return found is not None and found.requests >= 10

    shadows = [
        subprocess.Popen([sys.executable, "-m", "api", "shadow", "--generation", name], env=host.environ())
        for name in ("g2", "g3")
    ]
    try:
        for _ in range(10):
            ask()
        for name in ("g2", "g3"):
            wait_until(lambda name=name: seen(name), f"{name} has scored ten requests", 150.0)  # type: ignore[misc]
        same, other = shadow_of("g2"), shadow_of("g3")
        assert same is not None
        assert other is not None
        assert (same.against, same.shift, same.spread, same.overlap) == ("g1", 0.0, 1.0, 1.0)
        assert (other.against, other.not_finite) == ("g1", 0)
        wanted = [
            host.reference(name, anna(items), USERS["anna"], ids, NOW).astype(np.float64) for name in ("g1", "g3")
        ]
        assert other.shift == pytest.approx((wanted[1].mean() - wanted[0].mean()) / wanted[0].std(), abs=1e-3)
        assert other.spread == pytest.approx(wanted[1].std() / wanted[0].std(), rel=1e-3)
        text = client.get("/metrics").text
        assert re.search(r'forerank_shadow\{figure="overlap",generation="g2"\} 1\.0', text)
        host.activate("g3")
        wait_until(
            lambda: (found := shadow_of("g2")) is not None and found.against == "g3", "it is against g3 now", 150.0
        )
        for process in shadows:
            process.terminate()
            assert process.wait(30) == 0
    finally:
        for process in shadows:
            process.kill()
            process.wait()


def anna(items: Sequence[CatalogueItem]) -> list[Seen]:
    return [one for one in behaviours_of(items) if one.user_id == "anna"]
