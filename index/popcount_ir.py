"""The popcount histogram of SimTier, generated as LLVM IR for one signature size and number of tiers.

Why not numba: it compares one pair at a time in 64-bit words; here 64 behaviours are compared with a candidate at
once, one byte lane each, which is three to five times faster where the machine has vector popcounts and still good
where LLVM builds them from table look-ups.

The window is stored in blocks of 64 behaviours: byte k of all 64, then byte k + 1 (`blocks_of`). For a candidate and
a block:

    distance[64] = sum over bytes of popcount(candidate byte XOR block bytes)       lanes of 8 bits, 16 from 256 bits on
    near[t] += number of lanes with distance < limit[t]                             one mask and popcount per edge
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from index.layout import aligned_empty

LANES = 64
_I1, _I8, _I16, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(64)
_BYTES_IN_LANE = 31  # so many popcounts of a byte fit an 8-bit lane


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A window of behaviours' signatures in the kernel's order."""

    data: NDArray[np.uint8]  # [blocks, b/8, 64], aligned; the last block is filled up with zeros
    length: int  # behaviours


def blocks_of(window: NDArray[np.uint8]) -> Blocks:
    """From signatures u1[L, b/8]."""
    length, size = window.shape
    count = -(-length // LANES)
    full = np.zeros((count * LANES, size), np.uint8)
    full[:length] = window
    data = aligned_empty(count * size * LANES, np.dtype(np.uint8)).reshape(count, size, LANES)
    data[:] = full.reshape(count, LANES, size).transpose(0, 2, 1)
    return Blocks(data, length)


def counts(
    signatures: int, stride: int, number: int, size: int, blocks: Blocks, edges: NDArray[Any]
) -> NDArray[np.int32]:
    """i4[number, tiers]. The candidates' signatures of `size` bytes begin at address `signatures`, `stride` bytes
    apart."""
    tiers = len(edges) + 1
    out = np.zeros((number, tiers), np.int32)
    if number == 0 or blocks.length == 0 or tiers == 1:
        out[:, 0] = blocks.length
        return out
    # bits - distance >= edge, as distance < limit; beyond both ends every or no distance is below it
    limits = np.clip(8 * size - np.asarray(edges, np.int64) + 1, 0, 8 * size + 1).astype(np.uint16)
    compiled(size, tiers)(
        signatures, stride, number, blocks.data.ctypes.data, blocks.length, limits.ctypes.data, out.ctypes.data
    )
    return out


@functools.lru_cache(maxsize=16)
def compiled(size: int, tiers: int) -> Callable[..., None]:
    """The kernel for signatures of `size` bytes."""
    is_number = [False, True, True, False, True, False, False]
    return compile_function(_module(size, tiers - 1), "simtier", is_number)


def compile_function(module: ir.Module, name: str, is_number: Sequence[bool]) -> Callable[..., None]:
    """A function of a module as a ctypes function, which releases the GIL. Its arguments are addresses, or i8
    numbers."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=3)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64 if number else ctypes.c_void_p for number in is_number])
    function = kind(engine.get_function_address(name))
    function.engine = engine  # type: ignore[attr-defined]  # the code lives as long as its engine
    return function


def _module(size: int, edges: int) -> ir.Module:
    """void simtier(u1* signatures, i8 stride, i8 n, u1* blocks, i8 length, u2* limits, i4* counts)"""
    module = ir.Module("simtier")
    byte_lanes = ir.VectorType(_I8, LANES)
    lane = _I8 if 8 * size < 256 else _I16
    lanes = ir.VectorType(lane, LANES)
    i32 = ir.IntType(32)
    arguments = [_I8.as_pointer(), _I64, _I64, _I8.as_pointer(), _I64, _I16.as_pointer(), i32.as_pointer()]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "simtier")
    popcount_lanes = ir.Function(module, ir.FunctionType(byte_lanes, [byte_lanes]), f"llvm.ctpop.v{LANES}i8")
    popcount = ir.Function(module, ir.FunctionType(_I64, [_I64]), "llvm.ctpop.i64")
    signatures, stride, number, blocks, length, limits, counts_out = function.args
    entry, candidate, block, store, done = (
        function.append_basic_block(name) for name in ("entry", "candidate", "block", "store", "done")
    )
    zero, one = _I64(0), _I64(1)
    build = ir.IRBuilder(entry)

    def spread(value: Any, vector: Any) -> Any:
        """All lanes the same value."""
        first = build.insert_element(ir.Constant(vector, ir.Undefined), value, i32(0))
        return build.shuffle_vector(first, first, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))

    last_block = build.sub(build.udiv(build.add(length, _I64(LANES - 1)), _I64(LANES)), one)
    rest = build.urem(length, _I64(LANES))
    part = build.sub(build.shl(one, rest), one)
    last_mask = build.select(build.icmp_unsigned("==", rest, zero), _I64(-1), part)
    limit_lanes = []
    for t in range(edges):
        limit = build.load(build.gep(limits, [_I64(t)]), align=2)
        limit_lanes.append(spread(build.trunc(limit, _I8) if lane is _I8 else limit, lanes))
    build.branch(candidate)

    build.position_at_end(candidate)
    i = build.phi(_I64)
    i.add_incoming(zero, entry)
    signature = build.gep(signatures, [build.mul(i, stride)])
    own = [spread(build.load(build.gep(signature, [_I64(k)])), byte_lanes) for k in range(size)]
    build.branch(block)

    build.position_at_end(block)
    at = build.phi(_I64)
    at.add_incoming(zero, candidate)
    near = [build.phi(_I64) for _ in range(edges)]
    base = build.gep(blocks, [build.mul(at, _I64(LANES * size))])
    sums: list[Any] = []  # of at most _BYTES_IN_LANE bytes each
    for k in range(size):
        lines = build.bitcast(build.gep(base, [_I64(LANES * k)]), byte_lanes.as_pointer())
        ones = build.call(popcount_lanes, [build.xor(build.load(lines, align=LANES), own[k])])
        if k % _BYTES_IN_LANE == 0:
            sums.append(ones)
        else:
            sums[-1] = build.add(sums[-1], ones)
    wide = sums if lane is _I8 else [build.zext(value, lanes) for value in sums]
    distance = functools.reduce(build.add, wide)
    mask = build.select(build.icmp_unsigned("==", at, last_block), last_mask, _I64(-1))
    for t in range(edges):
        below = build.bitcast(build.icmp_unsigned("<", distance, limit_lanes[t]), _I64)
        more = build.add(near[t], build.call(popcount, [build.and_(below, mask)]))
        near[t].add_incoming(zero, candidate)
        near[t].add_incoming(more, block)
        near[t] = more
    following = build.add(at, one)
    at.add_incoming(following, block)
    build.cbranch(build.icmp_unsigned(">", following, last_block), store, block)

    build.position_at_end(store)
    row = build.gep(counts_out, [build.mul(i, _I64(edges + 1))])
    reached = [length, *near, zero]  # behaviours with at least t edges <= equal bits
    for t in range(edges + 1):
        exactly = build.trunc(build.sub(reached[t], reached[t + 1]), i32)
        build.store(exactly, build.gep(row, [_I64(t)]), align=4)
    following = build.add(i, one)
    i.add_incoming(following, store)
    build.cbranch(build.icmp_unsigned("==", following, number), done, candidate)

    build.position_at_end(done)
    build.ret_void()
    return module
