"""A seeded catalogue with users for benchmarks, in the shape of `encoders.bundle.SAMPLE_SPEC`. Ids are integers.

The events are about 1.4 kB with their 128-float embedding, as a publisher of multi-modal vectors would send them.
"""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
DAY_MS = 86_400_000


def as_of() -> int:
    """The moment of all benchmark requests, ms: after every behaviour."""
    return int(START.timestamp() * 1000) + 31 * DAY_MS


def ms(text: str) -> int:
    """Milliseconds since the epoch of an event's time."""
    return round(datetime.datetime.fromisoformat(text).timestamp() * 1000)


class World:
    """`items` distinct items; events of any item and version are made on demand and are always the same."""

    def __init__(self, items: int, seed: int) -> None:
        self.items = items
        self._seed = seed
        self._embeddings = np.random.default_rng(seed).standard_normal((1024, 128)).round(4)

    def item(self, number: int, version: int) -> dict[str, Any]:
        mixed = (number * 2_654_435_761 + version * 40_503 + self._seed) & 0xFFFFFFFF
        return {
            "item_id": str(number),
            "version": version,
            "crosses": [f"category:{mixed % 40}", f"brand:{mixed // 7 % 150}"],
            "features": {
                "category": f"c{mixed % 40}",
                "brand": f"b{mixed // 7 % 150}",
                "words": [f"w{mixed // 11 % 500}", f"w{mixed // 13 % 500}"],
                "price": float(mixed % 90 + 1),
            },
            "embedding": np.roll(self._embeddings[mixed % 1024], mixed // 1024 % 128).tolist(),
            "attributes": {"bid": round(mixed % 97 / 30, 2), "in_stock": mixed % 5 > 0, "title": f"Item {number}"},
        }

    def event(self, number: int, version: int) -> bytes:
        return msgspec.json.encode(self.item(number, version))

    def inputs(self, number: int, version: int) -> SimpleNamespace:
        """The same for `ItemFold.encode`."""
        return SimpleNamespace(**self.item(number, version))

    def history(self, user: int, length: int) -> list[dict[str, Any]]:
        """Behaviours of a user, oldest first, over the thirty days before `as_of`."""
        random = np.random.default_rng((self._seed, user))
        numbers = random.integers(0, self.items, length)
        times = np.sort(random.integers(0, 30 * DAY_MS, length))
        return [
            {
                "event_id": f"{user}-{place}",
                "user_id": f"u{user}",
                "item_id": str(number),
                "action": "click" if number % 3 == 0 else "view",
                "event_time": (START + datetime.timedelta(milliseconds=int(time))).isoformat(),
            }
            for place, (number, time) in enumerate(zip(numbers, times, strict=True))
        ]

    def profile(self, user: int) -> dict[str, Any]:
        return {"segment": f"s{user % 40}", "age": float(18 + user % 60)}
