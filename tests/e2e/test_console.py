"""The console in a real browser, on a real stack: it shows what is served, recommends, explains, changes an item."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from encoders.bundle import seeded_bundle
from tests.e2e.conftest import Running

pytestmark = [pytest.mark.e2e, pytest.mark.browser, pytest.mark.slow]

ITEMS = 40


@pytest.fixture(scope="module")
def filled(running: Running, client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """Forty items, one user, a generation with its retrieval index."""
    folder = tmp_path_factory.mktemp("console") / "bundle"
    bundle, random = seeded_bundle(folder, seed=3), np.random.default_rng(0)

    def post(kind: str, events: Any) -> None:
        assert client.post(f"/v1/events/{kind}", json=events).status_code == 202

    post(
        "items",
        [
            {
                "item_id": f"i{at}",
                "version": 1,
                "crosses": [f"category:{at % 5}"],
                "features": {"category": f"c{at % 5}", "price": at + 1.0},
                "embedding": random.standard_normal(128).round(4).tolist(),
                "attributes": {"title": f"<b>Lamp</b> no. {at}", "bid": 1.0},
            }
            for at in range(ITEMS)
        ],
    )
    seen = [{"event_id": f"e{at}", "user_id": "eva", "item_id": f"i{at}", "action": "click"} for at in range(6)]
    post("behaviours", seen)
    stage = {"action": "stage", "generation": "console-1", "uri": folder.as_uri(), "sha256": bundle.sha256}
    post("models", stage | {"activate_when_complete": True})
    running.wait_for(lambda: client.get("/readyz").is_success, "the generation is served", 120.0)
    body = {"user_id": "eva", "k": 1}
    running.wait_for(
        lambda: client.post("/v1/recommend", json=body).json()["user"]["behaviours_used"] == len(seen), "the history"
    )
    return running


@pytest.fixture
def page(browser: Browser, filled: Running) -> Iterator[Page]:
    """The console; whatever the page reports as an error, or loads from another place, fails the test."""
    one = browser.new_page(viewport={"width": 1280, "height": 1000})
    trouble: list[str] = []
    one.on("pageerror", lambda error: trouble.append(str(error)))
    one.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    one.on(
        "request",
        lambda request: None if request.url.startswith((filled.url, "data:")) else trouble.append(request.url),
    )
    one.goto(filled.url + "/")
    yield one
    one.close()
    assert trouble == []


def recommended(page: Page) -> list[str]:
    page.fill("#recommend input[name=user]", "eva")
    page.click("#recommend button")
    expect(page.locator("#ranked tbody tr")).to_have_count(10)
    return page.locator("#ranked tbody .id").all_inner_texts()


def test_it_says_what_is_served(page: Page) -> None:
    expect(page.locator("#ready")).to_have_text("ready")
    row = page.locator("#generations tr").first
    expect(row).to_contain_text("console-1")
    expect(row).to_contain_text("active")
    expect(row).to_contain_text(str(ITEMS))


def test_it_recommends_with_titles_and_stage_timings(page: Page, client: httpx.Client) -> None:
    ids = recommended(page)
    body = {"user_id": "eva", "k": 10, "exclude_seen": True}
    assert set(ids) == set(client.post("/v1/recommend", json=body).json()["ids"])
    assert not set(ids) & {f"i{at}" for at in range(6)}
    expect(page.locator("#ranked .title").first).to_have_text(re.compile(r"^<b>Lamp</b> no\. \d+$"))  # text, not markup
    assert page.locator("#timing .lane b").count() == 5
    expect(page.locator("#timing .legend")).to_contain_text("total")


def test_it_explains_an_item(page: Page, client: httpx.Client) -> None:
    item = recommended(page)[0]
    page.locator("#ranked button[data-explain]").first.click()
    expect(page.locator("#explained .share")).to_have_count(7)
    shown = [float(text.replace("\u2212", "-")) for text in page.locator("#explained .share .num").all_inner_texts()]
    score = float(page.locator("#explained .big").first.inner_text())
    assert sum(shown) == pytest.approx(score, abs=1e-3)
    answer = client.get("/v1/explain", params={"user_id": "eva", "item_id": item}).json()
    assert score == pytest.approx(answer["score"], abs=1e-3)


def test_it_changes_an_item_and_sees_it_arrive(page: Page, client: httpx.Client) -> None:
    item = recommended(page)[0]
    version = client.get(f"/v1/items/{item}").json()["version"]
    page.locator("#ranked button[data-change]").first.click()
    expect(page.locator("#editor")).to_be_visible()
    text = page.input_value("#event")
    page.fill("#event", text.replace("Lamp", "Lantern"))
    page.click("#publish")
    expect(page.locator("#change-message")).to_have_text(f"Version {version + 1} is visible.", timeout=20_000)
    expect(page.locator("#visible-ms")).to_have_text(re.compile(r"\d"))
    row = client.get(f"/v1/items/{item}").json()
    assert row["version"] == version + 1
    assert "Lantern" in row["attributes"]["title"]


def test_what_cannot_be_done_is_said(browser: Browser, filled: Running) -> None:
    page = browser.new_page()
    page.goto(filled.url + "/")
    page.fill("#load input[name=item]", "no such item")
    page.click("#load button")
    expect(page.locator("#change-message")).to_contain_text("no row of this item")
    page.fill("#recommend input[name=user]", "eva")
    page.fill("#recommend input[name=as_of]", "yesterday")
    page.click("#recommend button")
    expect(page.locator("#recommend-message")).to_contain_text("RFC 3339")
    page.close()


def test_the_documentation_lists_and_tries_routes(page: Page, filled: Running) -> None:
    page.goto(filled.url + "/docs")
    expect(page.locator("#routes details")).to_have_count(17)
    route = page.locator("#routes details").filter(has_text="/v1/score").first
    route.locator("summary").click()
    route.locator("textarea").fill('{"user_id": "eva", "candidates": ["i1"]}')
    route.locator("button").click()
    expect(route.locator(".answer pre")).to_contain_text("console-1")
