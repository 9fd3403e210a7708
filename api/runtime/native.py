"""Operations of a group as one generated function: no interpreter between them, and its lock is free while they run.

Sizes are known but for the number of rows. An index outside of its table is an IndexError, as in torch, and nothing is
read there. Operations that no function can be made of (operations.py) stay as they are, between functions.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from api.runtime import arena
from api.runtime.nest import Value
from api.runtime.operations import MAKERS
from api.runtime.writer import UnsupportedError, Writer, attribute

_ATEN = torch.ops.aten
_SHAPES = 4_096  # numbers of rows whose shapes are kept
_DEPTH = 32  # operations within each other that are computed where they are read

Shapes = tuple[tuple[int, ...], ...]


class Function(nn.Module):
    """A module of a group's inputs that gives its outputs."""

    def __init__(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        """`nodes` are in the order of the graph; get_attr nodes among them are constants. Raises UnsupportedError, with
        the node."""
        super().__init__()
        self._writer = writer = Writer(nodes, inputs, outputs)
        for node in nodes:
            try:
                _add(writer, node)
            except UnsupportedError as error:
                raise UnsupportedError(node) from error
        self._inputs = [writer.shape(node) for node in inputs]
        self._kinds = [(node.meta["val"].dtype, True) for node in inputs]
        self._outputs = [(writer.shape(node), node.meta["val"].dtype) for node in outputs]
        self._rows = next(
            (
                (at, dim, size.each)
                for at, shape in enumerate(self._inputs)
                for dim, size in enumerate(shape)
                if size.each
            ),
            None,
        )
        if self._rows is None and writer.symbol is not None:
            raise UnsupportedError(nodes[-1])
        self._shapes: dict[int, tuple[Shapes, Shapes]] = {}

    def compile(self) -> None:
        self._run, self._run_some, self._scratch = self._writer.functions()
        del self._writer

    def forward(self, *values: Tensor) -> Any:
        """Raises IndexError, and ValueError for inputs of other shapes or types."""
        rows, values, made = self._checked(values)
        found = [torch.empty(shape, dtype=dtype) for shape, (_, dtype) in zip(made, self._outputs, strict=True)]
        if self._run(self._memory(rows), rows, *[value.data_ptr() for value in (*values, *found)]):
            raise IndexError("index out of range")
        return found[0] if len(found) == 1 else tuple(found)

    def some(
        self, values: Sequence[Tensor], outputs: Sequence[Tensor], blocks: int, most: int, following: int, stop: int
    ) -> int:
        """`forward` on up to `most` of a query's blocks, into their rows of `outputs`: how many that were. `following`:
        address of the number of the next block, which others draw from too; `stop`: of what stops it, when it is not
        0, after a block."""
        rows, values, made = self._checked(tuple(values))
        if tuple([value.shape for value in outputs]) != made:
            raise ValueError(f"outputs have other shapes than {made}")
        places = [value.data_ptr() for value in (*values, *outputs)]
        done: int = self._run_some(self._memory(-(-rows // blocks)), rows, blocks, most, following, stop, *places)
        if done < 0:
            raise IndexError("index out of range")
        return done

    def _checked(self, values: tuple[Tensor, ...]) -> tuple[int, tuple[Tensor, ...], Shapes]:
        """Rows, the inputs as they are read, and shapes of outputs."""
        rows = 1
        if self._rows is not None:
            at, dim, each = self._rows
            rows = values[at].shape[dim] // each
        shapes, made = self._shapes.get(rows) or self._noted(rows)
        values = tuple([value.contiguous() for value in values])
        if tuple([value.shape for value in values]) != shapes:
            raise ValueError(f"inputs have other shapes than {shapes}")
        if [(value.dtype, value.is_cpu) for value in values] != self._kinds:
            raise ValueError(f"inputs are not of {[dtype for dtype, _ in self._kinds]}, on the host")
        return rows, values, made

    def _memory(self, rows: int) -> int:
        return arena.scratch(self._scratch.each * rows + self._scratch.fixed)

    def _noted(self, rows: int) -> tuple[Shapes, Shapes]:
        """Shapes of inputs and outputs."""
        every = [
            [tuple(size.of(rows) for size in shape) for shape in shapes]
            for shapes in (self._inputs, [shape for shape, _ in self._outputs])
        ]
        found = self._shapes[rows] = tuple(every[0]), tuple(every[1])
        if len(self._shapes) > _SHAPES:
            self._shapes.clear()
        return found


def _add(writer: Writer, node: fx.Node) -> None:
    if node in writer.values:
        return  # inside another one
    if node.op == "get_attr":
        with suppress(UnsupportedError):  # that is its reader
            writer.values[node] = writer.constant(attribute(node))
        return
    make = MAKERS[node.target]
    try:
        given = inspect.signature(make).bind(writer, node, *node.args, **node.kwargs)
    except TypeError as error:  # an argument that it does not know
        raise UnsupportedError(node) from error
    value: Value = make(*given.args, **given.kwargs)
    if isinstance(node.meta["val"], Tensor) and value.shape != writer.shape(node):
        raise UnsupportedError(node)
    twice = value.works and _reads(node) > 1
    if node not in writer.values:
        writer.values[node] = writer.placed(value) if twice or value.depth > _DEPTH else value


def _reads(node: fx.Node) -> int:
    """How often others read it."""
    found = list[fx.Node]()
    for user in node.users:
        fx.node.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def fused(module: fx.GraphModule) -> fx.GraphModule | None:
    """`module` with functions for all operations that one can be made of; None where there are none, or where an
    operation changes a value, for then their order matters."""
    graph = module.graph
    if any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.nodes):
        return None
    left = {node for node in graph.nodes if node.op != "call_function" or node.target not in MAKERS}
    while True:
        stages = _stages(graph, left)
        try:
            found = {stage: Function(*_ports(nodes)) for stage, nodes in _parts(graph, stages, left).items() if nodes}
        except UnsupportedError as error:
            (node,) = error.args
            more = set(node.users) - left if node in left else {node}  # where a value cannot be read, its readers
            assert more, f"{node} stops a function that has nothing to do with it"
            left |= more
            continue
        break
    if not found:
        return None
    return _rewritten(module, stages, left, found)


def _needs(node: fx.Node, left: set[fx.Node]) -> list[fx.Node]:
    """What it reads; functions read no sizes."""
    if node in left:
        return node.all_input_nodes
    return [
        one
        for one in node.all_input_nodes
        if isinstance(one.meta.get("val"), Tensor | tuple | list) or one.op == "get_attr"
        if one.target is not _ATEN.arange.start_step
    ]


def _stages(graph: fx.Graph, left: set[fx.Node]) -> dict[fx.Node, int]:
    """Operations of one kind and one stage do not wait for each other through operations of the other kind."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = [one for one in _needs(node, left) if one.op not in ("placeholder", "get_attr")]
        found[node] = max(
            (found[one] + ((one in left) != (node in left)) for one in before), default=int(node not in left)
        )
    return found


def _parts(graph: fx.Graph, stages: Mapping[fx.Node, int], left: set[fx.Node]) -> dict[int, list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node not in left:
            found.setdefault(stages[node], []).append(node)
    return found


def _ports(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """Nodes with their constants before them, what they read, and what others read of them."""
    own = set(nodes)
    read = dict.fromkeys(one for node in nodes for one in _needs(node, set()) if one not in own)
    constants = [one for one in read if one.op == "get_attr"]
    inputs = [one for one in read if one.op != "get_attr"]
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    return [*constants, *nodes], inputs, outputs


def _rewritten(
    module: fx.GraphModule, stages: Mapping[fx.Node, int], left: set[fx.Node], functions: Mapping[int, Function]
) -> fx.GraphModule:
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    parts = _parts(module.graph, stages, left)
    space: dict[str, Any] = {
        str(node.target): operator.attrgetter(str(node.target))(module)
        for node in module.graph.nodes
        if node.op in ("get_attr", "call_module")
    }

    def copied(nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            new[node] = graph.node_copy(node, lambda one: new[one])

    every = list(module.graph.nodes)
    copied(node for node in every if node.op in ("placeholder", "get_attr"))
    inner = [node for node in every if node.op not in ("placeholder", "get_attr", "output")]
    for stage in sorted({stages[node] for node in inner}):
        copied(node for node in inner if node in left and stages[node] == stage)
        if stage in functions:
            functions[stage].compile()
            _, inputs, outputs = _ports(parts[stage])
            name = f"native_{stage}"
            space[name] = functions[stage]
            call = graph.call_module(name, tuple(new[one] for one in inputs))
            for place, one in enumerate(outputs):
                new[one] = call if len(outputs) == 1 else graph.call_function(operator.getitem, (call, place))
    copied(node for node in every if node.op == "output")
    made = fx.GraphModule(space, graph)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


@dataclasses.dataclass(frozen=True)
class Alone:
    """A function that is all of a group. `takes`, `gives`: which of the group's inputs and outputs are its own."""

    function: Function
    takes: tuple[int, ...]
    gives: tuple[int, ...]

    def some(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *how: int) -> int:
        """`Function.some` of the group's inputs and outputs."""
        return self.function.some([inputs[at] for at in self.takes], [outputs[at] for at in self.gives], *how)


def alone(module: fx.GraphModule) -> Alone | None:
    """The one function that `fused` has made of all of a group."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    calls = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    (result,) = next(node for node in module.graph.nodes if node.op == "output").args
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    call, *parts = calls or [None]
    if call is None or call.op != "call_module" or not all(one.target is operator.getitem for one in parts):
        return None
    function = module.get_submodule(str(call.target))
    made = sorted(parts, key=lambda one: int(one.args[1])) or [call]
    if not isinstance(function, Function) or sorted(map(str, made)) != sorted(map(str, outputs)):
        return None
    return Alone(function, tuple(inputs.index(one) for one in call.args), tuple(outputs.index(one) for one in made))
