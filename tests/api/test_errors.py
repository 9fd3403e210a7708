"""Every wrong request against a real process: status, problem+json, and the field that is named."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest

from api.problems import ProblemBody
from tests.host import Host, catalogue

OK = {"user_id": "anna", "candidates": ["1"]}


def problem(response: Any, status: int, field: str | None) -> ProblemBody:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = msgspec.json.decode(response.content, type=ProblemBody)
    assert (body.status, body.field) == (status, field), body
    assert body.title
    assert body.detail
    assert body.type.startswith("urn:forerank:problem:")
    return body


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"user_id": None}, "user_id"),
        ({"user": {}}, "user_id"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": "x" * 129}, "user_id"),
        ({"user_id": "a\nb"}, "user_id"),
        ({"user_id": 1.5}, "user_id"),
        ({"as_of": "yesterday"}, "as_of"),
        ({"as_of": "2026-01-01T00:00:00"}, "as_of"),
        ({"as_of": 2**60}, "as_of"),
        ({"candidates": None}, "candidates"),
        ({"candidates": [None]}, "candidates[0]"),
        ({"candidates": [[1]]}, "candidates[0]"),
        ({"k": 0}, "k"),
        ({"k": 5_000}, "k"),
        ({"order": "bid"}, "order"),
        ({"order": "score*"}, "order"),
        ({"order": "score*height", "k": 1}, "order"),
        ({"filters": {"height": {"eq": 1}}}, "filters.height"),
        ({"filters": {"bid": {}}}, "filters.bid"),
        ({"filters": {"bid": {"eq": "1"}}}, "filters[...].eq"),
        ({"include": ["everything"]}, "include[0]"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_score_names_the_field(host: Host, change: dict[str, Any], field: str) -> None:
    problem(host.client.post("/v1/score", json=OK | change), 422, field)


@pytest.mark.parametrize(
    ("user", "field"),
    [
        ({"behaviours": [{"item_id": "1"}]}, "user.behaviours[0].event_time"),
        (
            {"behaviours": [{"item_id": "1", "event_time": 5}, {"item_id": "1", "event_time": "x"}]},
            "user.behaviours[1].event_time",
        ),
        ({"features": {"age": None}}, "user.features[...]"),
        ({"features": {"age": ["a", "b"]}}, "user.features"),
    ],
)
def test_an_inline_user_is_checked(host: Host, user: dict[str, Any], field: str) -> None:
    problem(host.client.post("/v1/score", json={"user": user, "candidates": ["1"]}), 422, field)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(host: Host, word: str) -> None:
    body = json.dumps({**OK, "filters": {"bid": {"lte": 0}}}).replace("0}", word + "}")
    found = problem(
        host.client.post("/v1/score", content=body, headers={"content-type": "application/json"}), 422, "lte"
    )
    assert found.type.endswith("not-a-number")


@pytest.mark.parametrize("body", [b"", b"{", b"user_id=anna", b'{"user_id": "anna", "candidates": ["\xff"]}'])
def test_what_is_not_json(host: Host, body: bytes) -> None:
    problem(host.client.post("/v1/score", content=body, headers={"content-type": "application/json"}), 400, None)


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "application/xml", None])
@pytest.mark.parametrize("path", ["/v1/score", "/v1/recommend", "/v1/events/items"])
def test_other_content_types(host: Host, media: str | None, path: str) -> None:
    headers = {"content-type": media} if media else {}
    problem(host.client.post(path, content=json.dumps(OK).encode(), headers=headers), 415, None)


def test_a_charset_does_no_harm(host: Host) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    assert host.client.post("/v1/score", content=json.dumps(OK).encode(), headers=headers).status_code == 200


def test_a_body_beyond_the_limit(host: Host) -> None:
    body = b" " * (17 << 20)
    problem(host.client.post("/v1/score", content=body, headers={"content-type": "application/json"}), 413, None)


@pytest.mark.parametrize(
    ("path", "parameters", "body", "status", "field"),
    [
        ("/v1/score", {"user_id": "anna"}, b"1234567", 400, None),
        ("/v1/score", {}, b"12345678", 422, "user_id"),
        ("/v1/score", {"user_id": "anna", "k": "x"}, b"12345678", 422, "k"),
        ("/v1/score", {"user_id": "anna", "k": "0"}, b"12345678", 422, "k"),
        ("/v1/score", {"user_id": "anna", "as_of": "now"}, b"12345678", 422, "as_of"),
        ("/v1/score", {"user_id": "anna", "as_of": "--5"}, b"12345678", 422, "as_of"),
        ("/v1/score", {"user_id": "anna", "as_of": "9" * 5_000}, b"12345678", 422, "as_of"),
        ("/v1/score", {"user_id": "anna", "as_of": "9" * 18}, b"12345678", 422, "as_of"),
        ("/v1/score", {"user_id": "anna", "k": "1" * 5_000}, b"12345678", 422, "k"),
        ("/v1/score", {"user_id": "anna", "k": "-1"}, b"12345678", 422, "k"),
        ("/v1/score", {"user_id": "anna", "filters": "[]"}, b"12345678", 422, "filters"),
        ("/v1/score", {"user_id": "anna", "colour": "red"}, b"12345678", 422, "colour"),
        ("/v1/score", {"user_id": "anna"}, b"12345678" * 1_001, 422, "candidates"),
        ("/v1/recommend", {}, b"12345678", 415, None),
    ],
)
def test_binary_requests(
    host: Host, path: str, parameters: dict[str, str], body: bytes, status: int, field: str | None
) -> None:
    headers = {"content-type": "application/octet-stream"}
    problem(host.client.post(path, params=parameters, content=body, headers=headers), status, field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 0}, "k"),
        ({"retrieve": 0}, "retrieve"),
        ({"retrieve": 10_000}, "retrieve"),
        ({"candidates": [1]}, "candidates"),
    ],
)
def test_recommend_names_the_field(host: Host, change: dict[str, Any], field: str) -> None:
    problem(host.client.post("/v1/recommend", json={"user_id": "anna"} | change), 422, field)


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("/v1/explain", 422, "user_id"),
        ("/v1/explain?user_id=anna", 422, "item_id"),
        ("/v1/explain?user_id=anna&item_id=no", 404, "item_id"),
        ("/v1/explain?user_id=anna&item_id=1&as_of=soon", 422, "as_of"),
        ("/v1/explain?user_id=anna&item_id=1&as_of=--5", 422, "as_of"),
        ("/v1/explain?user_id=anna&item_id=1&as_of=" + "9" * 5_000, 422, "as_of"),
        ("/v1/items/no", 404, "item_id"),
        ("/v1/items/1?include=all", 422, "include"),
        ("/v1/items/1?wait_for=new", 422, "wait_for"),
        ("/v1/items/1?wait_for=-1", 422, "wait_for"),
        ("/v1/items/1?wait_for=9223372036854775808", 422, "wait_for"),
        ("/v1/items/1?wait_for=" + "9" * 5_000, 422, "wait_for"),
        ("/v1/items/1?wait_for=1&timeout_ms=10001", 422, "timeout_ms"),
        ("/v1/items/1?wait_for=1&timeout_ms=", 422, "timeout_ms"),
        ("/v1/items/1?timeout_ms=5", 422, "timeout_ms"),
        ("/v1/items/1?wait_for=1&deleted=yes", 422, "deleted"),
        ("/v1/items/1?deleted=1", 422, "deleted"),
        ("/v1/items/" + "x" * 200 + "?wait_for=1", 422, "item_id"),
        ("/v1/items/" + "x" * 200, 422, "item_id"),
        ("/nothing/here", 404, None),
        ("/v1/scores", 404, None),
    ],
)
def test_gets(host: Host, path: str, status: int, field: str | None) -> None:
    problem(host.client.get(path), status, field)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/events/items"])
def test_compressed_bodies(host: Host, path: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = host.client.post(path, content=gzip.compress(json.dumps(OK).encode()), headers=headers)
    problem(answer, 415, None)
    assert "gzip" in answer.json()["detail"]


def test_without_a_folder_of_models_there_is_no_inference(host: Host) -> None:
    assert host.client.get("/v2").status_code == 404


def test_a_wrong_method_names_the_right_one(host: Host) -> None:
    response = host.client.get("/v1/score")
    problem(response, 405, None)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz"])
def test_a_load_balancer_may_ask_with_head(host: Host, path: str) -> None:
    response = host.client.head(path)
    assert (response.status_code, response.content) == (200, b"")


def test_attributes_of_too_many_items(host: Host) -> None:
    body = {"user_id": "anna", "candidates": ["1"] * 1_000, "include": ["attributes"]}
    assert host.client.post("/v1/score", json=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("items", {"item_id": "1"}, "version"),
        ("items", {"item_id": "1", "version": -1}, "version"),
        ("items", [{"item_id": "1", "version": 1}, {"item_id": "", "version": 1}], "[1].item_id"),
        ("behaviours", {"event_id": "e", "user_id": "u", "item_id": "i"}, "action"),
        ("users", {"user_id": "u"}, "features"),
        ("models", {"action": "stage", "generation": "g"}, "uri"),
        ("models", [{"action": "explode", "generation": "g"}], "[0].action"),
        ("items", 5, None),
    ],
)
def test_events_name_index_and_field(host: Host, path: str, body: Any, field: str | None) -> None:
    problem(host.client.post(f"/v1/events/{path}", json=body, headers=host.rights), 422, field)


def test_the_line_of_bad_ndjson_is_named(host: Host) -> None:
    lines = b'{"item_id": "1", "version": 1}\n\n{"item_id": "2", "version": "two"}\n'
    headers = {"content-type": "application/x-ndjson"}
    problem(host.client.post("/v1/events/items", content=lines, headers=headers), 422, "[1].version")


def test_a_broker_that_is_away_is_said(host: Host) -> None:
    found = problem(host.client.post("/v1/events/items", json={"item_id": "1", "version": 1}), 503, None)
    assert found.type.endswith("broker-away")


def test_a_broker_that_is_away_keeps_no_ranking_waiting(own_host: Callable[..., Host]) -> None:
    """More posts of events than there are request threads wait for a broker that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as mute, ThreadPoolExecutor(24) as posts:
        away = own_host(kafka_bootstrap=f"127.0.0.1:{mute.getsockname()[1]}")
        away.bundle("g1")
        away.write("g1", catalogue(10))
        away.activate("g1")
        client = away.start()
        away.ready()
        event, url = {"item_id": "1", "version": 1}, f"http://127.0.0.1:{away.settings.api_port}/v1/events/items"
        waiting = [posts.submit(httpx.post, url, json=event, timeout=60) for _ in range(24)]
        mute.settimeout(20)
        first, _ = mute.accept()  # the first of them is on its way to the broker
        for _ in range(5):
            began = time.monotonic()
            assert client.post("/v1/score", json=OK).status_code == 200
            assert time.monotonic() - began < 3
        assert not any(one.done() for one in waiting)
        answers = [one.result() for one in waiting]
        first.close()
        assert {problem(answer, 503, None).type.rpartition(":")[2] for answer in answers} == {"broker-away"}
        assert "Traceback" not in away.log


def test_no_event_is_no_error(host: Host) -> None:
    response = host.client.post("/v1/events/items", json=[])
    assert (response.status_code, response.json()["accepted"]) == (202, 0)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/events/items", "/v1/users/anna/prefetch"])
def test_a_caller_who_goes_away_amid_a_body_is_no_error(host: Host, path: str) -> None:
    with socket.create_connection(("127.0.0.1", host.settings.api_port), timeout=20) as caller:
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n["
        caller.sendall(head.encode())
        caller.shutdown(socket.SHUT_WR)
        assert caller.recv(1) == b""
    assert host.client.get("/healthz").is_success  # what the event loop did before is done
    assert "request failed" not in host.log


def test_the_process_lives_and_logged_no_error(host: Host) -> None:
    assert host.client.get("/readyz").status_code == 200
    assert "Traceback" not in host.log


def test_more_requests_than_may_wait_are_refused_at_once_and_nothing_else_is(own_host: Callable[..., Host]) -> None:
    host = own_host(requests_max=1)
    items = catalogue(2_000)
    host.bundle("g1")
    host.write("g1", items)
    host.activate("g1")
    client = host.start()
    host.ready()
    body = {"user_id": "anna", "candidates": [item.item_id for item in items] * 5}
    found: list[httpx.Response] = []

    def crowd() -> bool:
        with ThreadPoolExecutor(8) as pool:
            waits = [pool.submit(client.post, "/v1/score", json=body) for _ in range(8)]
            found.extend(one.result() for one in waits)
        for path in ("/readyz", "/metrics", "/v1/generations"):
            assert client.get(path).is_success
        return {response.status_code for response in found} == {200, 503}

    host.wait_for(crowd)
    refused = next(response for response in found if response.status_code == 503)
    assert problem(refused, 503, None).type == "urn:forerank:problem:overloaded"
    assert refused.headers["retry-after"] == "1"
    assert 'forerank_refused_total{kind="requests"}' in client.get("/metrics").text
    assert client.post("/v1/score", json=body).is_success
