"""Rows meet a user: the join and the head's layers, generated as LLVM IR for one row layout and one head.

    z     = relu(joint + P + C w + D s + T log1p(counts) + mean of G[c])          vectors of h floats
    score = layer after layer on z, ReLU between layers

Why not numba: with the sizes known, a candidate's whole z stays in vector registers while everything is added to it;
numba's loops over a run-time width were ten times slower. What is a product with a matrix (C w, T log1p(counts), the
layers) is done for a block of candidates at once, so that a row of the matrix is loaded once for all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from infra.codegen import F32, HALF, I8, I16, I32, I64, ROOM, Code, Matrix

_TILE = 32  # candidates between which the first cache keeps what it has
_TABLES = 1 << 14  # bytes of D's tables that stay in the first cache with a tile


def together(width: int, narrow: bool) -> int:
    """Bytes of a signature whose tables of D are looked up in one go: what stays in the first cache."""
    return max(1, _TABLES // (32 * width * (2 if narrow else 4)))


@functools.lru_cache(maxsize=16)
def fours(width: int, narrow: bool) -> Callable[..., None]:
    """void fours(D [4 n, width], shares [parts, width], n, out [n, 16, width]): for every four of D's rows their sums
    with all 16 choices of signs, bit k of the choice = + for row k; where `narrow` times the shares of its part, as
    16-bit integers. A part is `together` bytes of a signature."""
    code = Code("fours", [F32.as_pointer(), F32.as_pointer(), I64, (I16 if narrow else F32).as_pointer()])
    D, shares, number, out = code.function.args
    vector = ir.VectorType(F32, width)

    def one(four: Any, _: list[Any]) -> list[Any]:
        build = code.build
        part = build.udiv(four, I64(2 * together(width, narrow)))
        share = code.vector(shares, build.mul(part, I64(width)), vector) if narrow else None
        rows = [
            code.vector(D, build.mul(build.add(build.mul(four, I64(4)), I64(k)), I64(width)), vector) for k in range(4)
        ]
        for choice in range(16):
            total = ir.Constant(vector, None)
            for k, row in enumerate(rows):
                total = build.fadd(total, row) if choice >> k & 1 else build.fsub(total, row)
            if narrow:
                total = build.fptosi(code.round(build.fmul(total, share)), ir.VectorType(I16, width))
            code.store(total, out, build.mul(build.add(build.mul(four, I64(16)), I64(choice)), I64(width)))
        return []

    code.loop(number, one, [])
    return code.compiled()


@functools.lru_cache(maxsize=16)
def score(hot: np.dtype[np.void], tiers: int, sizes: tuple[int, ...], narrow: bool) -> Callable[..., None]:
    """void score(hot, n, counts i4[n, tiers], P, C [bridges, h], D [b/4, 16, h], steps [parts, h], G, slots u2[65536],
    unmet, logs, T [tiers, h], weights, biases, out [n])

    `sizes` = h, hidden layers, 1; layer l has weights [sizes[l], sizes[l + 1]]. D's tables hold 16-bit integers where
    they are `narrow`, to be multiplied by the `steps` of their part. `unmet` is the place of a row of zeros in G.
    """
    fields = hot.fields
    assert fields is not None
    joint, bridge, signature, crosses = (fields[name] for name in ("joint", "bridge", "signature", "crosses"))
    width, bridges = joint[0].shape[0], bridge[0].shape[0]
    assert sizes[0] == width
    stored = HALF if joint[0].base.itemsize == 2 else F32
    entry = I16 if narrow else F32  # of D's tables
    kinds = [I8, I64, I32, F32, F32, entry, F32, F32, I16, I64, F32, F32, F32, F32, F32]
    code = Code("score", [kind if kind is I64 else kind.as_pointer() for kind in kinds])
    rows, number, counts, P, C, D, steps, G, slots, unmet, logs, T, weights, biases, out = code.function.args
    vector = ir.VectorType(F32, width)
    block, inputs = max(1, ROOM // width), bridges + tiers
    begun = code.scratch(_TILE * width)  # z of a tile, without what is a product with a matrix
    entries = ir.VectorType(entry, width)
    x = code.scratch(block * inputs)  # bridge weights and log1p(counts) of a block
    z = [code.scratch(block * size) for size in sizes[:-1]]

    def row_of(table: Any, index: Any) -> Any:
        return code.vector(table, code.build.mul(index, I64(width)), vector)

    def address(i: Any, name: str) -> Any:
        """Of a field of candidate i."""
        build = code.build
        return build.gep(rows, [build.add(build.mul(i, I64(hot.itemsize)), I64(fields[name][1]))])

    def floats(i: Any, name: str, kind: Any) -> Any:
        own = code.build.bitcast(address(i, name), stored.as_pointer())
        value = code.vector(own, I64(0), ir.VectorType(stored, kind.count))
        return code.build.fpext(value, kind) if stored is HALF else value

    def signs(first: Any, count: Any) -> None:
        """joint + P + D s of a tile into `begun`: one row out of each table of D, two tables per byte of a signature.
        A few bytes at a time for the whole tile, so that their tables stay in the first cache.
        """
        size, most = signature[0].shape[0], together(width, narrow)
        for place, start in enumerate(range(0, size, most)):
            part = range(start, min(size, start + most))

            def add_part(c: Any, _: list[Any], part: range = part, place: int = place) -> list[Any]:
                build = code.build
                i = build.add(first, c)
                here = build.mul(c, I64(width))
                sums = ir.Constant(entries, None)
                own = address(i, "signature")
                add = build.add if narrow else build.fadd
                for j in part:
                    byte = build.zext(build.load(build.gep(own, [I64(j)])), I64)
                    for half, value in enumerate((build.and_(byte, I64(15)), build.lshr(byte, I64(4)))):
                        row = build.mul(build.add(value, I64(16 * (2 * j + half))), I64(width))
                        sums = add(sums, code.vector(D, row, entries))
                if part.start:
                    base = code.vector(begun, here, vector)
                else:
                    base = build.fadd(floats(i, "joint", vector), code.vector(P, I64(0), vector))
                if narrow:
                    sums = build.sitofp(build.sext(sums, ir.VectorType(I32, width)), vector)
                    base = code.multiply_add(sums, code.vector(steps, I64(place * width), vector), base)
                else:
                    base = build.fadd(base, sums)
                code.store(base, begun, here)
                return []

            code.loop(count, add_part, [])

    def met(first: Any) -> Any:
        """Mean of G[c] over the row's crosses, by indexes alone: which crosses a row has no branch can foretell."""
        build = code.build
        total, present = ir.Constant(vector, None), I32(0)
        places = build.bitcast(first, I16.as_pointer())
        for c in range(crosses[0].shape[0]):
            cross = build.load(build.gep(places, [I64(c)]))
            used = build.icmp_unsigned("!=", cross, I16(0))
            row = build.zext(build.load(build.gep(slots, [build.zext(cross, I64)])), I64)
            total = build.fadd(total, row_of(G, build.select(used, row, unmet)))
            present = build.add(present, build.zext(used, I32))
        none = build.icmp_unsigned("==", present, I32(0))
        total = build.fadd(total, row_of(G, build.select(none, I64(0), unmet)))
        share = build.fdiv(F32(1), build.uitofp(build.select(none, I32(1), present), F32))
        return build.fmul(code.spread(share, vector), total)

    def enter(b: Any, c: Any, i: Any) -> None:
        """Candidate i, the tile's c-th, is the block's b-th: its products' inputs into x, all else into z."""
        build = code.build
        value = build.fadd(code.vector(begun, build.mul(c, I64(width)), vector), met(address(i, "crosses")))
        code.store(value, z[0], build.mul(b, I64(width)))
        own = build.gep(x, [build.mul(b, I64(inputs))])
        code.store(floats(i, "bridge", ir.VectorType(F32, bridges)), own, I64(0))
        first = build.mul(i, I64(tiers))
        for t in range(tiers):
            count = build.load(build.gep(counts, [build.add(first, I64(t))]))
            log = build.load(build.gep(logs, [build.zext(count, I64)]))
            build.store(log, build.gep(own, [I64(bridges + t)]))

    def candidates(first: Any, begin: Any, last: Any) -> None:
        """A block of a tile that begins at `first`: from its place `begin`; what is behind place `last` repeats it."""

        def place(b: Any) -> Any:
            here = code.build.add(begin, b)
            return code.build.select(code.build.icmp_unsigned("<", here, last), here, last)

        def enter_one(b: Any, _: list[Any]) -> list[Any]:
            c = place(b)
            enter(b, c, code.build.add(first, c))
            return []

        code.loop(block, enter_one, [])
        sums = [code.vector(z[0], I64(b * width), vector) for b in range(block)]
        places = [I64(b) for b in range(block)]
        sums = code.product(sums, places, bridges, Matrix(x, inputs), Matrix(C, width))
        counted = Matrix(code.build.gep(x, [I64(bridges)]), inputs)
        sums = code.product(sums, places, tiers, counted, Matrix(T, width))
        weight_at = bias_at = 0
        for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
            lanes = ir.VectorType(F32, before)
            sums = [code.relu(value) for value in sums]
            if layer == len(sizes) - 2:  # one output: the sum of products
                row = code.vector(weights, I64(weight_at), lanes)
                bias = code.build.load(code.build.gep(biases, [I64(bias_at)]))
                for b, value in enumerate(sums):
                    total = code.sum(code.build.fmul(value, row), bias)
                    code.build.store(total, code.build.gep(out, [code.build.add(first, place(I64(b)))]))
                break
            for b, value in enumerate(sums):
                code.store(value, z[layer], I64(b * before))
            kind = ir.VectorType(F32, after)
            sums = [code.vector(biases, I64(bias_at), kind)] * block
            own = Matrix(code.build.gep(weights, [I64(weight_at)]), after)
            sums = code.product(sums, places, before, Matrix(z[layer], before), own)
            weight_at += before * after
            bias_at += after

    def tile(k: Any, _: list[Any]) -> list[Any]:
        build = code.build
        first = build.mul(k, I64(_TILE))
        left = build.sub(number, first)
        count = build.select(build.icmp_unsigned("<", left, I64(_TILE)), left, I64(_TILE))
        signs(first, count)
        last = code.build.sub(count, I64(1))

        def one_block(number: Any, _: list[Any]) -> list[Any]:
            candidates(first, code.build.mul(number, I64(block)), last)
            return []

        code.loop(code.build.udiv(code.build.add(count, I64(block - 1)), I64(block)), one_block, [])
        return []

    code.loop(code.build.udiv(code.build.add(number, I64(_TILE - 1)), I64(_TILE)), tile, [])
    return code.compiled()
