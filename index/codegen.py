"""Functions generated as LLVM IR: the few forms of code that kernels are made of, and their compilation.

A kernel's sizes are known when it is compiled, so that vectors as long as a row stay in registers; LLVM lays them out
for the machine at hand (AVX-512, AVX2, Arm).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I8, I16, I32, I64, F32, HALF = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType(), ir.HalfType())


class Code:
    """A function under construction, with the few forms of code that it is made of."""

    def __init__(self, name: str, arguments: Sequence[Any]) -> None:
        """`arguments`: types, I64 for a number and pointers for addresses."""
        self._module = ir.Module(name)
        self.function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), arguments), name)
        for argument in self.function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        self.build = ir.IRBuilder(self.function.append_basic_block())

    def compiled(self) -> Callable[..., None]:
        """The finished function as a ctypes function, which releases the GIL."""
        self.build.ret_void()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        parsed = llvm.parse_assembly(str(self._module))
        parsed.verify()
        features = llvm.get_host_cpu_features().flatten()
        machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=3)
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        builder.getModulePassManager().run(parsed, builder)
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        arguments = [ctypes.c_int64 if own.type == I64 else ctypes.c_void_p for own in self.function.args]
        function = ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(self.function.name))
        function.engine = engine  # type: ignore[attr-defined]  # the code lives as long as its engine
        return function

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
        return self.build.load(place, align={HALF: 2, I8: 1}.get(kind.element, 4))

    def store(self, value: Any, table: Any, at: Any) -> None:
        place = self.build.bitcast(self.build.gep(table, [at]), value.type.as_pointer())
        self.build.store(value, place, align=4)

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

    def relu(self, value: Any) -> Any:
        zero = ir.Constant(value.type, None)
        return self.build.select(self.build.fcmp_ordered(">", value, zero), value, zero)

    def sum(self, value: Any, start: Any) -> Any:
        reduce = self._function(f"llvm.vector.reduce.fadd.v{value.type.count}f32", F32, [F32, value.type])
        return self.build.call(reduce, [start, value], fastmath=("reassoc",))

    def _function(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """One of LLVM's own."""
        known = self._module.globals.get(name)
        return known or ir.Function(self._module, ir.FunctionType(result, arguments), name)
