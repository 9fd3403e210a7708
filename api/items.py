"""One item as the index holds it, for people and for tests; not on the path of ranking requests."""

from __future__ import annotations

import time

import numpy as np

from api import rtp
from api.generations import Generation
from api.problems import ProblemError
from api.schemas import ItemRow
from api.users import UserSource, infer
from index.keys import keys_of

_AGREE_S = 1.0  # a row reaches RocksDB some milliseconds before the arena


def row_of(generation: Generation, item_id: str, hash_key: bytes) -> ItemRow:
    """The row that requests see, with what RocksDB alone has of it. Raises ProblemError 404 where this generation has
    no row of the item, 503 where arena and RocksDB do not come to agree about it."""
    keys = keys_of([item_id], hash_key)
    deadline = time.monotonic() + _AGREE_S
    while True:
        hot, cold, found = generation.arena.gather_both(keys)
        stored = generation.rows.get([item_id])[0]
        if not found[0]:
            why = "it was never published, is deleted, or its newest version could not be encoded (see items.dlq)"
            where = f"generation {generation.name} has no row of this item"
            raise ProblemError(404, "no-such-item", f"{where}: {why}", "item_id")
        row = cold[0]
        if stored is not None and (stored.version, stored.encode_time) == (row["version"], row["encode_time"]):
            break
        if time.monotonic() > deadline:  # RocksDB is ahead, and the writer has stopped before the arena
            raise ProblemError(503, "changing", "the item's row is being changed")
        time.sleep(0.005)
    return ItemRow(
        generation=generation.name,
        item_id=item_id,
        version=stored.version,
        partition=stored.partition,
        offset=stored.offset,
        event_time=int(row["event_time"]),
        publish_time=int(row["publish_time"]),
        encode_time=int(row["encode_time"]),
        visible_time=int(row["visible_time"]),
        age_ms=time.time_ns() // 1_000_000 - int(row["visible_time"]),
        update_to_visible_ms=int(row["visible_time"]) - int(row["publish_time"]),
        signature=hot[0]["signature"].tobytes().hex(),
        crosses=hot[0]["crosses"].tolist(),
        attributes=stored.attributes,
    )


def warm_up(generation: Generation, nobody: UserSource) -> None:
    """One request's steps for a user of whom nothing is known and two items that need not be there."""
    side = infer(generation, nobody)
    hot, _, _ = generation.arena.gather_both(np.zeros((2, 2), np.uint64))
    scores = rtp.score(generation, side, hot)
    rtp.ranked(scores, 1, np.zeros((2, 2), np.uint64), lambda _: ["0", "0"])
