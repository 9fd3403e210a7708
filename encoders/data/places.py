"""Ids of published files -> places in the tables, for whole-number ids: sorted arrays, 8 bytes per id (8 more for each
value kept with it), where a dictionary would need over 100.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I8 = npt.NDArray[np.int64]
_PENDING = 1 << 20  # ids that wait before they are merged, at least


class Collected:
    """Distinct ids of a stream, with the values of each one's first row; merged as soon as as many wait as are known,
    so that memory is a few times that of the distinct ids.
    """

    def __init__(self, values: int = 0) -> None:
        self._columns = [np.empty(0, dtype=np.int64)] * (1 + values)
        self._waiting: list[list[I8]] = []
        self._count = 0
        self.rows = 0  # of the stream

    def add(self, ids: I8, *values: I8) -> None:
        self.rows += len(ids)
        self._waiting.append(_first([ids, *values]))
        self._count += len(self._waiting[-1][0])
        if self._count > max(_PENDING, len(self._columns[0])):
            self._merge()

    def result(self) -> tuple[I8, ...]:
        """The ids, ascending, and the values in the same order."""
        self._merge()
        return tuple(self._columns)

    def _merge(self) -> None:
        both = [np.concatenate(parts) for parts in zip(self._columns, *self._waiting, strict=True)]
        self._columns, self._waiting, self._count = _first(both), [], 0


def places(ids: I8, wanted: I8) -> npt.NDArray[np.int32]:
    """Place of each wanted id among the ascending `ids`; -1 where it is not there."""
    if not len(ids):
        return np.full(len(wanted), -1, dtype=np.int32)
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[at] == wanted, at, -1).astype(np.int32)


def _first(columns: list[I8]) -> list[I8]:
    """The rows in which an id (first column) comes for the first time, by id."""
    ids, rows = np.unique(columns[0], return_index=True)
    return [ids, *(column[rows] for column in columns[1:])]
