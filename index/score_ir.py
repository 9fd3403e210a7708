"""The join of rows with a user, and the head's layers, generated as LLVM IR for one row layout and one head.

Why not numba: with the sizes known, a candidate's whole z stays in vector registers while everything is added to it;
numba's loops over a run-time width were ten times slower.

    join:  out[i] = relu(joint + P + C w + D s + T log1p(counts) + mean of G[c])          vectors of h floats
    head:  layer after layer on out[i]; ReLU between layers
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from index.popcount_ir import compile_function

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_HALF = ir.HalfType()


@functools.lru_cache(maxsize=16)
def join(hot: np.dtype[np.void], tiers: int) -> Callable[..., None]:
    """void join(hot, n, counts i4[n, tiers], P, C [n, h], D [b/4, 16, h], G, slots u2[65536], logs, T [tiers, h], out
    [n, h])"""
    module = ir.Module("join")
    kinds = [_I8, _I64, _I32, _F32, _F32, _F32, _F32, _I16, _F32, _F32, _F32]
    code = _Code(module, "join", [kind if kind is _I64 else kind.as_pointer() for kind in kinds])
    rows, number, counts, P, C, D, G, slots, logs, T, out = code.function.args
    fields = hot.fields
    assert fields is not None
    joint, bridge, signature, crosses = (fields[name] for name in ("joint", "bridge", "signature", "crosses"))
    width = joint[0].shape[0]
    stored = _HALF if joint[0].base.itemsize == 2 else _F32
    vector = ir.VectorType(_F32, width)

    def row_of(table: Any, index: Any) -> Any:
        return code.vector(table, code.build.mul(index, _I64(width)), vector)

    def candidate(i: Any) -> None:
        build = code.build
        record = build.gep(rows, [build.mul(i, _I64(hot.itemsize))])
        at = {name: build.gep(record, [_I64(field[1])]) for name, field in fields.items()}
        own = code.vector(build.bitcast(at["joint"], stored.as_pointer()), _I64(0), ir.VectorType(stored, width))
        z = build.fadd(build.fpext(own, vector) if stored is _HALF else own, code.vector(P, _I64(0), vector))

        def add_bridge(j: Any, z: Any) -> Any:
            w = code.build.load(code.build.gep(code.build.bitcast(at["bridge"], stored.as_pointer()), [j]))
            w = code.build.fpext(w, _F32) if stored is _HALF else w
            return code.multiply_add(code.spread(w, vector), row_of(C, j), z)

        def add_signature(j: Any, z: Any) -> Any:
            build = code.build
            byte = build.zext(build.load(build.gep(at["signature"], [j])), _I64)
            low, high = build.and_(byte, _I64(15)), build.lshr(byte, _I64(4))
            first = build.mul(j, _I64(32))  # two tables of 16 rows per byte
            both = build.fadd(row_of(D, build.add(first, low)), row_of(D, build.add(build.add(first, _I64(16)), high)))
            return build.fadd(z, both)

        def add_tier(t: Any, z: Any) -> Any:
            build = code.build
            count = build.load(build.gep(counts, [build.add(build.mul(i, _I64(tiers)), t)]))
            log = build.load(build.gep(logs, [build.zext(count, _I64)]))
            return code.multiply_add(code.spread(log, vector), row_of(T, t), z)

        z = code.loop(bridge[0].shape[0], add_bridge, z)
        z = code.loop(signature[0].shape[0], add_signature, z)
        z = code.loop(tiers, add_tier, z)
        build = code.build
        zero = ir.Constant(vector, [0.0] * width)
        total, present = zero, _F32(0)
        places = build.bitcast(at["crosses"], _I16.as_pointer())
        for c in range(crosses[0].shape[0]):
            cross = build.load(build.gep(places, [_I64(c)]))
            used = build.icmp_unsigned("!=", cross, _I16(0))
            row = build.zext(build.load(build.gep(slots, [build.zext(cross, _I64)])), _I64)
            total = build.fadd(total, build.select(used, row_of(G, row), zero))
            present = build.fadd(present, build.select(used, _F32(1), _F32(0)))
        none = build.fcmp_ordered("==", present, _F32(0))
        total = build.select(none, row_of(G, _I64(0)), total)
        share = build.fdiv(_F32(1), build.select(none, _F32(1), present))
        z = code.multiply_add(code.spread(share, vector), total, z)
        code.store(code.relu(z), out, build.mul(i, _I64(width)))

    code.loop(number, lambda i, _: candidate(i), None)
    code.build.ret_void()
    return compile_function(module, "join", [kind is _I64 for kind in kinds])


@functools.lru_cache(maxsize=16)
def head(sizes: tuple[int, ...]) -> Callable[..., None]:
    """void head(z [n, sizes[0]], n, weights, biases, out [n]); layer l has weights [sizes[l], sizes[l + 1]]."""
    module = ir.Module("head")
    kinds = [_F32, _I64, _F32, _F32, _F32]
    code = _Code(module, "head", [kind if kind is _I64 else kind.as_pointer() for kind in kinds])
    z, number, weights, biases, out = code.function.args
    scratch = [code.build.alloca(_F32, size=_I32(size)) for size in sizes[1:-1]]

    def candidate(i: Any) -> None:
        source = code.build.gep(z, [code.build.mul(i, _I64(sizes[0]))])
        weight_at = bias_at = 0
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            if layer == len(sizes) - 2:  # one output: the sum of products
                lanes = ir.VectorType(_F32, inputs)
                first = code.vector(weights, _I64(weight_at), lanes)
                products = code.build.fmul(code.vector(source, _I64(0), lanes), first)
                bias = code.build.load(code.build.gep(biases, [_I64(bias_at)]))
                code.build.store(code.sum(products, bias), code.build.gep(out, [i]))
                break
            vector = ir.VectorType(_F32, outputs)

            def add_input(
                k: Any,
                y: Any,
                source: Any = source,
                start: int = weight_at,
                outputs: int = outputs,
                vector: Any = vector,
            ) -> Any:
                x = code.spread(code.build.load(code.build.gep(source, [k])), vector)
                place = code.build.add(code.build.mul(k, _I64(outputs)), _I64(start))
                return code.multiply_add(x, code.vector(weights, place, vector), y)

            y = code.loop(inputs, add_input, code.vector(biases, _I64(bias_at), vector))
            code.store(code.relu(y), scratch[layer], _I64(0))
            source = scratch[layer]
            weight_at += inputs * outputs
            bias_at += outputs

    code.loop(number, lambda i, _: candidate(i), None)
    code.build.ret_void()
    return compile_function(module, "head", [kind is _I64 for kind in kinds])


class _Code:
    """A function under construction, with the few forms of code that both functions need."""

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Any]) -> None:
        self._module = module
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        for argument in self.function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        self.build = ir.IRBuilder(self.function.append_basic_block())

    def loop(self, times: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
        """body(index, value) -> value, `times` times (a number above 0, or a value that may be 0); the last value."""
        count = _I64(times) if isinstance(times, int) else times
        before = self.build.block
        inside = self.function.append_basic_block()
        after = self.function.append_basic_block()
        self.build.cbranch(self.build.icmp_unsigned("==", count, _I64(0)), after, inside)
        self.build.position_at_end(inside)
        index = self.build.phi(_I64)
        index.add_incoming(_I64(0), before)
        value = None if start is None else self.build.phi(start.type)
        if value is not None:
            value.add_incoming(start, before)
        result = body(index, value)
        following = self.build.add(index, _I64(1))
        last = self.build.block
        index.add_incoming(following, last)
        if value is not None:
            value.add_incoming(result, last)
        self.build.cbranch(self.build.icmp_unsigned("==", following, count), after, inside)
        self.build.position_at_end(after)
        if value is None:
            return None
        end = self.build.phi(start.type)
        end.add_incoming(start, before)
        end.add_incoming(result, last)
        return end

    def vector(self, table: Any, at: Any, kind: Any) -> Any:
        """The numbers of a vector from element `at` of a table."""
        place = self.build.bitcast(self.build.gep(table, [at]), kind.as_pointer())
        return self.build.load(place, align=2 if kind.element is _HALF else 4)

    def store(self, value: Any, table: Any, at: Any) -> None:
        place = self.build.bitcast(self.build.gep(table, [at]), value.type.as_pointer())
        self.build.store(value, place, align=4)

    def spread(self, value: Any, vector: Any) -> Any:
        """All lanes the same value."""
        first = self.build.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
        return self.build.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, vector.count), None))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.build.call(self._intrinsic("fmuladd", a.type, [a.type] * 3), [a, b, c])

    def relu(self, value: Any) -> Any:
        zero = ir.Constant(value.type, None)
        return self.build.select(self.build.fcmp_ordered(">", value, zero), value, zero)

    def sum(self, value: Any, start: Any) -> Any:
        reduce = self._intrinsic("vector.reduce.fadd", value.type, [_F32, value.type], _F32)
        return self.build.call(reduce, [start, value], fastmath=("reassoc",))

    def _intrinsic(self, name: str, vector: Any, arguments: Sequence[Any], result: Any = None) -> Any:
        full = f"llvm.{name}.v{vector.count}f32"
        known = self._module.globals.get(full)
        return known or ir.Function(self._module, ir.FunctionType(result or vector, arguments), full)
