"""Graphs made by hand, whose operators are Python functions of given costs."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from api.runtime.blocks import Blocked
from api.runtime.graph import Graph, Operator
from api.runtime.model import Model


def made(costs: Sequence[float], waits: Sequence[Sequence[int]], run: Callable[[int, list[Any]], Any]) -> Model:
    """Operator k calls run(k, inputs): the query's one input, or what the operators in waits[k] gave. The output is the
    last one's.
    """
    operators = []
    for k, cost in enumerate(costs):

        def call(*values: Any, k: int = k) -> Any:
            return run(k, list(values))

        operators.append(Operator(call, tuple(1 + before for before in waits[k]) or (0,), (1 + k,), cost))
    return Model(Graph(1, tuple(operators), (len(costs),), single=True, bytes=(8.0, 0.0)))


def chain(*costs: float, run: Callable[[int, list[Any]], Any] = lambda k, values: (k, *values)) -> Model:
    return made(costs, [[k - 1] if k else [] for k in range(len(costs))], run)


def in_blocks(graph: Graph, rows: int) -> Graph:
    """The same with blocks of so many rows, however light they are."""
    return dataclasses.replace(
        graph,
        block=rows,
        operators=tuple(
            dataclasses.replace(one, run=one.run.sized(rows)) if isinstance(one.run, Blocked) else one
            for one in graph.operators
        ),
    )


class Gate:
    """What an operator runs that holds its lane, from `began` until `go` is set."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()

    def __call__(self, k: int, values: list[Any]) -> Any:
        self.began.set()
        assert self.go.wait(30)
        return k
