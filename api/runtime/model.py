"""A graph with what its operators have been seen to cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from api.runtime.graph import Graph, Operator

_NEWEST = 0.05  # the share of the newest time in what is learned of an operator
_SHAPES = 4_096  # numbers of rows that are remembered


class Shape(NamedTuple):
    """Of queries of so many rows."""

    blocks: int
    bytes: int
    keys: tuple[tuple[int, int], ...]  # of each operator: under what its cost is learned
    guesses: tuple[float, ...]  # s, until it is


class Model:
    """What is learned is one number by operator and bucket of rows (1, 2 to 3, 4 to 7 ...), of a usual block where it
    runs in blocks. Thread safe."""

    def __init__(self, graph: Graph, learns: bool = True) -> None:
        """`learns`: whether lanes tell it what they took; else its owner does."""
        self.graph, self.learns = graph, learns
        self._learned: dict[tuple[int, int], float] = {}
        self._shapes: dict[int, Shape] = {}

    @classmethod
    def opaque(cls, run: Callable[..., Any], inputs: int, cost_s: float, rows: int = 0, learns: bool = True) -> Model:
        """One operator of inputs of any kind. `cost_s` is that of so many rows; 0: it does not depend on them."""
        one = Operator(run, tuple(range(inputs)), (inputs,), cost_s, rows)
        return cls(Graph(inputs, (one,), (inputs,), single=True), learns)

    def shape(self, rows: int) -> Shape:
        found = self._shapes.get(rows)
        return self._noted(rows) if found is None else found

    def costs(self, rows: int) -> list[float]:
        """s of each operator, or of one of its blocks."""
        _, _, keys, guesses = self.shape(rows)
        return list(map(self._learned.get, keys, guesses))

    def work(self, rows: int) -> float:
        """s of all of a query."""
        costs, parted = self.costs(rows), self.graph.parted
        return sum(costs) + (self.shape(rows).blocks - 1) * (costs[parted] if parted >= 0 else 0.0)

    def learn(self, operator: int, rows: int, seconds: float) -> None:
        """What it took in a query of so many rows, or what a block of it took."""
        key = self.shape(rows).keys[operator]
        before = self._learned.get(key)
        self._learned[key] = seconds if before is None else before + _NEWEST * (seconds - before)

    def _noted(self, rows: int) -> Shape:
        graph, blocks = self.graph, self.graph.blocks_of(rows)
        of_each = [(-(-rows // blocks) if one.blocks else rows) if one.rows else 0 for one in graph.operators]
        found = Shape(
            blocks,
            graph.bytes_of(rows),
            tuple((at, own.bit_length()) for at, own in enumerate(of_each)),
            tuple(
                one.cost * own / one.rows if one.rows else one.cost
                for one, own in zip(graph.operators, of_each, strict=True)
            ),
        )
        if len(self._shapes) >= _SHAPES:
            self._shapes.clear()
        self._shapes[rows] = found
        return found
