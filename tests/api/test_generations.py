"""Which generation is served: none yet, one that does not load, a switch under load, and retrieval that comes later."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api.generations import Generations
from api.retrieval import RetrievalView
from streams import rollout
from tests.host import HOUR, NOW, Host, Seen, catalogue

ITEMS = catalogue(120)
IDS = [item.item_id for item in ITEMS]
PAST = [Seen("u", IDS[at], NOW - (40 - at) * HOUR) for at in range(40)]
PROFILE = {"segment": "s1", "age": 50}


def filled(host: Host, generation: str, seed: int = 0) -> None:
    host.bundle(generation, seed=seed)
    host.write(generation, ITEMS)


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
    filled(host, "g1")
    filled(host, "g2", seed=1)
    host.activate("g1")
    client = host.start()
    host.ready()
    tensors = host.settings.generation_dir("g2") / "bundle" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    host.activate("g2")
    host.wait_for(lambda: "g2 cannot be loaded" in client.get("/v1/generations").json()["reason"])
    assert client.post("/v1/score", json={"user_id": "u", "candidates": [1]}).json()["generation"] == "g1"
    assert client.get("/readyz").json()["generation"] == "g1"


def test_a_switch_under_load_fails_nothing_and_mixes_nothing(own_host: Callable[..., Host]) -> None:
    """Clients score while the served generation changes back and forth; each answer is right for the one it names."""
    host = own_host()
    for seed, name in enumerate(("g1", "g2")):
        filled(host, name, seed)
        host.retrieval(name)
    host.behave(PAST, {"u": PROFILE})
    host.activate("g1")
    client = host.start()
    host.ready()
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


def test_rows_that_change_are_served_at_once(own_host: Callable[..., Host]) -> None:
    host = own_host()
    filled(host, "g1")
    host.activate("g1")
    client = host.start()
    host.ready()
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
    filled(host, "g1")
    host.activate("g1")
    client = host.start()
    host.ready()

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
    finally:
        builder.terminate()
        assert builder.wait(20) == 0


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


def test_several_processes_serve_and_end_together(own_host: Callable[..., Host]) -> None:
    host = own_host(api_processes=2)
    filled(host, "g1")
    host.activate("g1")
    client = host.start()
    host.ready()
    body: dict[str, Any] = {"user_id": "u", "candidates": IDS, "as_of": NOW}
    for _ in range(10):
        with httpx.Client(base_url=client.base_url, timeout=30.0) as fresh:
            assert fresh.post("/v1/score", json=body).status_code in (200, 503)
    assert "Traceback" not in host.log


def workers(host: Host) -> set[int]:
    """Process ids below the API's."""
    assert host._process is not None
    children = Path(f"/proc/{host._process.pid}/task/{host._process.pid}/children").read_text().split()
    return {int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_processes_are_exchanged_and_replaced_without_a_failed_request(own_host: Callable[..., Host]) -> None:
    """Callers keep their connections and do not retry. A killed process takes its own connections with it: after that
    only new ones are asked for an answer."""
    host = own_host(api_processes=2)
    filled(host, "g1")
    host.activate("g1")
    client = host.start()
    host.ready()
    process, before = host._process, workers(host)
    assert process is not None
    assert len(before) == 2
    body = {"user_id": "u", "candidates": IDS, "as_of": NOW}
    wrong, stop, answered = [], threading.Event(), [0] * 4

    def ask(number: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=30.0) as own:
            while not stop.is_set():
                try:
                    answer = own.post("/v1/score", json=body)
                    wrong.extend([] if answer.is_success else [answer.text])
                except httpx.TransportError as error:
                    wrong.append(repr(error))
                answered[number] += 1
                time.sleep(0.001 * number)  # connections that rest are those which a careless end would cut

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            known = workers(host)
            os.kill(process.pid, signal.SIGHUP)
            host.wait_for(lambda known=known: len(workers(host)) == 2 and not workers(host) & known, 90.0)  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert min(answered) > 10
    assert not workers(host) & before

    known = workers(host)
    os.kill(min(known), signal.SIGKILL)
    host.wait_for(lambda: len(workers(host) - known) == 1, 30.0)
    with httpx.Client(base_url=client.base_url, timeout=30.0) as fresh:
        assert fresh.post("/v1/score", json=body).is_success


def test_sigterm_ends_the_process_with_its_requests_answered(own_host: Callable[..., Host]) -> None:
    host = own_host()
    filled(host, "g1")
    host.activate("g1")
    client = host.start()
    host.ready()
    process, answers = host._process, []
    assert process is not None
    body = {"user_id": "u", "candidates": IDS * 150}

    def ask(own: httpx.Client) -> None:
        answers.append(own.post("/v1/score", json=body).status_code)

    callers = [httpx.Client(base_url=client.base_url, timeout=30.0) for _ in range(6)]
    for own in callers:
        assert own.get("/healthz").is_success  # connected
    threads = [threading.Thread(target=ask, args=(own,)) for own in callers]
    for thread in threads:
        thread.start()
    host.wait_for(lambda: len(answers) > 0)  # the others are under way
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert answers == [200] * 6
    for own in callers:
        own.close()
    while time.monotonic() < began + 15:  # new callers are refused, not left waiting
        try:
            assert httpx.get(f"{client.base_url}/healthz").is_success
        except httpx.ConnectError:
            break
    assert process.wait(20) == 0
    assert time.monotonic() - began < 15
    assert "Traceback" not in host.log


def test_a_parent_that_is_killed_leaves_no_process(own_host: Callable[..., Host]) -> None:
    host = own_host(api_processes=2)
    host.start()
    process = host._process
    assert process is not None
    host.wait_for(lambda: len(workers(host)) == 2)
    known = workers(host)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in known):
        assert time.monotonic() < deadline, "a process outlives its parent"
        time.sleep(0.05)
    host._process = None


def test_a_taken_port_is_one_sentence(own_host: Callable[..., Host]) -> None:

    host = own_host()
    with socket.create_server(("127.0.0.1", host.settings.api_port)):
        done = subprocess.run(
            [sys.executable, "-m", "api", "serve"], env=host.environ(), capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert str(host.settings.api_port) in done.stderr
    assert "API_PORT" in done.stderr


@pytest.mark.parametrize("arguments", [["retrieval", "--generation", "nope", "--once"]])
def test_commands_that_cannot_work_say_so(own_host: Callable[..., Host], arguments: list[str]) -> None:

    host = own_host()
    done = subprocess.run(
        [sys.executable, "-m", "api", *arguments], env=host.environ(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("No retrieval index was built")


@pytest.mark.parametrize("command", ["up", "down", "demo", "serve"])
def test_a_state_folder_that_cannot_be_is_one_sentence(own_host: Callable[..., Host], command: str) -> None:
    environ = own_host().environ() | {"FORERANK_STATE": "/dev/null/x", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "api", command], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "/dev/null/x" in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_served_generation_that_is_not_kept_up_to_date_is_not_ready(own_host: Callable[..., Host]) -> None:
    host = own_host()
    filled(host, "g1")
    host.activate("g1")
    client = host.start()
    host.ready()
    rollout.write(host.settings.serving_file, rollout.fail(host.serving, "g1", "its jobs end again and again"))
    host.wait_for(lambda: client.get("/readyz").status_code == 503)
    assert "its jobs end again and again" in reason(host)
    found = client.get("/v1/generations").json()
    assert (found["ready"], found["active"]) == (False, "g1")
    assert "not kept up to date" in found["reason"]
    assert client.post("/v1/score", json={"user_id": "u", "candidates": IDS}).is_success  # it serves what it has
    rollout.write(host.settings.serving_file, host.serving)
    host.ready()


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
