"""Graphs made by hand, whose operators are Python functions of given costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from api.runtime.graph import Graph, Operator
from api.runtime.runtime import Model


def made(costs: Sequence[float], waits: Sequence[Sequence[int]], run: Callable[[int, list[Any]], Any]) -> Model:
    """Operator k calls run(k, inputs): the query's one input, or what the operators in waits[k] gave. The output is the
    last one's.
    """
    count = len(costs)
    then = [tuple(at for at in range(count) if k in waits[at]) for k in range(count)]
    operators = []
    for k in range(count):
        inputs = tuple(1 + before for before in waits[k]) or (0,)

        def call(*values: Any, k: int = k) -> Any:
            return run(k, list(values))

        operators.append(Operator(call, inputs, (1 + k,), tuple(waits[k]), then[k], costs[k]))
    uses = [sum(one.inputs.count(place) for one in operators) for place in range(1 + count)]
    uses[count] += 1
    return Model.of(Graph(1, {}, tuple(operators), (count,), True, tuple(uses)))


def chain(*costs: float, run: Callable[[int, list[Any]], Any] = lambda k, values: (k, *values)) -> Model:
    return made(costs, [[k - 1] if k else [] for k in range(len(costs))], run)
