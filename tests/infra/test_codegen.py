"""The forms of code that kernels are made of, against NumPy; and all kernels, as code for Arm."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from api.runtime import product
from encoders import user_ir
from encoders.ranker import RECENCY_EDGES
from index import popcount_ir, score_ir
from index.layout import RowLayout
from infra.codegen import F32, I64, Code, Matrix

FLOATS = F32.as_pointer()
sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 130])


def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(rows=sizes, inner=st.sampled_from([0, 1, 2, 33]), columns=sizes, turned=st.booleans(), kind=st.integers(0, 3))
def test_matmul(rows: int, inner: int, columns: int, turned: bool, kind: int) -> None:
    """Any shapes, a transposed left matrix, rows that end within a block, a bias, a sum with what is there, ReLU."""
    code = Code("matmul", [I64, FLOATS, FLOATS, FLOATS, FLOATS])
    count, a, b, bias, out = code.function.args
    left = Matrix(a, 1, rows) if turned else Matrix(a, inner)
    start = bias if kind % 2 else None
    right, result = Matrix(b, columns), Matrix(out, columns)
    code.matmul(count, inner, left, right, result, columns, start, add=kind == 2, relu=kind == 3)
    A, B, begin = random(rows, inner), random(inner, columns), random(columns)
    found = random(rows, columns)
    wanted = A.astype(np.float64) @ B + [0, begin, found, begin][kind]
    stored = np.ascontiguousarray(A.T) if turned else A
    code.compiled()(rows, *(array.ctypes.data for array in (stored, B, begin, found)))
    np.testing.assert_allclose(found, np.maximum(wanted, 0) if kind == 3 else wanted, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(rows=st.sampled_from([1, 2, 50, 1_001]), columns=sizes, spread=st.sampled_from([0.0, 1.0, 100.0, 1e4]))
def test_softmax_down(rows: int, columns: int, spread: float) -> None:
    code = Code("softmax", [I64, FLOATS])
    count, table = code.function.args
    code.softmax_down(Matrix(table, columns), count, columns)
    x = random(rows, columns) * np.float32(spread)
    raised = np.exp(x.astype(np.float64) - x.max(axis=0))
    code.compiled()(rows, x.ctypes.data)
    np.testing.assert_allclose(x, raised / raised.sum(axis=0), atol=2e-7)


def test_exp() -> None:
    code = Code("exp", [FLOATS])
    (table,) = code.function.args
    vector = ir.VectorType(F32, 16)

    def step(k: Any, _: list[Any]) -> list[Any]:
        at = code.build.mul(k, I64(16))
        code.store(code.exp(code.vector(table, at, vector)), table, at)
        return []

    code.loop(1_000, step, [])
    x = np.linspace(-100, 0, 16_000, dtype=np.float32)
    wanted = np.exp(x.astype(np.float64))
    code.compiled()(x.ctypes.data)
    normal = wanted > np.exp(-86.9)
    np.testing.assert_allclose(x[normal], wanted[normal], rtol=2.4e-7)
    assert (x[wanted < np.exp(-87.1)] == 0).all()
    assert x[-1] == 1


def kernels(layout: RowLayout) -> dict[str, Callable[[], Any]]:
    """Makes each generated function of a default model with rows of this layout."""
    narrow = half = layout.precision == "fp16"
    width = layout.width
    sizes = user_ir.Sizes(
        width=width,
        dim=layout.dim,
        bridges=layout.bridges,
        bits=layout.bits,
        crosses=layout.crosses,
        recent=50,
        longest=1_000,
        heads=4,
        hidden=128,
        dots=8,
        bridge_dots=4,
        actions=3,
        recencies=len(RECENCY_EDGES) + 1,
        kinds=16,
        attends=True,
        half=half,
    )
    return {
        "simtier": lambda: popcount_ir.compiled.__wrapped__(layout.bits // 8, 7, 2),
        "fours": lambda: score_ir.fours.__wrapped__(width, narrow),
        "score": lambda: score_ir.score.__wrapped__(layout.hot, 16, (width, 32, 1), narrow),
        "user": lambda: user_ir.user.__wrapped__(sizes, RECENCY_EDGES),
        "crosses": lambda: user_ir.crosses.__wrapped__(sizes),
        "product": lambda: product.product.__wrapped__(300, 48, relu=True),
    }


SMALL = RowLayout(width=24, bits=256, precision="fp32")
EXPECTED = {"simtier": "cnt", "fours": "fadd", "score": "fmla", "user": "fmla", "crosses": "fmla", "product": "fmla"}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(
    ("cpu", "layout"),
    [("generic", RowLayout()), ("generic", SMALL), ("neoverse-v2", RowLayout())],
    ids=["generic", "generic, fp32", "with SVE2"],
)
def test_every_kernel_is_vector_code_for_arm_too(
    name: str, cpu: str, layout: RowLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made, but not run: an object file of AArch64 that has the kernel's main instruction on vectors and calls
    nothing that would not be there."""
    monkeypatch.setattr(Code, "compiled", lambda self: self)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu, opt=3)
    module = kernels(layout)[name]().optimised(machine)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    made = machine.emit_object(module)
    assert made[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", made, 18) == (183,)  # EM_AARCH64
    lines = [line.split() for line in machine.emit_assembly(module).splitlines() if line.startswith("\t")]
    assert any(words[0] == EXPECTED[name] and words[1][0] in "vz" for words in lines)
    called = {words[1] for words in lines if words[0] in ("bl", "b") and not words[1].startswith(".L")}
    assert called <= {"memset", "memcpy"}
