"""Generated functions give what torch gives, for any number of rows, wherever values come from and go to."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim, export

from api.runtime import forms, native, product
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
    return torch.randn(shape)


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


def test_what_is_added_to_layers_has_many_shapes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.number = nn.Linear(16, 8), nn.Parameter(torch.tensor(0.5))
            self.weight = nn.Parameter(floats(8, 16))

        def forward(self, x: Tensor, z: Tensor, high: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            by_number = self.one(x) + self.number
            lazy = self.one(x) + z.sum(1)
            normed = nn.functional.layer_norm(self.one(x), (8,), weight=z.sum(1))
            higher = (self.one(x) + high).sum(1)
            plain = nn.functional.linear(x, self.weight, bias)
            return by_number, lazy, normed, higher, plain, nn.functional.linear(x, self.weight[0])

    check(Odd(), lambda n: (floats(n, 16), floats(8, 5), floats(1, 1, 8), floats(8)), whole=False)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_layer_reads_no_more_of_its_bias_than_there_is(shape: tuple[int, ...]) -> None:
    module = Of(lambda x, weight, bias: nn.functional.linear(x, weight, bias))
    form = native.fused(group(module, floats(7, 16), floats(8, 16), floats(*shape)))
    assert form is None, "torch's alone"


def test_values_that_are_read_twice_by_one_operation_are_computed_once() -> None:
    def squares(x: Tensor) -> tuple[Tensor, Tensor]:
        value = x * 0.9
        for _ in range(30):
            value = value * value  # 2^30 elements if each reading computed it anew
        return value, (x.sum(1) * 0.1) * (x.sum(1) + 1.0)

    def long(x: Tensor) -> Tensor:
        for at in range(700):
            x = x * 0.999 + float(at % 3)
        return x

    check(Of(squares), lambda n: (torch.rand(n, 5),))
    check(Of(long), lambda n: (torch.rand(n, 5),))


@pytest.mark.parametrize("name", ["sub", "mul", "rsub", "div"])
def test_whole_numbers(name: str) -> None:
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "sub": lambda ids: ids - 3,
        "mul": lambda ids: ids * ids,
        "rsub": lambda ids: 1 - ids,
        "div": lambda ids: ids / 2,
    }
    check(
        Of(lambda ids, x: (made[name](ids), ids * x, (ids + 1) * 0.5)),
        lambda n: (torch.arange(n * 4).view(n, 4), floats(4)),
    )


def test_views_and_sums_by_places_from_the_end() -> None:
    def views(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            x.sum(-1, keepdim=True) * 2.0,
            x.sum(1, keepdim=True) - x,
            (x * 2.0).permute(0, -1, 1) + 1.0,
            x.select(-1, -2) * x[:, -1, 1:2],
            x[:, -3:-1, 1:] * 3.0,
            torch.cat([x, y.expand(x.shape[0], -1, -1), x[:, :1]], dim=1),
            torch.cat([y, y * 2.0], dim=0),
        )

    check(Of(views), lambda n: (floats(n, 4, 5), floats(1, 2, 5)))


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


@pytest.mark.parametrize("columns", [5, 33])
def test_products_of_many_rows(columns: int) -> None:
    def products(x: Tensor, y: Tensor, own: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return x @ y, own @ table, (own @ table) @ table.transpose(1, 2), own @ table[0]

    check(
        Of(products),
        lambda n: (floats(n, 4, 3, 6), floats(n, 4, 6, columns), floats(n, 6), floats(5, 6, columns)),
        rows=3,
        whole=False,
    )


def test_several_threads_run_one_function() -> None:
    module = Tables(16)
    form = native.fused(group(module, torch.randint(0, 49, (7, 6))))
    assert form is not None
    asked = [torch.randint(0, 49, (1 + at % 40, 6)) for at in range(400)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        for ids, found in zip(asked, pool.map(form, asked), strict=True):
            for ours, theirs in zip(found, module(ids), strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)


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
    both = native.fused(group(Of(lambda x, y: (x + 1.0, y * 2.0)), floats(7, 5), floats(1, 5)))
    assert both is not None
    empty, fixed = both(floats(0, 5), y)
    assert empty.shape == (0, 5)
    torch.testing.assert_close(fixed, y * 2.0)


@pytest.mark.parametrize("wrong", ["raises", "another number"])
def test_a_function_that_is_not_what_torch_computes_is_not_used(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = group(Of(lambda x: x.relu() * 2.0), floats(7, 5)), floats(7, 5)
    assert len(forms.forms(module, (x,))) == 2

    def broken(_: fx.GraphModule) -> fx.GraphModule:
        if wrong == "raises":
            raise RecursionError
        return group(Of(lambda x: x.relu() * 2.1), floats(7, 5))

    monkeypatch.setattr(native, "fused", broken)
    (form,) = forms.forms(module, (x,))
    torch.testing.assert_close(form.call(x)[0], x.relu() * 2.0)
    assert "stays torch's" in caplog.text


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
