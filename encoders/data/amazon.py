"""Amazon reviews of 2014, 2018 and 2023 in their published formats -> a prepared folder.

A folder holds one file of reviews and one of metadata (`meta_*`), JSON lines, gzip or not, of one category:

| edition | reviews | metadata |
|---|---|---|
| 2014 | reviewerID, asin, overall, unixReviewTime (s) | asin, title, price, brand, categories [[...]]; Python form |
| 2018 | the same | asin, title, price ("$12.99"), brand, category [...] |
| 2023 | user_id, parent_asin, rating, timestamp (ms) | parent_asin, title, price, store, categories, main_category |

Sources: jmcauley.ucsd.edu/data/amazon (He and McAuley, 2016), nijianmo.github.io/amazon (Ni et al., 2019), the card of
McAuley-Lab/Amazon-Reviews-2023 (Hou et al., 2024). Known of the data, and counted: metadata rows that stand twice
(2018), items without metadata, prices that are no number ("$3.99 - $9.99", scraps of pages), reviews that stand twice.

A review is both an example and a behaviour: "click" and label 1 from 4 stars on, else "rate", as with MovieLens. Only
reviewed items are kept; an item is added with its first review. Not read: average_rating, rating_number, salesRank,
also_buy and the like: they were collected after the reviews and would tell the future. Price and title are of the time
of collection too; they are kept. Embeddings are hashed words of title, categories and brand, which stand in for
multi-modal vectors. Memory: dictionaries of about 150 bytes per user and item; reviews and metadata are not held.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from encoders.data import text
from encoders.data.dataset import DataError
from encoders.data.files import found, found_one, json_lines
from encoders.data.sorting import Records, distinct, records
from encoders.data.store import Item, Profile, Store, price_band

ACTIONS = ("rate", "click")
CLICK_FROM = 4.0  # stars

_ROWS = 65_536  # reviews in memory at a time
_TITLE_WORDS = 24  # of a title, so that scraps of pages that stand there stay small
_TIMES = (788_918_400_000, 4_102_444_800_000)  # 1995 .. 2099, ms
_TAG = re.compile(r"<[^>]*>")
_PRICE = re.compile(r"\$?\s*(\d[\d,]*(?:\.\d+)?)")

_Review = tuple[str, str, float, int]  # user, item, stars, ms


def prepare(folder: Path, store: Store) -> None:
    """Raises DataError; counts reviews of items without metadata, impossible times and repetitions as skipped."""
    metadata = found_one(folder, "meta_*.json", "meta_*.jsonl")
    names = [path for path in found(folder, "*.json", "*.jsonl") if not path.name.startswith("meta_")]
    if len(names) != 1:
        raise DataError(f"{folder} must hold one file of reviews beside {metadata.name}; there are {len(names)}")
    users: dict[str, int] = {}
    reviewed: set[str] = set()
    count = 0
    for user, item, _, _ in _reviews(names[0]):
        users.setdefault(user, len(users))
        reviewed.add(item)
        count += 1
    items = _places(metadata, reviewed, store)
    with store.sorter("reviews", len(users), count) as sorter:
        reviews = _reviews(names[0])
        while batch := list(islice(reviews, _ROWS)):
            sorter.add(_kept(batch, users, items, store))

        def once(count: bool) -> Iterator[Records]:
            for ordered in sorter.parts():
                kept = distinct(ordered)
                if count:
                    store.skip("review that stands twice", len(ordered) - len(kept))
                yield kept

        store.behaviours(once(count=True), len(items))
        store.examples(once(count=False), len(items))
    store.users((Profile(user, {}) for user in users), {})
    words = dict.fromkeys(("title", "categories"), pl.List(pl.String))
    store.items(
        _items(metadata, items, store),
        {**dict.fromkeys(("item", "brand", "price_band"), pl.String), **words, "price": pl.Float64},
        {**dict.fromkeys(("title", "brand", "categories"), pl.String), "price": pl.Float64},
    )
    store.finish(re.split(r"\.json", names[0].name)[0], "amazon", ACTIONS)


def _reviews(path: Path) -> Iterator[_Review]:
    for where, row in json_lines(path):
        recent = "parent_asin" in row
        user = _id(row, "user_id" if recent else "reviewerID", where)
        item = _id(row, "parent_asin" if recent else "asin", where)
        stars = _number(row, "rating" if recent else "overall", where)
        if not 1 <= stars <= 5:
            raise DataError(f"{where}: a rating of {stars:g} stars")
        time = _number(row, "timestamp", where) if recent else _number(row, "unixReviewTime", where) * 1000
        yield user, item, stars, int(time)


def _places(metadata: Path, reviewed: set[str], store: Store) -> dict[str, int]:
    """Reviewed item -> place, in the order of the metadata."""
    places: dict[str, int] = {}
    for where, row in json_lines(metadata):
        item = _item_id(row, where)
        if item in places:
            store.skip("metadata of an item that came before", 1)
        elif item in reviewed:
            places[item] = len(places)
        else:
            store.note("items without a review, which are left out", 1)
    return places


def _kept(reviews: list[_Review], users: Mapping[str, int], items: Mapping[str, int], store: Store) -> Records:
    item = np.array([items.get(item, -1) for _, item, _, _ in reviews])
    time = np.array([time for _, _, _, time in reviews], dtype=np.int64)
    inside = (time >= _TIMES[0]) & (time < _TIMES[1])
    store.skip("review of an item without metadata", (item < 0).sum())
    store.skip("review: time out of range", ((item >= 0) & ~inside).sum())
    clicked = np.array([stars >= CLICK_FROM for _, _, stars, _ in reviews])
    rows = records(np.array([users[user] for user, _, _, _ in reviews]), item, time, clicked)
    return rows[(item >= 0) & inside]


def _items(metadata: Path, places: Mapping[str, int], store: Store) -> Iterator[Item]:
    at = 0
    for where, row in json_lines(metadata):
        item = _item_id(row, where)
        if places.get(item) == at:  # its first row
            yield _item(item, row, store)
            at += 1


def _item(name: str, row: Mapping[str, Any], store: Store) -> Item:
    title = " ".join(html.unescape(_TAG.sub(" ", str(row.get("title") or ""))).split())
    title_words = text.words(title)[:_TITLE_WORDS]
    brand = _brand(row)
    categories = _categories(row)
    features: dict[str, Any] = {"item": name, "title": title_words, "categories": categories, "brand": brand}
    words = {f"title {word}": 0.3 for word in title_words} | {f"category {part}": 1.0 for part in categories}
    attributes: dict[str, Any] = {"title": title[:200], "brand": brand, "categories": ", ".join(categories)}
    leaf = categories[-1] if categories else None
    crosses = [f"category:{leaf}"] if leaf else []
    if brand:
        words[f"brand {brand}"] = 0.7
        crosses.append(f"brand:{brand}")
        crosses += [f"category+brand:{leaf}/{brand}"] if leaf else []
    price = _price(row.get("price"))
    if price is None and row.get("price") not in (None, "", "None", "—"):
        store.note("prices that are no number, taken as absent", 1)
    if price is not None:
        features |= {"price": price, "price_band": price_band(price)}
        attributes["price"] = price
        words[f"price {price_band(price)}"] = 0.3
        crosses.append(f"price:{price_band(price)}")
        crosses += [f"category+price:{leaf}/{price_band(price)}"] if leaf else []
    return Item(name, features, crosses, attributes, words)


def _brand(row: Mapping[str, Any]) -> str | None:
    brand = row.get("brand") or row.get("store")
    return " ".join(brand.split())[:100] or None if isinstance(brand, str) else None


def _categories(row: Mapping[str, Any]) -> list[str]:
    """From the widest to the narrowest; of several paths (2014) the first."""
    path = row.get("categories") or row.get("category") or []
    if isinstance(path, list) and path and isinstance(path[0], list):
        path = path[0]
    names = [" ".join(html.unescape(name).split())[:100] for name in path if isinstance(name, str)]
    names = [name for name in names if name]
    if not names and isinstance(row.get("main_category"), str):
        names = [row["main_category"]]
    return list(dict.fromkeys(names))


def _price(value: Any) -> float | None:
    if isinstance(value, str):
        matched = _PRICE.fullmatch(value.strip())
        value = float(matched[1].replace(",", "")) if matched else None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    return None


def _item_id(row: Mapping[str, Any], where: str) -> str:
    return _id(row, "parent_asin" if "parent_asin" in row else "asin", where)


def _id(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: no {name}" if value is None else f"{where}: {name} {value!r} is not a text")
    return value


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if value is None:
        raise DataError(f"{where}: no {name}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {name} {value!r} is not a number") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} {value!r} is not finite")
    return number
