"""Which generation is served: none yet, one that does not load, a switch under load, and retrieval that comes later."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from api.generations import Generations
from api.retrieval import Built, RetrievalView, arena_of, due
from api.service import Service
from index.errors import StoreLockedError
from index.lock import WriterLock, unused
from streams import fleet, rollout
from streams.heartbeat import Heartbeat
from tests.host import HOUR, NOW, Host, Seen, catalogue

ITEMS = catalogue(120)
IDS = [item.item_id for item in ITEMS]
PAST = [Seen("u", IDS[at], NOW - (40 - at) * HOUR) for at in range(40)]
PROFILE = {"segment": "s1", "age": 50}


def filled(host: Host, generation: str, seed: int = 0) -> None:
    host.bundle(generation, seed=seed)
    host.write(generation, ITEMS)


def serving(host: Host, *generations: str, retrieval: bool = False, past: bool = False) -> httpx.Client:
    """A client of the host's API, which serves the first of these generations; the n-th has seed n."""
    for seed, name in enumerate(generations):
        filled(host, name, seed)
        if retrieval:
            host.retrieval(name)
    if past:
        host.behave(PAST, {"u": PROFILE})
    host.activate(generations[0])
    client = host.start()
    host.ready()
    return client


def reason(host: Host) -> str:
    response = host.client.get("/readyz")
    assert (response.status_code, response.headers["content-type"]) == (503, "application/problem+json")
    assert response.headers["retry-after"]
    return str(response.json()["detail"])


def test_nothing_is_served_without_a_model(own_host: Callable[..., Host]) -> None:
    host = own_host()
    client = host.start()
    assert "no model event" in reason(host)
    for response in (
        client.post("/v1/score", json={"user_id": "u", "candidates": [1]}),
        client.post("/v1/recommend", json={"user_id": "u"}),
        client.post("/v1/users/u/prefetch"),
        client.get("/v1/explain", params={"user_id": "u", "item_id": "1"}),
        client.get("/v1/items/1"),
    ):
        assert (response.status_code, response.json()["detail"]) == (503, reason(host))
    assert client.get("/healthz").status_code == 200
    assert client.get("/v1/generations").json()["ready"] is False
    assert (
        client.post("/v1/score", json={"candidates": [1]}).status_code == 422
    )  # a wrong request is wrong all the same

    filled(host, "g1")
    state = rollout.GenerationState(generation="g1", state="filling", offset=0, uri="", sha256="", progress=0.25)
    rollout.write(host.settings.serving_file, rollout.Serving(generations={"g1": state}))
    host.wait_for(lambda: "filling" in reason(host))
    assert "25 %" in reason(host)
    assert client.get("/v1/generations").json()["generations"][0]["rows"] == len(ITEMS)
    beat = Heartbeat("encode-g1", 1, state="filling", lag=9_000, rate=3_000.0)
    beat.write(host.settings.heartbeat_dir)
    (told,) = client.get("/v1/generations").json()["generations"]
    assert (told["rate"], told["lag"], told["eta_s"]) == (3_000.0, 9_000, 3.0)
    beat.state = "stopped"
    beat.write(host.settings.heartbeat_dir)
    (told,) = client.get("/v1/generations").json()["generations"]
    assert (told["rate"], told["lag"], told["eta_s"]) == (0.0, 0, None), "what an ended job said is no news"

    host.activate("g1")
    host.ready()
    found = client.post("/v1/score", json={"user_id": "u", "candidates": IDS, "as_of": NOW}).json()
    np.testing.assert_allclose(found["scores"], host.reference("g1", [], None, IDS, NOW), rtol=0, atol=1e-5)
    assert found["degraded"] == ["histories are not available yet"]
    assert found["user"]["cold"]

    recommended = client.post("/v1/recommend", json={"user_id": "u"})
    assert (recommended.status_code, "retrieval" in recommended.json()["detail"]) == (503, True)
    host.retrieval("g1")
    host.wait_for(lambda: client.post("/v1/recommend", json={"user_id": "u"}).is_success)

    host.behave(PAST, {"u": PROFILE})
    host.wait_for(lambda: not client.post("/v1/score", json={"user_id": "u", "candidates": [1]}).json()["degraded"])
    found = client.post("/v1/score", json={"user_id": "u", "candidates": IDS, "as_of": NOW}).json()
    np.testing.assert_allclose(found["scores"], host.reference("g1", PAST, PROFILE, IDS, NOW), rtol=0, atol=1e-5)


def test_a_bundle_that_does_not_load_never_replaces_one_that_does(own_host: Callable[..., Host]) -> None:
    host = own_host()
    client = serving(host, "g1", "g2")
    tensors = host.settings.generation_dir("g2") / "bundle" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    host.activate("g2")
    host.wait_for(lambda: "g2 cannot be loaded" in client.get("/v1/generations").json()["reason"])
    assert client.post("/v1/score", json={"user_id": "u", "candidates": [1]}).json()["generation"] == "g1"
    assert client.get("/readyz").json()["generation"] == "g1"


def test_a_bundle_that_could_not_be_read_is_read_again(own_host: Callable[..., Host]) -> None:
    host = own_host()
    filled(host, "g1")
    host.activate("g1")
    tensors = host.settings.generation_dir("g1") / "bundle" / "model.safetensors"
    tensors.rename(tensors.with_name("away"))
    generations = Generations(host.settings)
    generations.poll()
    assert generations.reason.startswith("generation g1 cannot be loaded: ")
    assert "No such file" in generations.reason
    tensors.with_name("away").rename(tensors)

    def polled() -> bool:
        generations.poll()
        return generations.active is not None

    host.wait_for(polled)
    assert (generations.reason, generations.pin().name) == ("", "g1")


def test_a_damaged_copy_of_a_bundle_keeps_no_other_generation_from_it(own_host: Callable[..., Host]) -> None:
    host = own_host()
    filled(host, "g1")
    host.activate("g1")
    tensors = host.settings.generation_dir("g1") / "bundle" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    generations = Generations(host.settings)
    generations.poll()
    assert "generation g1 cannot be loaded" in generations.reason
    filled(host, "g2")
    assert host.bundles["g1"].sha256 == host.bundles["g2"].sha256
    host.activate("g2")
    generations.poll()
    assert (generations.reason, generations.pin().name) == ("", "g2")


def test_a_switch_under_load_fails_nothing_and_mixes_nothing(own_host: Callable[..., Host]) -> None:
    """Clients score while the served generation changes back and forth; each answer is right for the one it names."""
    host = own_host()
    client = serving(host, "g1", "g2", retrieval=True, past=True)
    wanted = {name: host.reference(name, PAST, PROFILE, IDS, NOW) for name in ("g1", "g2")}
    assert np.abs(wanted["g1"] - wanted["g2"]).max() > 0.1
    stop, answers, failures = threading.Event(), {"g1": 0, "g2": 0}, []
    body = {"user_id": "u", "candidates": IDS, "as_of": NOW}

    def ask(at: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=30.0) as own:
            while not stop.is_set():
                if at == 0:
                    own.post("/v1/users/u/prefetch", json={"as_of": NOW})
                answer = own.post(
                    "/v1/recommend" if at == 1 else "/v1/score", json=body if at != 1 else {"user_id": "u"}
                )
                if not answer.is_success:
                    failures.append(answer.text)
                    return
                found = answer.json()
                if at != 1 and np.abs(np.array(found["scores"]) - wanted[found["generation"]]).max() > 1e-5:
                    failures.append(f"not the scores of {found['generation']}")
                    return
                answers[found["generation"]] += 1

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(4)]
    for one in threads:
        one.start()
    try:
        for turn in range(6):
            name = ("g2", "g1")[turn % 2]
            host.activate(name)
            host.wait_for(lambda name=name: client.get("/readyz").json()["generation"] == name)  # type: ignore[misc]
            before = answers[name]
            host.wait_for(lambda name=name, before=before: answers[name] > before + 5 or bool(failures))  # type: ignore[misc]
    finally:
        stop.set()
        for one in threads:
            one.join()
    assert failures == []
    assert min(answers.values()) > 10


def test_hot_users_are_warm_before_a_generation_is_served(own_host: Callable[..., Host]) -> None:
    """Nobody asks while the generations change, so whoever asks first finds the block there."""
    host = own_host()
    client = serving(host, "g1", "g2", past=True)
    body = {"user_id": "u", "candidates": IDS, "as_of": NOW}
    sources = [client.post("/v1/score", json=body).json()["user"]["source"] for _ in range(3)]
    assert sources == ["store", "cached", "cached"]
    host.activate("g2")
    host.wait_for(lambda: client.get("/readyz").json()["generation"] == "g2")
    found = client.post("/v1/score", json=body).json()
    assert (found["generation"], found["user"]["source"]) == ("g2", "cached")
    np.testing.assert_allclose(found["scores"], host.reference("g2", PAST, PROFILE, IDS, NOW), rtol=0, atol=1e-5)


def test_a_rollback_under_requests_loads_nothing(own_host: Callable[..., Host]) -> None:
    """Once both are loaded the bundles are taken away: from then on a load would fail, and a switch needs none."""
    host = own_host()
    client = serving(host, "g1", "g2")
    host.activate("g2")
    body = {"user_id": "u", "candidates": IDS, "as_of": NOW}
    wanted = {name: host.reference(name, [], None, IDS, NOW) for name in ("g1", "g2")}

    def served() -> str:
        found = client.post("/v1/score", json=body).json()
        np.testing.assert_allclose(found["scores"], wanted[found["generation"]], rtol=0, atol=1e-5)
        return str(found["generation"])

    host.wait_for(lambda: served() == "g2")
    known = client.get("/v1/generations").json()["generations"]
    assert {one["name"]: one["loaded"] for one in known} == {"g1": True, "g2": True}
    for name in ("g1", "g2"):
        folder = host.settings.generation_dir(name)
        (folder / "bundle").rename(folder / "away")
    for name in ("g1", "g2", "g1"):
        host.activate(name)
        began = time.monotonic()
        host.wait_for(lambda name=name: served() == name)  # type: ignore[misc]
        print(f"back to {name} after {1000 * (time.monotonic() - began):.0f} ms")


def test_no_request_waits_or_fails_at_a_switch_to_what_is_warm(own_host: Callable[..., Host]) -> None:
    """Two processes say that the next generation is warm; then its bundle is taken away, so that a load would fail, and
    the switch is made under requests. Prints what they took, and how long the switch took to reach all of them."""
    host = own_host(api_processes=2)
    client = serving(host, "g1", "g2", past=True)
    body = {"user_id": "u", "candidates": IDS, "as_of": NOW}
    wanted = {name: host.reference(name, PAST, PROFILE, IDS, NOW) for name in ("g1", "g2")}
    stop, wrong = threading.Event(), list[str]()
    asked: list[tuple[float, float, str]] = []  # when, seconds, generation

    def ask() -> None:
        while not stop.is_set():
            began = time.monotonic()
            with httpx.Client(base_url=client.base_url, timeout=30.0) as own:  # any of the processes
                answer = own.post("/v1/score", json=body)
            found = answer.json()
            if not answer.is_success:
                wrong.append(answer.text)
            elif np.abs(np.array(found["scores"]) - wanted[found["generation"]]).max() > 1e-5:
                wrong.append(f"not the scores of {found['generation']}")
            else:
                asked.append((began, time.monotonic() - began, found["generation"]))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for one in threads:
        one.start()
    try:
        host.prepare("g2")
        host.wait_for(lambda: [set(one.warm) for one in fleet.reports(host.settings)] == [{"g1", "g2"}] * 2, 60.0)
        assert not any(name == "g2" for *_, name in asked)
        found = client.get("/v1/generations").json()
        assert (found["active"], found["next"]) == ("g1", "g2")
        folder = host.settings.generation_dir("g2")
        (folder / "bundle").rename(folder / "away")
        before = len(asked)
        host.wait_for(lambda: len(asked) > before + 50 or bool(wrong))
        switched = time.monotonic()
        host.activate("g2")
        host.wait_for(lambda: [name for *_, name in asked[-20:]] == ["g2"] * 20 or bool(wrong))
    finally:
        stop.set()
        for one in threads:
            one.join()
    assert wrong == []
    late = max(began for began, _, name in asked if name == "g1")
    around = [took for began, took, _ in asked if switched - 0.1 < began < switched + 0.2]
    others = [took for began, took, _ in asked if began < switched - 0.1]
    print(
        f"all on g2 {1000 * max(0.0, late - switched):.0f} ms after the write; requests around it "
        f"{1000 * np.median(around):.1f} ms (most {1000 * max(around):.1f}), before {1000 * np.median(others):.1f} "
        f"(most {1000 * max(others):.1f})"
    )
    workers = [one.pid for one in fleet.reports(host.settings)]
    os.kill(workers[0], signal.SIGTERM)
    host.wait_for(lambda: workers[0] not in [one.pid for one in fleet.reports(host.settings)])


def test_a_process_says_why_it_cannot_load_the_next_generation_and_when_it_can(own_host: Callable[..., Host]) -> None:
    host = own_host()
    filled(host, "g1")
    filled(host, "g2", seed=1)
    host.activate("g1")
    arena = host.settings.generation_dir("g2") / "n2o" / "arena"
    arena.rename(arena.with_name("away"))
    arena.write_text("no folder")
    host.prepare("g2")
    generations = Generations(host.settings)

    def said() -> str:
        generations.poll()
        generations.poll()  # what was loaded is told at the next look
        (mine,) = fleet.reports(host.settings)
        assert mine.warm in (["g1"], ["g1", "g2"])
        return fleet.waits_for([mine], "g2", mine.time)

    assert "generation g2 cannot be loaded: " in said()
    assert generations.pin().name == "g1"
    arena.unlink()
    arena.with_name("away").rename(arena)
    host.wait_for(lambda: said() == "")
    rollout.write(host.settings.serving_file, rollout.prepare(host.serving, None))
    generations.poll()
    assert (generations.loaded("g2"), generations.pin().name) == (None, "g1")


def test_a_canary_serves_its_share_of_the_users_and_no_others(own_host: Callable[..., Host]) -> None:
    """On two processes, by every route; a greater share keeps its users; nothing is mixed."""
    host = own_host(api_processes=2)
    client = serving(host, "g1", "g2", retrieval=True, past=True)
    host.prepare("g2")
    host.wait_for(lambda: all("g2" in one.warm for one in fleet.reports(host.settings)), 60.0)
    users = [str(number) for number in range(60)]
    wanted = {name: host.reference(name, [], None, IDS, NOW) for name in ("g1", "g2")}

    def served() -> set[str]:
        """Those that g2 serves. Each of the answers is right for the generation that it names."""
        out = set()
        for user in users:
            with httpx.Client(base_url=client.base_url, timeout=30.0) as own:  # any of the processes
                sent = int(user) if int(user) % 2 else user  # the same user
                body = {"user_id": sent, "candidates": IDS, "as_of": NOW}
                found = own.post("/v1/score", json=body).json()
            np.testing.assert_allclose(found["scores"], wanted[found["generation"]], rtol=0, atol=1e-5)
            out |= {user} if found["generation"] == "g2" else set()
        return out

    def share(share: float | None) -> set[str]:
        canary = None if share is None else rollout.Canary("g2", share)
        host.serving = msgspec.structs.replace(host.serving, next=None, canary=canary)
        rollout.write(host.settings.serving_file, host.serving)
        expected = {user for user in users if rollout.bucket("g2", user) < (share or 0)}
        host.wait_for(lambda: served() == expected, 60.0)
        return expected

    few, many = share(0.2), share(0.6)
    assert served() == many
    assert set() < few < many < set(users)
    assert client.get("/v1/generations").json()["canary"] == {"generation": "g2", "share": 0.6}

    for user, name in ((min(many), "g2"), (min(set(users) - many), "g1")):
        assert client.post(f"/v1/users/{user}/prefetch", json={"as_of": NOW}).json()["generation"] == name
        found = client.get("/v1/explain", params={"user_id": user, "item_id": IDS[0], "as_of": NOW}).json()
        assert (found["generation"], found["score"]) == (name, pytest.approx(wanted[name][0], abs=1e-4))
        found = client.post("/v1/recommend", json={"user_id": user, "as_of": NOW, "k": len(IDS)}).json()
        assert (found["generation"], found["degraded"]) == (name, [])  # candidates of its own retrieval
        scores = dict(zip(found["ids"], found["scores"], strict=True))
        there = [at for at, name in enumerate(IDS) if name in scores]
        np.testing.assert_allclose([scores[IDS[at]] for at in there], wanted[name][there], rtol=0, atol=1e-5)
    inline = {"user": {"behaviours": []}, "candidates": IDS, "as_of": NOW}
    assert {client.post("/v1/score", json=inline).json()["generation"] for _ in range(5)} == {"g1"}
    metrics = client.get("/metrics").text
    for name in ("g1", "g2"):
        labels = f'{{generation="{name}",route="score"}}'
        assert f"forerank_generation_seconds_count{labels}" in metrics
        assert f"forerank_generation_best_score_count{labels}" in metrics
    assert share(None) == set()
    rollout.write(host.settings.serving_file, rollout.retire(host.serving, "g2"))
    host.wait_for(lambda: 'generation="g2"' not in client.get("/metrics").text)
    assert 'forerank_generation_seconds_count{generation="g1",route="score"}' in client.get("/metrics").text


def test_a_generation_that_was_dropped_is_freed(own_host: Callable[..., Host]) -> None:
    """Also what the warm-up has frozen: it is in no cycle. The one to roll back to is kept."""
    host = own_host()
    generations = Service(host.settings).generations
    held: list[weakref.ref[Any]] = []
    try:
        for seed, name in enumerate(("g1", "g2", "g3")):
            filled(host, name, seed)
            host.activate(name)
            generations.poll()
            held += [weakref.ref(generations.pin()), weakref.ref(generations.pin().bundle.model)]
    finally:
        gc.unfreeze()
    assert [one() is None for one in held] == [True, True, False, False, False, False]
    assert (generations.loaded("g1"), generations.pin().name) == (None, "g3")
    assert generations.loaded("g2") is not None


def test_a_retired_generation_is_dropped_and_in_use_until_its_last_request_has_ended(
    own_host: Callable[..., Host],
) -> None:
    """Its retrieval index goes too, which served until the next generation has its own."""
    host = own_host()
    generations = Service(host.settings).generations
    try:
        for seed, name in enumerate(("g1", "g2")):
            filled(host, name, seed)
            if name == "g1":
                host.retrieval(name)
            host.activate(name)
            generations.poll()
            if name == "g1":
                request = generations.pin()
        assert generations.retrieval is not None
        rollout.write(host.settings.serving_file, rollout.retire(host.serving, "g1"))
        generations.poll()
    finally:
        gc.unfreeze()
    assert (generations.loaded("g1"), generations.retrieval, generations.pin().name) == (None, None, "g2")
    folder = host.settings.generation_dir("g1")
    assert request.rows.get(["1"])[0] is not None
    with pytest.raises(StoreLockedError), unused(folder):
        pass
    del request
    with unused(folder):
        generations.poll()
    assert (generations.pin().name, generations.reason) == ("g2", "")


def test_rows_that_change_are_served_at_once(own_host: Callable[..., Host]) -> None:
    host = own_host()
    client = serving(host, "g1")
    body = {"user_id": "u", "candidates": ["1", "2"], "as_of": NOW, "include": ["trace"]}
    assert client.post("/v1/score", json=body).json()["trace"]["versions"] == [1, 1]
    host.write("g1", [type(ITEMS[0])(**{**vars(ITEMS[7]), "item_id": "1", "version": 5})], deleted=["2"])
    found = client.post("/v1/score", json=body).json()
    assert (found["ids"], found["missing"], found["trace"]["versions"]) == (["1"], ["2"], [5])
    np.testing.assert_allclose(found["scores"], host.reference("g1", [], None, [IDS[7]], NOW), rtol=0, atol=1e-5)
    assert client.get("/v1/items/2").status_code == 404
    row = client.get("/v1/items/1").json()
    assert (row["version"], row["offset"]) == (5, len(ITEMS))
    host.wait_for(lambda: client.get("/v1/generations").json()["generations"][0]["last_change"] is not None)


def test_retrieval_is_renewed_without_a_failed_request(own_host: Callable[..., Host]) -> None:
    """The command follows the rows; the API takes its builds over while it answers."""
    host = own_host(retrieval_interval_s=0.2)
    client = serving(host, "g1")
    unended = host.settings.generation_dir("g1") / "retrieval" / "1-0.new"
    unended.mkdir(parents=True)

    builder = subprocess.Popen(
        [sys.executable, "-m", "api", "retrieval", "--generation", "g1"], env=host.environ(), stderr=subprocess.DEVNULL
    )

    def recommended() -> set[str]:
        answer = client.post("/v1/recommend", json={"user_id": "u", "k": 500})
        return set(answer.json()["ids"]) if answer.is_success else set()

    try:
        host.wait_for(lambda: recommended() == set(IDS), 40.0)
        statuses = []
        new = [type(ITEMS[0])(**{**vars(ITEMS[at]), "item_id": f"new-{at}"}) for at in range(30)]
        host.write("g1", new, deleted=IDS[:10])
        wanted = {*IDS[10:], *(item.item_id for item in new)}

        def renewed() -> bool:
            answer = client.post("/v1/recommend", json={"user_id": "u", "k": 500})
            statuses.append(answer.status_code)
            return set(answer.json()["ids"]) == wanted

        host.wait_for(renewed)
        assert set(statuses) == {200}
        host.wait_for(lambda: client.get("/v1/generations").json()["generations"][0]["retrieval_items"] == len(wanted))
        builds = [path for path in (host.settings.generation_dir("g1") / "retrieval").iterdir() if path.is_dir()]
        assert len(builds) <= 2
        assert not unended.exists(), "what a killed build left goes with the next one"
    finally:
        builder.terminate()
        assert builder.wait(20) == -signal.SIGTERM, "at once, also amid a build"


def test_a_build_that_cannot_be_written_leaves_nothing_and_two_at_once_do_not_meet(
    own_host: Callable[..., Host],
) -> None:
    host = own_host()
    host.bundle("g1")
    host.write("g1", ITEMS)
    folder = host.settings.generation_dir("g1") / "retrieval"

    def refused(file_bytes: int) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "api", "retrieval", "--generation", "g1", "--once"],
            env=host.environ(),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        return done.stderr

    assert "No retrieval index was built: the index cannot be written" in refused(4_096)  # as on a full disk
    assert [path for path in folder.iterdir() if path.is_dir()] == []
    other, lock = folder / "1-0.new", WriterLock(folder)
    other.mkdir()
    assert "already has a writer" in refused(1 << 30)
    assert other.exists()
    lock.release()
    host.retrieval("g1")
    assert not other.exists()


def test_after_a_long_build_comes_a_long_rest(own_host: Callable[..., Host]) -> None:
    host = own_host()
    host.bundle("g1")
    host.write("g1", ITEMS)
    arena, ended = arena_of(host.settings, "g1"), time.monotonic() - 10.0
    assert due(arena, Built("other rows", ended, took=1.0), interval_s=9.0)
    assert not due(arena, Built("other rows", ended, took=1.0), interval_s=60.0)
    assert not due(arena, Built("other rows", ended, took=100.0), interval_s=9.0)
    assert due(arena, Built(), interval_s=60.0), "the first one is built at once"


def test_an_index_of_no_rows(own_host: Callable[..., Host]) -> None:
    host = own_host()
    host.bundle("g1")
    host.write("g1", [])
    host.retrieval("g1")
    host.activate("g1")
    client = host.start()
    host.ready()
    host.wait_for(lambda: client.post("/v1/recommend", json={"user_id": "u"}).is_success)
    found = client.post("/v1/recommend", json={"user_id": "u", "include": ["trace", "attributes"]}).json()
    assert (found["ids"], found["candidates"], found["attributes"]) == ([], 0, [])


def test_a_served_generation_that_is_not_kept_up_to_date_is_not_ready(own_host: Callable[..., Host]) -> None:
    host = own_host()
    client = serving(host, "g1")
    rollout.write(host.settings.serving_file, rollout.fail(host.serving, "g1", "its jobs end again and again"))
    host.wait_for(lambda: client.get("/readyz").status_code == 503)
    assert "its jobs end again and again" in reason(host)
    found = client.get("/v1/generations").json()
    assert (found["ready"], found["active"]) == (False, "g1")
    assert "not kept up to date" in found["reason"]
    assert client.post("/v1/score", json={"user_id": "u", "candidates": IDS}).is_success  # it serves what it has
    rollout.write(host.settings.serving_file, host.serving)
    host.ready()


def test_a_lost_index_is_served_until_it_is_restored(own_host: Callable[..., Host]) -> None:
    host = own_host()
    client = serving(host, "g1", retrieval=True)

    def missing() -> list[str]:
        answer = client.post("/v1/score", json={"user_id": "u", "candidates": IDS})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["missing"])

    states = rollout.lose(host.serving, "g1", [len(ITEMS), 0])
    rollout.write(host.settings.serving_file, states)
    host.wait_for(lambda: client.get("/readyz").status_code == 503)
    host.lose("g1")
    for half in (ITEMS[:60], ITEMS[60:100]):
        host.write("g1", half)
        assert rollout.REMADE in reason(host)
        assert missing() == []  # the deleted files are still open
    rollout.write(host.settings.serving_file, rollout.regain(states, "g1"))
    host.ready()
    assert missing() == []  # the new one has not come so far
    host.write("g1", ITEMS[100:], deleted=IDS[:3])
    host.wait_for(lambda: missing() == IDS[:3])
    host.write("g1", [], deleted=IDS[3:5])
    assert missing() == IDS[:5]
    found = client.post("/v1/recommend", json={"user_id": "u", "k": 5, "include": ["attributes"]})
    assert len(found.json()["attributes"]) == 5, found.text  # from the new RocksDB too


def test_a_generation_is_seen_only_with_its_retrieval_index(
    own_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = own_host()
    filled(host, "g1")
    host.retrieval("g1")
    host.activate("g1")
    generations = Generations(host.settings)
    newer, seen = RetrievalView.newer, []

    def watched(*arguments: Any) -> RetrievalView | None:
        seen.append(generations.active)
        return newer(*arguments)

    monkeypatch.setattr(RetrievalView, "newer", watched)
    generations.poll()
    assert seen[0] is None
    assert generations.pin().name == "g1"
    assert generations.retrieval is not None


def test_the_watcher_outlives_damage_and_tries_again(own_host: Callable[..., Host]) -> None:
    host = own_host()
    filled(host, "g1")
    host.settings.histories_dir.mkdir(parents=True)
    (host.settings.histories_dir / "data.mdb").write_bytes(b"no store" * 4_096)
    host.retrieval("g1")
    host.activate("g1")
    folder = host.settings.generation_dir("g1")
    build = folder / "retrieval" / (folder / "retrieval" / "current").read_text()
    (build / "keys.npy").write_bytes(b"no array")
    (folder / "n2o" / "arena").rename(folder / "n2o" / "away")
    (folder / "n2o" / "arena").write_text("no folder")  # NotADirectoryError
    generations = Generations(host.settings)
    generations.poll()
    assert "cannot be loaded" in generations.reason
    (folder / "n2o" / "arena").unlink()
    (folder / "n2o" / "away").rename(folder / "n2o" / "arena")

    def polled() -> bool:
        generations.poll()
        return generations.active is not None

    host.wait_for(polled)
    assert (generations.reason, generations.retrieval, generations.histories) == ("", None, None)
    time.sleep(0.002)  # builds are named by the millisecond
    host.retrieval("g1")
    generations.poll()
    assert generations.retrieval is not None
    host.settings.serving_file.unlink()
    generations.poll()
    assert "has gone" in generations.reason
    assert generations.pin().name == "g1"
