"""Why one item has its score for one user: the first layer's blocks one by one, in plain NumPy on the same rows and
user block.

Guarantee: constant + the sum of the blocks' shares = the score. The head is linear along the units that are active for
this pair, so a block's share is what it adds to z, carried through those units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from api.generations import Generation
from api.schemas import Contribution, Explanation, Tier, column
from api.users import UserSide
from encoders.fold import Head, UserBlock


def explain(generation: Generation, side: UserSide, item_id: str, hot: NDArray[Any], version: int) -> Explanation:
    """`hot`: the item's hot record [1]."""
    window, *newest = [one[0] for one in side.block.histograms(hot["signature"], generation.head.edges)]
    counts = np.concatenate([window, *newest])
    blocks = _blocks(side.block, generation.head, hot[0], counts)
    z = np.sum([part for _, part in blocks], axis=0)
    slope, constant = _along_active_units(generation.head, z)
    contributions = [
        Contribution(name, float(slope @ part), float(np.linalg.norm(part)), column(part)) for name, part in blocks
    ]
    return Explanation(
        generation=generation.name,
        as_of=side.source.as_of,
        item_id=item_id,
        score=float(slope @ z + constant),
        constant=constant,
        contributions=contributions,
        tiers=_tiers(generation, window, newest[0] if newest else np.zeros_like(window)),
        crosses=_cross_names(generation, hot[0]["crosses"]),
        row_version=version,
        user=side.seen(),
        degraded=list(side.degraded),
    )


def _blocks(block: UserBlock, head: Head, row: Any, counts: NDArray[np.int32]) -> list[tuple[str, NDArray[np.float64]]]:
    """What each block adds to z [h]; the sum is z."""
    signs = np.unpackbits(row["signature"], bitorder="little").astype(np.float64) * 2 - 1
    rows_of_g = {int(slot): at for at, slot in enumerate(block.cross_slots, start=1)}
    used = [rows_of_g.get(int(slot), 0) for slot in row["crosses"] if slot] or [0]
    parts: list[tuple[str, NDArray[Any]]] = [
        ("item", row["joint"]),
        ("user", block.P),
        ("BEA", row["bridge"].astype(np.float64) @ block.C.astype(np.float64)),
        ("DIN", signs @ block.D.astype(np.float64)),
        ("SimTier", head.T.astype(np.float64) @ np.log1p(counts)),
        ("SIM", block.G[used].mean(axis=0)),
    ]
    return [(name, np.asarray(part, np.float64)) for name, part in parts]


def _along_active_units(head: Head, z: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """slope [h] and constant with score = slope @ z + constant for these active units."""
    slope, constant, value = np.eye(len(z)), np.zeros(len(z)), z
    for weight, bias in zip(head.weights, head.biases, strict=True):
        active = value > 0
        slope = weight @ (slope * active[:, None])
        constant = weight @ (constant * active) + bias
        value = weight @ (value * active) + bias
    return slope[0], float(constant[0])


def _tiers(generation: Generation, counts: NDArray[np.int32], newest: NDArray[np.int32]) -> list[Tier]:
    edges = [0, *generation.head.edges.tolist(), generation.layout.bits + 1]
    columns = zip(edges[:-1], edges[1:], counts.tolist(), newest.tolist(), strict=True)
    return [Tier(low, high - 1, count, recent) for low, high, count, recent in columns]


def _cross_names(generation: Generation, slots: NDArray[np.uint16]) -> list[str]:
    """Crosses seen in training by name, others by slot."""
    names = generation.bundle.manifest.features.crosses
    return [names[slot - 1] if slot <= len(names) else f"slot {slot}" for slot in slots.tolist() if slot]
