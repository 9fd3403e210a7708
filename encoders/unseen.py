"""What a slice of the data holds that training did not see: counted, and reported by training and `evaluate`.

None of it is an error: an unknown category has a row of the table by its hash, an unknown cross a slot by its hash, an
unknown action its own code. But weights that nothing has trained stand behind them, so figures on a slice that is full
of them say little of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders.data.dataset import Dataset
from encoders.features import FeatureSpec

_Places = npt.NDArray[np.integer]


def unseen(data: Dataset, spec: FeatureSpec, before: int, since: int, until: int) -> dict[str, int]:
    """How many of the examples with `since` <= time < `until` (ms) are of something new, by what it is; "behaviours"
    counts those of the log before `until`. What there is none of is left out.

    A category is new if no item added before `before`, and no user with an example before it, has it: what training on
    these data saw. A cross is new if it is none of the spec's, an action if the spec does not name it.
    """
    examples = data.examples
    inside = (examples.time >= since) & (examples.time < until)
    items, shown = np.unique(examples.item[inside], return_counts=True)
    users, served = np.unique(examples.user[inside], return_counts=True)
    known_items = np.flatnonzero(data.items.added < before)
    known_users = np.unique(examples.user[examples.time < before])
    of_items, of_users = ([c.name for c in found] for found in (spec.item_categories, spec.user_categories))
    new_action = ~np.isin(np.array(data.actions), spec.actions)
    found = {
        "examples of an item with a new category": shown[_new(data.items.features, known_items, items, of_items)].sum(),
        "examples of an item with a new cross": shown[_foreign(data, spec, items)].sum(),
        "examples of a user with a new category": served[
            _new(data.profiles.features, known_users, users, of_users)
        ].sum(),
        "behaviours of a new action": new_action[data.log.action[data.log.time < until]].sum(),
    }
    return {what: int(count) for what, count in found.items() if count}


def lines(found: Mapping[str, int], slice_name: str) -> list[str]:
    """`unseen`'s counts as they are reported."""
    return [f"{slice_name} slice: {count} {what}, which training did not see" for what, count in found.items()]


def _new(
    features: Sequence[dict[str, Any]], known: _Places, asked: _Places, names: Sequence[str]
) -> npt.NDArray[np.bool_]:
    """Which of the rows `asked` have a value, of the features `names`, that none of the rows `known` has."""
    seen: set[tuple[str, str]] = set()
    for row in _rows(features, known):
        seen.update(_values(row, names))
    return np.array([not seen.issuperset(_values(row, names)) for row in _rows(features, asked)], dtype=bool)


def _foreign(data: Dataset, spec: FeatureSpec, items: _Places) -> npt.NDArray[np.bool_]:
    """Which of the items have a cross outside the vocabulary; none where all crosses are hashed."""
    if not spec.crosses:
        return np.zeros(len(items), dtype=bool)
    vocabulary = frozenset(spec.crosses)
    return np.array([not vocabulary.issuperset(data.items.crosses[k]) for k in items.tolist()], dtype=bool)


def _rows(features: Sequence[dict[str, Any]], places: _Places) -> Iterable[dict[str, Any]]:
    return (features[k] for k in places.tolist())


def _values(row: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """(feature, value) of each category of a row."""
    found: list[tuple[str, str]] = []
    for name in names:
        value = row.get(name)
        if isinstance(value, str):
            found.append((name, value))
        elif isinstance(value, (list, tuple)):
            found += [(name, one) for one in value]
    return found
