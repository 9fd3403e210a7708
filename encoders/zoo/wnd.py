"""Wide & Deep (Cheng et al., DLRS 2016): a linear model and a perceptron over the same features, their logits added."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from encoders.zoo.layers import Halves, Perceptron, Tables


@dataclasses.dataclass(frozen=True)
class WideAndDeepConfig:
    """DeepRecSys' WnD: 27 tables of 32, a perceptron of 1024, 512, 256."""

    user_tables: int = 18
    item_tables: int = 9
    rows: int = 10_000
    dim: int = 32
    dense: int = 13  # numbers of the user
    hidden: tuple[int, ...] = (1024, 512, 256)


class WideAndDeep(nn.Module):
    def __init__(self, config: WideAndDeepConfig) -> None:
        super().__init__()
        c = config
        self.user_wide, self.item_wide = Tables(c.user_tables, c.rows, 1), Tables(c.item_tables, c.rows, 1)
        self.wide = nn.Linear(c.dense, 1)
        self.user_deep, self.item_deep = Tables(c.user_tables, c.rows, c.dim), Tables(c.item_tables, c.rows, c.dim)
        self.first = Halves(c.user_tables * c.dim + c.dense, c.item_tables * c.dim, c.hidden[0])
        self.rest = Perceptron([*c.hidden, 1])

    def forward(self, user_ids: Tensor, dense: Tensor, item_ids: Tensor) -> Tensor:
        """i8[U, user tables], f4[U, dense], i8[N, item tables] -> logits [N]."""
        wide = self.item_wide(item_ids).sum(1) + self.user_wide(user_ids).sum(1) + self.wide(dense)  # [N, 1]
        user = torch.cat([self.user_deep(user_ids).flatten(1), dense], dim=1)
        deep = self.rest(self.first(user, self.item_deep(item_ids).flatten(1)))  # [N, 1]
        out: Tensor = (wide + deep).squeeze(1)
        return out
