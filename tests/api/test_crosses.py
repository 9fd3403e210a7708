"""Crosses that come from elsewhere than the block: one contract for both sources, and requests that do not wait."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import numpy as np
import pytest

from api.crosses import MISSING, OLD, CrossCache, CrossSource, HostHistories, Past, RemoteHistories, SourceError
from api.generations import load
from api.lanes import Lanes, Step
from api.problems import ProblemError
from api.runtime.runtime import Runtime
from api.schemas import Query
from api.users import Users, UserSide, UserSource, infer
from index.keys import keys_of
from infra.settings import Settings
from tests.conftest import free_ports, wait_until
from tests.host import HOUR, NOW, Host, Seen, catalogue
from tests.remote_features import feature_service

ITEMS = catalogue(40)
ACTIONS = ("view", "click", "buy")
PAST = [Seen("u", ITEMS[at % 40].item_id, NOW - (50 - at) * HOUR, ACTIONS[at % 3]) for at in range(50)]
PAST[7] = dataclasses.replace(PAST[7], item_id="gone")
LENGTH = 30  # of the histories
HASH_KEY = Settings().hash_key.encode()


@pytest.fixture(scope="module")
def service() -> Iterator[httpx.Client]:
    with feature_service({name: [(one.item_id, one.action, one.time) for one in PAST] for name in "uv"}) as client:
        yield client
        client.put("/delay", params={"ms": 0})


@pytest.fixture(autouse=True)
def usual(service: httpx.Client) -> None:
    service.put("/delay", params={"ms": 0})
    service.put("/fail", params={"status": 0})


def remote_of(url: str, timeout_s: float = 30.0) -> RemoteHistories:
    return RemoteHistories(url, LENGTH, HASH_KEY, timeout_s, 4)


# ---- what every source does


@pytest.fixture(params=["host", "remote"])
def source(
    request: pytest.FixtureRequest, own_host: Callable[..., Host], service: httpx.Client
) -> Iterator[CrossSource]:
    if request.param == "remote":
        one: CrossSource = remote_of(str(service.base_url))
    else:
        host = own_host(history_length=LENGTH)
        host.behave(PAST)
        one = HostHistories(host.reader)
    yield one
    one.close()


def told(past: Past) -> list[tuple[tuple[int, ...], str, int]]:
    names = [past.action_names[code] for code in past.actions]
    return list(zip(map(tuple, past.keys.tolist()), names, past.times.tolist(), strict=True))


@pytest.mark.parametrize(("as_of", "seen"), [(NOW, PAST[20:]), (PAST[9].time, PAST[:10]), (PAST[0].time - 1, [])])
def test_a_source_gives_the_newest_of_the_past(source: CrossSource, as_of: int, seen: list[Seen]) -> None:
    past = source.past("u", as_of)
    if as_of == PAST[9].time and isinstance(source, HostHistories):
        seen = []  # a host keeps the newest LENGTH alone, wherever a request looks from
    keys = keys_of([one.item_id for one in seen], HASH_KEY) if seen else np.zeros((0, 2), np.uint64)
    wanted = [(tuple(key), one.action, one.time) for key, one in zip(keys.tolist(), seen, strict=True)]
    assert told(past) == wanted
    assert (past.keys.dtype, past.actions.dtype, past.times.dtype) == (np.uint64, np.uint8, np.int64)


def test_a_source_knows_nothing_of_a_stranger(source: CrossSource) -> None:
    for name in ("nobody", "../..", "a b&c=ü?#", "."):
        assert told(source.past(name, NOW)) == []


def test_a_source_serves_many_threads(source: CrossSource) -> None:
    wanted = told(source.past("u", NOW))
    with ThreadPoolExecutor(8) as pool:
        assert all(one == wanted for one in pool.map(lambda _: told(source.past("u", NOW)), range(50)))


def test_a_source_that_is_away_says_so(source: CrossSource) -> None:
    if isinstance(source, RemoteHistories):
        away: CrossSource = remote_of(f"http://127.0.0.1:{free_ports(1)[0]}")
    else:
        away = HostHistories(lambda: None)
    with pytest.raises(SourceError):
        away.past("u", NOW)
    away.close()


# ---- what a feature service may answer


BAD = {
    "no JSON": b"{",
    "another form": b"[]",
    "lengths": b'{"item_ids": ["1"], "actions": [], "event_times": [1]}',
    "a moment beyond all": b'{"item_ids": ["1"], "actions": ["a"], "event_times": [99999999999999999]}',
    "NaN": b'{"item_ids": ["1"], "actions": ["a"], "event_times": [NaN]}',
    "not UTF-8": b'{"item_ids": ["\xff"], "actions": ["a"], "event_times": [1]}',
    "a lone surrogate": b'{"item_ids": ["\\ud800"], "actions": ["a"], "event_times": [1]}',
    "too many actions": b'{"item_ids": [%s], "actions": [%s], "event_times": [%s]}'
    % (b",".join([b"1"] * 300), b",".join(b'"%d"' % at for at in range(300)), b",".join([b"1"] * 300)),
    "too much": b" " * (2 << 20),
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_answer_is_a_source_error(body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        bad = remote_of(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(SourceError):
            bad.past("u", NOW)
        bad.close()
        thread.join()


def test_errors_and_slowness_of_a_feature_service_are_source_errors(service: httpx.Client) -> None:
    source = remote_of(str(service.base_url), 0.2)
    service.put("/fail", params={"status": 500})
    with pytest.raises(SourceError, match="500"):
        source.past("u", NOW)
    service.put("/fail", params={"status": 0})
    service.put("/delay", params={"ms": 5_000})
    with pytest.raises(SourceError, match="does not answer"):
        source.past("u", NOW)
    source.close()


def test_any_order_and_integer_ids_are_accepted() -> None:
    source = remote_of("http://127.0.0.1")
    body = {"item_ids": [3, "1", "x"], "actions": ["c", "b", "a"], "event_times": [30, 10, 20]}
    past = source._past(source._decoder.decode(httpx.Request("GET", "http://x", json=body).content), 25)
    assert told(past) == [
        (tuple(keys_of(["1"], HASH_KEY)[0].tolist()), "b", 10),
        (tuple(keys_of(["x"], HASH_KEY)[0].tolist()), "a", 20),
    ]
    source.close()


# ---- requests


class Remote:
    """A host's users in this process, whose crosses come from the feature service."""

    def __init__(self, host: Host, service: httpx.Client, **changes: Any) -> None:
        self.host, self.service = host, service
        for seed, name in enumerate(("g1", "g2")):
            host.bundle(name, seed)
            host.write(name, ITEMS)
        host.behave([*PAST, dataclasses.replace(PAST[0], user_id="v")], {"u": {"segment": "s1", "age": 50}})
        self.generations = [load(host.settings, name, host.bundles[name].sha256) for name in ("g1", "g2")]
        self.runtime = Runtime(1)
        self.runtime.start()
        settings = dataclasses.replace(host.settings, **changes)
        self.crosses = CrossCache(settings, remote_of(str(service.base_url)))
        reader = host.reader()
        self.lanes = Lanes(self.runtime)
        self.users = Users(settings, lambda: reader, self.lanes, self.crosses)

    def ask(self, user: str = "u", generation: int = 0, until: float | None = None) -> UserSide:
        query = Query(user_id=user, as_of=NOW)
        return self.users.begin(self.generations[generation], query, self.users.find(query)).result(until)

    def slow(self) -> None:
        self.service.put("/delay", params={"ms": 300})

    def close(self) -> None:
        self.crosses.close()
        self.runtime.close()


@pytest.fixture
def remote(own_host: Callable[..., Host], service: httpx.Client) -> Iterator[Callable[..., Remote]]:
    made = []

    def make(**changes: Any) -> Remote:
        made.append(Remote(own_host(history_length=LENGTH), service, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def whole(one: Remote, user: str = "u", generation: int = 0) -> UserSide:
    """The side with crosses of this host's histories, made in one call."""
    return infer(one.generations[generation], one.users.stored(user, NOW))


def test_crosses_of_both_sources_are_the_same(remote: Callable[..., Remote]) -> None:
    one = remote()
    for generation in (0, 1):
        side, wanted = one.ask(generation=generation), whole(one, generation=generation)
        assert side.degraded == ()
        assert len(side.block.cross_slots) > 5
        for name in ("P", "C", "D", "G", "cross_slots", "window"):
            np.testing.assert_array_equal(getattr(side.block, name), getattr(wanted.block, name))
        np.testing.assert_array_equal(side.tables.G, wanted.tables.G)
        np.testing.assert_array_equal(side.tables.cross_slots, wanted.tables.cross_slots)
    stranger = one.ask("nobody")
    np.testing.assert_array_equal(stranger.block.G, whole(one, "nobody").block.G)
    assert stranger.degraded == ()


def test_crosses_are_those_of_the_feature_service_alone(remote: Callable[..., Remote]) -> None:
    """This host knows of one behaviour of v, the service of fifty."""
    one = remote()
    side = one.ask("v")
    np.testing.assert_array_equal(side.block.G, _crosses_of_all(one))
    assert side.used == 1


def _crosses_of_all(one: Remote) -> np.ndarray:
    source = one.users.stored("u", NOW)
    return infer(one.generations[0], UserSource(**{**vars(source), "profile": None})).block.G


def test_who_cannot_wait_is_served_without_and_the_next_one_with(remote: Callable[..., Remote]) -> None:
    one = remote()
    one.slow()
    early = one.ask(until=0.0)
    assert early.degraded == (MISSING,)
    assert early.block.G.shape == (1, 64)
    np.testing.assert_array_equal(early.block.G[0], whole(one).block.G[0])
    np.testing.assert_array_equal(early.block.D, whole(one).block.D)
    wait_until(lambda: one.crosses.kept.nbytes > 0, "the fetch has gone on")
    late = one.ask(until=0.0)
    assert (late.degraded, late.origin) == ((), "cached")
    np.testing.assert_array_equal(late.block.G, whole(one).block.G)
    side = one.crosses.kept.start(("u", "g1", NOW), None, lambda: pytest.fail("is there"))[0].result()
    assert one.crosses.kept.nbytes == side.nbytes


def test_fetches_have_places_and_who_finds_none_does_not_wait(
    remote: Callable[..., Remote], service: httpx.Client
) -> None:
    one = remote(cross_misses=2)
    one.slow()
    asked = service.get("/asked").json()
    began = [one.users.begin(one.generations[0], query, one.users.find(query)) for query in _queries(8)]
    waits = [one.crosses is not None and one.crosses.future is not None for one in began]
    assert waits == [True, True] + [False] * 6
    sides = [each.result() for each in began]
    assert [side.degraded for side in sides] == [()] * 2 + [(MISSING,)] * 6
    assert service.get("/asked").json() == asked + 2
    wait_until(lambda: one.crosses._admission._free._value == 2, "the places are free again")
    assert one.ask("v").degraded == ()


def _queries(count: int) -> list[Query]:
    return [Query(user_id=f"n{at}", as_of=NOW) for at in range(count)]


def test_a_service_that_fails_costs_crosses_until_it_answers_again(
    remote: Callable[..., Remote], service: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    one = remote()
    service.put("/fail", params={"status": 503})
    assert [one.ask().degraded for _ in range(3)] == [(MISSING,)] * 3
    service.put("/fail", params={"status": 0})
    wait_until(lambda: one.ask().degraded == (), "the crosses are back")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "crosses cannot be fetched"
    ]


def test_old_crosses_serve_while_they_cannot_be_fetched_and_say_so(
    remote: Callable[..., Remote], service: httpx.Client
) -> None:
    one = remote(cross_ttl_s=0.5)
    one.ask()
    service.put("/fail", params={"status": 500})
    wait_until(lambda: one.ask().degraded == (OLD,), "they are old")
    wait_until(lambda: one.ask().degraded == (MISSING,), "they are gone")
    service.put("/fail", params={"status": 0})
    wait_until(lambda: one.ask().degraded == (), "they are back")


def test_crosses_have_a_limit_in_bytes(remote: Callable[..., Remote]) -> None:
    one = remote(cross_bytes=60_000)
    for query in _queries(100):
        one.ask(str(query.user_id))
        one.ask("u")
    wait_until(lambda: one.crosses.kept.nbytes <= 60_000, "they fit")
    assert 10 < len(one.crosses.kept) < 60
    assert "u" in {key[0] for key in one.crosses.kept.hottest(1)}
    assert one.ask("u").block.G.nbytes <= (512 + 1) * 64 * 4


def test_crosses_of_another_generation_are_refused(remote: Callable[..., Remote]) -> None:
    one = remote()
    wanted = one.crosses.begin(one.generations[1], ("u", "g2", NOW), NOW).result(None)[0]
    with pytest.raises(ValueError, match="generation g2 met a block of generation g1"):
        one.ask().with_crosses(wanted, (), 0.0)


def test_users_have_places_and_who_finds_none_is_told(remote: Callable[..., Remote]) -> None:
    """Who asks for one that is being inferred already needs no place."""
    one, go = remote(user_misses=1), threading.Event()
    one.lanes.submit(Step.FIND, 1, lambda: go.wait(30))
    first, query = threading.Thread(target=one.ask), Query(user_id="v", as_of=NOW)
    first.start()
    wait_until(lambda: len(one.users.blocks) == 1, "it has the place")
    try:
        for act in (lambda: one.ask("v"), lambda: one.users.prefetch(one.generations[0], "v", NOW)):
            with pytest.raises(ProblemError) as caught:
                act()
            response = caught.value.response()
            assert (response.status_code, caught.value.body.type) == (503, "urn:forerank:problem:overloaded")
            assert response.headers["retry-after"] == "1"
        joined = one.users.begin(
            one.generations[0], Query(user_id="u", as_of=NOW), one.users.find(Query(user_id="u", as_of=NOW))
        )
        assert joined.found == "joined"
    finally:
        go.set()
        first.join()
    wait_until(lambda: one.users._admission._free._value == 1, "the place is free again")
    assert one.users.begin(one.generations[0], query, one.users.find(query)).result().degraded == ()


def test_a_new_generation_has_the_crosses_of_the_hottest(remote: Callable[..., Remote]) -> None:
    one = remote()
    for user in "uuuvv":
        one.ask(user)
    one.users.warm(one.generations[1], 2)
    one.slow()
    assert [one.ask(user, 1, until=0.0).degraded for user in "uv"] == [(), ()]
    one.users.forget()
    assert (len(one.users.blocks), len(one.crosses.kept)) == (0, 0)
    assert one.ask(until=0.0).degraded == (MISSING,)
