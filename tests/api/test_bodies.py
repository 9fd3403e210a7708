"""Bodies in flight against a real process: never more bytes than may be, none is kept, and nobody sends for ever."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from api.bodies import BODY_MAX, Bodies
from api.problems import ProblemError
from api.replies import JSON
from infra.settings import Settings
from tests.host import Host

EVENTS = "/v1/events/items"  # of which none are no error, broker or not


def request_in(parts: list[bytes], *headers: tuple[bytes, bytes]) -> Request:
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    coming = iter([*messages, {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        return next(coming)

    head = [(b"content-type", b"application/json; charset=utf-8"), *headers]
    return Request({"type": "http", "headers": head}, receive)


@given(st.lists(st.binary(max_size=5), max_size=5), st.integers(0, 30))
def test_a_body_is_taken_once_and_whole_whatever_was_announced(parts: list[bytes], announced: int) -> None:
    async def scene() -> None:
        bodies = Bodies(Settings())
        head = (b"content-length", str(announced).encode())
        with await bodies.of(request_in(parts, head), JSON, empty=True) as body:
            assert bodies._held == max(announced, len(body))
            assert (body.take(), body.media) == (b"".join(parts), JSON)
            assert body.take() == b"", "its memory is given back with the first"
        assert bodies._held == 0

    asyncio.run(scene())


def test_a_body_of_the_most_bytes_and_one_byte_more() -> None:
    async def scene() -> None:
        bodies, most = Bodies(Settings()), [b"x" * (BODY_MAX // 4)] * 4
        with await bodies.of(request_in(most), JSON) as body:
            assert len(body.take()) == BODY_MAX
        for beyond in (request_in([*most, b"x"]), request_in([], (b"content-length", str(BODY_MAX + 1).encode()))):
            with pytest.raises(ProblemError) as refused:
                await bodies.of(beyond, JSON)
            assert refused.value.body.status == 413
        assert bodies._held == 0

    asyncio.run(scene())


@contextmanager
def caller(host: Host, head: str, body: bytes = b"", path: str = EVENTS) -> Iterator[socket.socket]:
    """Sends no more than this."""
    with socket.create_connection(("127.0.0.1", host.settings.api_port), timeout=30) as one:
        one.sendall(f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: {JSON}\r\n{head}\r\n\r\n".encode() + body)
        yield one


def answer(one: socket.socket) -> str:
    """The next answer to a caller, with its head."""
    said = b""
    while not (found := re.match(rb"(?s)(.*?\r\n\r\n)", said)):
        said += one.recv(4096)
    length = int(re.search(rb"content-length: (\d+)", found[1])[1])  # type: ignore[index]
    while len(said) < len(found[1]) + length:
        said += one.recv(4096)
    return said.decode()


def value(host: Host, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", host.client.get("/metrics").text, re.M)
    return 0.0 if found is None else float(found[1])


def held(host: Host) -> float:
    return value(host, "forerank_body_bytes")


def test_what_goes_beyond_the_bytes_is_refused_and_all_are_given_back(own_host: Callable[..., Host]) -> None:
    host = own_host(body_bytes=BODY_MAX, body_timeout_s=60.0)
    client = host.start()
    empty = {"content": b"[]", "headers": {"content-type": JSON}}
    for path in (EVENTS, "/v1/score", "/v1/recommend", "/v1/users/u/prefetch"):
        with caller(host, f"Content-Length: {BODY_MAX}", b"["):
            host.wait_for(lambda: held(host) == BODY_MAX)
            refused = client.post(path, **empty)  # type: ignore[arg-type]
            assert refused.status_code == 503
            assert refused.json()["type"] == "urn:forerank:problem:overloaded"
            assert refused.headers["retry-after"] == "1"
            assert client.get("/healthz").is_success
        host.wait_for(lambda: held(host) == 0)  # he has gone amid his body
    assert value(host, 'forerank_refused_total{kind="bodies"}') == 4

    with caller(host, f"Content-Length: {BODY_MAX - 4}", b"[") as first:
        host.wait_for(lambda: held(host) == BODY_MAX - 4)
        with caller(host, "Transfer-Encoding: chunked", b"3\r\n[  \r\n") as second:
            host.wait_for(lambda: held(host) == BODY_MAX - 1)
            second.sendall(b"2\r\n ]\r\n")
            assert answer(second).startswith("HTTP/1.1 503 ")
            host.wait_for(lambda: held(host) == BODY_MAX - 4)
            second.sendall(b"0\r\n\r\n")  # and he may go on
            second.sendall(f"POST {EVENTS} HTTP/1.1\r\nContent-Type: {JSON}\r\nContent-Length: 2\r\n\r\n[]".encode())
            assert answer(second).startswith("HTTP/1.1 202 ")
        first.sendall(b" " * (BODY_MAX - 6) + b"]")
        assert answer(first).startswith("HTTP/1.1 202 ")
        host.wait_for(lambda: held(host) == 0)
    for content, status in ((b"[", 400), (b"5", 422), (b"[]", 202), (b" " * (BODY_MAX + 1), 413)):
        assert client.post(EVENTS, content=content, headers={"content-type": JSON}).status_code == status
    assert client.post(EVENTS, content=b"[]", headers={"content-type": "text/plain"}).status_code == 415
    with caller(host, f"Content-Length: {BODY_MAX}"):  # nothing is left of any of them
        host.wait_for(lambda: held(host) == BODY_MAX)
    host.wait_for(lambda: held(host) == 0)
    assert "Traceback" not in host.log


def test_a_body_that_does_not_come_in_time_is_told_and_closed(own_host: Callable[..., Host]) -> None:
    host = own_host(body_timeout_s=0.5)
    host.start()
    for path in (EVENTS, "/v1/score"):
        for head in ("Content-Length: 9", "Transfer-Encoding: chunked"):
            with caller(host, head, path=path) as slow:
                told = answer(slow)
                assert told.startswith("HTTP/1.1 408 ")
                assert "urn:forerank:problem:too-slow" in told
                assert slow.recv(1) == b""
    host.wait_for(lambda: held(host) == 0)
    assert "Traceback" not in host.log
