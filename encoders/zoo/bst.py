"""Behavior Sequence Transformer (Chen et al., DLP-KDD 2019): one transformer block over the behaviours and the
candidate behind them, whose output at the candidate's place enters a perceptron.

Nothing else of the block's output is used, so only the candidate asks; it is the same number for less work. Positions
are places in the sequence.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from encoders.zoo.layers import Halves, Perceptron, Tables


@dataclasses.dataclass(frozen=True)
class BSTConfig:
    """As published: 20 behaviours, 8 heads, one block, a perceptron of 1024, 512, 256."""

    rows: int = 10_000
    dim: int = 64  # of item and category together
    heads: int = 8
    behaviours: int = 20
    feed: int = 256
    profile_tables: int = 4
    hidden: tuple[int, ...] = (1024, 512, 256)


class BST(nn.Module):
    def __init__(self, config: BSTConfig) -> None:
        super().__init__()
        c = config
        self.heads = c.heads
        self.pairs, self.profile = Tables(2, c.rows, c.dim // 2), Tables(c.profile_tables, c.rows, c.dim // 2)
        self.places = nn.Parameter(torch.randn(c.behaviours + 1, c.dim) * 0.1)
        self.query, self.keys, self.values = (nn.Linear(c.dim, c.dim) for _ in range(3))
        self.out = nn.Linear(c.dim, c.dim)
        self.inner, self.outer = nn.Linear(c.dim, c.feed), nn.Linear(c.feed, c.dim)
        self.norm, self.norm_feed = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.first = Halves(c.profile_tables * (c.dim // 2), 2 * c.dim, c.hidden[0])
        self.rest = Perceptron([*c.hidden, 1])

    def forward(self, profile: Tensor, history: Tensor, valid: Tensor, item: Tensor) -> Tensor:
        """i8[U, profile tables], i8[U, L, 2], bool[U, L], i8[N, 2] -> logits [N]."""
        x = self.pairs(item).flatten(1)  # [N, d]
        past = self.pairs(history.flatten(0, 1)).reshape(*history.shape[:2], -1) + self.places[:-1]
        target = x + self.places[-1]
        block = self.norm(target + self.out(self._attended(target, past, valid)))
        block = self.norm_feed(block + self.outer(nn.functional.leaky_relu(self.inner(block))))  # [N, d]
        user = self.profile(profile).flatten(1)
        out: Tensor = self.rest(self.first(user, torch.cat([block, x], dim=1))).squeeze(1)
        return out

    def _attended(self, target: Tensor, past: Tensor, valid: Tensor) -> Tensor:
        """What the candidate [N, d] takes from the behaviours [U, L, d] and itself: [N, d]."""
        (N, d), (U, L) = target.shape, past.shape[:2]
        one, many = (N, self.heads, -1), (U, L, self.heads, -1)
        q = self.query(target).reshape(one) * (d // self.heads) ** -0.5  # [N, H, d / H]
        own = (q * self.keys(target).reshape(one)).sum(2, keepdim=True)  # [N, H, 1]
        keys = self.keys(past).reshape(many).permute(0, 2, 3, 1)  # [U, H, d / H, L]
        seen = (q[:, :, None] @ keys).squeeze(2)  # [N, H, L]
        seen = seen.masked_fill(~valid[:, None], float("-inf"))
        weight = torch.softmax(torch.cat([seen, own], dim=2), dim=2)
        values = self.values(past).reshape(many).transpose(1, 2)  # [U, H, L, d / H]
        taken = (weight[:, :, None, :-1] @ values).squeeze(2)  # [N, H, d / H]
        out: Tensor = (taken + weight[:, :, -1:] * self.values(target).reshape(one)).flatten(1)
        return out
