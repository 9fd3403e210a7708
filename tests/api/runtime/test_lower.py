"""A group as one function: the same bits, cheaper calls, and no value kept longer than it is read."""

from __future__ import annotations

import operator
import weakref

import torch
from torch import Tensor, fx, nn

from api.runtime.lower import lowered

aten = torch.ops.aten


def group(graph: fx.Graph, **constants: Tensor) -> fx.GraphModule:
    root = nn.Module()
    for name, value in constants.items():
        root.register_buffer(name, value)
    root.add_module("layer", nn.Linear(4, 4))
    return fx.GraphModule(root, graph)


def test_all_kinds_of_operations_and_of_arguments() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    shift = graph.get_attr("shift")
    y = graph.call_module("layer", (x,))
    y = graph.call_function(aten.relu.default, (y,))
    y = graph.call_function(aten.add.Tensor, (y, shift), {"alpha": 2})
    y = graph.call_function(aten.masked_fill.Scalar, (y, graph.get_attr("mask"), float("-inf")))
    halves = graph.call_function(aten.split.Tensor, (y, 2, 1))
    first, second = (graph.call_function(operator.getitem, (halves, at)) for at in (0, 1))
    joined = graph.call_function(aten.cat.default, ([second, first], 1))
    part = graph.call_function(aten.slice.Tensor, (joined, 1, 0, 3))
    total = graph.call_method("sum", (part,), {"dim": [1], "keepdim": True})
    graph.output((total, joined))
    mask = torch.tensor([False, True, False, False])
    module = group(graph, shift=torch.randn(4), mask=mask)
    function = lowered(module, (torch.randn(3, 4),))
    for rows in (1, 3, 8):
        x_ = torch.randn(rows, 4)
        for one, other in zip(function(x_), module(x_), strict=True):
            assert torch.equal(one, other)
    called = [value for name, value in function.__globals__.items() if name.startswith("call_")]
    left = [one for one in called if isinstance(one, torch._ops.OpOverload)]
    assert [one._schema.name for one in left] == ["aten::split", "aten::slice"], "several values, and one not in torch"


def test_an_operation_whose_namesake_gives_something_else_stays() -> None:
    """`aten.std.correction` and `torch.std` do not take the same arguments."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.std.correction, (x, [1]), {"correction": 0}))
    module = group(graph)
    x_ = torch.randn(3, 5)
    assert torch.equal(lowered(module, (x_,))(x_), module(x_))


def test_no_constant_takes_the_name_of_another_value() -> None:
    """Whatever the group's own values are called."""
    graph = fx.Graph()
    x = graph.placeholder("call_mul_tensor")
    names = ["group", "constant", *(f"constant_{at}" for at in range(9))]
    kept = [graph.get_attr(name) for name in names]
    y = graph.call_function(aten.mul.Tensor, (x, 0.5))
    for one in kept:
        y = graph.call_function(aten.add.Tensor, (y, one))
    graph.output(y)
    module = group(graph, **{name: torch.randn(4) for name in names})
    x_ = torch.randn(3, 4)
    assert torch.equal(lowered(module, (x_,))(x_), module(x_))


def test_a_value_is_freed_when_it_has_been_read() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def make(x: Tensor) -> Tensor:
        y = x + 1
        made.append(weakref.ref(y))
        return y

    def look(x: Tensor) -> Tensor:
        alive.append(made[-1]() is not None)
        return x * 2

    graph = fx.Graph()
    y = graph.call_function(make, (graph.placeholder("x"),))
    graph.call_function(make, (y,))  # whose result nobody reads
    y = graph.call_function(torch.neg, (y,))
    graph.output(graph.call_function(look, (y,)))
    function = lowered(group(graph), (torch.zeros(2),))
    alive.clear()
    assert torch.equal(function(torch.zeros(2)), torch.full((2,), -2.0))
    assert alive == [False]
    assert made[-2]() is None
