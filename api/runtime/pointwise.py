"""Chains of element-wise operations as one compiled loop: what would be read from and written to memory once for each
operation is read and written once.

A chain is made of sums, differences, products, ReLU and sigmoid, each of whose values only the next one reads, over
values that broadcast to the shape of the last. Numba compiles one loop for each kind of chain when a model is loaded;
the GIL is released in it. The sigmoid is within 3e-7 of torch's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor, fx, nn

_ATEN = torch.ops.aten
_TEXT: dict[Any, str] = {
    _ATEN.add.Tensor: "({} + {})",
    _ATEN.sub.Tensor: "({} - {})",
    _ATEN.mul.Tensor: "({} * {})",
    _ATEN.relu.default: "relu({})",
    _ATEN.sigmoid.default: "sigmoid({})",
}
_MATH = {"contract", "reassoc", "arcp", "nsz"}  # NaN and infinities stay what they are
_LEAST, _DIMENSIONS = 2, 3  # operations that are worth a loop; dimensions of its values
_LOG2E, _ZERO, _ONE, _MOST = np.float32(-math.log2(math.e)), np.float32(0), np.float32(1), np.float32(88)
_C = [np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7)]  # of 2^f
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = _C


def _cast(_: Any, __: Any) -> Any:
    """The float whose bits these are."""

    def code(_context: Any, builder: ir.IRBuilder, _types: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


_of_bits: Any = intrinsic(_cast)


@numba.njit(inline="always", fastmath=_MATH)
def _sigmoid(x: Any) -> Any:
    y = min(max(x, -_MOST), _MOST) * _LOG2E
    whole = np.rint(y)
    f = y - whole
    p = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    power = _of_bits(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))
    return _ONE / (_ONE + p * power)


@numba.njit(inline="always", fastmath=_MATH)
def _relu(x: Any) -> Any:
    return _ZERO if x < _ZERO else x  # NaN stays


@dataclasses.dataclass(frozen=True)
class Chain:
    """`text` is the expression of the elements `{0}`, `{1}` ...; `moves` says of each of them along which of the three
    dimensions it has elements of its own. The result is written over the value `over`; None: into new memory."""

    text: str
    moves: tuple[tuple[bool, ...], ...]
    over: int | None


@functools.cache
def _compiled(chain: Chain) -> Callable[..., None]:
    """f(out, *values), all f4 of three dimensions, one after the other in memory; without the value that is `out`."""
    names = ["out" if at == chain.over else f"v{at}" for at in range(len(chain.moves))]
    elements = [
        "out[i, j, k]"  # also where it has one element only, so that the compiler sees that it is the one written
        if name == "out"
        else f"{name}[{', '.join(index if moves else '0' for index, moves in zip('ijk', own, strict=True))}]"
        for name, own in zip(names, chain.moves, strict=True)
    ]
    others = [name for name in names if name != "out"]
    source = (
        f"def loop({', '.join(('out', *others))}):\n"
        "    for i in range(out.shape[0]):\n"
        "        for j in range(out.shape[1]):\n"
        "            for k in range(out.shape[2]):\n"
        f"                out[i, j, k] = {chain.text.format(*elements)}\n"
    )
    space: dict[str, Any] = {"sigmoid": _sigmoid, "relu": _relu}
    exec(source, space)  # noqa: S102 - of expressions that were made here
    array = numba.float32[:, :, ::1]
    signature = numba.void(array, *[array] * len(others))
    made: Callable[..., None] = numba.njit([signature], nogil=True, fastmath=_MATH, error_model="numpy")(space["loop"])
    return made


class Loop(nn.Module):
    """The chain as a module of the values it reads."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.over = chain.over
        self._run = _compiled(chain)

    def forward(self, *values: Tensor) -> Tensor:
        over = self.over
        out = torch.empty(_broadcast(*(value.shape for value in values))) if over is None else values[over]
        self._run(_lifted(out), *(_lifted(value) for at, value in enumerate(values) if at != over))
        return out


def _broadcast(*shapes: torch.Size) -> tuple[int, ...]:
    """Of shapes that fit each other: torch's own function takes 20 us."""
    out = [1] * max(map(len, shapes))
    for shape in shapes:
        for at in range(1, len(shape) + 1):
            if shape[-at] != 1:
                out[-at] = shape[-at]
    return tuple(out)


def _lifted(value: Tensor) -> NDArray[np.float32]:
    whole: NDArray[np.float32] = (value if value.is_contiguous() else value.contiguous()).numpy()
    return whole if whole.ndim == _DIMENSIONS else whole.reshape((1,) * (_DIMENSIONS - whole.ndim) + whole.shape)


def fuse(module: fx.GraphModule, values: dict[str, Tensor]) -> bool:
    """Replaces the chains of a group whose operations have given these values; whether there were any."""
    taken = set[fx.Node]()
    for number, last in enumerate(reversed(list(module.graph.nodes))):
        if last in taken or not _fits(last, values):
            continue
        found: list[fx.Node] = []
        read: list[fx.Node] = []
        text = _text(last, last, values, found, read)
        if len(found) < _LEAST or not all(node.name in values for node in read):
            continue
        whole, shapes = values[last.name].shape, [values[node.name].shape for node in read]
        if _broadcast(*shapes) != whole:
            continue
        taken.update(found)
        moves = tuple(tuple(size != 1 for size in (1,) * (_DIMENSIONS - len(shape)) + tuple(shape)) for shape in shapes)
        over = next((at for at, node in enumerate(read) if shapes[at] == whole and _is_own(node, values)), None)
        name = f"loop_{number}"
        module.add_module(name, Loop(Chain(text, moves, over)))
        with module.graph.inserting_before(last):
            new = module.graph.call_module(name, tuple(read))
        last.replace_all_uses_with(new)
        for node in found:
            module.graph.erase_node(node)
    module.recompile()
    return bool(taken)


def _fits(node: fx.Node, values: dict[str, Tensor]) -> bool:
    if node.target not in _TEXT:
        return False
    value = values.get(node.name)
    simple = not node.kwargs and all(isinstance(one, fx.Node) for one in node.args)
    return simple and value is not None and value.dtype == torch.float32 and 1 <= value.ndim <= _DIMENSIONS


def _is_own(node: fx.Node, values: dict[str, Tensor]) -> bool:
    """Whether nobody but the chain reads the memory of this value."""
    fresh = node.op == "call_module" or node.target in (_ATEN.linear.default, *_TEXT)
    return fresh and len(node.users) == 1 and values[node.name].is_contiguous()


def _text(node: fx.Node, last: fx.Node, values: dict[str, Tensor], found: list[fx.Node], read: list[fx.Node]) -> str:
    """The expression of a node; what is computed within goes to `found`, users first, what is read to `read`."""
    if node is not last and not (_fits(node, values) and len(node.users) == 1):
        if node not in read:
            read.append(node)
        return f"{{{read.index(node)}}}"
    found.append(node)
    parts = [_text(one, last, values, found, read) for one in node.args if isinstance(one, fx.Node)]
    return _TEXT[node.target].format(*parts)
