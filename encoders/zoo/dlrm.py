"""DLRM (Naumov et al., 2019): sums of look-ups and a perceptron over numbers, all pairwise products, a perceptron.

The order is that of the authors' code: the top perceptron takes [dense ; pairs], and the pairs of the vectors
[dense, table 1, table 2 ...] are the strict lower triangle of their products, row by row: (1,0), (2,0), (2,1) ...
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from encoders.zoo.layers import Perceptron, Tables


@dataclasses.dataclass(frozen=True)
class DLRMConfig:
    """DeepRecSys' RMC1: 8 tables of 32 with 80 look-ups each; 256-128-32 below, 256-64-1 above."""

    user_tables: int = 6
    item_tables: int = 2
    rows: int = 10_000
    dim: int = 32
    lookups: int = 80
    dense: int = 13
    bottom: tuple[int, ...] = (256, 128)
    top: tuple[int, ...] = (256, 64)


class DLRM(nn.Module):
    rows: Tensor
    columns: Tensor

    def __init__(self, config: DLRMConfig) -> None:
        super().__init__()
        c = config
        vectors = 1 + c.user_tables + c.item_tables
        self.user, self.item = Tables(c.user_tables, c.rows, c.dim), Tables(c.item_tables, c.rows, c.dim)
        self.below, self.bottom = nn.Linear(c.dense, c.bottom[0]), Perceptron([*c.bottom, c.dim])
        self.above = nn.Linear(c.dim + vectors * (vectors - 1) // 2, c.top[0])
        self.top = Perceptron([*c.top, 1])
        rows, columns = torch.tril_indices(vectors, vectors, -1)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, dense: Tensor, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """f4[U, dense], i8[U, user tables, P], i8[N, item tables, P] -> logits [N]."""
        items = self.item.summed(item_ids)  # [N, item tables, d]
        number = torch.relu(self.bottom(self.below(dense)))  # [U, d]
        user = torch.cat([number[:, None], self.user.summed(user_ids)], dim=1)  # [U, 1 + user tables, d]
        every = torch.cat([user.expand(items.shape[0], -1, -1), items], dim=1)  # [N, vectors, d]
        pairs = (every @ every.transpose(1, 2))[:, self.rows, self.columns]  # [N, pairs]
        out: Tensor = self.top(self.above(torch.cat([every[:, 0], pairs], dim=1))).squeeze(1)
        return out
