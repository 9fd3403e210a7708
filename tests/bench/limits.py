"""What this machine can do at most, measured by generated loops that do nothing else: the limits of benchmark `rtp`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from index.layout import aligned_empty
from infra.codegen import F32, I64, Code

POPCOUNT_BITS = 512  # a cycle: AVX-512's VPOPCNT, one port of Ice Lake and later, two halves of Zen 4
_LANES = ir.VectorType(F32, 16)
_MULTIPLY = 3  # cycles until a 64-bit product can be used, on all x86-64 cores of the last fifteen years
_STREAM = 256 << 20  # bytes, more than any cache


@dataclasses.dataclass(frozen=True)
class Limits:
    """One core's, the best of some tries."""

    stream_gb_per_s: float
    clock_ghz: float
    fma_g_per_s: float  # multiply-adds of single precision

    def score_ms(self, candidates: int, record: int, window: int, bits: int, multiply_adds: int) -> dict[str, float]:
        """Lower bounds of a request's parts: reading the records once, the popcounts, the multiply-adds. Their sum is
        one where they do not overlap."""
        return {
            "records": candidates * record / self.stream_gb_per_s / 1e6,
            "popcounts": candidates * window * bits / POPCOUNT_BITS / self.clock_ghz / 1e6,
            "multiply-adds": candidates * multiply_adds / self.fma_g_per_s / 1e6,
        }


def measure(tries: int = 7) -> Limits:
    """Some tenths of a second."""
    data = aligned_empty(_STREAM, np.dtype(np.uint8))
    data[:] = 1
    stream, clock, fma = _stream(), _clock(), _fma()
    steps = 2_000_000
    read = min(_seconds(stream, data.ctypes.data, _STREAM // 256) for _ in range(tries))
    chain = min(_seconds(clock, steps, data.ctypes.data) for _ in range(tries))
    products = min(_seconds(fma, steps, data.ctypes.data) for _ in range(tries))
    return Limits(_STREAM / read / 1e9, _MULTIPLY * steps / chain / 1e9, _SUMS * 16 * steps / products / 1e9)


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
