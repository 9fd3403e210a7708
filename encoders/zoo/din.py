"""Deep Interest Network (Zhou et al., KDD 2018): an activation unit weighs every behaviour by the candidate; the
weights are not normalised. ReLU stands for PReLU and Dice.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from encoders.zoo.layers import Halves, Perceptron, Tables


@dataclasses.dataclass(frozen=True)
class DINConfig:
    """DeepRecSys' DIN: 250 behaviours, a perceptron of 200 and 80; the activation unit is the published code's."""

    rows: int = 10_000
    dim: int = 32
    profile_tables: int = 4
    behaviours: int = 250
    attention: tuple[int, ...] = (80, 40)
    hidden: tuple[int, ...] = (200, 80)


class DIN(nn.Module):
    """Items and behaviours are pairs of an item and its category, in one table each."""

    def __init__(self, config: DINConfig) -> None:
        super().__init__()
        c = config
        width = 2 * c.dim
        self.pairs, self.profile = Tables(2, c.rows, c.dim), Tables(c.profile_tables, c.rows, c.dim)
        self.query = nn.Linear(width, c.attention[0])  # of [x, e, x - e, x e]: Wx + Wd, We - Wd and Wp are learned
        self.key = nn.Linear(width, c.attention[0], bias=False)
        self.both = nn.Linear(width, c.attention[0], bias=False)
        self.unit = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([*c.attention, 1]))
        self.first = Halves(c.profile_tables * c.dim, 2 * width, c.hidden[0])
        self.rest = Perceptron([*c.hidden, 1])

    def forward(self, profile: Tensor, history: Tensor, valid: Tensor, item: Tensor) -> Tensor:
        """i8[U, profile tables], i8[U, L, 2], bool[U, L], i8[N, 2] -> logits [N]."""
        x = self.pairs(item).flatten(1)  # [N, w]
        e = self.pairs(history.flatten(0, 1)).reshape(*history.shape[:2], -1)  # [U, L, w]
        z = self.query(x)[:, None] + self.key(e) + self.both(x[:, None] * e)  # [N, L, a]
        for layer in self.unit:
            z = layer(torch.sigmoid(z))
        weight = z.squeeze(2) * valid  # [N, L]
        interest = (weight[:, None] @ e).squeeze(1)  # [N, w]
        user = self.profile(profile).flatten(1)
        out: Tensor = self.rest(self.first(user, torch.cat([x, interest], dim=1))).squeeze(1)
        return out
