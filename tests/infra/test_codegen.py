"""The forms of code that kernels are made of, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from infra.codegen import F32, I64, Code, Matrix

FLOATS = F32.as_pointer()
sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 130])


def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@settings(max_examples=40)
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


@settings(max_examples=20)
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
