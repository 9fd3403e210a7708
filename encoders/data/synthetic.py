"""A seeded marketplace: users whose interests drift, items that arrive and expire, impressions clicked or only viewed.

Equal arguments give the same data. What a model can learn: an item's embedding and words tell its place among the
interests, brand and price band shift its appeal, and a user's past clicks tell more than the profile does; how popular
an item is says little, because its appeal differs from user to user.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from encoders.data import text
from encoders.data.dataset import NEVER, BehaviourLog, Dataset, Examples, Items, UserProfiles, by_user

ACTIONS = ("view", "click")
START = 1_767_225_600_000  # 2026-01-01T00:00:00Z, ms
_DAY = 86_400_000
_SESSION = (3, 15)  # impressions in one go: from, below
_PRICE_BANDS = ("low", "middle", "high", "luxury")
_NOUNS = (
    "lamp",
    "chair",
    "jacket",
    "boots",
    "phone",
    "camera",
    "novel",
    "puzzle",
    "tent",
    "bicycle",
    "guitar",
    "kettle",
)
_STYLES = ("plain", "bright", "vintage", "compact", "classic", "light", "sturdy", "soft")


@dataclasses.dataclass(frozen=True)
class Marketplace:
    """Sizes of the world."""

    users: int = 2_000
    items: int = 4_000
    behaviours: int = 120_000
    days: int = 30
    categories: int = 24
    brands: int = 120
    interests: int = 16  # dimension of the hidden space of tastes
    embedding_dim: int = 128


def generate(world: Marketplace | None = None, seed: int = 0) -> Dataset:
    """The data set of a world: `behaviours` impressions over `days` days, in sessions."""
    world = world or Marketplace()
    random = np.random.default_rng(seed)
    centres = random.standard_normal((world.categories, world.interests))
    category = random.integers(0, world.categories, world.items)
    taste = centres[category] + 0.6 * random.standard_normal((world.items, world.interests))  # [M, k]
    brand = random.integers(0, world.brands, world.items)
    band = random.integers(0, len(_PRICE_BANDS), world.items)
    quality = 0.4 * random.standard_normal(world.items) + 0.4 * random.standard_normal(world.brands)[brand]
    added, removed = _lifetimes(world, random)

    segment = random.integers(0, world.categories, world.users)
    interest = centres[segment] + 0.8 * random.standard_normal((world.users, world.interests))  # [U, k]
    wallet = random.integers(0, len(_PRICE_BANDS), world.users)
    activity = random.lognormal(0, 1, world.users)
    drift = 0.15 * random.standard_normal((world.days, world.users, world.interests))

    parts = []
    counts = np.diff(np.linspace(0, world.behaviours, world.days + 1).astype(int))
    for day, count in enumerate(counts):
        interest = interest + drift[day]
        alive = np.flatnonzero((added <= START + day * _DAY) & (removed >= START + (day + 1) * _DAY))
        user, time = _sessions(activity, int(count), day, random)
        item = alive[_shown(interest[user], taste[alive], random)]
        fit = np.einsum("nk,nk->n", interest[user], taste[item]) / world.interests
        appeal = 2.0 * fit + quality[item] - 0.5 * np.abs(wallet[user] - band[item]) - 1.0
        clicked = random.random(len(user)) < 1 / (1 + np.exp(-appeal))
        parts.append((user, item, clicked, time))
    user, item, clicked, time = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = by_user(user, time)
    by, of, clicked, time = user[order].astype(np.int32), item[order].astype(np.int32), clicked[order], time[order]
    return Dataset(
        name=f"market-{seed}",
        items=_items(world, category, brand, band, taste, added, removed, random),
        profiles=UserProfiles(
            ids=[f"u{k}" for k in range(world.users)],
            features=[
                {"segment": f"segment {segment[k]}", "age": int(age), "wallet": _PRICE_BANDS[wallet[k]]}
                for k, age in enumerate(random.integers(18, 80, world.users))
            ],
        ),
        log=BehaviourLog(by, of, clicked.astype(np.uint8), time),
        examples=Examples(by, of, clicked, time),
        actions=ACTIONS,
    )


def _lifetimes(world: Marketplace, random: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """When items are added and removed: 40 % come late, 15 % expire; some neither, so that no day is without items."""
    end = START + world.days * _DAY
    late = random.random(world.items) < 0.4
    late[: world.categories] = False  # so that some items are there on every day
    added = np.where(late, START + (random.random(world.items) * world.days * _DAY).astype(np.int64), START)
    expires = random.random(world.items) < 0.15
    expires[: world.categories] = False
    left = (random.random(world.items) * (end - added)).astype(np.int64)
    return added, np.where(expires, added + 1 + left, NEVER)


def _sessions(
    activity: npt.NDArray[np.float64], count: int, day: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Users and times of a day's impressions: sessions of 3 to 14, ten seconds to a minute apart within each."""
    sessions = -(-count // _SESSION[0])  # enough, whatever their lengths
    length = random.integers(*_SESSION, sessions)
    user = random.choice(len(activity), sessions, p=activity / activity.sum())
    begin = START + day * _DAY + random.integers(0, _DAY - _SESSION[1] * 60_000, sessions)
    passed = np.cumsum(random.integers(10_000, 60_000, length.sum()))
    first = np.cumsum(length) - length
    time = np.repeat(begin - passed[first], length) + passed
    return np.repeat(user, length)[:count], time[:count]


def _shown(
    interest: npt.NDArray[np.float64], taste: npt.NDArray[np.float64], random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """An item for each impression: of eight at random, half of the time the first, else the one that fits best."""
    offered = random.integers(0, len(taste), (len(interest), 8))
    fit = np.einsum("nk,nok->no", interest, taste[offered])
    pick = np.where(random.random(len(interest)) < 0.5, 0, fit.argmax(axis=1))
    shown: npt.NDArray[np.int64] = offered[np.arange(len(interest)), pick]
    return shown


def _items(
    world: Marketplace,
    category: npt.NDArray[np.int64],
    brand: npt.NDArray[np.int64],
    band: npt.NDArray[np.int64],
    taste: npt.NDArray[np.float64],
    added: npt.NDArray[np.int64],
    removed: npt.NDArray[np.int64],
    random: np.random.Generator,
) -> Items:
    view = random.standard_normal((world.interests, world.embedding_dim)) / np.sqrt(world.interests)
    noise = random.standard_normal((world.items, world.embedding_dim))
    price = np.round(np.exp(random.normal(0, 0.25, world.items)) * 10.0 * 3.0**band, 2)
    style = random.integers(0, len(_STYLES), world.items)
    features, crosses, attributes = [], [], []
    for k in range(world.items):
        series, noun_place = divmod(int(category[k]), len(_NOUNS))
        noun = _NOUNS[noun_place]
        names = {
            "category": f"{noun} {series + 1}",
            "brand": f"brand {brand[k]}",
            "price_band": _PRICE_BANDS[band[k]],
        }
        features.append({**names, "words": [_STYLES[style[k]], noun], "price": float(price[k])})
        crosses.append([f"{name}:{value}" for name, value in names.items()])
        attributes.append(
            {
                "title": f"{_STYLES[style[k]]} {noun} {k} by {names['brand']}",
                "price": float(price[k]),
                "bid": round(0.05 + 0.01 * float(price[k]) ** 0.5, 4),
                "in_stock": True,
            }
        )
    return Items(
        ids=[f"i{k}" for k in range(world.items)],
        features=features,
        crosses=crosses,
        attributes=attributes,
        embeddings=text.normalised(taste @ view + 0.5 * noise),
        added=added,
        removed=removed,
    )
