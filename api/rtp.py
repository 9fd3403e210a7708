"""Real-time prediction: rows and user block become scores, filtered and ordered. Last step of a request.

Order: by the score, or by probability x a row attribute (`score*bid`), where probability = 1 / (1 + exp(-score)); equal
values by id: numeric ids (the canonical decimal form below 2^64) by number, then all others by their UTF-8 bytes; the
same id twice by place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from api.generations import Generation
from api.problems import invalid
from api.schemas import Comparison
from api.users import UserSide
from index import kernels

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "lte": np.less_equal,
    "gt": np.greater,
    "gte": np.greater_equal,
}


class GenerationMismatchError(RuntimeError):
    """A user block met rows of another generation: a defect of this program, never served."""


def score(generation: Generation, side: UserSide, hot: NDArray[Any]) -> NDArray[np.float32]:
    """Logits f4[n] of gathered hot records [n]. Raises GenerationMismatchError rather than mix two generations."""
    if side.block.generation != generation.name:
        raise GenerationMismatchError(
            f"a user block of generation {side.block.generation} met rows of generation {generation.name}"
        )
    return kernels.score(hot, side.tables, generation.head_tables)


def column_of(generation: Generation, name: str, field: str) -> int:
    """The place of a numeric attribute in the cold record. Raises ProblemError naming the request's field and what
    there is.
    """
    try:
        return generation.layout.attributes.index(name)
    except ValueError:
        known = ", ".join(generation.layout.attributes) or "none"
        raise invalid(field, f"rows have no numeric attribute {name!r}; they have: {known}") from None


def order_attribute(generation: Generation, order: str) -> int | None:
    """The attribute that scores are multiplied by; None for `score`. Raises ProblemError."""
    if order == "score":
        return None
    head, times, name = order.partition("*")
    if head != "score" or not times:
        raise invalid("order", "expected `score` or `score*<attribute>`")
    return column_of(generation, name, "order")


def passing(generation: Generation, filters: Mapping[str, Comparison], cold: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows [n] meet all bounds; an absent attribute (NaN) meets none."""
    keep = np.ones(len(cold), bool)
    for name, comparison in filters.items():
        values = cold["attributes"][:, column_of(generation, name, f"filters.{name}")]
        keep &= ~np.isnan(values)
        for operator, compare in _COMPARE.items():
            bound = getattr(comparison, operator)
            if bound is not None:
                with np.errstate(over="ignore"):  # beyond all rows' values
                    limit = np.float32(bound)
                keep &= compare(values, limit)
    return keep


def order_values(scores: NDArray[np.float32], weights: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """What candidates are ranked by, f4[n]; absent weights (NaN) rank last."""
    if weights is None:
        return scores
    with np.errstate(over="ignore"):  # of a probability that is nothing
        values = weights / (1.0 + np.exp(-scores.astype(np.float64)))
    return np.where(np.isnan(values), -np.inf, values).astype(np.float32)


def ranked(
    values: NDArray[np.float32], k: int, keys: NDArray[np.uint64], names: Callable[[NDArray[np.int64]], Any]
) -> NDArray[np.int64]:
    """Places of the best k, best first. `names` gives the ids at places; only those of equal values are looked at."""
    chosen = kernels.best(values, k)
    own = np.nan_to_num(values[chosen], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    rank = np.zeros(len(own), np.uint32)
    equal = tied(own)
    if len(equal):
        places = chosen[equal]
        rank[equal] = tie_rank(keys[places], lambda: names(places))
    return chosen[np.lexsort((rank, -own))[:k]]


def tied(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places of values that are there more than once, in order."""
    order = np.argsort(values)
    equal = values[order[1:]] == values[order[:-1]]
    return np.unique(np.concatenate([order[1:][equal], order[:-1][equal]]))


def tie_rank(keys: NDArray[np.uint64], names: Callable[[], Any]) -> NDArray[np.uint32]:
    """u4[n]: the place of each id in the order of ids; equal ids in the order of the request."""
    numeric = keys[:, 0] == 0
    if numeric.all():
        order = np.argsort(keys[:, 1], kind="stable")
    else:
        texts, low = names(), keys[:, 1].tolist()
        parts = [(False, low[at], "") if number else (True, 0, str(texts[at])) for at, number in enumerate(numeric)]
        order = np.array(sorted(range(len(parts)), key=parts.__getitem__))  # of str as of its UTF-8
    rank = np.empty(len(keys), np.uint32)
    rank[order] = np.arange(len(keys), dtype=np.uint32)
    return rank
