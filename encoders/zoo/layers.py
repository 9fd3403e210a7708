"""What the published models share: tables of categories, a perceptron, and a first layer of two halves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Tables(nn.Module):
    """T tables of `rows` vectors, kept as one so that all look-ups are one operator."""

    starts: Tensor

    def __init__(self, tables: int, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tables * rows, dim) * dim**-0.5)
        self.register_buffer("starts", torch.arange(tables) * rows)

    def forward(self, ids: Tensor) -> Tensor:
        """[R, T] ids -> [R, T, d]."""
        return nn.functional.embedding(ids + self.starts, self.weight)

    def summed(self, ids: Tensor) -> Tensor:
        """[R, T, P] ids -> [R, T, d], sums over the P look-ups in each table."""
        flat = (ids + self.starts[:, None]).flatten(0, 1)
        return nn.functional.embedding_bag(flat, self.weight, mode="sum").reshape(*ids.shape[:2], -1)


class Halves(nn.Module):
    """A linear layer over [user ; item] whose user half may have a single row for all items."""

    def __init__(self, user: int, item: int, outputs: int) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(user, outputs), nn.Linear(item, outputs, bias=False)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """[U, user], [N, item] -> [N, outputs]."""
        out: Tensor = self.item(item) + self.user(user)
        return out


class Perceptron(nn.Module):
    """ReLU, linear, ReLU, linear ...: what follows a first layer that somebody else computes. The last is linear."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """[R, sizes[0]] -> [R, sizes[-1]]."""
        for layer in self.layers:
            x = layer(torch.relu(x))
        return x
