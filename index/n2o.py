"""The N2O index of one generation on one host: RocksDB is the truth, the arena is what requests read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.arena import Progress
from index.layout import RowLayout


@dataclasses.dataclass(frozen=True)
class FillProof:
    """Row count and digest of a partition at the block's `covered` offset; sent with the last block of a fill."""

    count: int
    digest: int


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """The columns of one block: n rows of one `items` partition. For a deleted row the other columns hold zeros."""

    partition: int
    covered: int  # last `items` offset covered by this and all earlier blocks of the partition
    ids: list[str]
    versions: NDArray[np.uint64]
    offsets: NDArray[np.int64]  # in `items`
    deleted: NDArray[np.bool_]
    hot: NDArray[Any]  # layout.hot [n]; slot_version is the arena's and ignored
    cold: NDArray[Any]  # layout.cold [n]; visible_time is the host's and ignored
    attributes: list[bytes]  # JSON objects
    fill: FillProof | None = None


@dataclasses.dataclass(frozen=True)
class StoredRow:
    """One row as RocksDB holds it; times in ms since the epoch."""

    version: int
    offset: int  # in `items`
    partition: int
    event_time: int
    publish_time: int
    encode_time: int
    visible_time: int
    attributes: dict[str, Any]


class N2OWriter:
    """The only writer of an index (StoreLockedError otherwise)."""

    def __init__(self, path: Path, layout: RowLayout, partitions: int, hash_key: bytes) -> None:
        raise NotImplementedError

    def apply(self, batches: Sequence[tuple[RowBatch, int]]) -> int:
        """Blocks with their offsets in `rows.<generation>`, in log order. Returns how many rows were put or removed."""
        raise NotImplementedError

    def rows_offsets(self) -> NDArray[np.int64]:
        """Next offset to read of `rows.<generation>` per partition, -1: none."""
        raise NotImplementedError

    def progress(self) -> Progress:
        raise NotImplementedError

    def reset(self) -> None:
        """Empties the index, rows and progress, for a refill."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class N2OReader:
    """Single rows, from another process than the writer's (a RocksDB secondary instance). Raises StoreMissingError."""

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    def get(self, ids: Sequence[str]) -> list[StoredRow | None]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
