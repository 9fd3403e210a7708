"""One data set: items, users, their behaviours, and the examples to learn from. Every reader gives this; training,
evaluation and the publisher's files all take it.

Behaviours are what enters histories; examples are impressions with their labels, and never enter a history. (Where a
source has ratings only, each is both.) Both are columns sorted by user, then time, ties in the order of the source;
columns may be memory maps. `item_updates`, `behaviours` and `users` give the data in the JSON form of the topics
(DESIGN.md section 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders.data.text import DECIMALS

NEVER = np.iinfo(np.int64).max
_PART = 10_000  # behaviours turned into dicts at a time


class DataError(Exception):
    """Data that cannot be read; the message names the file and the line."""


@dataclasses.dataclass(frozen=True)
class ItemRow:
    """One item as `ItemFold.encode` takes it."""

    features: dict[str, Any]
    embedding: npt.NDArray[np.float32]
    crosses: list[str]
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Items:
    """M items; the k-th of each column belongs to the same item. Columns may be on disk, so they are sequences."""

    ids: Sequence[str]
    features: Sequence[dict[str, Any]]
    crosses: Sequence[list[str]]
    attributes: Sequence[dict[str, Any]]
    embeddings: npt.NDArray[np.float32]  # [M, e]
    added: npt.NDArray[np.int64]  # [M], ms
    removed: npt.NDArray[np.int64]  # [M], ms; NEVER

    def rows(self, begin: int = 0, end: int | None = None) -> list[ItemRow]:
        """Items begin..end of the M, all by default."""
        part = slice(begin, end)
        columns = zip(
            self.features[part], self.embeddings[part], self.crosses[part], self.attributes[part], strict=True
        )
        return [ItemRow(*row) for row in columns]


@dataclasses.dataclass(frozen=True)
class UserProfiles:
    """U users."""

    ids: Sequence[str]
    features: Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class BehaviourLog:
    """N behaviours, ascending in (user, time)."""

    user: npt.NDArray[np.int32]  # place in UserProfiles
    item: npt.NDArray[np.int32]  # place in Items
    action: npt.NDArray[np.uint8]  # place in `Dataset.actions`
    time: npt.NDArray[np.int64]  # ms

    def __len__(self) -> int:
        return len(self.time)


@dataclasses.dataclass(frozen=True)
class Examples:
    """n impressions with their labels, ascending in (user, time)."""

    user: npt.NDArray[np.int32]  # place in UserProfiles
    item: npt.NDArray[np.int32]  # place in Items
    clicked: npt.NDArray[np.bool_]  # the label
    time: npt.NDArray[np.int64]  # ms
    probability: npt.NDArray[np.float32] | None = None  # of a click, where a generator knows it

    def __len__(self) -> int:
        return len(self.time)


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str  # begins the event ids
    items: Items
    profiles: UserProfiles
    log: BehaviourLog
    examples: Examples
    actions: tuple[str, ...]

    def begins(self) -> npt.NDArray[np.int64]:
        """Places in the log where each user's behaviours begin, and the end [U + 1]."""
        users = np.arange(len(self.profiles.ids) + 1, dtype=self.log.user.dtype)  # of another type: the log is copied
        return np.searchsorted(self.log.user, users)

    def item_updates(self) -> Iterator[dict[str, Any]]:
        """`item-updates` in time order: version 1 when an item is added, the deletion as version 2."""
        items = self.items
        gone = np.flatnonzero(items.removed != NEVER)
        times = np.concatenate([items.added, items.removed[gone]])
        which = np.concatenate([np.arange(len(items.ids)), gone])
        for place in np.argsort(times, kind="stable"):
            k = int(which[place])
            if place >= len(items.ids):
                yield {"item_id": items.ids[k], "version": 2, "event_time": iso(times[place]), "deleted": True}
            else:
                yield {
                    "item_id": items.ids[k],
                    "version": 1,
                    "event_time": iso(times[place]),
                    "crosses": items.crosses[k],
                    "features": items.features[k],
                    "embedding": np.round(items.embeddings[k].astype(np.float64), DECIMALS).tolist(),
                    "attributes": items.attributes[k],
                }

    def behaviours(self) -> Iterator[dict[str, Any]]:
        """`behaviours` in time order. Event ids follow from the place in that order."""
        log, order = self.log, np.argsort(self.log.time, kind="stable")
        for at in range(0, len(log), _PART):
            part = order[at : at + _PART]
            times = np.datetime_as_string(log.time[part].astype("datetime64[ms]")).tolist()
            columns = zip(
                log.user[part].tolist(), log.item[part].tolist(), log.action[part].tolist(), times, strict=True
            )
            for place, (user, item, action, time) in enumerate(columns, start=at):
                yield {
                    "event_id": f"{self.name}-{place}",
                    "user_id": self.profiles.ids[user],
                    "item_id": self.items.ids[item],
                    "action": self.actions[action],
                    "event_time": time + "Z",
                }

    def users(self) -> Iterator[dict[str, Any]]:
        """`users`: every profile, dated by the beginning of the data."""
        start = iso(self.log.time.min()) if len(self.log) else iso(0)
        for user_id, features in zip(self.profiles.ids, self.profiles.features, strict=True):
            yield {"user_id": user_id, "features": features, "event_time": start}

    @property
    def end(self) -> int:
        """Time of the last behaviour, ms; what a demo on old data uses as `as_of`."""
        return int(self.log.time.max()) if len(self.log) else 0


def by_user(user: npt.NDArray[np.integer], time: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The order of a `BehaviourLog` and of `Examples`: by user, then time, ties as they stand."""
    return np.lexsort((time, user))


def iso(time: int | np.int64) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return f"{np.datetime64(int(time), 'ms')}Z"
