"""SimTier's counts for the peers that keep ready columns: no operator of ONNX Runtime counts bits, so they take numba.

One pass per candidate writes the equal bits with every behaviour as bytes, and one per edge counts them; LLVM makes
vectors of both, and of the arithmetic below the processor's own bit count.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_1, _2, _4, _56 = (np.uint64(number) for number in (1, 2, 4, 56))
_PAIRS, _FOURS, _BYTES, _SUM = (
    np.uint64(number) for number in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101)
)


class Tiers:
    """Counter for one model's edges and windows; compiled when it is made."""

    def __init__(self, edges: tuple[int, ...], windows: tuple[int, ...], bits: int) -> None:
        assert bits == 128, "the kernel is written for two words, without an inner loop that would stop LLVM"
        self._edges, self._windows = np.array(edges, np.uint8), np.array(windows, np.int64)
        self(np.zeros((1, bits // 8), np.uint8), np.zeros((1, bits // 8), np.uint8))

    def __call__(self, signatures: NDArray[np.uint8], history: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Behaviours in each tier of each window, the newest last, i4 [K, tiers of all windows]."""
        newest = np.minimum(self._windows, len(history))
        ours = np.ascontiguousarray(history[len(history) - newest.max() :]).view(np.uint64).T.copy()
        out = np.empty((len(signatures), len(newest) * (len(self._edges) + 1)), np.int32)
        _count(np.ascontiguousarray(signatures).view(np.uint64), ours[0], ours[1], self._edges, newest, out)
        return out


@numba.njit(nogil=True, inline="always")
def _ones(x: np.uint64) -> np.uint64:
    x = x - ((x >> _1) & _PAIRS)
    x = (x & _FOURS) + ((x >> _2) & _FOURS)
    return (((x + (x >> _4)) & _BYTES) * _SUM) >> _56


@numba.njit(nogil=True)
def _count(
    theirs: NDArray[np.uint64],  # [K, words]
    low: NDArray[np.uint64],  # [L], the first words of the behaviours' signatures
    high: NDArray[np.uint64],  # [L], the second ones
    edges: NDArray[np.uint8],
    newest: NDArray[np.int64],
    out: NDArray[np.int32],
) -> None:
    length, tiers = len(low), len(edges) + 1
    equal = np.empty(length, np.uint8)
    for i in range(len(theirs)):
        x, y = theirs[i, 0], theirs[i, 1]
        for j in range(length):
            equal[j] = np.uint8(128) - np.uint8(_ones(x ^ low[j]) + _ones(y ^ high[j]))
        for w in range(len(newest)):
            near, at = equal[length - newest[w] :], w * tiers
            above = np.int32(newest[w])
            for e in range(len(edges)):
                edge, reached = edges[e], np.int32(0)
                for j in range(len(near)):
                    reached += np.int32(near[j] >= edge)
                out[i, at + e] = above - reached
                above = reached
            out[i, at + tiers - 1] = above
