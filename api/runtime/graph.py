"""A PyTorch module -> operators with their data dependencies: the units that the scheduler places.

`torch.export` gives the module's ATen operations for any number of rows. Most of them take less time than to place one,
so they are grouped: in an order in which the branches of the graph lie one after the other, consecutive operations are
one operator until they have taken `grain_s` together. Groups of consecutive operations never wait for each other in a
circle, and two branches still fall into different ones.
"""

from __future__ import annotations

import dataclasses
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.passes.split_module import split_module

GRAIN_S = 300e-6  # some twenty times what placing an operator costs
_TIMED = 5  # runs of an example, of which the median counts


class GraphError(ValueError):
    """A module that cannot be made into operators; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """`run` takes the values in `inputs` and gives those in `outputs`."""

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    waits: tuple[int, ...]  # operators that must have run
    then: tuple[int, ...]  # operators that wait for this one
    cost: float  # s, of the example

    def __call__(self, values: Sequence[Any]) -> tuple[Any, ...]:
        found = self.run(*(values[place] for place in self.inputs))
        return (found,) if len(self.outputs) == 1 else tuple(found)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Operators in an order in which they may run. Values are numbered: the module's inputs first, then constants."""

    inputs: int
    constants: Mapping[int, Tensor]
    operators: tuple[Operator, ...]
    outputs: tuple[int, ...]
    single: bool  # the module gives one tensor, not a tuple
    uses: tuple[int, ...]  # of each value: how many operators, and outputs, read it

    def begun(self, inputs: Sequence[Any]) -> list[Any]:
        """The values of a query before its first operator."""
        values: list[Any] = [None] * len(self.uses)
        values[: self.inputs] = inputs
        for place, tensor in self.constants.items():
            values[place] = tensor
        return values

    def run(self, *inputs: Tensor) -> Any:
        """One operator after the other: what every schedule gives."""
        values = self.begun(inputs)
        for one in self.operators:
            for place, value in zip(one.outputs, one(values), strict=True):
                values[place] = value
        return self.result(values)

    def result(self, values: Sequence[Any]) -> Any:
        found = tuple(values[place] for place in self.outputs)
        return found[0] if self.single else found


def capture(
    module: nn.Module, example: tuple[Tensor, ...], rows: Sequence[int | None] = (), grain_s: float = GRAIN_S
) -> Graph:
    """`rows`: of each input the dimension that differs from query to query (the number of candidates), None for none.
    `example` is timed for the grouping, so it is best of a usual size. Raises GraphError.
    """
    number = Dim("rows", min=2)
    shapes = tuple(None if at is None else {at: number} for at in rows) or None
    try:
        program = export(module.eval(), example, dynamic_shapes=shapes)
    except Exception as error:  # whatever torch finds that it cannot follow
        raise GraphError(f"torch.export cannot follow the module: {str(error).splitlines()[0]}") from error
    whole = program.module(check_guards=False)
    assert isinstance(whole, fx.GraphModule)
    whole.graph.eliminate_dead_code()
    whole.recompile()
    costs = _costs(whole, example)
    groups = _grouped(_branches(whole), costs, grain_s)
    split = split_module(whole, None, lambda node: groups[node.name])  # type: ignore[arg-type]
    spent = [0.0] * (1 + max(groups.values(), default=0))
    for name, group in groups.items():
        spent[group] += costs[name]
    single = program.call_spec.out_spec.is_leaf()
    return _graph(split, {f"submod_{group}": cost for group, cost in enumerate(spent)}, single)


def _costs(whole: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of each operation."""
    found: dict[str, list[float]] = {}

    class Timed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            began = time.perf_counter()
            value = super().run_node(n)
            found.setdefault(n.name, []).append(time.perf_counter() - began)
            return value

    with torch.inference_mode():
        for _ in range(_TIMED + 1):
            Timed(whole).run(*example)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def _branches(whole: fx.GraphModule) -> list[fx.Node]:
    """The operations in the order of a depth-first walk from the output: what one operation needs stands together."""
    order: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(node, False) for node in whole.graph.nodes if node.op == "output"]
    while stack:
        node, entered = stack.pop()
        if entered:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack += [(before, False) for before in reversed(node.all_input_nodes) if before not in order]
    return [node for node in order if node.op not in ("placeholder", "get_attr", "output")]


def _grouped(order: Sequence[fx.Node], costs: Mapping[str, float], grain_s: float) -> dict[str, int]:
    """Operation -> its group."""
    groups, group, spent = dict[str, int](), 0, 0.0
    for node in order:
        if spent >= grain_s:
            group, spent = group + 1, 0.0
        groups[node.name] = group
        spent += costs[node.name]
    return groups


def _graph(split: fx.GraphModule, costs: Mapping[str, float], single: bool) -> Graph:
    constants: dict[int, Tensor] = {}
    found: list[tuple[Callable[..., Any], tuple[int, ...], range, float]] = []
    made: dict[int, int] = {}  # value -> operator
    outputs: tuple[int, ...] = ()
    nodes = list(split.graph.nodes)
    places: dict[fx.Node, int] = {node: at for at, node in enumerate(n for n in nodes if n.op == "placeholder")}
    inputs_count = count = len(places)
    for node in nodes:
        if node.op == "get_attr":
            places[node] = count
            constants[count] = operator.attrgetter(str(node.target))(split)
            count += 1
    for node in nodes:
        if node.op == "call_module":
            many = [user for user in node.users if user.target is operator.getitem]
            results = range(count, count + 1 + max((int(user.args[1]) for user in many), default=0))
            made |= dict.fromkeys(results, len(found))
            count += len(results)
            places |= {user: results[int(user.args[1])] for user in many} or {node: results[0]}
            inputs = tuple(places[one] for one in node.args)
            found.append((getattr(split, str(node.target)).forward, inputs, results, costs[str(node.target)]))
        elif node.op == "output":
            (last,) = node.args
            last = last if isinstance(last, tuple | list) else (last,)
            outputs = tuple(places[one] for one in last)
    uses = [0] * count
    for _, inputs, _, _ in found:
        for place in inputs:
            uses[place] += 1
    for place in outputs:
        uses[place] += 1
    waits = [tuple(sorted({made[place] for place in inputs if place in made})) for _, inputs, _, _ in found]
    then = [tuple(at for at, before in enumerate(waits) if number in before) for number in range(len(found))]
    operators = tuple(
        Operator(run, inputs, tuple(results), waits[at], then[at], cost)
        for at, (run, inputs, results, cost) in enumerate(found)
    )
    return Graph(inputs_count, constants, operators, outputs, single, tuple(uses))
