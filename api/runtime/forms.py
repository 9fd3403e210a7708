"""Faster forms of a captured group of operations: linear layers as functions made for their sizes (product.py), into
memory that is used again and again (arena.py); chains of element-wise operations as one loop (pointwise.py); products
with matrices that all rows share as fewer, larger ones.

Whichever is fastest for the shapes of the example is taken, as measured at load time. ReLU and sigmoid behind a layer
are computed inside of it, or in its memory. Forms differ from the module by rounding alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from api.runtime import arena, pointwise, product
from api.runtime.pointwise import Loop

_ATEN = torch.ops.aten
_RUNS = 9  # of which the least counts
_ACTIVATIONS = {_ATEN.relu.default: "relu", _ATEN.sigmoid.default: "sigmoid"}
_OWN = {  # operations whose results are memory of their own
    *(_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.relu.default, _ATEN.sigmoid.default),
    *(_ATEN.linear.default, _ATEN.matmul.default, _ATEN.softmax.int, _ATEN.cat.default, _ATEN.layer_norm.default),
    *(_ATEN.leaky_relu.default, _ATEN.masked_fill.Scalar, _ATEN.sum.dim_IntList),
}
_WORTH = 4_096  # multiply-adds of a layer from which a form may pay


class SharedMatrix(nn.Module):
    """[n, h, 1, d] @ [1, h, d, m]: rows of vectors times matrices that all rows share, as h products instead of n h."""

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return (x.squeeze(2).transpose(0, 1) @ shared.squeeze(0)).transpose(0, 1).unsqueeze(2)


class _Plain(nn.Module):
    """A linear layer with what follows it: [..., k] -> [..., m]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = weight, bias, activation

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y.relu_() if self.activation == "relu" else y.sigmoid_() if self.activation == "sigmoid" else y


class _Generated(nn.Module):
    """The same by a function made for its sizes (product.py); with a slot into memory of this thread (arena.py), where
    nothing of the result may leave the group."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        super().__init__()
        self.columns, inner = weight.shape
        self.packed, self.slot = product.packed(weight), -1
        self.bias = torch.zeros(self.columns) if bias is None else bias.contiguous()
        self.places = self.packed.data_ptr(), self.bias.data_ptr()
        self.run = product.product(inner, self.columns, activation == "relu")
        self.sigmoid = activation == "sigmoid"

    def lent(self, slot: int) -> _Generated:
        other = copy.copy(self)
        other.slot = slot
        return other

    def forward(self, x: Tensor) -> Tensor:
        flat = x if x.ndim == 2 and x.is_contiguous() else x.reshape(-1, x.shape[-1]).contiguous()
        rows, slot = len(flat), self.slot
        y = torch.empty(rows, self.columns) if slot < 0 else arena.lent(slot, rows, self.columns)
        if rows:
            self.run(flat.data_ptr(), *self.places, y.data_ptr(), rows)
        if self.sigmoid:
            y.sigmoid_()
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def fastest(module: fx.GraphModule, given: tuple[Any, ...]) -> fx.GraphModule:
    """`module` in the fastest form for inputs of these shapes. It is left as it is."""
    form = fx.GraphModule(module, copy.deepcopy(module.graph))
    values = _values(form, given)
    _with_linear_forms(form, values)
    _with_shared_matrices(form, values)
    form.recompile()
    fused = fx.GraphModule(form, copy.deepcopy(form.graph))
    if pointwise.fuse(fused, _values(fused, given)):
        form = min((form, fused), key=lambda one: seconds(one, given))
    _lend(form, _values(form, given))
    return form


def _lend(form: fx.GraphModule, values: Mapping[str, Tensor]) -> None:
    """Has layers write into memory that is used again and again, where that is faster. Two layers have the same slot
    only where the first one's result is read no more."""
    place = {node: at for at, node in enumerate(form.graph.nodes)}
    until: list[int] = []  # of each slot: which operation reads it last
    for node, at in place.items():
        layer = form.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, _Generated) or (last := _last_read(form, node, place)) is None:
            continue
        slot = next((slot for slot, read in enumerate(until) if read < at), len(until))
        lent, x = layer.lent(slot), values[node.all_input_nodes[0].name]
        if seconds(lent, (x,)) < seconds(layer, (x,)):
            form.set_submodule(str(node.target), lent)
            until[slot : slot + 1] = [last]


def _last_read(form: fx.GraphModule, node: fx.Node, place: Mapping[fx.Node, int]) -> int | None:
    """The last operation that reads the memory of a value; None: it leaves the group. Whatever is not known to make
    memory of its own is taken to give the same one."""
    last = place[node]
    for user in node.users:
        if user.op == "output":
            return None
        layer = form.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(layer, Loop):
            own = layer.over is None or user.args[layer.over] is not node
        else:
            own = isinstance(layer, _Plain | _Generated | SharedMatrix) or user.target in _OWN
        read = place[user] if own else _last_read(form, user, place)
        if read is None:
            return None
        last = max(last, read)
    return last


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


def _choose(weight: Tensor, bias: Tensor | None, activation: str, x: Tensor) -> nn.Module:
    made: list[nn.Module] = [_Plain(weight, bias, activation)]
    if product.fits(weight.shape[1], weight.shape[0]):
        made.append(_Generated(weight, bias, activation))
    return min(made, key=lambda form: seconds(form, (x,)))


def seconds(form: Callable[..., Any], *calls: tuple[Any, ...]) -> float:
    """CPU time of all calls one after the other, undisturbed: whatever else runs can only add to it."""
    took = []
    for _ in range(_RUNS):
        began = time.thread_time()
        for given in calls:
            form(*given)
        took.append(time.thread_time() - began)
    return min(took)
