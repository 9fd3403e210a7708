"""POST /v1/score against a real process: parity with the training form, order, filters, odd sizes, both forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from api import schemas
from tests.api.conftest import USERS, behaviours_of
from tests.host import HOUR, NOW, CatalogueItem, Host, Seen, catalogue

ITEMS = catalogue(200)
IDS = [item.item_id for item in ITEMS]
BY_ID = {item.item_id: item for item in ITEMS}
ALL = behaviours_of(ITEMS)


def past_of(user: str) -> list[Seen]:
    return [one for one in ALL if one.user_id == user]


def score(host: Host, **body: Any) -> dict[str, Any]:
    response = host.client.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    msgspec.json.decode(response.content, type=schemas.Ranked, strict=True)  # the documented form
    found: dict[str, Any] = response.json()
    return found


def place(item_id: str) -> tuple[bool, int, bytes]:
    """Order of ids: numbers by value, then all others by their UTF-8."""
    numeric = item_id.isascii() and item_id.isdigit() and str(int(item_id)) == item_id and int(item_id) < 2**64
    return (False, int(item_id), b"") if numeric else (True, 0, item_id.encode())


@pytest.mark.parametrize("user", ["anna", "7", "lonely", "ghost", "nobody"])
@pytest.mark.parametrize("as_of", [NOW, NOW - 100 * HOUR, NOW - 1000 * HOUR])
def test_scores_are_those_of_the_training_form(host: Host, user: str, as_of: int) -> None:
    found = score(host, user_id=user, candidates=IDS, as_of=as_of, include=["trace"])
    wanted = host.reference("g1", past_of(user), USERS.get(user), IDS, as_of)
    assert found["ids"] == IDS
    np.testing.assert_allclose(found["scores"], wanted, rtol=0, atol=1e-5)
    seen = [one for one in past_of(user) if one.time <= as_of]
    used = sum(one.item_id in BY_ID for one in seen)
    assert found["generation"] == "g1"
    assert found["as_of"] == found["trace"]["as_of"] == as_of
    assert found["trace"]["history"]["used"] == used == found["user"]["behaviours_used"]
    assert found["trace"]["history"]["missing"] == len(seen) - used == found["user"]["behaviours_without_row"]
    assert found["trace"]["versions"] == [1] * len(IDS)
    assert found["user"]["profile"] is (user in USERS)
    assert found["user"]["cold"] is (user not in USERS and used == 0)
    assert found["degraded"] == []


def test_scores_differ_between_users_and_moments(host: Host) -> None:
    """Guards the test above: an API that ignores the user would need an oracle that does."""
    anna, lonely, cold = (
        np.array(score(host, user_id=user, candidates=IDS, as_of=NOW)["scores"]) for user in ("anna", "lonely", "x")
    )
    earlier = np.array(score(host, user_id="anna", candidates=IDS, as_of=NOW - 200 * HOUR)["scores"])
    for other in (lonely, cold, earlier):
        assert np.abs(anna - other).max() > 1e-3


def test_an_inline_user_scores_like_a_stored_one(host: Host) -> None:
    behaviours = [{"item_id": one.item_id, "action": one.action, "event_time": one.time} for one in past_of("anna")]
    inline = {"features": USERS["anna"], "behaviours": list(reversed(behaviours))}
    stored = score(host, user_id="anna", candidates=IDS, as_of=NOW)
    sent = score(host, user=inline, candidates=IDS, as_of=NOW)
    np.testing.assert_allclose(sent["scores"], stored["scores"], rtol=0, atol=1e-6)
    assert sent["user"] == {**stored["user"], "source": "inline"}


def test_a_user_of_whom_nothing_is_known_is_cold_however_said(host: Host) -> None:
    unknown = score(host, user_id="nobody", candidates=IDS, as_of=NOW)
    empty = score(host, user={"features": {}, "behaviours": []}, candidates=IDS, as_of=NOW)
    assert unknown["user"]["cold"]
    assert empty["user"] == {**unknown["user"], "source": "inline"}
    assert empty["scores"] == unknown["scores"]


def test_times_may_be_rfc_3339(host: Host) -> None:
    text = np.datetime64(NOW, "ms").item().isoformat() + "Z"
    as_text, as_number = (score(host, user_id="anna", candidates=IDS, as_of=at) for at in (text, NOW))
    assert as_text["as_of"] == NOW
    assert as_text["scores"] == as_number["scores"]


def test_every_stage_is_timed(host: Host) -> None:
    stages = score(host, user_id="anna", candidates=IDS)["stages_ms"]
    assert set(stages) == {"user", "retrieval", "gather", "score", "top_k", "total"}
    assert all(0 <= took <= stages["total"] + 0.01 for took in stages.values())


# ---- sizes


def test_no_candidates(host: Host) -> None:
    found = score(host, user_id="anna", candidates=[], k=5, include=["trace", "attributes"])
    assert (found["ids"], found["scores"], found["missing"], found["candidates"]) == ([], [], [], 0)


def test_one_candidate(host: Host) -> None:
    assert score(host, user_id="anna", candidates=[IDS[0]])["ids"] == [IDS[0]]


def test_all_missing(host: Host) -> None:
    unknown = ["no", 5_000, "sku", "", "-1", "007", 2**63, "x" * 500]
    found = score(host, user_id="anna", candidates=unknown, k=3)
    assert (found["ids"], found["missing"]) == ([], unknown)


def test_an_integer_beyond_64_bits_is_missing(host: Host) -> None:
    found = score(host, user_id="anna", candidates=[10**40, 2**64 - 1, -(10**30)])
    assert found["missing"] == [10**40, 2**64 - 1, -(10**30)]


def test_missing_ones_are_named_and_the_rest_is_scored(host: Host) -> None:
    mixed = [IDS[3], "no", IDS[1], 77_777, IDS[2]]
    found = score(host, user_id="anna", candidates=mixed, as_of=NOW)
    assert found["ids"] == [IDS[3], IDS[1], IDS[2]]
    assert found["missing"] == ["no", 77_777]
    wanted = host.reference("g1", past_of("anna"), USERS["anna"], found["ids"], NOW)
    np.testing.assert_allclose(found["scores"], wanted, rtol=0, atol=1e-5)


def test_duplicates_are_scored_at_each_place(host: Host) -> None:
    found = score(host, user_id="anna", candidates=["1", "2", 1, "1"], as_of=NOW)
    assert found["ids"] == ["1", "2", 1, "1"]
    assert found["scores"][0] == found["scores"][2] == found["scores"][3]
    ranked = score(host, user_id="anna", candidates=["1", "2", 1, "1"], as_of=NOW, k=4)
    assert [str(one) for one in ranked["ids"]] in (["1", "1", "1", "2"], ["2", "1", "1", "1"])
    assert [one for one in ranked["ids"] if one != "2"] == ["1", 1, "1"]  # equal ids in the request's order


def test_integers_and_their_decimals_are_the_same_item(host: Host) -> None:
    numeric = [one for one in IDS if one.isdigit()]
    as_text = score(host, user_id="anna", candidates=numeric, as_of=NOW)
    as_numbers = score(host, user_id="anna", candidates=[int(one) for one in numeric], as_of=NOW)
    assert as_text["scores"] == as_numbers["scores"]
    assert as_numbers["ids"] == [int(one) for one in numeric]


def test_as_many_as_allowed_and_one_more(host: Host) -> None:
    most = host.settings.candidates_max
    assert score(host, user_id="anna", candidates=list(range(most)))["candidates"] == most
    response = host.client.post("/v1/score", json={"user_id": "anna", "candidates": list(range(most + 1))})
    assert (response.status_code, response.json()["field"]) == (422, "candidates")
    assert str(most) in response.json()["detail"]


# ---- order and filters


@pytest.mark.parametrize("k", [1, 7, 200, 1_000])
def test_top_k_is_the_sorted_head(host: Host, k: int) -> None:
    everything = score(host, user_id="anna", candidates=IDS, as_of=NOW)
    scores = dict(zip(everything["ids"], everything["scores"], strict=True))
    wanted = sorted(IDS, key=lambda one: (-scores[one], place(one)))[:k]
    found = score(host, user_id="anna", candidates=IDS, as_of=NOW, k=k, include=["trace"])
    assert found["ids"] == wanted
    assert found["scores"] == [scores[one] for one in wanted]
    assert len(found["trace"]["versions"]) == len(wanted)


def test_score_times_an_attribute(host: Host) -> None:
    everything = score(host, user_id="anna", candidates=IDS, as_of=NOW)
    scores = dict(zip(everything["ids"], everything["scores"], strict=True))

    def value(item: CatalogueItem) -> float:
        bid = item.attributes.get("bid")
        return -math.inf if bid is None else np.float32(bid) / (1 + math.exp(-scores[item.item_id]))

    wanted = sorted(ITEMS, key=lambda item: (-value(item), place(item.item_id)))
    found = score(host, user_id="anna", candidates=IDS, as_of=NOW, k=200, order="score*bid")
    without = sum("bid" not in item.attributes for item in ITEMS)
    assert found["ids"][: 200 - without] == [item.item_id for item in wanted][: 200 - without]
    assert found["ids"][200 - without :] == [item.item_id for item in wanted][200 - without :]
    assert found["scores"] == [scores[one] for one in found["ids"]]  # the scores stay the logits


@pytest.mark.parametrize(
    ("filters", "keep"),
    [
        ({"in_stock": {"eq": 1}}, lambda a: a["in_stock"]),
        ({"in_stock": {"eq": True}}, lambda a: a["in_stock"]),
        ({"in_stock": {"ne": 1}}, lambda a: not a["in_stock"]),
        ({"bid": {"lte": 1.5}}, lambda a: a.get("bid", 9) <= 1.5),
        ({"bid": {"gt": 0.5, "lt": 2}}, lambda a: 0.5 < a.get("bid", 9) < 2),
        ({"bid": {"gte": 0.1}, "in_stock": {"eq": 0}}, lambda a: "bid" in a and not a["in_stock"]),
        ({"bid": {"lt": -1}}, lambda a: False),
    ],
)
def test_filters(host: Host, filters: dict[str, Any], keep: Any) -> None:
    found = score(host, user_id="anna", candidates=[*IDS, "no"], filters=filters, include=["trace"])
    wanted = [item.item_id for item in ITEMS if keep(item.attributes)]
    assert found["ids"] == wanted
    assert found["missing"] == ["no"]  # missing is not filtered
    assert found["filtered"] == len(IDS) - len(wanted)
    assert len(found["trace"]["versions"]) == len(wanted)


def test_a_bound_is_compared_as_rows_store_it(host: Host) -> None:
    bids = [item.attributes["bid"] for item in ITEMS if "bid" in item.attributes]
    found = score(host, user_id="anna", candidates=IDS, filters={"bid": {"eq": bids[0]}})
    assert len(found["ids"]) == bids.count(bids[0])


def test_attributes_come_along(host: Host) -> None:
    found = score(host, user_id="anna", candidates=IDS, k=5, include=["attributes"])
    assert found["attributes"] == [BY_ID[one].attributes for one in found["ids"]]


# ---- binary


def binary(host: Host, ids: Sequence[int], **parameters: Any) -> Any:
    response = host.client.post(
        "/v1/score",
        params=parameters,
        content=np.array(ids, "<u8").tobytes(),
        headers={"content-type": "application/octet-stream"},
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    return response


def test_binary_scores_equal_json_scores(host: Host) -> None:
    ids = [*(int(one) for one in IDS if one.isdigit()), 2**64 - 1]
    response = binary(host, ids, user_id="anna", as_of=NOW)
    wanted = score(host, user_id="anna", candidates=ids, as_of=NOW)
    scores = np.frombuffer(response.content, "<f4")
    assert len(scores) == len(ids)
    assert scores[:-1].tolist() == np.array(wanted["scores"], np.float32).tolist()
    assert np.isnan(scores[-1])
    assert response.headers["forerank-missing"] == "1"
    assert response.headers["forerank-generation"] == "g1"
    assert response.headers["forerank-as-of"] == str(NOW)
    assert "total;dur=" in response.headers["server-timing"]


def test_binary_top_k_names_ids_and_missing(host: Host) -> None:
    ids = [*(int(one) for one in IDS if one.isdigit()), 2**64 - 1, 123_456]
    response = binary(host, ids, user_id="anna", as_of=NOW, k=7, order="score*bid", filters='{"in_stock":{"eq":1}}')
    wanted = score(
        host, user_id="anna", candidates=ids, as_of=NOW, k=7, order="score*bid", filters={"in_stock": {"eq": 1}}
    )
    count, missing = int(response.headers["forerank-count"]), int(response.headers["forerank-missing"])
    assert (count, missing) == (7, 2)
    assert len(response.content) == 8 * count + 8 * missing + 4 * count
    assert np.frombuffer(response.content, "<u8", count).tolist() == wanted["ids"]
    assert np.frombuffer(response.content, "<u8", missing, 8 * count).tolist() == wanted["missing"]
    scores = np.frombuffer(response.content, "<f4", count, 8 * (count + missing))
    assert scores.tolist() == np.array(wanted["scores"], np.float32).tolist()
    assert response.headers["forerank-filtered"] == str(wanted["filtered"])


def test_binary_of_nothing(host: Host) -> None:
    assert binary(host, [], user_id="anna").content == b""
    assert binary(host, [], user_id="nobody", k=3).content == b""
