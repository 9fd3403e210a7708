"""LSH signatures of items: bits of a projection of the centred frozen embedding.

Computed once per item and generation by `ItemFold`; compared bit by bit on the request path. The similarity of two
items is the number of equal bits divided by `bits`. Bits are packed in little order: bit k of a signature is bit k % 8
of byte k // 8.

One bit per projection says its sign. Two bits are a thermometer over two thresholds, 00 below both, 10 between, 11
above both, so that unequal bits count the thresholds between two items; everything that compares signatures stays as
it is. Of p projections, bit k is projection k against the lower threshold, bit p + k against the upper one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

COUNTED = 2_048  # behaviours of a longer window that SimTier counts for all


def projection(embedding_dim: int, bits: int, seed: int, bits_per_projection: int = 1) -> npt.NDArray[np.float32]:
    """A Gaussian random projection [embedding_dim, bits / bits_per_projection]; `bits` is a multiple of 8."""
    if bits % 8:
        raise ValueError(f"{bits} bits do not fill whole bytes")
    size = (embedding_dim, bits // bits_per_projection)
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def thresholds(
    embedding: npt.NDArray[np.float32], centre: npt.NDArray[np.float32], projection: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The two thresholds of each projection [2, p], which part the embeddings [n, e], n > 0, into thirds."""
    projected = (embedding - centre) @ projection
    return np.quantile(projected, (1 / 3, 2 / 3), axis=0).astype(np.float32)


def signatures(
    embedding: npt.NDArray[np.float32],
    centre: npt.NDArray[np.float32],
    projection: npt.NDArray[np.float32],
    thresholds: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Signatures u1 [n, bits / 8] of embeddings [n, e]: bit set where the projection is >= its threshold, 0 where
    none is given.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # of absurd embeddings; their rows are refused by the caller
        projected = (embedding - centre) @ projection
    limits = np.zeros((1, 1), dtype=np.float32) if thresholds is None else thresholds
    return np.packbits(np.hstack([projected >= limit for limit in limits]), axis=1, bitorder="little")


def directions(
    embedding: npt.NDArray[np.float32], centre: npt.NDArray[np.float32], bits: int
) -> npt.NDArray[np.float32]:
    """Centred embeddings [n, e] as vectors of length sqrt(bits), whose products stand for those of signs: bits times
    the cosine. For comparison only: rows hold signatures.
    """
    centred = embedding - centre
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred * (bits**0.5 / np.maximum(length, 1e-12)), dtype=np.float32)


def signs(signatures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Packed signatures [..., bits / 8] -> -1 and +1 [..., bits]."""
    return np.take(_SIGNS, signatures, axis=0).reshape(*signatures.shape[:-1], signatures.shape[-1] * 8)


def matches(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Equal bits [n, m] of signatures a [n, bits / 8] and b [m, bits / 8]; the oracle of the popcount kernels."""
    unequal = np.bitwise_count(a[:, None, :] ^ b[None, :, :]).sum(axis=2, dtype=np.int32)
    equal: npt.NDArray[np.int32] = 8 * a.shape[1] - unequal
    return equal


def tier_counts(
    matches: npt.NDArray[np.int32], edges: npt.NDArray[np.int32] | tuple[int, ...]
) -> npt.NDArray[np.int32]:
    """Histogram [n, len(edges) + 1] of each row of `matches` [n, m]; tier = number of edges <= equal bits."""
    tier = np.searchsorted(np.asarray(edges), matches, side="right")
    return np.stack([(tier == t).sum(axis=1, dtype=np.int32) for t in range(len(edges) + 1)], axis=1)


def thinned(window: npt.NDArray[np.uint8], exact: int, most: int = COUNTED) -> tuple[npt.NDArray[np.uint8], float]:
    """What SimTier counts of a window of signatures [L, bits / 8], oldest first: all where L - `exact` is at most
    `most`, else so many of those before the newest `exact`; and how many behaviours each of these stands for.

    They are every k-th in the order of their first 64 bits, so a set of equal signatures is counted right to within
    one weight, and like ones are near each other: on histories that were not made against it a tier errs less than
    with a random sample of the same size (docs/performance.md).
    """
    older = window[: max(0, len(window) - exact)]
    if len(older) <= most:
        return window, 1.0
    size = min(8, older.shape[1])
    begin = np.zeros((len(older), 8), np.uint8)
    begin[:, :size] = older[:, :size]
    order = np.argsort(begin.view(">u8")[:, 0].astype(np.uint64), kind="stable")
    places = ((np.arange(most) + 0.5) * (len(older) / most)).astype(np.int64)
    return np.concatenate([older[order[places]], window[len(older) :]]), len(older) / most


def weighted(counts: npt.NDArray[np.int32], weight: float) -> npt.NDArray[np.int32]:
    """What `counts` of a thinned window stand for, as the kernels round it."""
    out: npt.NDArray[np.int32] = ((counts.astype(np.int64) * round(weight * 65_536) + 32_768) >> 16).astype(np.int32)
    return out


def tier_edges(sample: npt.NDArray[np.number], tiers: int, bits: int) -> tuple[int, ...]:
    """`tiers` - 1 strictly ascending edges in 1..bits that halve a sample of equal bits again and again: the lower half
    is the first tier, the upper half of the rest the last ones.

    Tiers of like size would leave the few behaviours that are about nearly the same thing in one tier with an eighth of
    all others; what they say is in the tail.
    """
    if tiers - 1 > bits:
        raise ValueError(f"{tiers} tiers need more than {bits} bits")
    halves = 1 - 0.5 ** np.arange(1, tiers)
    quantiles = np.quantile(sample, halves) if sample.size else np.linspace(0, bits, tiers + 1)[1:-1]
    edges: list[int] = []
    for place, quantile in enumerate(quantiles):
        low = edges[-1] + 1 if edges else 1
        high = bits - (tiers - 2 - place)  # leaves room for the edges that follow
        edges.append(min(max(int(np.ceil(quantile)), low), high))
    return tuple(edges)


# The eight signs of every byte value, lowest bit first [256, 8].
_SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32) * 2 - 1
