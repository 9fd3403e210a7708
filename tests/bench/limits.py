"""What this machine can do at most, the limits of benchmark `rtp`: measured by generated loops that do nothing else,
but for its popcounts, of which its features tell."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from index.layout import aligned_empty
from infra.codegen import F32, I64, Code, host

_POPCOUNTS = (  # bits a cycle, the first whose feature the processor has
    ("avx512bitalg", 512),  # VPOPCNTB: one port of Ice Lake and later, two halves of Zen 4
    ("avx512vpopcntdq", 512),  # VPOPCNTQ: the same
    ("avx2", 128),  # six instructions on 256 bits (shifts, masks, two look-ups in tables of 16), three ports
    ("sve2", 256),  # CNT on two of four ports of 128 bits (Neoverse N2 and V2)
    ("neon", 256),  # the same (Neoverse N1)
    ("", 64),  # POPCNT
)
_LANES = ir.VectorType(F32, 16)
_MULTIPLY = 3  # cycles until a 64-bit product can be used, on all x86-64 cores of the last fifteen years
_STREAM = 256 << 20  # bytes, more than any cache


@dataclasses.dataclass(frozen=True)
class Limits:
    """One core's, the best of some tries."""

    stream_gb_per_s: float
    clock_ghz: float
    fma_g_per_s: float  # multiply-adds of single precision
    popcount_bits: int  # a cycle, by the processor's features

    def score_ms(self, candidates: int, record: int, window: int, bits: int, multiply_adds: int) -> dict[str, float]:
        """Lower bounds of a request's parts: reading the records once, the popcounts, the multiply-adds. Their sum is
        one where they do not overlap."""
        return {
            "records": candidates * record / self.stream_gb_per_s / 1e6,
            "popcounts": candidates * window * bits / self.popcount_bits / self.clock_ghz / 1e6,
            "multiply-adds": candidates * multiply_adds / self.fma_g_per_s / 1e6,
        }


def popcount_bits(features: str) -> int:
    """Bits whose ones a core counts in a cycle, at most; `features` as LLVM names them: `+avx2,-sse4a,...`"""
    there = {feature[1:] for feature in features.split(",") if feature.startswith("+")} | {""}
    return next(bits for name, bits in _POPCOUNTS if name in there)


def measure(tries: int = 7) -> Limits:
    """Some tenths of a second."""
    data = aligned_empty(_STREAM, np.dtype(np.uint8))
    data[:] = 1
    stream, clock, fma = _stream(), _clock(), _fma()
    steps = 2_000_000
    read = min(_seconds(stream, data.ctypes.data, _STREAM // 256) for _ in range(tries))
    chain = min(_seconds(clock, steps, data.ctypes.data) for _ in range(tries))
    products = min(_seconds(fma, steps, data.ctypes.data) for _ in range(tries))
    return Limits(
        _STREAM / read / 1e9,
        _MULTIPLY * steps / chain / 1e9,
        _SUMS * 16 * steps / products / 1e9,
        popcount_bits(host()[1]),
    )


def _seconds(function: Callable[..., None], *arguments: int) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def _stream() -> Callable[..., None]:
    """void stream(data, blocks of 256 bytes): reads all of it."""
    code = Code("stream", [F32.as_pointer(), I64])
    data, blocks = code.function.args

    def block(number: Any, sums: list[Any]) -> list[Any]:
        at = code.build.mul(number, I64(64))
        lines = [code.vector(data, code.build.add(at, I64(16 * k)), _LANES) for k in range(4)]
        return [code.build.fadd(total, line) for total, line in zip(sums, lines, strict=True)]

    for k, total in enumerate(code.loop(blocks, block, [ir.Constant(_LANES, None)] * 4)):
        code.store(total, data, I64(16 * k))
    return code.compiled()


def _clock() -> Callable[..., None]:
    """void clock(steps, out): products that each need the one before."""
    code = Code("clock", [I64, I64.as_pointer()])
    steps, out = code.function.args
    (last,) = code.loop(steps, lambda _, values: [code.build.mul(values[0], values[0])], [code.build.load(out)])
    code.build.store(last, out)
    return code.compiled()


_SUMS = 12  # independent, so that none waits for its predecessor


def _fma() -> Callable[..., None]:
    """void fma(steps, data): multiply-adds on registers alone."""
    code = Code("fma", [I64, F32.as_pointer()])
    steps, data = code.function.args
    a, b = code.vector(data, I64(0), _LANES), code.vector(data, I64(16), _LANES)
    start = [code.vector(data, I64(32 + 16 * k), _LANES) for k in range(_SUMS)]
    ends = code.loop(steps, lambda _, sums: [code.multiply_add(a, value, b) for value in sums], start)
    for k, total in enumerate(ends):
        code.store(total, data, I64(32 + 16 * k))
    return code.compiled()
