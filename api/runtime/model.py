"""A graph with what its operators have been seen to cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from api.runtime.graph import Graph, Operator

_NEWEST = 0.05  # the share of the newest time in what is learned of an operator


class Model:
    """What is learned is one number by operator and bucket of rows (1, 2 to 3, 4 to 7 ...). Thread safe."""

    def __init__(self, graph: Graph, learns: bool = True) -> None:
        """`learns`: whether lanes tell it what they took; else its owner does."""
        self.graph, self.learns = graph, learns
        self._learned: dict[tuple[int, int], float] = {}

    @classmethod
    def opaque(cls, run: Callable[..., Any], inputs: int, cost_s: float, rows: int = 0, learns: bool = True) -> Model:
        """One operator of inputs of any kind. `cost_s` is that of so many rows; 0: it does not depend on them."""
        one = Operator(run, tuple(range(inputs)), (inputs,), cost_s, rows)
        return cls(Graph(inputs, (one,), (inputs,), single=True), learns)

    def rows(self, operator: int, rows: int) -> int:
        """Of a run of an operator, of a usual block where it runs in blocks, in a query of so many; 0 where its cost
        does not depend on them."""
        one = self.graph.operators[operator]
        if one.blocks:
            return -(-rows // self.graph.blocks_of(rows))
        return rows if one.rows else 0

    def costs(self, rows: int) -> list[float]:
        """s of each operator, or of one of its blocks."""
        return [self._cost(at, self.rows(at, rows)) for at in range(len(self.graph.operators))]

    def work(self, rows: int) -> float:
        """s of all of a query."""
        costs, parted = self.costs(rows), self.graph.parted
        return sum(costs) + (self.graph.blocks_of(rows) - 1) * (costs[parted] if parted >= 0 else 0.0)

    def _cost(self, operator: int, rows: int) -> float:
        learned = self._learned.get((operator, rows.bit_length()))
        if learned is not None:
            return learned
        one = self.graph.operators[operator]
        return one.cost * rows / one.rows if one.rows else one.cost

    def learn(self, operator: int, rows: int, seconds: float) -> None:
        key = operator, rows.bit_length()
        before = self._learned.get(key)
        self._learned[key] = seconds if before is None else before + _NEWEST * (seconds - before)
