"""Readers' side of the rows: memory-mapped records of one generation, written by one process, read by all API processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.layout import RowLayout


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an N2O index has come, one entry per partition."""

    covered: NDArray[np.int64]  # last `items` offset covered, -1: none
    rows_offset: NDArray[np.int64]  # next offset to read of `rows.<generation>`, -1: none
    count: NDArray[np.int64]  # live rows
    digest: NDArray[np.uint64]  # sum of digest_of(key, version) over the live rows
    filled: NDArray[np.bool_]  # the newest fill proof agreed with count and digest
    mismatch: NDArray[np.bool_]  # the newest fill proof did not: the generation has failed


@dataclasses.dataclass(frozen=True)
class ArenaSize:
    """Items and bytes of an arena; `capacity` is how many records fit before it grows."""

    items: int
    capacity: int
    hot_bytes: int
    cold_bytes: int
    table_bytes: int


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Rows of n keys: `hot` aligned structured copy [n], all zero where not found; `found` bool[n]; `slots` u4[n]."""

    hot: NDArray[Any]
    found: NDArray[np.bool_]
    slots: NDArray[np.uint32]


class ArenaReader:
    """Many may be open, in any process and thread. Use `ArenaReader.open`."""

    @classmethod
    def open(cls, path: Path, layout: RowLayout) -> ArenaReader:
        """`path` is the folder given to N2OWriter. Raises StoreMissing when there is no arena (yet), N2OError on another layout."""
        raise NotImplementedError

    def gather(self, keys: NDArray[np.uint64]) -> Gathered:
        """Hot records of keys u8[n, 2]."""
        raise NotImplementedError

    def gather_cold(self, keys: NDArray[np.uint64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Cold records of keys u8[n, 2], zero where not found, and found bool[n]."""
        raise NotImplementedError

    def snapshot(self) -> tuple[NDArray[np.uint64], NDArray[Any]]:
        """Keys u8[m, 2] and cold records [m] of all live rows."""
        raise NotImplementedError

    def progress(self) -> Progress:
        raise NotImplementedError

    def size(self) -> ArenaSize:
        raise NotImplementedError
