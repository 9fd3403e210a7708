"""The real-time arithmetic of one request: rows gathered from the arena meet arrays prepared per user and generation.

    z     = joint + P + C w + D s + T log1p(counts) + mean over the row's crosses of G[c]
    score = the head's layers on relu(z)                            s = +-1 by signature bit

D s costs b/4 table look-ups per candidate instead of b x h multiplications: `user_tables` adds up D's columns for all
16 values of every four signature bits. Everything that takes longer than microseconds runs without the GIL. The
`*_oracle` functions say the same in plain NumPy; tests hold each kernel against its oracle.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index import popcount_ir, score_ir
from index.layout import RowLayout, aligned_empty

F4 = NDArray[np.float32]
CROSS_SLOTS = 65536
_LEAST_STEP = 1e-30  # of a column of D without weight


class KernelError(ValueError):
    """Arrays whose shapes do not go together."""


@dataclasses.dataclass(frozen=True)
class UserTables:
    """What `score` needs of a user block; made once per block by `user_tables`."""

    P: F4  # [h]
    C: F4  # [n, h]
    D: F4 | NDArray[np.int16]  # [b/4, 16, h]
    steps: F4  # [parts of the signature, h], what 1 is worth where D holds integers
    G: F4  # [c+2, h], the last row zero
    cross_slots: NDArray[np.uint16]  # [c]
    window: popcount_ir.Blocks
    logs: F4  # log1p of all counts there may be

    @property
    def nbytes(self) -> int:
        arrays = (self.P, self.C, self.D, self.steps, self.G, self.cross_slots, self.window.data, self.logs)
        return sum(array.nbytes for array in arrays)


@dataclasses.dataclass(frozen=True)
class HeadTables:
    """What `score` needs of a generation's head; made once per generation by `head_tables`."""

    T: F4  # [tiers of every histogram, h]
    edges: NDArray[np.int64]
    sizes: tuple[int, ...]  # h, hidden layers, 1
    weights: F4  # all layers' [in, out], one after the other
    biases: F4  # all layers' [out]


def user_tables(
    P: F4,
    C: F4,
    D: F4,
    G: F4,
    cross_slots: NDArray[np.uint16],
    window: NDArray[np.uint8],
    lengths: tuple[int, ...],
    weight: float = 1.0,
    *,
    narrow: bool,
) -> UserTables:
    """From P [h], C [n, h], D [b, h], G [c+1, h] (row 0 = absent cross), cross_slots u2[c], the signatures u1[L, b/8]
    of SimTier's window, oldest first, how many of its newest each histogram counts: L first, then ever fewer; and how
    many behaviours each stands for that the first alone counts.
    `narrow`: D's tables as 16-bit integers. Their steps are as small as lets no sum over a part of the signature run
    over; an entry errs by half a step at most, so a number of z by some 0.3 sqrt(b / 4) steps. Raises KernelError when
    shapes do not go together."""
    bits, width = D.shape
    fitting = P.shape == (width,) and C.shape[1] == width and G.shape == (len(cross_slots) + 1, width)
    nested = [len(window), *lengths[1:]] == sorted(lengths, reverse=True)
    if not fitting or bits % 8 or window.shape != (len(window), bits // 8) or not nested:
        raise KernelError(f"P {P.shape} C {C.shape} D {D.shape} G {G.shape} window {window.shape} of {lengths}")
    exact = lengths[1] if len(lengths) > 1 else 0
    rows, fours = np.ascontiguousarray(D, np.float32), _aligned_f4(bits // 4, 16, width)
    part = 8 * score_ir.together(width, narrow)  # rows of D
    most = np.add.reduceat(np.abs(rows), np.arange(0, bits, part), axis=0)
    steps = _aligned(most / (32_767 - part // 4))
    if narrow:
        fours = aligned_empty(fours.size, np.dtype(np.int16)).reshape(fours.shape)
    shares = 1 / np.maximum(steps, _LEAST_STEP)
    score_ir.fours(width, narrow)(rows.ctypes.data, shares.ctypes.data, bits // 4, fours.ctypes.data)
    return UserTables(
        _aligned(P),
        _aligned(C),
        fours,
        steps,
        cross_table(G),
        np.ascontiguousarray(cross_slots, np.uint16),
        popcount_ir.blocks_of(window, lengths, weight),
        np.log1p(np.arange(exact + math.ceil(max(1.0, weight) * (len(window) - exact)) + 2, dtype=np.float32)),
    )


def cross_table(G: F4) -> F4:
    """`UserTables.G` [c+2, h] of G [c+1, h]."""
    return np.concatenate([G, np.zeros((1, G.shape[1]))], out=_aligned_f4(len(G) + 1, G.shape[1]))


def head_tables(T: F4, edges: NDArray[Any], weights: Sequence[F4], biases: Sequence[F4]) -> HeadTables:
    """From T [h, tiers of every histogram], ascending integer edges [tiers - 1], and the MLP after the first layer:
    weights[i] [out, in] (torch's form), biases[i] [out], ReLU between layers, the last out = 1. Raises KernelError."""
    sizes = [int(T.shape[0]), *(len(bias) for bias in biases)]
    shapes = [weight.shape for weight in weights]
    if T.shape[1] % (len(edges) + 1) or shapes != list(zip(sizes[1:], sizes[:-1], strict=True)) or sizes[-1] != 1:
        raise KernelError(f"T {T.shape}, {len(edges)} edges, weights {shapes}")
    return HeadTables(
        _aligned(T.T),
        np.asarray(edges, np.int64),
        tuple(sizes),
        _aligned(np.concatenate([np.ravel(weight.T) for weight in weights])),
        np.concatenate([np.asarray(bias, np.float32).ravel() for bias in biases]),
    )


def score(hot: NDArray[Any], user: UserTables, head: HeadTables) -> F4:
    """f4[n] logits of gathered hot records [n]. An item without crosses gets G[0], as one in crosses that are absent.
    Raises KernelError when rows, user and head are of different shapes."""
    fields = hot.dtype.fields
    assert fields is not None
    joint, bridge, signature = (fields[name] for name in ("joint", "bridge", "signature"))
    width, bridges, size = joint[0].shape[0], bridge[0].shape[0], signature[0].shape[0]
    tiers = (len(head.edges) + 1) * len(user.window.lengths)
    if user.C.shape != (bridges, width) or len(user.D) != 2 * size or head.T.shape != (tiers, width):
        raise KernelError(
            f"rows {hot.dtype}, user C {user.C.shape} D {user.D.shape}, {len(user.window.lengths)} histograms, "
            f"head T {head.T.shape}"
        )
    hot = np.ascontiguousarray(hot)
    counts = _scratch.counts(len(hot) * tiers)
    first = hot.ctypes.data + signature[1]
    popcount_ir.counts(first, hot.dtype.itemsize, len(hot), size, user.window, head.edges, counts)
    out = np.empty(len(hot), np.float32)
    slots = _scratch.cross_map
    place_crosses(slots, user)
    join(hot, counts, user, head, slots, out)
    slots[user.cross_slots] = 0
    return out


def place_crosses(slots: NDArray[np.uint16], user: UserTables) -> None:
    """Notes in slots u2[65536], zero before, which row of G is each cross's."""
    slots[user.cross_slots] = np.arange(1, len(user.cross_slots) + 1, dtype=np.uint16)


def join(
    hot: NDArray[Any], counts: NDArray[np.int32], user: UserTables, head: HeadTables, slots: NDArray[np.uint16], out: F4
) -> None:
    """The rest of `score`, into f4[n]: SimTier's counts i4[n, tiers of all histograms] are there, crosses in place,
    and all arrays are contiguous and of shapes that go together."""
    code, arguments = joining(hot, counts, user, head, slots, out)
    code(*arguments)


def joining(
    hot: NDArray[Any], counts: NDArray[np.int32], user: UserTables, head: HeadTables, slots: NDArray[np.uint16], out: F4
) -> tuple[Callable[..., None], list[int]]:
    """The machine code of `join` and its arguments, most of them addresses: good while all arrays are alive."""
    before = [a.ctypes.data for a in (counts, user.P, user.C, user.D, user.steps, user.G, slots)]
    after = [a.ctypes.data for a in (user.logs, head.T, head.weights, head.biases, out)]
    code = score_ir.score(hot.dtype, len(head.T), head.sizes, user.D.dtype == np.int16)
    return code, [hot.ctypes.data, len(hot), *before, len(user.G) - 1, *after]


def score_oracle(
    hot: NDArray[Any],
    block: tuple[Any, ...],
    T: F4,
    edges: NDArray[Any],
    weights: Sequence[F4],
    biases: Sequence[F4],
) -> NDArray[np.float64]:
    """f8[n]: `score` from the arguments of `user_tables` and `head_tables`."""
    P, C, D, G, cross_slots, window, lengths, weight = (*block, 1.0)[:8]
    windows = [window[len(window) - length :] for length in lengths]
    signs = np.unpackbits(hot["signature"], axis=1, bitorder="little").astype(np.float64) * 2 - 1
    counts = [simtier_counts_oracle(hot["signature"], window, edges).astype(np.int64) for window in windows]
    exact = counts[1] if len(counts) > 1 else 0
    counts[0] = exact + ((counts[0] - exact) * round(65_536 * weight) + 32_768) // 65_536
    tiers = np.concatenate(counts, axis=1)
    z = hot["joint"].astype(np.float64) + P + hot["bridge"].astype(np.float64) @ C + signs @ D
    z += np.log1p(tiers.astype(np.float64)) @ T.T
    rows_of = {int(slot): row for row, slot in enumerate(cross_slots, 1)}
    for i, crosses in enumerate(hot["crosses"].tolist()):
        present = [rows_of.get(cross, 0) for cross in crosses if cross] or [0]
        z[i] += G[present].astype(np.float64).mean(axis=0)
    for weight, bias in zip(weights, biases, strict=True):
        z = np.maximum(z, 0) @ weight.T.astype(np.float64) + bias
    return np.asarray(z[:, 0])


def simtier_counts(signatures: NDArray[np.uint8], window: NDArray[np.uint8], edges: NDArray[Any]) -> NDArray[np.int32]:
    """i4[n, tiers]: for signatures u1[n, b/8], how many of window u1[L, b/8] have exactly t of the edges <= equal
    bits."""
    signatures = np.ascontiguousarray(signatures)
    size, blocks = signatures.shape[1], popcount_ir.blocks_of(window, (len(window),))
    counts = np.empty((len(signatures), len(edges) + 1), np.int32)
    popcount_ir.counts(signatures.ctypes.data, size, len(signatures), size, blocks, edges, counts)
    return counts


def simtier_counts_oracle(
    signatures: NDArray[np.uint8], window: NDArray[np.uint8], edges: NDArray[Any]
) -> NDArray[np.int32]:
    """`simtier_counts`."""
    different = np.bitwise_count(signatures[:, None, :] ^ window[None, :, :]).sum(axis=2, dtype=np.int64)
    tier = np.searchsorted(np.asarray(edges), 8 * signatures.shape[1] - different, side="right")
    return np.stack([(tier == t).sum(axis=1) for t in range(len(edges) + 1)], axis=1).astype(np.int32)


def best(values: F4, k: int) -> NDArray[np.int64]:
    """Places, ascending, of all values that are not below the k-th best: k of them, and more where it is there more
    than once. NaN counts as the lowest."""
    if k <= 0:
        return np.empty(0, np.int64)
    if k >= len(values):
        return np.arange(len(values))
    clean = np.where(np.isnan(values), np.float32(-np.inf), values)
    return np.flatnonzero(clean >= np.partition(clean, len(clean) - k)[len(clean) - k])


def best_oracle(values: F4, k: int) -> NDArray[np.int64]:
    """`best`."""
    clean = [-math.inf if math.isnan(value) else value for value in values.tolist()]
    limit = sorted(clean, reverse=True)[: max(0, k)]
    return np.array([place for place, value in enumerate(clean) if limit and value >= limit[-1]], np.int64)


def warm_up(layout: RowLayout, head: HeadTables) -> None:
    """Compiles every kernel for these rows and this head, so that no request pays for it."""
    hot = aligned_empty(1, layout.hot)
    hot.view(np.uint8)[:] = 0
    width, tiers = layout.width, len(head.edges) + 1
    user = user_tables(
        np.zeros(width, np.float32),
        np.zeros((layout.bridges, width), np.float32),
        np.zeros((layout.bits, width), np.float32),
        np.zeros((1, width), np.float32),
        np.zeros(0, np.uint16),
        np.zeros((1, layout.bits // 8), np.uint8),
        (1,) * (len(head.T) // tiers),
        narrow=layout.precision == "fp16",
    )
    score(hot, user, head)


def _aligned(values: NDArray[Any]) -> F4:
    """A contiguous copy that begins at a cache line: a vector that straddles two takes twice as long to load."""
    out = _aligned_f4(*values.shape)
    out[...] = values
    return out


def _aligned_f4(*shape: int) -> F4:
    return aligned_empty(math.prod(shape), np.dtype(np.float32)).reshape(shape)


class _Scratch(threading.local):
    """A thread's own room; fresh memory would cost each request a page fault per 4 KiB."""

    def __init__(self) -> None:
        self.cross_map = np.zeros(CROSS_SLOTS, np.uint16)  # row of G by cross; all zero (absent) between calls
        self._counts = np.empty(0, np.int32)

    def counts(self, size: int) -> NDArray[np.int32]:
        if len(self._counts) < size:
            self._counts = np.empty(size, np.int32)
        return self._counts[:size]


_scratch = _Scratch()
