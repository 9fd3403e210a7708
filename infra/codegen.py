"""Functions generated as LLVM IR: the few forms of code that kernels are made of, and their compilation.

A kernel's sizes are known when it is compiled, so that vectors as long as a row stay in registers; LLVM lays them out
for the machine at hand: AVX-512 and AVX2 are run by the tests, for Arm (AArch64) they see that every kernel is made.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I8, I16, I32, I64, F32, HALF = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType(), ir.HalfType())


def host() -> tuple[str, str]:
    """The processor that code is made for, and its features."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


ROOM = 256  # floats of a block that stay in registers: half of what AVX-512 has
_PANEL = 64  # columns of a matrix that are computed together
_BLOCK = 16  # rows, at most


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Floats in memory: element [r, c] stands `r * down + c * across` behind `base`."""

    base: Any
    down: int
    across: int = 1

    def row(self, build: Any, r: Any, base: Any = None) -> Any:
        """The address of row r, or of an element of it where `base` is that of its column."""
        return build.gep(base or self.base, [build.mul(r, I64(self.down))])

    def column(self, build: Any, c: Any) -> Any:
        return build.gep(self.base, [build.mul(c, I64(self.across))])


class Code:
    """A function under construction, with the few forms of code that it is made of."""

    def __init__(self, name: str, arguments: Sequence[Any], caller: Code | None = None, answers: bool = False) -> None:
        """`arguments`: types, I64 for a number and pointers for addresses. `caller`: the function that calls it, where
        it is a part of that one. `answers`: gives an I64, else nothing."""
        self._module: Any = caller._module if caller else ir.Module(name)
        self._answers = answers
        kind = ir.FunctionType(I64 if answers else ir.VoidType(), arguments)
        self.function = ir.Function(self._module, kind, self._module.get_unique_name(name))
        if caller:
            self.function.linkage = "internal"
        for argument in self.function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        self.build = ir.IRBuilder(self.function.append_basic_block())

    def compiled(self) -> Callable[..., Any]:
        """The finished function as a ctypes function, which releases the GIL."""
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        cpu, features = host()
        machine = llvm.Target.from_default_triple().create_target_machine(cpu, features, opt=3)
        engine = llvm.create_mcjit_compiler(self.optimised(machine), machine)
        engine.finalize_object()
        return self.called(engine)

    def called(self, engine: Any) -> Callable[..., Any]:
        """The same of an engine that holds it, as the one of another function of its module."""
        arguments = [ctypes.c_int64 if own.type == I64 else ctypes.c_void_p for own in self.function.args]
        address = engine.get_function_address(self.function.name)
        function = ctypes.CFUNCTYPE(ctypes.c_int64 if self._answers else None, *arguments)(address)
        function.engine = engine  # type: ignore[attr-defined]  # the code lives as long as its engine
        function.address = address  # type: ignore[attr-defined]  # for other generated functions
        return function

    def optimised(self, machine: Any) -> Any:
        """The finished function as a module of LLVM, for any machine that LLVM knows (an llvmlite TargetMachine)."""
        if not self._answers:
            self.build.ret_void()
        parsed = llvm.parse_assembly(str(self._module))
        parsed.verify()
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        builder.getModulePassManager().run(parsed, builder)
        return parsed

    def loop(self, times: Any, body: Callable[[Any, list[Any]], list[Any]], start: list[Any]) -> list[Any]:
        """body(index, values) -> values, `times` times (a number above 0, or a value that may be 0); the last ones."""
        count = I64(times) if isinstance(times, int) else times
        before = self.build.block
        inside = self.function.append_basic_block()
        after = self.function.append_basic_block()
        self.build.cbranch(self.build.icmp_unsigned("==", count, I64(0)), after, inside)
        self.build.position_at_end(inside)
        index, values = self.build.phi(I64), [self.build.phi(value.type) for value in start]
        results = body(index, list(values))
        following = self.build.add(index, I64(1))
        last = self.build.block
        for phi, first, result in zip([index, *values], [I64(0), *start], [following, *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(result, last)
        self.build.cbranch(self.build.icmp_unsigned("==", following, count), after, inside)
        self.build.position_at_end(after)
        ends = [self.build.phi(value.type) for value in start]
        for end, first, result in zip(ends, start, results, strict=True):
            end.add_incoming(first, before)
            end.add_incoming(result, last)
        return ends

    def scratch(self, count: int) -> Any:
        """Room for so many floats on the stack."""
        place = self.build.alloca(F32, size=I32(count))
        place.align = 64
        return place

    def vector(self, table: Any, at: Any, kind: Any) -> Any:
        """The numbers of a vector from element `at` of a table."""
        place = self.build.bitcast(self.build.gep(table, [at]), kind.as_pointer())
        return self.build.load(place, align={HALF: 2, I16: 2, I8: 1}.get(kind.element, 4))

    def store(self, value: Any, table: Any, at: Any) -> None:
        place = self.build.bitcast(self.build.gep(table, [at]), value.type.as_pointer())
        self.build.store(value, place, align=2 if value.type.element == I16 else 4)

    def spread(self, value: Any, vector: Any) -> Any:
        """All lanes the same value."""
        first = self.build.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        return self.build.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, vector.count), None))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.build.call(self._function(f"llvm.fmuladd.v{a.type.count}f32", a.type, [a.type] * 3), [a, b, c])

    def popcount(self, value: Any) -> Any:
        """Ones of each lane, or of a number."""
        kind = value.type
        name = f"v{kind.count}i{kind.element.width}" if isinstance(kind, ir.VectorType) else f"i{kind.width}"
        return self.build.call(self._function(f"llvm.ctpop.{name}", kind, [kind]), [value])

    def matmul(
        self,
        rows: Any,
        inner: Any,
        a: Matrix,
        b: Matrix,
        out: Matrix,
        columns: int,
        start: Any = None,
        add: bool = False,
        relu: bool = False,
    ) -> None:
        """out[rows, columns] = start + a[rows, inner] b[inner, columns]; or `add`ed to what is there; ReLU on it where
        asked for.

        `rows` > 0 and `inner` are numbers or values, `start` the address of a vector (a bias). b and out have their
        columns side by side. A block of rows stays in registers; the last one repeats the last row.
        """
        count = I64(rows) if isinstance(rows, int) else rows
        last = self.build.sub(count, I64(1))
        for begin in range(0, columns, _PANEL):
            self._panel(count, last, inner, a, b, out, begin, min(_PANEL, columns - begin), start, add, relu)

    def _panel(
        self,
        count: Any,
        last: Any,
        inner: Any,
        a: Matrix,
        b: Matrix,
        out: Matrix,
        begin: int,
        width: int,
        start: Any,
        add: bool,
        relu: bool,
    ) -> None:
        kind = ir.VectorType(F32, width)
        block = max(1, min(_BLOCK, ROOM // width))

        def one_block(number: Any, _: list[Any]) -> list[Any]:
            build, first = self.build, self.build.mul(number, I64(block))
            places = []
            for r in range(block):
                row = build.add(first, I64(r))
                places.append(build.select(build.icmp_unsigned("<", row, last), row, last))
            if add:
                sums = [self.vector(out.row(build, place), I64(begin), kind) for place in places]
            elif start is None:
                sums = [ir.Constant(kind, None)] * block
            else:
                sums = [self.vector(start, I64(begin), kind)] * block

            for value, place in zip(self.product(sums, places, inner, a, b, begin), places, strict=True):
                self.store(self.relu(value) if relu else value, out.row(self.build, place), I64(begin))
            return []

        self.loop(self.build.udiv(self.build.add(count, I64(block - 1)), I64(block)), one_block, [])

    def product(
        self, sums: list[Any], places: list[Any], inner: Any, a: Matrix, b: Matrix, begin: int = 0
    ) -> list[Any]:
        """sums[r] + a[places[r], inner] b[inner, from column `begin` on], in registers: a row of b is loaded once for
        all of them."""
        kind = sums[0].type

        def step(k: Any, sums: list[Any]) -> list[Any]:
            own, column = self.vector(b.row(self.build, k), I64(begin), kind), a.column(self.build, k)
            found = []
            for value, place in zip(sums, places, strict=True):
                one = self.build.load(a.row(self.build, place, column))
                found.append(self.multiply_add(self.spread(one, kind), own, value))
            return found

        return self.loop(inner, step, sums)

    def softmax_down(self, table: Matrix, rows: Any, columns: int) -> None:
        """Softmax over the rows (> 0) of each column of table[rows, columns], in place."""
        kind = ir.VectorType(F32, columns)

        def highest(k: Any, values: list[Any]) -> list[Any]:
            own = self.vector(table.row(self.build, k), I64(0), kind)
            return [self.build.select(self.build.fcmp_ordered(">", own, values[0]), own, values[0])]

        (top,) = self.loop(rows, highest, [self.vector(table.base, I64(0), kind)])

        def raise_(k: Any, values: list[Any]) -> list[Any]:
            place = table.row(self.build, k)
            own = self.exp(self.build.fsub(self.vector(place, I64(0), kind), top))
            self.store(own, place, I64(0))
            return [self.build.fadd(values[0], own)]

        (total,) = self.loop(rows, raise_, [ir.Constant(kind, None)])
        share = self.build.fdiv(self.spread(F32(1), kind), total)

        def scale(k: Any, _: list[Any]) -> list[Any]:
            place = table.row(self.build, k)
            self.store(self.build.fmul(self.vector(place, I64(0), kind), share), place, I64(0))
            return []

        self.loop(rows, scale, [])

    def exp(self, x: Any) -> Any:
        """e^x of a vector of numbers <= 88, within 2 units of the last place; 0 below -87. x = n log 2 + r, |r| <=
        log(2) / 2; e^r by a polynomial (Cephes' expf), 2^n by its exponent."""
        build, kind = self.build, x.type
        whole = ir.VectorType(I32, kind.count)

        def constant(value: float) -> Any:
            return ir.Constant(kind, [value] * kind.count)

        low = constant(-87.0)
        x = build.select(build.fcmp_ordered("<", x, low), low, x)
        n = self.round(build.fmul(x, constant(1.44269504088896341)))
        r = self.multiply_add(n, constant(-0.693359375), x)
        r = self.multiply_add(n, constant(2.12194440e-4), r)
        value = constant(1.9875691500e-4)
        for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            value = self.multiply_add(value, r, constant(factor))
        value = build.fadd(self.multiply_add(value, build.fmul(r, r), r), constant(1.0))
        power = build.shl(
            build.add(build.fptosi(n, whole), ir.Constant(whole, [127] * kind.count)),
            ir.Constant(whole, [23] * kind.count),
        )
        found = build.fmul(value, build.bitcast(power, kind))
        return build.select(build.fcmp_ordered("<=", x, low), ir.Constant(kind, None), found)

    def round(self, value: Any) -> Any:
        """To the nearest whole number."""
        return self.build.call(
            self._function(f"llvm.nearbyint.v{value.type.count}f32", value.type, [value.type]), [value]
        )

    def sqrt(self, value: Any) -> Any:
        return self.build.call(self._function("llvm.sqrt.f32", F32, [F32]), [value])

    def relu(self, value: Any) -> Any:
        zero = ir.Constant(value.type, None)
        return self.build.select(self.build.fcmp_ordered(">", value, zero), value, zero)

    def highest(self, value: Any) -> Any:
        """The highest number of a vector."""
        return self.build.call(
            self._function(f"llvm.vector.reduce.fmax.v{value.type.count}f32", F32, [value.type]), [value]
        )

    def sum(self, value: Any, start: Any) -> Any:
        reduce = self._function(f"llvm.vector.reduce.fadd.v{value.type.count}f32", F32, [F32, value.type])
        return self.build.call(reduce, [start, value], fastmath=("reassoc",))

    def _function(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """One of LLVM's own."""
        known = self._module.globals.get(name)
        return known or ir.Function(self._module, ir.FunctionType(result, arguments), name)
