"""Products of few rows with a weight matrix, generated as LLVM IR for one layer.

    out[rows, N] = activation(x[rows, K] W[K, N] + bias)

A block of up to 14 rows by 32 columns stays in registers (6 by 16 without AVX-512). The weights lie packed: of each 32
columns all K rows, one after the other, of which a piece stays in the first cache while all rows go by. Rows are parted
into blocks of equal size, so that there is no small rest. A row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from infra import codegen
from infra.codegen import F32, I64, Code

_PIECE = 256  # rows of the packed weights that are used for all rows of x before the next ones


def _tile() -> tuple[int, int]:
    """Rows and columns of what stays in registers: 28 of 32 long ones, or 12 of 16 shorter ones."""
    return (14, 32) if "+avx512f" in codegen.host()[1].split(",") else (6, 16)


def fits(inner: int, columns: int) -> bool:
    """Whether a layer of these sizes can be one."""
    return inner >= 16 and columns % (_tile()[1] // 2) == 0


def packed(weight: Tensor) -> Tensor:
    """[N, K] as the function takes it: f4[N K]."""
    _, width = _tile()
    turned = weight.t().contiguous()  # [K, N]
    panels = [turned[:, at : at + width].reshape(-1) for at in range(0, turned.shape[1], width)]
    return torch.cat(panels).contiguous()


@functools.lru_cache(maxsize=256)
def product(inner: int, columns: int, relu: bool) -> Callable[..., None]:
    """void(x [rows, K], packed [N K], bias [N], out [rows, N], rows): addresses and a number above 0."""
    most, width = _tile()
    code = Code("product", [F32.as_pointer()] * 4 + [I64])
    x, weights, bias, out, rows = code.function.args
    build = code.build
    blocks = build.udiv(build.add(rows, I64(most - 1)), I64(most))
    size, larger = build.udiv(rows, blocks), build.urem(rows, blocks)
    pieces = [(at, min(_PIECE, inner - at)) for at in range(0, inner, _PIECE)]

    def panel(begin: Any, wide: int, first: int, depth: int) -> None:
        """All rows, `wide` columns from `begin` on, of one piece."""
        own = code.build.gep(weights, [code.build.add(code.build.mul(begin, I64(inner)), I64(first * wide))])

        def block(number: Any, _: list[Any]) -> list[Any]:
            build = code.build
            start = build.add(
                build.mul(number, size), build.select(build.icmp_unsigned("<", number, larger), number, larger)
            )
            height = build.add(size, build.zext(build.icmp_unsigned("<", number, larger), I64))
            after = code.function.append_basic_block()
            choice = build.switch(height, after)
            for count in range(1, most + 1):
                inside = code.function.append_basic_block()
                choice.add_case(I64(count), inside)
                build.position_at_end(inside)
                _rows(code, x, own, bias, out, start, begin, count, wide, (inner, columns), (first, depth), relu)
                build.branch(after)
            build.position_at_end(after)
            return []

        code.loop(blocks, block, [])

    whole, rest = divmod(columns, width)
    for first, depth in pieces:

        def one(number: Any, _: list[Any], first: int = first, depth: int = depth) -> list[Any]:
            panel(code.build.mul(number, I64(width)), width, first, depth)
            return []

        if whole:
            code.loop(whole, one, [])
        if rest:
            panel(I64(whole * width), rest, first, depth)
    return code.compiled()


def _rows(
    code: Code,
    x: Any,
    weights: Any,
    bias: Any,
    out: Any,
    start: Any,
    begin: Any,
    count: int,
    wide: int,
    sizes: tuple[int, int],
    piece: tuple[int, int],
    relu: bool,
) -> None:
    """`count` rows from `start` on, `wide` columns from `begin` on."""
    build, kind = code.build, ir.VectorType(F32, wide)
    (inner, columns), (first, depth) = sizes, piece
    place = build.add(build.mul(start, I64(columns)), begin)
    base = build.gep(x, [build.add(build.mul(start, I64(inner)), I64(first))])
    if first:
        sums = [code.vector(out, build.add(place, I64(r * columns)), kind) for r in range(count)]
    else:
        sums = [code.vector(bias, begin, kind)] * count

    def step(k: Any, sums: list[Any]) -> list[Any]:
        build = code.build
        own = code.vector(weights, build.mul(k, I64(wide)), kind)
        one = [build.load(build.gep(base, [build.add(k, I64(r * inner))])) for r in range(count)]
        return [code.multiply_add(code.spread(a, kind), own, value) for a, value in zip(one, sums, strict=True)]

    for r, value in enumerate(code.loop(depth, step, sums)):
        if relu and first + depth == inner:
            zero = ir.Constant(kind, None)
            value = code.build.select(code.build.fcmp_ordered("<", value, zero), zero, value)  # NaN stays
        code.store(value, out, code.build.add(place, I64(r * columns)))
