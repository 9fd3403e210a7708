"""Fused chains are what torch computes operation by operation, whatever broadcasts and whatever is read twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from api.runtime import forms
from api.runtime.pointwise import Loop, _broadcast

CLOSE = {"atol": 1e-6, "rtol": 2e-6}


class Unit(nn.Module):
    def forward(self, query: Tensor, key: Tensor, both: Tensor, mask: Tensor) -> Tensor:
        z = torch.ops.aten.add.Tensor(torch.ops.aten.add.Tensor(query, key), both)
        return torch.ops.aten.mul.Tensor(torch.ops.aten.sigmoid.default(z), mask)


class Twice(nn.Module):
    """A value that two operations read stays outside of the chain, and is not written over."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.ops.aten.add.Tensor(x, y)
        square = torch.ops.aten.mul.Tensor(total, total)
        return torch.ops.aten.relu.default(torch.ops.aten.sub.Tensor(square, y)), total


def loops(form: fx.GraphModule) -> int:
    return sum(isinstance(one, Loop) for one in form.modules())


def fused(module: nn.Module, *example: Tensor) -> fx.GraphModule:
    form = fx.symbolic_trace(module)
    from api.runtime.pointwise import fuse

    assert fuse(form, forms._values(form, example))
    assert loops(form) == 1
    return form


def test_a_chain_with_broadcasts_for_any_number_of_rows() -> None:
    def values(n: int) -> tuple[Tensor, ...]:
        return torch.randn(n, 1, 5), torch.randn(1, 7, 5), torch.randn(n, 7, 5), torch.randn(n, 7, 1)

    form = fused(Unit(), *values(4))
    for n in (1, 2, 4, 9):
        given_values = values(n)
        kept = [value.clone() for value in given_values]
        torch.testing.assert_close(form(*given_values), Unit()(*given_values), **CLOSE)
        assert all(torch.equal(one, other) for one, other in zip(given_values, kept, strict=True))


def test_what_others_read_is_left_as_it_is() -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    form = fused(Twice(), x, y)
    for mine, theirs in zip(form(x, y), Twice()(x, y), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=40))
def test_the_sigmoid_is_torchs(numbers: list[float]) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.ops.aten.sigmoid.default(torch.ops.aten.add.Tensor(x, y))

    form = fused(Shifted(), torch.randn(3), torch.randn(3))
    x = torch.tensor(numbers)
    torch.testing.assert_close(form(x, torch.zeros_like(x)), torch.sigmoid(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(special: float) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.ops.aten.sigmoid.default(torch.ops.aten.add.Tensor(x, y))

    form = fused(Shifted(), torch.randn(20), torch.randn(20))
    x = torch.full((20,), special)
    torch.testing.assert_close(form(x, torch.zeros(20)), torch.sigmoid(x), equal_nan=True, **CLOSE)


def test_a_matrix_that_all_rows_share() -> None:
    shared = forms.SharedMatrix()
    x, matrix = torch.randn(9, 4, 1, 6), torch.randn(1, 4, 6, 5)
    torch.testing.assert_close(shared(x, matrix), x @ matrix)


@pytest.mark.parametrize(
    "shapes",
    [[(3,), (1,)], [(4, 1, 5), (7, 5)], [(1, 1, 1), (1,)], [(2, 3), (2, 3)], [(0, 3), (1, 3)], [(6, 1), (1, 0)]],
)
def test_shapes_are_broadcast_as_torch_does(shapes: list[tuple[int, ...]]) -> None:
    sizes = [torch.Size(shape) for shape in shapes]
    assert _broadcast(*sizes) == torch.broadcast_shapes(*sizes)  # type: ignore[no-untyped-call]
