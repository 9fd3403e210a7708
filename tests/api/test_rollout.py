"""Rolling out over HTTP: who may, what is refused with its reason, and that it is the topic's own event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from infra.admin import admin_token
from infra.kafka.topics import ensure_topics
from infra.settings import Settings
from streams import events, rollout
from streams.events import ModelEvent
from tests.host import Host

STAGE = {"uri": "file:///models/a", "sha256": "a" * 64, "activate_when_complete": True}
ROUTES = [
    ("/v1/generations/a/stage", STAGE),
    ("/v1/generations/a/activate", {}),
    ("/v1/generations/a/rollback", {}),
    ("/v1/generations/a/retire", {}),
    ("/v1/events/models", {"action": "activate", "generation": "a"}),
]


@pytest.fixture
def host(settings: Callable[..., Settings]) -> Iterator[Host]:
    """The API of a host with topics and without a generation."""
    one = Host(settings())
    one.settings.state.mkdir()
    ensure_topics(one.settings)
    try:
        one.start()
        yield one
    finally:
        one.close()


def published(settings: Settings) -> list[ModelEvent]:
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False)
    place, found = TopicPartition(settings.topic("models"), 0), []
    try:
        consumer.assign([place])
        consumer.seek_to_beginning(place)
        end = consumer.end_offsets([place])[place]
        while consumer.position(place) < end:
            found += [events.model(record.value) for record in consumer.poll(500).get(place, [])]
    finally:
        consumer.close()
    return found


def post(host: Host, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    content = b"" if body is None else msgspec.json.encode(body)
    kind = {} if body is None else {"content-type": "application/json"}
    answer = host.client.post(path, content=content, headers={**host.rights, **kind, **headers})
    return answer.status_code, answer.json()


def test_without_the_token_nothing_is_published(own_host: Callable[..., Host]) -> None:
    """A wrong body is not even looked at: who may not is told that alone."""
    host = own_host(admin_token="right")
    client = host.start()
    wrong = ("right", "Bearer", "Bearer wrong", "Basic right", "Bearer right right", "Bearer \xe4")
    for path, body in ROUTES:
        for header in (None, *wrong):
            headers = {} if header is None else {b"authorization": header.encode("latin-1")}
            for sent in (body, {"no": "such field"}):
                answer = client.post(path, json=sent, headers=headers)
                assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json"), header
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert "right" not in answer.json()["detail"]
        for header in ("Bearer right", "bearer right"):
            answer = client.post(path, json=body, headers={"authorization": header})
            assert answer.json()["type"].endswith("broker-away")
    assert client.get("/v1/generations").is_success
    assert not host.settings.admin_token_file.exists()


@pytest.mark.e2e
def test_what_is_published_is_the_topic_s_event_and_what_would_be_refused_is_not(host: Host) -> None:
    assert host.client.post("/v1/generations/a/stage", json=STAGE).status_code == 401
    expected = [ModelEvent("stage", "a", **STAGE), ModelEvent("stage", "b", "file:///models/b", "b" * 64)]
    assert post(host, "/v1/generations/a/stage", STAGE) == (
        202,
        {"accepted": 1, "topic": host.settings.topic("models")},
    )
    assert post(host, "/v1/generations/b/stage", {"uri": "file:///models/b", "sha256": "b" * 64})[0] == 202
    for action, generation, said in (
        ("activate", "c", "generation c was never staged"),
        ("share", "a", "generation a is the one that serves all"),
        ("rollback", "a", "there is nothing to go back to from generation a"),
        ("rollback", "b", "generation b was not to be served"),
        ("retire", "a", "generation a is the one to be served; activate another one before it is retired"),
        ("stage", "a", "generation names are never used twice"),
    ):
        body = {"stage": STAGE | {"sha256": "c" * 64}, "share": {"share": 0.1}}.get(action)
        status, found = post(host, f"/v1/generations/{generation}/{action.replace('share', 'activate')}", body)
        assert (status, found["type"]) == (409, "urn:forerank:problem:refused")
        assert said in found["detail"]
    assert post(host, "/v1/generations/b/activate", {"share": 0.25})[0] == 202
    expected.append(ModelEvent("activate", "b", share=0.25))
    for action, generation in (("activate", "b"), ("rollback", "b"), ("retire", "b")):
        assert post(host, f"/v1/generations/{generation}/{action}")[0] == 202
        expected.append(ModelEvent(action, generation))  # type: ignore[arg-type]
    assert post(host, "/v1/generations/a/activate")[0] == 202  # this host does not know it yet
    expected.append(ModelEvent("activate", "a"))
    failed = rollout.fail(rollout.stage(rollout.Serving(), 0, expected[0]), "a", "bad bundle")
    rollout.write(host.settings.serving_file, failed)
    for name, action, said in (
        ("a", "activate", "generation a is failed (bad bundle) and cannot be activated"),
        ("a", "stage", "generation a is failed here (bad bundle): stage the bundle under a new name"),
        ("b", "activate", "generation b was retired"),
    ):
        status, found = post(host, f"/v1/generations/{name}/{action}", STAGE if action == "stage" else None)
        assert (status, found["type"], found["detail"]) == (409, "urn:forerank:problem:refused", said)
    newest = STAGE | {"sha256": "c" * 64}
    assert post(host, "/v1/generations/c/stage", newest)[0] == 202
    expected.append(ModelEvent("stage", "c", **newest))
    known = rollout.stage(failed, 9, expected[-1])
    alone = msgspec.structs.replace(known.generations["c"], state="active")
    rollout.write(
        host.settings.serving_file,
        msgspec.structs.replace(known, active="c", generations=known.generations | {"c": alone}),
    )
    status, found = post(host, "/v1/generations/c/rollback")  # to a, which this host cannot serve
    assert (status, found["detail"]) == (409, "generation a is failed (bad bundle) and cannot be activated")
    assert post(host, "/v1/events/models", {"action": "activate", "generation": "z"})[0] == 202  # the log refuses it
    assert published(host.settings) == [*expected, ModelEvent("activate", "z")]


@pytest.mark.e2e
def test_a_wrong_request_names_its_field(host: Host) -> None:
    for path, body, field in (
        ("a/stage", {"uri": "file:///models/a"}, "sha256"),
        ("a/stage", STAGE | {"sha256": "short"}, "sha256"),
        ("a/stage", None, "uri"),
        ("A/stage", STAGE, "generation"),
        ("a/activate", {"generation": "b"}, "generation"),
        ("a/retire", {"force": True}, "force"),
        ("a/activate", {"share": -0.1}, "share"),
        ("a/activate", {"share": 1.5}, "share"),
        ("a/rollback", {"share": 0.5}, "share"),
    ):
        status, found = post(host, f"/v1/generations/{path}", body)
        assert (status, found["field"]) == (422, field), found
    assert host.client.post("/v1/generations/a/explode", headers=host.rights).status_code == 404
    assert published(host.settings) == []


def test_the_token_of_the_state_folder_is_one_for_all_processes(own_host: Callable[..., Host]) -> None:
    host = own_host(api_processes=2)
    client = host.start()
    token = admin_token(host.settings)
    assert host.settings.admin_token_file.stat().st_mode & 0o777 == 0o600
    assert token not in host.log
    for _ in range(6):
        with httpx.Client(base_url=client.base_url, timeout=30.0) as fresh:
            found = fresh.post("/v1/generations/a/activate", headers=host.rights)
            assert found.json()["type"].endswith("broker-away")
