"""The real-time arithmetic of one request: rows gathered from the arena meet arrays prepared per user and
generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.layout import RowLayout

F4 = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class UserTables:
    """What `score` needs of a user block; make it once per block with `user_tables`."""


@dataclasses.dataclass(frozen=True)
class HeadTables:
    """What `score` needs of a generation's head; make it once per generation with `head_tables`."""


def user_tables(P: F4, C: F4, D: F4, G: F4, cross_slots: NDArray[np.uint16], window: NDArray[np.uint8]) -> UserTables:
    """From P [h], C [h, n], D [h, b], G [c+1, h] (row 0 = absent cross), cross_slots u2[c], window u1[Lw, b/8]."""
    raise NotImplementedError


def head_tables(T: F4, edges: NDArray[Any], weights: Sequence[F4], biases: Sequence[F4]) -> HeadTables:
    """From T [h, tiers], ascending integer edges [tiers - 1], and the MLP after the first layer: weights[i] [out, in]
    (torch's form), biases[i] [out], ReLU between layers, the last out = 1."""
    raise NotImplementedError


def score(hot: NDArray[Any], user: UserTables, head: HeadTables) -> F4:
    """f4[n] logits of gathered hot records [n]. An item without crosses gets nothing for them: `joint` has its
    default."""
    raise NotImplementedError


def simtier_counts(signatures: NDArray[np.uint8], window: NDArray[np.uint8], edges: NDArray[Any]) -> NDArray[np.int32]:
    """i4[n, tiers]: for signatures u1[n, b/8], how many of window u1[L, b/8] have `t` edges <= equal bits."""
    raise NotImplementedError


def top_k(scores: F4, k: int, tie_rank: NDArray[Any]) -> NDArray[np.int64]:
    """Indices of the min(k, n) best, best first; equal scores by ascending tie_rank (integers 0..2^32-1)."""
    raise NotImplementedError


def warm_up(layout: RowLayout, tiers: int) -> None:
    """Compiles every kernel for this layout, so that no request pays for it."""
    raise NotImplementedError
