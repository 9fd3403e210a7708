"""The popcount histograms of SimTier, generated as LLVM IR for one signature size and number of tiers.

Why not numba: it compares one pair at a time in 64-bit words; here 64 behaviours are compared with a candidate at
once, one byte lane each, which is three to five times faster where the machine has vector popcounts and still good
where LLVM builds them from table look-ups.

The window is stored newest first in blocks of 64 behaviours: byte k of all 64, then byte k + 1 (`blocks_of`). The
histograms are over its newest behaviours, the longest first, so that a block is compared once for all of them. For a
candidate and a block:

    distance[64] = sum over bytes of popcount(candidate byte XOR block bytes)       lanes of 8 bits, 16 from 256 bits on
    near[t] += number of lanes with distance < limit[t]                             one mask and popcount per edge

Of a long window a sample is there: then what the first histogram counts and no shorter one does is multiplied by how
many behaviours each stands for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from index.layout import aligned_empty
from infra.codegen import I8, I16, I32, I64, Code

LANES = 64
WHOLE = 1 << 16  # a weight of 1
_BYTES_IN_LANE = 31  # so many popcounts of a byte fit an 8-bit lane


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A window of behaviours' signatures in the kernel's order, and how many of its newest each histogram counts."""

    data: NDArray[np.uint8]  # [blocks, b/8, 64], aligned; the last block is filled up with zeros
    lengths: NDArray[np.int64]  # [histograms], descending
    weight: int = WHOLE  # of what only the first counts, in 1/65,536


def fixed(weight: float) -> int:
    """A weight as the kernel takes it."""
    return round(weight * WHOLE)


def blocks_of(window: NDArray[np.uint8], lengths: tuple[int, ...], weight: float = 1.0) -> Blocks:
    """From signatures u1[L, b/8], oldest first, L >= lengths, descending, and how many behaviours each stands for that
    only the first histogram counts."""
    length, size = window.shape
    count = -(-length // LANES)
    full = np.zeros((count * LANES, size), np.uint8)
    full[:length] = window[::-1]
    data = aligned_empty(count * size * LANES, np.dtype(np.uint8)).reshape(count, size, LANES)
    data[:] = full.reshape(count, LANES, size).transpose(0, 2, 1)
    return Blocks(data, np.array(lengths, np.int64), fixed(weight))


def counts(
    signatures: int, stride: int, number: int, size: int, blocks: Blocks, edges: NDArray[Any], out: NDArray[np.int32]
) -> None:
    """Fills i4[number, histograms x tiers]. The candidates' signatures of `size` bytes begin at address `signatures`,
    `stride` bytes apart."""
    limits = limits_of(size, edges)
    arrays = [array.ctypes.data for array in (blocks.data, blocks.lengths, limits, out)]
    compiled(size, len(edges), len(blocks.lengths))(signatures, stride, number, blocks.weight, *arrays)


def limits_of(size: int, edges: NDArray[Any]) -> NDArray[np.uint16]:
    """bits - distance >= edge, as distance < limit u2[edges], for signatures of `size` bytes; beyond both ends every or
    no distance is below it."""
    return np.clip(8 * size - np.asarray(edges, np.int64) + 1, 0, 8 * size + 1).astype(np.uint16)


@functools.lru_cache(maxsize=16)
def compiled(size: int, edges: int, histograms: int) -> Callable[..., None]:
    """void simtier(u1* signatures, i8 stride, i8 n, i8 weight, u1* blocks, i8* lengths, u2* limits, i4* counts)"""
    lane = I8 if 8 * size < 256 else I16
    bytes_, lanes = ir.VectorType(I8, LANES), ir.VectorType(lane, LANES)
    code = Code("simtier", [I8.as_pointer(), I64, I64, I64, *(kind.as_pointer() for kind in (I8, I64, I16, I32))])
    signatures, stride, number, weight, blocks, lengths_at, limits_at, out = code.function.args
    build = code.build
    lengths = [build.load(build.gep(lengths_at, [I64(q)])) for q in range(histograms)]
    last_blocks = [build.udiv(build.add(length, I64(LANES - 1)), I64(LANES)) for length in lengths]
    limits = []
    for t in range(edges):
        limit = build.load(build.gep(limits_at, [I64(t)]), align=2)
        limits.append(code.spread(build.trunc(limit, I8) if lane is I8 else limit, lanes))

    def inside(length: Any, at: Any) -> Any:
        """Bits of the lanes of block `at` that a histogram of this length counts; it counts one at least."""
        left = code.build.sub(length, code.build.mul(at, I64(LANES)))
        part = code.build.sub(code.build.shl(I64(1), left), I64(1))
        return code.build.select(code.build.icmp_unsigned("<", left, I64(LANES)), part, I64(-1))

    def distance(own: list[Any], at: Any) -> Any:
        build = code.build
        base = build.mul(at, I64(LANES * size))
        sums: list[Any] = []  # of at most _BYTES_IN_LANE bytes each
        for k in range(size):
            ones = code.popcount(build.xor(code.vector(blocks, build.add(base, I64(LANES * k)), bytes_), own[k]))
            if k % _BYTES_IN_LANE == 0:
                sums.append(ones)
            else:
                sums[-1] = build.add(sums[-1], ones)
        return functools.reduce(build.add, sums if lane is I8 else [build.zext(value, lanes) for value in sums])

    def stood_for(all_: Any, exact: Any) -> Any:
        build = code.build
        others = build.mul(build.sub(all_, exact), weight)
        return build.add(exact, build.lshr(build.add(others, I64(WHOLE // 2)), I64(16)))

    def candidate(i: Any, _: list[Any]) -> list[Any]:
        build = code.build
        signature = build.gep(signatures, [build.mul(i, stride)])
        own = [code.spread(build.load(build.gep(signature, [I64(k)])), bytes_) for k in range(size)]
        near = [[I64(0)] * edges for _ in range(histograms)]
        for q in reversed(range(histograms)):  # the blocks of the shortest are those of all; those behind, of fewer
            begin = last_blocks[q + 1] if q + 1 < histograms else I64(0)

            def block(k: Any, values: list[Any], q: int = q, begin: Any = begin) -> list[Any]:
                at = code.build.add(begin, k)
                masks = [inside(lengths[r], at) for r in range(q + 1)]
                far = distance(own, at)
                below = [code.build.bitcast(code.build.icmp_unsigned("<", far, limit), I64) for limit in limits]
                return [
                    code.build.add(values[r * edges + t], code.popcount(code.build.and_(below[t], masks[r])))
                    for r in range(q + 1)
                    for t in range(edges)
                ]

            started = [value for row in near[: q + 1] for value in row]
            ended = code.loop(code.build.sub(last_blocks[q], begin), block, started)
            near[: q + 1] = [ended[r * edges : (r + 1) * edges] for r in range(q + 1)]
        build = code.build
        tiers = []  # of each histogram
        for length, row in zip(lengths, near, strict=True):
            reached = [length, *row, I64(0)]  # behaviours with at least t edges <= equal bits
            tiers.append([build.sub(more, fewer) for more, fewer in itertools.pairwise(reached)])
        exact = tiers[1] if histograms > 1 else [I64(0)] * (edges + 1)
        tiers[0] = [stood_for(all_, few) for all_, few in zip(tiers[0], exact, strict=True)]
        for t, value in enumerate(itertools.chain(*tiers)):
            place = build.add(build.mul(i, I64(histograms * (edges + 1))), I64(t))
            build.store(build.trunc(value, I32), build.gep(out, [place]))
        return []

    code.loop(number, candidate, [])
    return code.compiled()
