"""Faster forms of a captured group of operations: linear layers with weights packed for oneDNN, chains of element-wise
operations as one loop (pointwise.py), products with matrices that all rows share as fewer, larger ones.

Whichever is fastest for the shapes of the example is taken, as measured at load time. ReLU and sigmoid behind a layer
are computed inside of it, or in its memory. Forms differ from the module by rounding alone.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from api.runtime import pointwise

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # a kernel for each number of rows; read at first use
_ATEN = torch.ops.aten
_RUNS = 7  # of which the median counts
_ACTIVATIONS = {_ATEN.relu.default: "relu", _ATEN.sigmoid.default: "sigmoid"}
_WORTH = 4_096  # multiply-adds of a layer from which a form may pay


class SharedMatrix(nn.Module):
    """[n, h, 1, d] @ [1, h, d, m]: rows of vectors times matrices that all rows share, as h products instead of n h."""

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return (x.squeeze(2).transpose(0, 1) @ shared.squeeze(0)).transpose(0, 1).unsqueeze(2)


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


def fastest(module: fx.GraphModule, given: tuple[Any, ...]) -> fx.GraphModule:
    """`module` in the fastest form for inputs of these shapes. It is left as it is."""
    form = fx.GraphModule(module, copy.deepcopy(module.graph))
    values = _values(form, given)
    _with_linear_forms(form, values)
    _with_shared_matrices(form, values)
    form.recompile()
    fused = fx.GraphModule(form, copy.deepcopy(form.graph))
    if not pointwise.fuse(fused, _values(fused, given)):
        return form
    return min((form, fused), key=lambda one: _seconds(one, *given))


def _with_shared_matrices(form: fx.GraphModule, values: Mapping[str, Tensor]) -> None:
    for number, node in enumerate(list(form.graph.nodes)):
        if node.target is not _ATEN.matmul.default or len(node.all_input_nodes) < 2:  # a matrix by itself
            continue
        x, shared = (values[one.name].shape for one in node.all_input_nodes)
        if len(x) == len(shared) == 4 and x[2] == shared[0] == 1 and x[0] > 1 and x[1] == shared[1]:
            name = f"matmul_{number}"
            form.add_module(name, SharedMatrix())
            with form.graph.inserting_before(node):
                node.replace_all_uses_with(form.graph.call_module(name, node.args))
            form.graph.erase_node(node)


def _with_linear_forms(form: fx.GraphModule, values: dict[str, Tensor]) -> None:
    for number, node in enumerate(list(form.graph.nodes)):
        if node.target is not _ATEN.linear.default or any(one.op != "get_attr" for one in node.all_input_nodes[1:]):
            continue
        x, weight, *rest = (values.get(one.name) for one in node.all_input_nodes)
        assert x is not None
        assert weight is not None
        if weight.dtype != torch.float32 or x.numel() * weight.shape[0] < _WORTH:
            continue
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        activation = _ACTIVATIONS.get(follower.target, "") if follower is not None else ""
        bias = rest[0].detach() if rest and rest[0] is not None else None
        name = f"linear_{number}"
        form.add_module(name, _choose(weight.detach(), bias, activation, x))
        with form.graph.inserting_before(node):
            new = form.graph.call_module(name, (node.args[0],))
        last = follower if activation and follower is not None else node
        values[new.name] = values[last.name]
        last.replace_all_uses_with(new)
        for old in dict.fromkeys((last, node)):
            form.graph.erase_node(old)


def _values(form: fx.GraphModule, given: tuple[Any, ...]) -> dict[str, Tensor]:
    """What each of its operations gives, where that is a tensor."""
    found = {}

    class Noted(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found[n.name] = value
            return value

    Noted(form).run(*given)
    return found


def _choose(weight: Tensor, bias: Tensor | None, activation: str, x: Tensor) -> _Linear:
    made: list[_Linear] = [_Plain(weight, bias, activation)]
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        made.append(_OneDnn(weight, bias, activation, x.numel() // x.shape[-1]))
    return min(made, key=lambda form: _seconds(form, x))


def _seconds(form: Callable[..., Any], *given: Any) -> float:
    took = []
    for _ in range(_RUNS):
        began = time.thread_time()
        form(*given)
        took.append(time.thread_time() - began)
    return statistics.median(took)
