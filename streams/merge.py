"""Merging: what an update, a deletion or a patch makes of the item that is known. Pure functions, for ingest.

Every leaf of an item (`crosses`, `embedding`, `features.<name>`, `attributes.<name>`) has a version: that of the patch
that wrote it, else that of the last whole update, the `base`. A whole update at v takes every leaf whose version is at
most v, and with it what it does not name; a patch at v takes the leaves it names whose version is below v. So two
writers do not undo each other, and the end is the same in whatever order, and however often, the events arrive, but for
a patch that meets no item: it is refused.

A deletion is a whole update that leaves nothing. What a newer patch wrote before it came stays in the record, unseen,
for a whole update between the two, which makes the item again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from streams import events
from streams.events import EventError, Header, Item, ItemPatch

ATTRIBUTES_ONLY: Header = ("changed", b"attributes")  # of a record on `items` that differs in nothing else


class Known(NamedTuple):
    """What is remembered of an item. `version`: the newest of its leaves' and `base`; `deleted_at`: ms since the epoch
    at which ingest accepted the deletion, 0 = live; `value`: the record on `items`.
    """

    version: int
    base: int
    deleted_at: int
    value: bytes


class Merged(NamedTuple):
    """A record for `items`. `attributes_only`: nothing else differs from the item's record before."""

    known: Known
    attributes_only: bool = False


def merged(known: Known | None, event: Item | ItemPatch, now: int) -> Merged | None:
    """What follows from an event; None where it is late or a duplicate and changes nothing. `now`: ms since the epoch.
    Raises EventError `no_such_item` for a patch of an unknown or deleted item, `too_large` where the record would be.
    """
    if isinstance(event, ItemPatch):
        return _patched(known, event)
    if known is None or event.version > known.version:
        return Merged(_known(event, now))
    if event.version <= known.base:
        return None
    return Merged(_under(known, event, now))


def of_record(value: bytes, timestamp: int) -> Known:
    """The same from a record of `items` and its time, ms: exactly what was remembered when it was written."""
    head = _HEAD.decode(value)
    base = head.version if head.base is None else head.base
    return Known(head.version, base, timestamp if head.deleted else 0, value)


class _Head(msgspec.Struct):
    """The part of a record that says how events compare with it."""

    version: int
    base: int | None = None
    deleted: bool = False


_HEAD = msgspec.json.Decoder(_Head)


def _patched(known: Known | None, patch: ItemPatch) -> Merged | None:
    if known is None:
        raise EventError("no_such_item", "the item was never published, or is long deleted: a patch needs one")
    if patch.version <= known.base:
        return None
    item = events.item(known.value)
    leaves = [pair for pair in _leaves(patch) if item.versions.get(pair[0], known.base) < patch.version]
    if not leaves:
        return None
    if known.deleted_at:
        raise EventError("no_such_item", f"the item is deleted since version {known.base}: a patch needs one")
    for leaf, value in leaves:
        _write(item, leaf, value)
        item.versions[leaf] = patch.version
    if patch.version > item.version:
        item.version, item.event_time = patch.version, patch.event_time
    item.base, item.publish_time = known.base, patch.publish_time
    return Merged(_known(item, 0), all(leaf.startswith("attributes.") for leaf, _ in leaves))


def _under(known: Known, event: Item, now: int) -> Known:
    """A whole update, or a deletion, of an item of which patches have as new a version, which it takes, or newer."""
    before = events.item(known.value)
    for leaf, version in before.versions.items():
        if version > event.version:
            _write(event, leaf, _read(before, leaf))
            event.versions[leaf] = version
    if event.versions:
        event.base, event.version, event.event_time = event.version, before.version, before.event_time
    return _known(event, now)


def _leaves(patch: ItemPatch) -> Iterator[tuple[str, Any]]:
    if patch.crosses is not None:
        yield "crosses", patch.crosses
    if patch.embedding is not None:
        yield "embedding", patch.embedding
    for name, feature in patch.features.items():
        yield f"features.{name}", feature
    for name, attribute in patch.attributes.items():
        yield f"attributes.{name}", attribute


def _read(item: Item, leaf: str) -> Any:
    group, dot, name = leaf.partition(".")
    return getattr(item, group)[name] if dot else getattr(item, group)


def _write(item: Item, leaf: str, value: Any) -> None:
    group, dot, name = leaf.partition(".")
    if dot:
        getattr(item, group)[name] = value
    else:
        setattr(item, group, value)


def _known(item: Item, now: int) -> Known:
    value = events.encode(item)
    if item.versions and len(value) > events.MAX_ITEM_BYTES:
        raise EventError("too_large", f"with what patches wrote, the item would have {len(value)} bytes")
    base = item.version if item.base is None else item.base
    return Known(item.version, base, now if item.deleted else 0, value)
