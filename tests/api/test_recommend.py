"""POST /v1/recommend, /v1/explain, /v1/items, /v1/generations, prefetch and the pages, against a real process."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from api import schemas
from encoders.config import ModelConfig
from tests.api.conftest import USERS, behaviours_of
from tests.host import HOUR, NOW, Host, Seen, catalogue

ITEMS = catalogue(200)
IDS = {item.item_id for item in ITEMS}
ALL = behaviours_of(ITEMS)


def checked(response: Any, kind: Any, status: int = 200) -> dict[str, Any]:
    assert response.status_code == status, response.text
    msgspec.json.decode(response.content, type=kind, strict=True)
    found: dict[str, Any] = response.json()
    return found


def recommend(host: Host, **body: Any) -> dict[str, Any]:
    return checked(host.client.post("/v1/recommend", json=body), schemas.Ranked)


@pytest.mark.parametrize("user", ["anna", "7", "lonely", "ghost", "nobody"])
def test_what_is_retrieved_is_scored_like_any_candidate(host: Host, user: str) -> None:
    found = recommend(host, user_id=user, as_of=NOW, k=15, retrieve=80, include=["trace"])
    assert len(found["ids"]) == len(set(found["ids"])) == 15
    assert set(found["ids"]) <= IDS
    assert (found["candidates"], found["missing"], found["degraded"]) == (80, [], [])
    past = [one for one in ALL if one.user_id == user]
    wanted = host.reference("g1", past, USERS.get(user), found["ids"], NOW)
    np.testing.assert_allclose(found["scores"], wanted, rtol=0, atol=1e-5)
    assert found["scores"] == sorted(found["scores"], reverse=True)


def test_all_items_are_candidates_when_there_are_fewer(host: Host) -> None:
    found = recommend(host, user_id="anna", as_of=NOW, k=1_000, retrieve=1_000)
    assert set(found["ids"]) == IDS


def test_retrieval_follows_the_users_newest_behaviours(host: Host) -> None:
    """A user of one item meets it and its neighbours; what the vector says, not chance."""
    item = next(one for one in ITEMS if one.item_id == "7")
    user = {"behaviours": [{"item_id": item.item_id, "event_time": NOW - HOUR}]}
    found = recommend(host, user=user, as_of=NOW, k=40, retrieve=40)
    assert item.item_id in found["ids"]


def test_seen_items_can_be_left_out(host: Host) -> None:
    seen = {one.item_id for one in ALL if one.user_id == "anna"}
    found = recommend(host, user_id="anna", as_of=NOW, k=1_000, retrieve=1_000, exclude_seen=True)
    assert set(found["ids"]) == IDS - seen


def test_filters_and_order_hold_here_too(host: Host) -> None:
    found = recommend(
        host, user_id="anna", k=10, order="score*bid", filters={"in_stock": {"eq": 1}}, include=["attributes"]
    )
    assert all(attributes["in_stock"] and "bid" in attributes for attributes in found["attributes"])
    assert found["filtered"] > 0


# ---- prefetch


def prefetch(host: Host, user: str, **body: Any) -> dict[str, Any]:
    return checked(host.client.post(f"/v1/users/{user}/prefetch", json=body), schemas.Prefetching, 202)


def test_a_prefetched_user_is_used_and_scores_the_same(host: Host) -> None:
    body = {"user_id": "7", "candidates": sorted(IDS), "as_of": NOW - 7}
    assert prefetch(host, "7", as_of=NOW - 7)["state"] == "started"
    host.wait_for(lambda: prefetch(host, "7", as_of=NOW - 7)["state"] == "ready")
    found = checked(host.client.post("/v1/score", json=body), schemas.Ranked)
    assert found["user"]["source"] == "prefetched"
    past = [one for one in ALL if one.user_id == "7"]
    wanted = host.reference("g1", past, USERS["7"], sorted(IDS), NOW - 7)
    np.testing.assert_allclose(found["scores"], wanted, rtol=0, atol=1e-5)
    other_moment = checked(host.client.post("/v1/score", json=body | {"as_of": NOW - 8}), schemas.Ranked)
    assert other_moment["user"]["source"] == "store"


def test_a_block_is_shared_by_later_requests(host: Host) -> None:
    body = {"user_id": "anna", "candidates": sorted(IDS), "as_of": NOW - 9}
    first, second = (checked(host.client.post("/v1/score", json=body), schemas.Ranked) for _ in range(2))
    assert (first["user"]["source"], second["user"]["source"]) == ("store", "cached")
    assert (first["scores"], first["as_of"]) == (second["scores"], second["as_of"])
    assert second["stages_ms"]["user"] <= second["stages_ms"]["total"]
    assert prefetch(host, "anna", as_of=NOW - 9)["state"] == "ready"
    sent = {"behaviours": [{"item_id": "1", "event_time": NOW - HOUR}]}
    for _ in range(2):
        inline = {"user": sent, "candidates": ["1"], "as_of": NOW - 9}
        assert checked(host.client.post("/v1/score", json=inline), schemas.Ranked)["user"]["source"] == "inline"


def test_simultaneous_requests_for_a_cold_user_cost_one_inference(host: Host) -> None:
    def value(outcome: str) -> float:
        name = f'forerank_cache_lookups_total{{cache="blocks",outcome="{outcome}"}}'
        return sum(float(line.split()[-1]) for line in host.client.get("/metrics").text.splitlines() if name in line)

    before = {outcome: value(outcome) for outcome in ("miss", "hit", "joined")}
    body = {"user_id": "anna", "candidates": ["1", "2"], "as_of": NOW - 11}
    sources = []

    def ask() -> None:
        with httpx.Client(base_url=host.client.base_url, timeout=30.0) as own:
            for _ in range(32):
                sources.append(own.post("/v1/score", json=body).json()["user"]["source"])

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (len(sources), sources.count("store"), sources.count("cached")) == (1_024, 1, 1_023)
    found = {outcome: value(outcome) - before[outcome] for outcome in before}
    assert found["miss"] == 1
    assert found["hit"] + found["joined"] == 1_023


def test_prefetch_without_a_body(host: Host) -> None:
    response = host.client.post("/v1/users/lonely/prefetch")
    assert checked(response, schemas.Prefetching, 202)["generation"] == "g1"
    host.wait_for(lambda: prefetch(host, "lonely")["state"] == "ready")
    found = checked(host.client.post("/v1/score", json={"user_id": "lonely", "candidates": ["1"]}), schemas.Ranked)
    assert found["user"]["source"] == "prefetched"


def test_a_prefetched_user_who_is_erased_is_inferred_anew(own_host: Any) -> None:
    """Also one without a profile, whose position stays what it was."""
    host = own_host()
    host.bundle("g1")
    host.write("g1", ITEMS)
    past = [Seen("u", one, NOW - HOUR) for one in sorted(IDS)[:5]]
    host.behave(past)
    host.activate("g1")
    client = host.start()
    host.ready()
    body = {"user_id": "u", "candidates": sorted(IDS), "as_of": NOW, "include": ["trace"]}

    def ready() -> bool:
        return bool(client.post("/v1/users/u/prefetch", json={"as_of": NOW}).json()["state"] == "ready")

    host.wait_for(ready)
    before = client.post("/v1/score", json=body).json()
    assert before["user"]["source"] == "prefetched"
    host.erase("u")
    after = client.post("/v1/score", json=body).json()
    assert after["trace"]["history"] == before["trace"]["history"] | {"used": 0}
    assert (after["user"]["source"], after["user"]["behaviours_used"], after["user"]["cold"]) == ("store", 0, True)
    wanted = host.reference("g1", [], None, sorted(IDS), NOW)
    np.testing.assert_allclose(after["scores"], wanted, rtol=0, atol=1e-5)
    host.behave([Seen("u", "1", NOW - 1)])
    assert client.post("/v1/users/u/prefetch", json={"as_of": NOW}).json()["state"] == "started"


def test_a_prefetched_user_who_acts_is_inferred_anew(own_host: Any) -> None:
    host = own_host()
    host.bundle("g1")
    host.write("g1", ITEMS)
    first = [Seen("u", "1", NOW - HOUR)]
    host.behave(first, {"u": {"age": 30}})
    host.activate("g1")
    host.start()
    host.ready()
    body = {"user_id": "u", "candidates": ["1", "2"], "as_of": NOW}

    def score() -> dict[str, Any]:
        return checked(host.client.post("/v1/score", json=body), schemas.Ranked)

    prefetch(host, "u", as_of=NOW)
    host.wait_for(lambda: score()["user"]["source"] == "prefetched")
    second = Seen("u", "2", NOW - 1)
    host.behave([second])
    found = score()
    assert found["user"]["source"] == "store"
    np.testing.assert_allclose(
        found["scores"], host.reference("g1", [*first, second], {"age": 30}, ["1", "2"], NOW), rtol=0, atol=1e-5
    )
    assert score()["user"]["source"] == "cached"
    host.behave([], {"u": {"age": 77}})
    found = score()
    assert found["user"]["source"] == "store"
    np.testing.assert_allclose(
        found["scores"], host.reference("g1", [*first, second], {"age": 77}, ["1", "2"], NOW), rtol=0, atol=1e-5
    )


# ---- look-ups


@pytest.mark.parametrize("user", ["anna", "7", "lonely", "ghost", "nobody"])
@pytest.mark.parametrize("item", ["1", "sku-0-ß", "sku-33-ß"])
def test_the_shares_of_an_explanation_add_up_to_the_score(host: Host, user: str, item: str) -> None:
    found = checked(
        host.client.get("/v1/explain", params={"user_id": user, "item_id": item, "as_of": NOW}), schemas.Explanation
    )
    scored = checked(
        host.client.post("/v1/score", json={"user_id": user, "candidates": [item], "as_of": NOW}), schemas.Ranked
    )
    assert found["score"] == pytest.approx(scored["scores"][0], abs=1e-5)
    assert found["constant"] + sum(one["logit"] for one in found["contributions"]) == pytest.approx(
        found["score"], abs=1e-9
    )
    assert [one["block"] for one in found["contributions"]] == ["item", "user", "BEA", "DIN", "SimTier", "SIM"]
    for one in found["contributions"]:
        assert one["norm"] == pytest.approx(np.linalg.norm(one["z"]))
    assert sum(tier["count"] for tier in found["tiers"]) == found["user"]["behaviours_used"]
    newest = sum(tier["newest"] for tier in found["tiers"])
    assert newest == min(ModelConfig().short_window, found["user"]["behaviours_used"])
    assert (found["tiers"][0]["low"], found["tiers"][-1]["high"]) == (0, 128)
    assert found["crosses"] == next(one for one in ITEMS if one.item_id == item).crosses
    assert found["row_version"] == 1


def test_an_item_shows_its_row(host: Host) -> None:
    for at, item in enumerate(ITEMS[:5]):
        found = checked(host.client.get(f"/v1/items/{item.item_id}"), schemas.ItemRow)
        assert (found["item_id"], found["version"], found["partition"], found["offset"]) == (item.item_id, 1, 0, at)
        assert found["attributes"] == item.attributes
        assert found["publish_time"] <= found["visible_time"]
        assert found["update_to_visible_ms"] == found["visible_time"] - found["publish_time"]
        assert len(bytes.fromhex(found["signature"])) == 16


def test_items_are_read_by_many_threads(host: Host) -> None:
    wrong: list[str] = []

    def read(at: int) -> None:
        for _ in range(15):
            item = ITEMS[at]
            if host.client.get(f"/v1/items/{item.item_id}").json().get("attributes") != item.attributes:
                wrong.append(item.item_id)

    threads = [threading.Thread(target=read, args=(at,)) for at in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []


def test_generations_say_what_is_served(host: Host) -> None:
    found = checked(host.client.get("/v1/generations"), schemas.Generations)
    assert (found["active"], found["ready"], found["reason"]) == ("g1", True, "")
    (one,) = found["generations"]
    assert (one["name"], one["state"], one["loaded"], one["rows"]) == ("g1", "active", True, 200)
    assert (one["completeness"], one["retrieval_items"]) == (1.0, 200)
    assert one["arena_bytes"] > 200 * 192
    assert one["covered"] == [199, -1]


def test_health_and_readiness(host: Host) -> None:
    assert checked(host.client.get("/healthz"), schemas.Health)["status"] == "ok"
    assert checked(host.client.get("/readyz"), schemas.Health)["generation"] == "g1"


def test_metrics_count_what_was_asked(host: Host) -> None:
    def value(name: str) -> float:
        lines = [line for line in host.client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
        return float(lines[0].split()[-1])

    def score(*ids: str) -> None:
        assert host.client.post("/v1/score", json={"user_id": "anna", "candidates": ids}).is_success

    score("1")
    before = value('forerank_candidates_total{route="score"}')
    score("1", "2", "no")
    assert value('forerank_candidates_total{route="score"}') == before + 3
    assert value('forerank_stage_seconds_count{route="score",stage="total"}') >= 2

    def collected() -> bool:
        score("1")
        return value("forerank_gc_pause_seconds_count") > 0

    host.wait_for(collected)


# ---- pages


def test_the_document_describes_every_route(host: Host) -> None:
    document = host.client.get("/openapi.json").json()
    schemas_there = document["components"]["schemas"]
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            assert operation["summary"]
            answers = operation["responses"]
            ok = next(answers[code] for code in ("200", "202") if code in answers)
            if path != "/metrics":
                assert ok["content"]["application/json"]["schema"]["$ref"]
            if verb == "post":
                body = operation["requestBody"]["content"]["application/json"]
                assert body["schema"], path
                assert "example" in body
                assert {"415", "422", "503"} <= set(answers)
    text = host.client.get("/openapi.json").text
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(schemas_there)
    events = {f"/v1/events/{kind}" for kind in ("items", "behaviours", "users", "models")}
    ranking = {"/v1/score", "/v1/recommend", "/v1/users/{user_id}/prefetch"}
    looking = {"/v1/explain", "/v1/items/{item_id}", "/v1/generations", "/healthz", "/readyz", "/metrics"}
    actions = {f"/v1/generations/{{generation}}/{name}" for name in ("stage", "activate", "rollback", "retire")}
    assert set(document["paths"]) == events | ranking | looking | actions
    secured = {path for path, verbs in document["paths"].items() if any("security" in one for one in verbs.values())}
    assert secured == actions | {"/v1/events/models"}
    assert all("401" in document["paths"][path]["post"]["responses"] for path in secured)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_need_nothing_from_elsewhere(host: Host, path: str) -> None:
    page = host.client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    for outside in ("http://", "https://", "//cdn", "@import", 'src="'):
        assert outside not in page.text.replace("http://www.w3.org/2000/svg", "")
