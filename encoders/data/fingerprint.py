"""Data set -> the SHA-256 of all that a model can learn from it. Names the data of checkpoints and cached models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders.data.dataset import Dataset

_PART = 100_000  # rows at a time, so that memory maps stay on disk


def fingerprint(data: Dataset) -> str:
    """64 hex digits; equal for equal content, however it is stored."""
    found = hashlib.sha256()
    items, profiles, log, examples = data.items, data.profiles, data.log, data.examples
    found.update(json.dumps([data.name, list(data.actions)]).encode())
    for rows in (items.ids, items.features, items.crosses, items.attributes, profiles.ids, profiles.features):
        _rows(found, rows)
    columns: tuple[npt.NDArray[Any], ...] = (
        *(items.embeddings, items.added, items.removed),
        *(log.user, log.item, log.action, log.time),
        *(examples.user, examples.item, examples.clicked, examples.time),
    )
    for column in columns:
        _column(found, column)
    return found.hexdigest()


def _rows(found: hashlib._Hash, rows: Sequence[Any]) -> None:
    found.update(f"|{len(rows)}".encode())
    for at in range(0, len(rows), _PART):
        found.update(json.dumps(list(rows[at : at + _PART]), sort_keys=True, default=str).encode())


def _column(found: hashlib._Hash, column: npt.NDArray[Any]) -> None:
    found.update(f"|{column.dtype.str}{column.shape}".encode())
    for at in range(0, len(column), _PART):
        found.update(np.ascontiguousarray(column[at : at + _PART]).data)
