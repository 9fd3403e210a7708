"""Rows as a store takes them; needs nothing of pytest, so that benchmarks in other environments have it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.n2o import RowBatch


def batch_of(
    ids: Sequence[str],
    start: int,
    hot: NDArray[Any],
    cold: NDArray[Any],
    versions: Sequence[int] | None = None,
    attributes: Sequence[bytes] | None = None,
    deleted: int = 0,
) -> RowBatch:
    """Ready records as the rows of partition 0 from offset `start` on; the last `deleted` of them are deletions."""
    n = len(ids)
    return RowBatch(
        partition=0,
        covered=start + n - 1,
        ids=list(ids),
        versions=np.array(versions or [1] * n, np.uint64),
        offsets=np.arange(start, start + n, dtype=np.int64),
        kinds=(np.arange(n) >= n - deleted).astype(np.uint8),
        hot=hot,
        cold=cold,
        attributes=list(attributes or [b"{}"] * n),
    )
