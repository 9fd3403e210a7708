"""What a network takes: users with their histories, and candidates. `encoders/batches.py` makes them for training and
evaluation, `encoders/fold.py` for the oracle of serving.

Letters in the shape comments: B users, K candidates per user, M distinct items, L behaviours (padded on the left,
oldest first), d dim, b bits, e length of an embedding, C crosses per item.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

NO_CROSS = 0  # slot of an unused place among an item's crosses


@dataclasses.dataclass(frozen=True)
class Features:
    """Encoded features of M items or profiles."""

    ids: Tensor  # i8 [sum of bag lengths], rows of the tower's category table
    offsets: Tensor  # i8 [M * categories], start of each bag
    numerics: Tensor  # f4 [M, numerics], standardised, NaN = missing
    dense: Tensor  # f4 [M, e]: an item's embedding; the constant 1 for a profile


@dataclasses.dataclass(frozen=True)
class Users:
    """B users with their histories, as seen at each user's own `as_of`."""

    profile: Features
    known: Tensor  # bool [B], False = no profile
    vectors: Tensor  # f4 [B, L, d], item vectors (no gradient)
    signatures: Tensor  # f4 [B, L, b], -1 or +1; where lsh = "cosine", directions of length sqrt b [B, L, e]
    crosses: Tensor  # i8 [B, L, C], slots, 0 = none
    actions: Tensor  # i8 [B, L]
    ages: Tensor  # i8 [B, L], milliseconds, >= 0
    valid: Tensor  # bool [B, L], False = padding


@dataclasses.dataclass(frozen=True)
class Candidates:
    """K candidates of each of the B users, as indices of M distinct items."""

    features: Features  # of the M items
    signatures: Tensor  # f4 [M, b] or [M, e], as those of Users
    crosses: Tensor  # i8 [M, C]
    index: Tensor  # i8 [B, K]
