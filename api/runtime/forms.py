"""Faster forms of a captured group of operations: its linear layers with weights packed for oneDNN or MKL.

A layer takes whichever form is fastest for the shapes of the example, as measured at load time. ReLU and sigmoid behind
a layer are computed inside of it, or in its memory. Forms differ from the module by rounding alone.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

_ATEN = torch.ops.aten
_RUNS = 7  # of which the median counts
_ACTIVATIONS = {_ATEN.relu.default: "relu", _ATEN.sigmoid.default: "sigmoid"}
_WORTH = 4_096  # multiply-adds of a layer from which a form may pay


class _Linear(nn.Module):
    """A linear layer with what follows it: [..., k] -> [..., m]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = weight, bias, activation

    def after(self, y: Tensor) -> Tensor:
        return y.relu_() if self.activation == "relu" else y.sigmoid_() if self.activation == "sigmoid" else y


class _Plain(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(nn.functional.linear(x, self.weight, self.bias))


class _OneDnn(_Linear):
    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, rows: int) -> None:
        super().__init__(weight, bias, activation)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.activation or "none", [], "")
        return out


class _Mkl(_Linear):
    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, rows: int) -> None:
        super().__init__(weight, bias, activation)
        self.rows = rows
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows))


def fastest(module: nn.Module, given: tuple[Any, ...]) -> fx.GraphModule:
    """`module` with the fastest form of each of its linear layers for inputs of these shapes. It is left as it is."""
    assert isinstance(module, fx.GraphModule)
    form = fx.GraphModule(module, copy.deepcopy(module.graph))
    seen = _inputs(form, given)
    for number, node in enumerate(list(form.graph.nodes)):
        if node.target is not _ATEN.linear.default or node.name not in seen:
            continue
        x, weight, bias = seen[node.name]
        if weight.dtype != torch.float32 or x.numel() * weight.shape[0] < _WORTH:
            continue
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        activation = _ACTIVATIONS.get(follower.target, "") if follower is not None else ""
        chosen = _choose(weight, bias, activation, x)
        name = f"linear_{number}"
        form.add_module(name, chosen)
        with form.graph.inserting_before(node):
            new = form.graph.call_module(name, (node.args[0],))
        last = follower if activation and follower is not None else node
        last.replace_all_uses_with(new)
        for old in dict.fromkeys((last, node)):
            form.graph.erase_node(old)
    form.recompile()
    return form


def _inputs(form: fx.GraphModule, given: tuple[Any, ...]) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Input, weight and bias of each linear layer, whose weights do not depend on the query."""
    found = {}
    constant = {node.name for node in form.graph.nodes if node.op == "get_attr"}

    class Noted(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.target is _ATEN.linear.default and all(one.name in constant for one in n.all_input_nodes[1:]):
                x, weight, *bias = self.fetch_args_kwargs_from_env(n)[0]
                found[n.name] = x, weight.detach(), bias[0].detach() if bias and bias[0] is not None else None
            return super().run_node(n)

    Noted(form).run(*given)
    return found


def _choose(weight: Tensor, bias: Tensor | None, activation: str, x: Tensor) -> _Linear:
    rows = x.numel() // x.shape[-1]
    plain = _Plain(weight, bias, activation)
    made: list[_Linear] = [plain]
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        made.append(_OneDnn(weight, bias, activation, rows))
    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        made.append(_Mkl(weight, bias, activation, rows))
    return min(made, key=lambda form: _seconds(form, x))


def _seconds(form: Callable[[Tensor], Tensor], x: Tensor) -> float:
    took = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        form(x)
        took.append(time.perf_counter() - began)
    return statistics.median(took)
