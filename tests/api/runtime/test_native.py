"""Generated functions give what torch gives, for any number of rows, wherever values come from and go to."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim, export

from api.runtime import native, product
from api.runtime.native import Function
from infra import codegen

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
ROWS = (1, 2, 5, 33)


def group(module: nn.Module, *example: Tensor, rows: int = 1) -> fx.GraphModule:
    """The operations of a module whose first `rows` inputs have rows."""
    number = Dim("rows", min=2)
    shapes: Any = tuple({0: number} if at < rows else None for at in range(len(example)))
    shapes = (shapes,) if isinstance(module, Of) else shapes  # of *values
    found = export(module.eval(), example, dynamic_shapes=shapes).module(check_guards=False)
    assert isinstance(found, fx.GraphModule)
    found.graph.eliminate_dead_code()
    return found


def parts(form: fx.GraphModule) -> tuple[int, list[Any]]:
    """How many functions, and what else is called."""
    functions = sum(isinstance(one, Function) for one in form.modules())
    return functions, [one.target for one in form.graph.nodes if one.op == "call_function"]


def check(module: nn.Module, give: Callable[[int], tuple[Tensor, ...]], rows: int = 1, whole: bool = True) -> None:
    form = native.fused(group(module, *give(7), rows=rows))
    assert form is not None
    count, others = parts(form)
    if whole:
        assert count == 1
        assert all("getitem" in str(one) for one in others)
    for number in ROWS:
        values = give(number)
        kept = [value.clone() for value in values]
        with torch.inference_mode():
            found, wanted = form(*values), module(*values)
        for ours, theirs in zip(*((one if isinstance(one, tuple) else (one,)) for one in (found, wanted)), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, **CLOSE)
        for value, other in zip(values, kept, strict=True):  # inputs stay as they are
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)


class Of(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Any:
        return self.function(*values)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 7, 16, 21, 40, 130, 300]),
    st.sampled_from([1, 3]),
    st.lists(st.sampled_from(["add", "sub", "mul", "div", "relu", "sigmoid", "leaky"]), min_size=1, max_size=5),
)
def test_chains_with_broadcasts(width: int, middle: int, names: list[str]) -> None:
    def chain(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        value = x
        for at, name in enumerate(names):
            other = (y, z, 0.5)[at % 3]
            made = {
                "add": lambda value=value, other=other: value + other,
                "sub": lambda value=value, other=other: other - value,
                "mul": lambda value=value, other=other: value * other,
                "div": lambda value=value: value / 3.0,
                "relu": lambda value=value: value.relu(),
                "sigmoid": lambda value=value: value.sigmoid(),
                "leaky": lambda value=value: nn.functional.leaky_relu(value, 0.1),
            }
            value = made[name]()
        return value * mask

    def give(n: int) -> tuple[Tensor, ...]:
        return floats(n, middle, width), floats(1, 1, width), floats(middle, 1), torch.rand(1, middle, width) > 0.3

    check(Of(chain), give)


def test_what_is_read_twice_and_given_away() -> None:
    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = x + y
        square = total * total
        return (square - y).relu(), total, total.unsqueeze(1), x[:, 1:3]

    check(Of(both), lambda n: (floats(n, 5), floats(n, 5)), rows=2)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf"), 100.0, -100.0])
def test_numbers_that_are_none_and_far_ones(special: float) -> None:
    def chain(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x + y).sigmoid(), (x + y).relu(), nn.functional.leaky_relu(x + y)

    check(Of(chain), lambda n: (torch.full((n, 20), special), torch.zeros(n, 20)), rows=2)


@pytest.mark.parametrize(("inner", "columns"), [(13, 40), (64, 80), (40, 1), (9, 3), (16, 9), (33, 129)])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_and_what_follows_them(inner: int, columns: int, bias: bool) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(inner, columns, bias=bias), nn.Linear(columns, 8)
            self.third = nn.Linear(inner, columns, bias=bias)

        def forward(self, x: Tensor, row: Tensor) -> tuple[Tensor, ...]:
            inside = (self.first(x) + row).relu()
            return self.second(inside.sigmoid()), self.third(x).relu(), self.third(x) + self.first(x), inside

    check(Layers(), lambda n: (floats(n, inner), floats(1, columns)))


class Tables(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.one, self.bag = nn.Embedding(50, dim), nn.EmbeddingBag(50, dim, mode="sum")

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        found = self.one(ids + 1)
        return found.flatten(1), found.sum(1), found.transpose(1, 2) * 2.0, self.bag(ids)


@pytest.mark.parametrize("dim", [1, 8, 33])
def test_look_ups(dim: int) -> None:
    check(Tables(dim), lambda n: (torch.randint(0, 49, (n, 6)),))


@pytest.mark.parametrize("wrong", [-1, 50, 2**40, -(2**62)])
def test_an_index_outside_of_its_table_is_an_error_and_nothing_is_read(wrong: int) -> None:
    module = Of(lambda ids, table: nn.functional.embedding(ids, table).sum(1))
    form = native.fused(group(module, torch.randint(0, 50, (7, 40)), floats(50, 4)))
    assert form is not None
    ids, table = torch.randint(0, 50, (9, 40)), floats(50, 4)
    torch.testing.assert_close(form(ids, table)[0], module(ids, table), **CLOSE)
    ids[8, 39] = wrong
    with pytest.raises(IndexError):
        form(ids, table)


@pytest.mark.parametrize("count", [1, 8, 20, 31, 64, 200])
def test_rows_as_a_whole(count: int) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.plain = nn.LayerNorm(count + 1), nn.LayerNorm(count + 1, elementwise_affine=False)
            self.plain.eps = 1e-3
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

        def forward(self, x: Tensor, own: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            seen = x.masked_fill(~mask, float("-inf"))
            joined = torch.cat([seen, own], dim=2)
            weight = torch.softmax(joined, dim=2)
            return weight, weight[:, :, -1:] * x, self.norm(weight * 9.0), self.plain(joined.sigmoid())

    check(
        Rows(),
        lambda n: (20 * floats(n, 3, count), floats(n, 3, 1), torch.rand(1, 1, count) > 0.5),
        rows=2,
    )


def test_a_row_that_is_masked_as_a_whole() -> None:
    def masked(x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(x.masked_fill(mask, float("-inf")), dim=1)

    check(Of(masked), lambda n: (floats(n, 20), torch.arange(20 * n).view(n, 20) < 20), rows=2)


@pytest.mark.parametrize("width", [1, 8, 20, 70])
def test_products(width: int) -> None:
    def products(x: Tensor, shared: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        own = x @ shared  # rows share it
        pairs = x @ x.transpose(2, 3)
        return own, pairs, weight[:, None] @ shared[0, 0], x.squeeze(2) @ shared[0, 0].t().contiguous().t()

    check(Of(products), lambda n: (floats(n, 4, 1, 6), floats(1, 4, 6, width), floats(3, 6)))


def test_pairs_by_constant_places() -> None:
    class Pairs(nn.Module):
        rows: Tensor
        columns: Tensor

        def __init__(self) -> None:
            super().__init__()
            rows, columns = torch.tril_indices(9, 9, -1)
            self.register_buffer("rows", rows)
            self.register_buffer("columns", columns)

        def forward(self, x: Tensor, user: Tensor) -> Tensor:
            every = torch.cat([user.expand(x.shape[0], -1, -1), x], dim=1)
            pairs = (every @ every.transpose(1, 2))[:, self.rows, self.columns]
            return torch.cat([every[:, 0], pairs], dim=1)

    check(Pairs(), lambda n: (floats(n, 2, 32), floats(1, 7, 32)))


def test_what_no_function_is_made_of_stays_between() -> None:
    def mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        left = (x + y).relu()
        middle = torch.cumsum(left * 2.0, dim=1)
        return (middle - left).sigmoid(), (x * y).double() + 1.0

    module = Of(mixed)
    check(module, lambda n: (floats(n, 5), floats(n, 5)), rows=2, whole=False)
    form = native.fused(group(module, floats(7, 5), floats(7, 5), rows=2))
    assert form is not None
    functions, others = parts(form)
    assert functions == 2, "before what is between, and behind it"
    assert torch.ops.aten.cumsum.default in others
    assert native.fused(group(Of(lambda x: torch.cumsum(x, 0)), floats(7, 5))) is None
    assert native.fused(group(Of(lambda x: (x + 1) * (x * 2).add_(x).relu()), floats(7, 5))) is None, "order matters"


def test_what_follows_a_layer_elsewhere_is_not_inside_of_it() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x: Tensor, row: Tensor) -> tuple[Tensor, ...]:
            odd = torch.cumsum(row, dim=1)
            return (self.layer(x) + odd).relu(), torch.cumsum(self.layer(x * 2.0), dim=1).relu()

    check(Between(), lambda n: (floats(n, 16), floats(1, 8)), whole=False)


def test_inputs_of_another_shape_are_refused_and_views_are_taken() -> None:
    form = native.fused(group(Of(lambda x, y: (x * y).relu()), floats(7, 5), floats(1, 5)))
    assert form is not None
    with pytest.raises(ValueError, match="other shapes"):
        form(floats(3, 5), floats(1, 4))
    with pytest.raises(ValueError, match="other shapes"):
        form(floats(3, 6), floats(1, 5))
    with pytest.raises(ValueError, match=r"not of \[torch.float32"):
        form(floats(3, 5).double(), floats(1, 5))
    x, y = floats(5, 3).t(), floats(1, 10)[:, ::2]
    torch.testing.assert_close(form(x, y)[0], (x * y).relu())
    assert form(floats(0, 5), y)[0].shape == (0, 5)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="made for x86-64")
def test_machines_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "host", lambda: ("x86-64-v3", ""))
    product.product.cache_clear()
    try:
        test_rows_as_a_whole(31)
        test_layers_and_what_follows_them(13, 40, True)
        test_look_ups(33)
        test_products(20)
    finally:
        product.product.cache_clear()
