"""One item as the index holds it, for people and for tests; not on the path of ranking requests."""

from __future__ import annotations

import time

import numpy as np

from api import rtp
from api.generations import Generation
from api.prerank import Candidates, gather_both
from api.problems import ProblemError
from api.schemas import ItemRow
from api.users import UserSource, infer


def row_of(generation: Generation, item_id: str, hash_key: bytes) -> ItemRow:
    """Raises ProblemError 404 where this generation has no row of the item."""
    stored = generation.rows.get([item_id])[0]
    hot, _, found = gather_both(generation, Candidates.of_ids([item_id], hash_key).keys)
    if stored is None or not found[0]:
        raise ProblemError(404, "no-such-item", f"generation {generation.name} has no row of this item", "item_id")
    return ItemRow(
        generation=generation.name,
        item_id=item_id,
        version=stored.version,
        partition=stored.partition,
        offset=stored.offset,
        event_time=stored.event_time,
        publish_time=stored.publish_time,
        encode_time=stored.encode_time,
        visible_time=stored.visible_time,
        age_ms=time.time_ns() // 1_000_000 - stored.visible_time,
        update_to_visible_ms=stored.visible_time - stored.publish_time,
        signature=hot[0]["signature"].tobytes().hex(),
        crosses=hot[0]["crosses"].tolist(),
        attributes=stored.attributes,
    )


def warm_up(generation: Generation, nobody: UserSource) -> None:
    """One request's steps for a user of whom nothing is known and two items that need not be there."""
    side = infer(generation, nobody)
    hot, _, _ = gather_both(generation, np.zeros((2, 2), np.uint64))
    scores = rtp.score(generation, side, hot)
    rtp.ranked(scores, 1, np.zeros((2, 2), np.uint64), lambda _: ["0", "0"])
