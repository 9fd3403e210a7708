"""What a click in the synthetic marketplace depends on: six terms whose weighted sum is the logit of its probability.

`encoders.data.synthetic` draws the world and clicks by these terms; experiments take regret, and what a term is worth,
from them. Guarantee: of a user, nothing enters but the behaviours strictly before the request (density, interests,
intent, price) and the profile (price, segment). docs/experiments/marketplace.md has the equations and the sizes.

Letters in the shape comments: R requests, P candidates, W behaviours (the newest at the end), D hidden dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

TERMS = ("density", "interests", "intent", "price", "quality", "segment")
HISTORY_TERMS = TERMS[:4]
WEIGHTS = np.array([0.85, 3.8, 5.4, 0.93, 0.58, 0.68])
BIAS = -3.6

WINDOW = 1_000  # newest behaviours that the terms look at
RECENT = 10  # newest behaviours that make the intent
_REACH = 0.67  # of `nearness` in the hidden space: it joins a cluster and parts it from the category
_FINER = 8  # `nearness` to this power joins a family and parts it from the cluster
_SHRINK = 4.0  # behaviours' worth of doubt in the share of a category's behaviours
_PEAK = 3.0  # a third of the category's behaviours around an item is about as good as all of them
_NONE = -1  # padding of a history

I4 = npt.NDArray[np.int32]
F4 = npt.NDArray[np.float32]
F8 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What the terms know and no feature says outright."""

    position: F4  # [M, D], an item's place
    category: I4  # [M]
    level: F4  # [M], price against the category's others, in standard deviations
    quality: F4  # [M]
    segment: I4  # [U]
    wallet: F4  # [U], price level that the profile promises
    affinity: F4  # [segments, categories]


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The terms of every example, in the order of `Dataset.examples`: its probability is sigmoid(`logits()`)."""

    hidden: Hidden
    terms: F4  # [n, 6], columns as in TERMS

    def logits(self, without: Collection[str] = ()) -> F8:
        """The sum of the terms but those `without`."""
        return logits(self.terms, without)


def logits(terms: F4, without: Collection[str] = ()) -> F8:
    """[..., 6] -> [...]: bias + terms @ weights."""
    weights = np.where([name in without for name in TERMS], 0.0, WEIGHTS)
    total: F8 = BIAS + terms.astype(np.float64) @ weights
    return total


def sigmoid(logit: F8) -> F8:
    out: F8 = 1 / (1 + np.exp(-logit))
    return out


def terms_of(hidden: Hidden, user: I4, candidates: I4, history: I4) -> F4:
    """Terms [R, P, 6] of users [R] with candidates [R, P] and items of behaviours [R, W]; -1 = padding, on the left."""
    history = history[:, -WINDOW:]
    valid = history != _NONE
    near = nearness(hidden.position[candidates], hidden.position[history], valid)
    equal = near**_FINER
    category = hidden.category[candidates]  # [R, P]
    same = ((category[:, :, None] == hidden.category[history][:, None, :]) & valid[:, None, :]).astype(np.float32)
    columns = (
        density(equal),
        interests(near - equal, same),
        intent(near),
        price(hidden.level[candidates], hidden.level[history], same, hidden.wallet[user]),
        hidden.quality[candidates],
        hidden.affinity[hidden.segment[user][:, None], category],
    )
    return np.stack(columns, axis=-1)


def nearness(item: F4, past: F4, valid: npt.NDArray[np.bool_]) -> F4:
    """exp(-distance^2 / 2 reach^2) of candidates [R, P, D] to behaviours [R, W, D] -> [R, P, W]; 0 on padding."""
    square = (item**2).sum(axis=2)[:, :, None] + (past**2).sum(axis=2)[:, None, :]
    square -= 2 * (item @ past.transpose(0, 2, 1))
    near: F4 = np.exp(np.maximum(square, 0) * np.float32(-0.5 / _REACH**2))
    near *= valid[:, None, :]
    return near


def density(equal: F4) -> F4:
    """How many behaviours were about nearly the same thing: log1p of a count, much finer than a category."""
    out: F4 = np.log1p(equal.sum(axis=2))
    return out


def interests(around: F4, same: F4) -> F4:
    """Whether the item is by one of the user's interests in its category: the share of the category's behaviours that
    are around it, nearly the same things left out. Two interests are two peaks; the behaviours' mean lies in the
    valley between.
    """
    share = (around * same).sum(axis=2) / (same.sum(axis=2) + _SHRINK)
    out: F4 = np.tanh(_PEAK * share)
    return out


def intent(near: F4) -> F4:
    """What the user is about now: mean nearness of the last RECENT behaviours, absent ones counting 0."""
    out: F4 = near[:, :, -RECENT:].sum(axis=2) / RECENT
    return out


def price(level: F4, past: F4, same: F4, wallet: F4) -> F4:
    """Minus the distance of the item's price level to the mean of the category's behaviours, with the wallet's level as
    one of them.
    """
    total = (same @ past[:, :, None])[:, :, 0] + wallet[:, None]
    out: F4 = -np.abs(level - total / (same.sum(axis=2) + 1))
    return out
