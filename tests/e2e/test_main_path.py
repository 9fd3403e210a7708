"""Events in, HTTP scores out, through the whole running stack, held against the training form's forward pass.

The tests of this module follow one stack through its life, in order: no model, first model, changes, second model.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from encoders.bundle import Bundle, seeded_bundle
from encoders.fold import Behaviours, ItemFold, reference_scores
from streams.events import partition_of
from tests.e2e.conftest import HISTORY_LENGTH, Running

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NOW = 1_780_000_000_000
HOUR = 3_600_000
FP32, FP16 = 1e-5, 5e-3  # the bounds of the served score; fp16 against histories in fp32


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "first": seeded_bundle(folder / "first", seed=1, precision="fp32"),
        "second": seeded_bundle(folder / "second", seed=2, precision="fp16"),
    }


class World:
    """What was published, and so what a score must be."""

    def __init__(self) -> None:
        random = np.random.default_rng(5)
        self.items: dict[str, dict[str, Any]] = {}
        for at in range(150):
            item_id = f"thing {at}/ü" if at % 3 == 0 else str(at)
            self.items[item_id] = self.item(item_id, 2, random)
        ids = list(self.items)
        self.behaviours: dict[str, list[tuple[str, str, int]]] = {
            "one": [(ids[5], "click", NOW - HOUR)],
            "some": [(ids[int(random.integers(150))], "view", NOW - (50 - at) * HOUR) for at in range(30)],
            "many": [(ids[int(random.integers(150))], "click", NOW - (300 - at) * HOUR) for at in range(250)],
            "gone": [("never there", "click", NOW - 3 * HOUR), ("999", "click", NOW - 2 * HOUR)],
        }
        self.profiles: dict[str, dict[str, Any]] = {
            "none": {"segment": "s1", "age": 20},
            "one": {"segment": "s2"},
            "many": {"segment": "s3", "age": 61},
        }

    @staticmethod
    def item(item_id: str, version: int, random: np.random.Generator) -> dict[str, Any]:
        return {
            "item_id": item_id,
            "version": version,
            "event_time": "2026-01-31T12:00:00Z",
            "crosses": [f"category:{random.integers(32)}", f"brand:{random.integers(300)}"][: int(random.integers(3))],
            "features": {
                "category": f"c{random.integers(9)}",
                "price": float(random.uniform(1, 99)),
                "words": ["a", "b"],
            },
            "embedding": random.standard_normal(128).round(4).tolist(),
            "attributes": {"bid": float(random.uniform(0, 3)), "in_stock": True, "title": f"the {item_id}"},
        }

    def behaviour_events(self) -> list[dict[str, Any]]:
        return [
            {"event_id": f"{user}-{at}", "user_id": user, "item_id": item, "action": action, "event_time": _iso(when)}
            for user, own in self.behaviours.items()
            for at, (item, action, when) in enumerate(own)
        ]

    def reference(self, bundle: Bundle, user: str, ids: list[str], as_of: int) -> np.ndarray:
        """The training form's scores: the newest L behaviours, those not after `as_of`, those whose items are there."""
        newest = sorted(self.behaviours.get(user, []), key=lambda one: one[2])[-HISTORY_LENGTH:]
        there = [one for one in newest if one[2] <= as_of and one[0] in self.items]
        rows = ItemFold(bundle).encode([_Item(self.items[item]) for item, _, _ in there])
        behaviours = Behaviours(
            rows.vector,
            rows.signature,
            rows.crosses,
            bundle.manifest.features.action_codes([action for _, action, _ in there]),
            np.array([when for _, _, when in there], np.int64),
        )
        items = [_Item(self.items[one]) for one in ids]
        return reference_scores(bundle, self.profiles.get(user), behaviours, items, as_of)


class _Item:
    """An item event as ItemFold takes it."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.features, self.crosses, self.attributes = event["features"], event["crosses"], event["attributes"]
        self.embedding = event["embedding"]


def _iso(ms: int) -> str:
    return np.datetime64(ms, "ms").item().isoformat(timespec="milliseconds") + "Z"


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def publish(client: httpx.Client, kind: str, events: Any, lines: bool = False) -> None:
    if lines:
        body = b"\n".join(msgspec.json.encode(event) for event in events)
        response = client.post(f"/v1/events/{kind}", content=body, headers={"content-type": "application/x-ndjson"})
    else:
        response = client.post(f"/v1/events/{kind}", json=events)
    assert response.status_code == 202, response.text
    assert response.json()["accepted"] == (len(events) if isinstance(events, list) else 1)


def score(client: httpx.Client, user: str, ids: list[str], as_of: int = NOW) -> dict[str, Any]:
    body = {"user_id": user, "candidates": ids, "as_of": as_of, "include": ["trace"]}
    response = client.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def stage(client: httpx.Client, bundle: Bundle, folder: Path, generation: str) -> None:
    event = {
        "action": "stage",
        "generation": generation,
        "uri": folder.as_uri(),
        "sha256": bundle.sha256,
        "activate_when_complete": True,
    }
    publish(client, "models", event)


def test_no_model_yet(running: Running, client: httpx.Client) -> None:
    for response in (
        client.get("/readyz"),
        client.post("/v1/score", json={"user_id": "u", "candidates": [1]}),
        client.post("/v1/recommend", json={"user_id": "u"}),
    ):
        assert response.status_code == 503
        assert "no model event" in response.json()["detail"]


def test_one_event_carries_a_model_to_serving(
    running: Running, client: httpx.Client, world: World, bundles: dict[str, Bundle], tmp_path_factory: Any
) -> None:
    publish(client, "items", list(world.items.values()), lines=True)
    publish(client, "users", [{"user_id": user, "features": features} for user, features in world.profiles.items()])
    events = world.behaviour_events()
    publish(client, "behaviours", events)
    publish(client, "behaviours", events[:50])  # the same again changes nothing
    folder = tmp_path_factory.getbasetemp()
    path = next(iter(folder.glob("bundles*/first")))
    stage(client, bundles["first"], path, "g1")
    said = set()

    def ready() -> bool:
        response = client.get("/readyz")
        if response.status_code == 503:
            said.add(response.json()["detail"])
        return response.is_success

    running.wait_for(ready, "the first generation is served", 120.0)
    assert any("g1" in reason for reason in said), said
    for user in world.behaviours:
        wanted = min(len(world.behaviours[user]), HISTORY_LENGTH)

        def complete(user: str = user, wanted: int = wanted) -> bool:
            history = score(client, user, ["1"])["trace"]["history"]
            return bool(history["used"] + history["missing"] == wanted)

        running.wait_for(complete, f"the history of {user} is complete")


@pytest.mark.parametrize("as_of", [NOW, NOW - 20 * HOUR, NOW - 1_000 * HOUR])
@pytest.mark.parametrize("user", ["nobody", "none", "one", "some", "many", "gone"])
def test_the_score_is_the_training_forms(
    client: httpx.Client, world: World, bundles: dict[str, Bundle], user: str, as_of: int
) -> None:
    ids = list(world.items)
    found = score(client, user, ids, as_of)
    assert found["generation"] == "g1"
    assert found["ids"] == ids
    np.testing.assert_allclose(found["scores"], world.reference(bundles["first"], user, ids, as_of), rtol=0, atol=FP32)
    assert found["trace"]["as_of"] == as_of
    assert found["trace"]["versions"] == [2] * len(ids)
    history = found["trace"]["history"]
    newest = sorted(world.behaviours.get(user, []), key=lambda one: one[2])[-HISTORY_LENGTH:]
    assert history["used"] + history["missing"] == sum(when <= as_of for _, _, when in newest)
    assert found["user"]["cold"] is (user == "nobody" or (user in ("some", "gone") and history["used"] == 0))
    if user == "gone" and as_of == NOW:
        assert (history["used"], history["missing"]) == (0, 2)


def test_recommendations_come_from_the_catalogue(
    client: httpx.Client, world: World, bundles: dict[str, Bundle]
) -> None:
    for user in ("nobody", "many"):
        body = {"user_id": user, "as_of": NOW, "k": 20, "include": ["attributes", "trace"]}
        found = client.post("/v1/recommend", json=body).json()
        wanted = world.reference(bundles["first"], user, found["ids"], NOW)
        np.testing.assert_allclose(found["scores"], wanted, rtol=0, atol=FP32)
        assert [one["title"] for one in found["attributes"]] == [f"the {item}" for item in found["ids"]]
        everything = world.reference(bundles["first"], user, list(world.items), NOW)
        np.testing.assert_allclose(found["scores"], np.sort(everything)[::-1][:20], rtol=0, atol=FP32)


def test_an_item_can_be_read_back_from_its_place_on_items(client: httpx.Client, world: World) -> None:
    for item in ("1", "thing 0/ü"):
        found = client.get(f"/v1/items/{item}", params={"include": "event"}).json()
        event = found["event"]
        assert (event["item_id"], event["version"]) == (item, found["version"]) == (item, 2)
        assert event["embedding"] == world.items[item]["embedding"]
        assert found["partition"] == partition_of(item.encode(), 3)


def test_updates_deletions_and_stale_versions(
    running: Running, client: httpx.Client, world: World, bundles: dict[str, Bundle]
) -> None:
    random = np.random.default_rng(8)
    newer, older = World.item("4", 7, random), World.item("4", 3, random)
    publish(client, "items", newer)
    assert client.get("/v1/items/4", params={"wait_for": 7, "timeout_ms": 10_000}).json()["version"] == 7
    assert score(client, "many", ["4"])["trace"]["versions"] == [7]
    world.items["4"] = newer
    publish(client, "items", [older, {"item_id": "8", "version": 5, "deleted": True}, World.item("8", 4, random)])
    assert client.get("/v1/items/8", params={"wait_for": 5, "deleted": 1, "timeout_ms": 10_000}).status_code == 204
    assert score(client, "many", ["8"])["missing"] == ["8"]
    del world.items["8"]
    mark = World.item("mark", 1, random)
    publish(client, "items", mark | {"item_id": _same_partition("4")})
    running.wait_for(lambda: score(client, "one", [_same_partition("4")])["missing"] == [], "what came later is served")
    assert score(client, "many", ["4"])["trace"]["versions"] == [7]
    assert score(client, "many", ["8"])["missing"] == ["8"]
    ids = list(world.items)
    for user in ("one", "some", "many"):  # some of their behaviours are of changed and deleted items
        found = score(client, user, ids)
        np.testing.assert_allclose(
            found["scores"], world.reference(bundles["first"], user, ids, NOW), rtol=0, atol=FP32
        )


def _same_partition(item_id: str) -> str:
    wanted = partition_of(item_id.encode(), 3)
    return next(name for name in (f"mark-{at}" for at in range(99)) if partition_of(name.encode(), 3) == wanted)


def test_bad_events_are_dead_letters_and_the_rest_goes_on(running: Running, client: httpx.Client, world: World) -> None:
    random = np.random.default_rng(9)
    good = World.item("4", 8, random)
    body = msgspec.json.encode(World.item("4", 99, random))
    own = partition_of(b"4", 3)
    running.send_raw("item-updates", b"4", b'{"item_id": "4", "version"', own)
    running.send_raw("item-updates", b"5", body, partition_of(b"5", 3))
    running.send_raw("item-updates", b"4", body, (own + 1) % 3)
    unfit = World.item("4", 9, random) | {"embedding": [1.0, 2.0]}
    publish(client, "items", good)
    running.wait_for(lambda: score(client, "many", ["4"])["trace"]["versions"] == [8], "the good one is served")
    letters = running.records("item-updates.dlq", 3)
    headers = [dict(letter.headers) for letter in letters]
    assert sorted(one["error_type"] for one in headers) == [b"key_mismatch", b"malformed", b"wrong_partition"]
    wrong = next(one for one in headers if one["error_type"] == b"wrong_partition")
    assert b"murmur2_random" in wrong["message"]
    assert wrong["source_topic"] == running.settings.topic("item-updates").encode()
    assert {letter.value for letter in letters} == {b'{"item_id": "4", "version"', body}

    publish(client, "items", unfit)  # valid as an event, but not for this bundle: its older row goes
    running.wait_for(lambda: score(client, "many", ["4"])["missing"] == ["4"], "the row of the unfit item is gone")
    (letter,) = running.records("items.dlq", 1)
    assert dict(letter.headers)["error_type"] == b"not_encodable"
    assert letter.key == b"4"
    del world.items["4"]

    running.send_raw("behaviours", b"one", b"[]", partition_of(b"one", 3))
    running.send_raw("users", b"one", b"null", partition_of(b"one", 3))
    assert dict(running.records("behaviours.dlq", 1)[0].headers)["error_type"] == b"malformed"
    assert dict(running.records("users.dlq", 1)[0].headers)["error_type"] == b"malformed"


def test_behaviours_are_served_as_they_arrive(
    running: Running, client: httpx.Client, world: World, bundles: dict[str, Bundle]
) -> None:
    event = {"event_id": "late", "user_id": "one", "item_id": "7", "action": "view", "event_time": _iso(NOW - 5)}
    publish(client, "behaviours", event)
    world.behaviours["one"].append(("7", "view", NOW - 5))
    running.wait_for(lambda: score(client, "one", ["1"])["trace"]["history"]["used"] == 2, "the behaviour is served")
    ids = list(world.items)
    wanted = world.reference(bundles["first"], "one", ids, NOW)
    np.testing.assert_allclose(score(client, "one", ids)["scores"], wanted, rtol=0, atol=FP32)
    publish(client, "users", {"user_id": "one", "erased_at": _iso(int(time.time() * 1_000))})
    running.wait_for(lambda: score(client, "one", ["1"])["user"]["cold"], "the user is forgotten")
    del world.profiles["one"]
    world.behaviours["one"] = []


def test_a_second_model_event_swaps_under_load(
    running: Running, client: httpx.Client, world: World, bundles: dict[str, Bundle], tmp_path_factory: Any
) -> None:
    ids, stop = list(world.items), threading.Event()
    wanted = {name: world.reference(bundle, "many", ids, NOW) for name, bundle in bundles.items()}
    named = {"g1": ("first", FP32), "g2": ("second", FP16)}
    answers, failures = dict.fromkeys(named, 0), []

    def ask(path: str) -> None:
        with httpx.Client(base_url=running.url, timeout=30.0) as own:
            while not stop.is_set():
                body: dict[str, Any] = {"user_id": "many", "as_of": NOW, "candidates": ids}
                answer = own.post(path, json=body if path == "/v1/score" else {"user_id": "many"})
                if not answer.is_success:
                    failures.append(answer.text)
                    return
                found = answer.json()
                bundle, bound = named[found["generation"]]
                if path == "/v1/score" and np.abs(np.array(found["scores"]) - wanted[bundle]).max() > bound:
                    failures.append(f"not the scores of {found['generation']}")
                    return
                answers[found["generation"]] += 1

    askers = [threading.Thread(target=ask, args=(path,)) for path in ("/v1/score", "/v1/score", "/v1/recommend")]
    for one in askers:
        one.start()
    try:
        stage(client, bundles["second"], next(iter(tmp_path_factory.getbasetemp().glob("bundles*/second"))), "g2")
        running.wait_for(lambda: answers["g2"] > 20 or bool(failures), "the second generation is served", 120.0)
    finally:
        stop.set()
        for one in askers:
            one.join()
    assert failures == []
    assert answers["g1"] > 10
    states = {one["name"]: one["state"] for one in client.get("/v1/generations").json()["generations"]}
    assert states == {"g1": "former", "g2": "active"}


@pytest.mark.parametrize("user", ["nobody", "none", "one", "some", "many", "gone"])
def test_half_precision_rows_stay_within_the_stated_bound(
    client: httpx.Client, world: World, bundles: dict[str, Bundle], user: str
) -> None:
    ids = list(world.items)
    found = score(client, user, ids)
    assert found["generation"] == "g2"
    wanted = world.reference(bundles["second"], user, ids, NOW)
    np.testing.assert_allclose(found["scores"], wanted, rtol=0, atol=FP16)
    assert np.abs(wanted - world.reference(bundles["first"], user, ids, NOW)).max() > 10 * FP16


def test_what_was_stale_or_deleted_stays_so_in_a_later_fill(client: httpx.Client) -> None:
    assert score(client, "many", ["8", "4"])["missing"] == ["8", "4"]


def test_nothing_went_wrong_in_silence(running: Running) -> None:
    assert "Traceback" not in running.log()
