"""Products of few rows with a weight matrix, generated as LLVM IR for one layer.

    out[rows, N] = activation(x[rows, K] W[K, N] + bias)

A block of up to 14 rows by 32 columns stays in registers (6 by 16 without AVX-512). The weights lie packed: of each 32
columns all K rows, one after the other, of which a piece stays in the first cache while a chunk of rows goes by. Rows
are parted into chunks and blocks of equal size, so that there is no small rest. A row's bits do not depend on the rows
beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from infra import codegen
from infra.codegen import F32, I64, Code, Matrix

_PIECE = 256  # rows of the packed weights that are used for all rows of a chunk before the next ones
_CHUNK = 512 << 10  # bytes of x and out that stay in the second cache while all weights go by


def _tile() -> tuple[int, int]:
    """Rows and columns of what stays in registers: 28 of 32 long ones, or 12 of 16 shorter ones."""
    return (14, 32) if "+avx512f" in codegen.host()[1].split(",") else (6, 16)


def fits(inner: int, columns: int) -> bool:
    """Whether a layer of these sizes can be one."""
    return inner > 0 and columns >= 8


def _panels(columns: int) -> list[tuple[int, int]]:
    """First column and width of each: as many wide ones as there are, then halves."""
    found, begin = [], 0
    for width in (_tile()[1], 16, 8, 4, 2, 1):
        while columns - begin >= width:
            found.append((begin, width))
            begin += width
    return found


def packed(weight: Tensor) -> Tensor:
    """[N, K] as the function takes it: f4[N K]."""
    turned = weight.t()
    return torch.cat([turned[:, begin : begin + width].reshape(-1) for begin, width in _panels(len(weight))])


@functools.lru_cache(maxsize=256)
def product(inner: int, columns: int, relu: bool) -> Callable[..., None]:
    """void(x [rows, K], packed [N K], bias [N], out [rows, N], rows): addresses and a number above 0."""
    most, width = _tile()
    code = Code("product", [F32.as_pointer()] * 4 + [I64])
    x, weights, bias, out, rows = code.function.args
    panels = _panels(columns)
    whole = sum(wide == width for _, wide in panels)
    chunks = _ceiling(code, rows, max(most, _CHUNK // (4 * (inner + columns))))

    def chunk(number: Any, _: list[Any]) -> list[Any]:
        begun, height = part(code, rows, chunks, number)
        blocks = _ceiling(code, height, most)

        def panel(begin: Any, wide: int, first: int) -> None:
            """All rows, `wide` columns from `begin` on, of one piece."""
            depth = min(_PIECE, inner - first)
            own = code.build.gep(weights, [code.build.add(code.build.mul(begin, I64(inner)), I64(first * wide))])

            def block(number: Any, _: list[Any]) -> list[Any]:
                build = code.build
                within, size = part(code, height, blocks, number)
                start = build.add(begun, within)
                after = code.function.append_basic_block()
                choice = build.switch(size, after)
                for count in range(1, most + 1):
                    inside = code.function.append_basic_block()
                    choice.add_case(I64(count), inside)
                    build.position_at_end(inside)
                    _rows(code, x, own, bias, out, start, begin, count, wide, (inner, columns), (first, depth), relu)
                    build.branch(after)
                build.position_at_end(after)
                return []

            code.loop(blocks, block, [])

        for first in range(0, inner, _PIECE):

            def one(number: Any, _: list[Any], first: int = first) -> list[Any]:
                panel(code.build.mul(number, I64(width)), width, first)
                return []

            if whole:
                code.loop(whole, one, [])
            for begin, wide in panels[whole:]:
                panel(I64(begin), wide, first)
        return []

    code.loop(chunks, chunk, [])
    return code.compiled()


def _ceiling(code: Code, number: Any, size: int) -> Any:
    return code.build.udiv(code.build.add(number, I64(size - 1)), I64(size))


def part(code: Code, rows: Any, parts: Any, number: Any) -> tuple[Any, Any]:
    """First row and rows of a part: sizes differ by 1 at most, the larger ones first."""
    build = code.build
    size, larger = build.udiv(rows, parts), build.urem(rows, parts)
    is_larger = build.icmp_unsigned("<", number, larger)
    start = build.add(build.mul(number, size), build.select(is_larger, number, larger))
    return start, build.add(size, build.zext(is_larger, I64))


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

    places = [I64(r) for r in range(count)]
    for r, value in enumerate(code.product(sums, places, depth, Matrix(base, inner), Matrix(weights, wide))):
        if relu and first + depth == inner:
            zero = ir.Constant(kind, None)
            value = code.build.select(code.build.fcmp_ordered("<", value, zero), zero, value)  # NaN stays
        code.store(value, out, code.build.add(place, I64(r * columns)))
