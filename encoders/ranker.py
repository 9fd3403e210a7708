"""What every model has, AIF and its rivals alike: the towers of items and profiles, the tokens of a history, the LSH.

`Ranker` is the interface that trainer, evaluation and cache take; encoders/model.py and encoders/baselines.py fill it.
Letters in the shape comments are those of encoders/model.py.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders import lsh
from encoders.config import ModelConfig, Sizes
from encoders.inputs import Candidates, Features, Users

# A behaviour's age falls into bucket = number of edges <= age; milliseconds.
_MINUTE, _HOUR, DAY = 60_000, 3_600_000, 86_400_000
RECENCY_EDGES: tuple[int, ...] = (
    _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR, 3 * _HOUR, 8 * _HOUR, DAY, 2 * DAY, 4 * DAY, 7 * DAY,
    14 * DAY, 30 * DAY, 60 * DAY, 120 * DAY, 365 * DAY,
)  # fmt: skip
_NO_SPREAD = 1e-4  # root mean square of differences between vectors that are rounding, not features


def noise(*shape: int, scale: float = 0.1) -> Tensor:
    """Normal numbers of this standard deviation. A model without memory, on the meta device, gets none: torch would
    load its compiler for them, a second and 80 MB of every process that loads a bundle.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    return torch.randn(shape) * scale


class Tower(nn.Module):
    """Features -> vector: mean-pooled category embeddings, numerics and the dense input through one hidden layer."""

    def __init__(self, rows: int, categories: int, numerics: int, dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.categories = categories
        self.table = nn.Parameter(noise(rows, config.category_dim))
        self.missing = nn.Parameter(torch.zeros(numerics))  # stands for a numeric feature that is absent
        self.inner = nn.Linear(categories * config.category_dim + numerics + dense, config.hidden)
        self.outer = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Features) -> Tensor:
        bags, numerics, dense = self.inputs(x)
        joined = torch.cat([bags.flatten(1), numerics, dense], dim=1)
        out: Tensor = self.outer(functional.relu(self.inner(joined)))  # [M, d]
        return out

    def inputs(self, x: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Category embeddings [M, categories, category_dim], numerics [M, numerics] and the dense input [M, e]."""
        bags = functional.embedding_bag(x.ids, self.table, x.offsets, mode="mean")  # [M * categories, category_dim]
        numerics = torch.where(torch.isnan(x.numerics), self.missing, x.numerics)
        return bags.reshape(len(x.dense), self.categories, self.table.shape[1]), numerics, x.dense

    @torch.no_grad()
    def standardise(self, x: Features) -> None:
        """Scale the untrained tower so that its vectors of `x` have mean 0 and, over all numbers, variance 1.

        A random tower gives one long vector common to all rows and small differences from it. All attention over such
        vectors starts flat, gets next to no gradient and stays there. After Mishkin & Matas, ICLR 2016. A tower whose
        vectors do not differ is left as it is.
        """
        vectors = self(x)
        mean = vectors.mean(dim=0)
        spread = float((vectors - mean).square().mean().sqrt()) if len(vectors) else 0.0
        if spread > _NO_SPREAD:
            self.outer.weight.div_(spread)
            self.outer.bias.sub_(mean).div_(spread)


class Ranker(nn.Module):
    """What AIF and its rivals have in common: the towers of item and profile, the tokens of a history, the LSH.

    `projection` [e, p], `centre` [e] and, for two bits per projection, `thresholds` [2, p] define the LSH. They are
    drawn or measured, and buffers; where lsh = "learned", projection and thresholds go on to learn from there.
    """

    history_gradient: ClassVar[bool] = False  # do the item vectors of histories learn?
    projection: Tensor
    centre: Tensor
    thresholds: Tensor | None

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        d = config.dim
        self.item_tower = Tower(*sizes.item, config.embedding_dim, config)
        self.profile_tower = Tower(*sizes.user, 1, config)
        self.no_profile = nn.Parameter(noise(d))
        self.action_table = nn.Parameter(noise(sizes.actions + 1, d))
        self.recency_table = nn.Parameter(noise(len(RECENCY_EDGES) + 1, d))
        projections = config.bits // config.bits_per_projection
        self._lsh_part("projection", torch.zeros(config.embedding_dim, projections))
        self._lsh_part("thresholds", torch.zeros(2, projections) if config.bits_per_projection == 2 else None)
        self.register_buffer("centre", torch.zeros(config.embedding_dim))

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        raise NotImplementedError

    def training_forward(
        self,
        users: Users,
        candidates: Candidates,
        clicked: Tensor,  # noqa: ARG002  a contrastive penalty needs both
        counted: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, K], and a penalty (scalar) to be added to their loss.

        clicked f4 [B, K], counted bool [B, K] with False = padding.
        """
        logits: Tensor = self(users, candidates)
        return logits, logits.new_zeros(())

    def serving_flops(self, length: int, window: int) -> float:
        """Operations per candidate once the candidates are known, for a history of `length` behaviours, the newest
        `window` of which SimTier counts.

        All that depends on the user alone or on the item alone is done before and not counted. A multiplication and an
        addition are two operations; an integer operation on a 64-bit word is one.
        """
        raise NotImplementedError

    def item_vectors(self, features: Features) -> Tensor:
        """x_i [M, d]."""
        out: Tensor = self.item_tower(features)
        return out

    def profiles(self, features: Features, known: Tensor) -> Tensor:
        """Profile vectors [B, d]; the learned default where not `known`."""
        return torch.where(known[:, None], self.profile_tower(features), self.no_profile)

    def tokens(self, vectors: Tensor, actions: Tensor, ages: Tensor) -> Tensor:
        """e_j = item vector + action embedding + recency embedding [..., d]."""
        return vectors + self.token_table()[actions * len(self.recency_table) + recency_buckets(ages)]

    def token_table(self) -> Tensor:
        """Action and recency embeddings summed for every pair of codes [(actions + 1) * recencies, d]."""
        return (self.action_table[:, None, :] + self.recency_table[None, :, :]).flatten(0, 1)

    def signatures(self, embedding: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Packed signatures u1 [n, b / 8] of items' embeddings [n, e], as rows hold them."""
        thresholds = None if self.thresholds is None else self.thresholds.detach().numpy()
        return lsh.signatures(embedding, self.centre.numpy(), self.projection.detach().numpy(), thresholds)

    def signatures_or_directions(
        self, embedding: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
        """`signatures`; where lsh = "cosine" the directions f4 [n, e] that stand for them."""
        if self.config.lsh == "cosine":
            return lsh.directions(embedding, self.centre.numpy(), self.config.bits)
        return self.signatures(embedding)

    def learning_signs(self, embedding: Tensor) -> Tensor:
        """Signatures of embeddings [n, e] as -1 and +1 [n, b], with a gradient to projection and thresholds.

        The gradient is straight-through: that of tanh(v / mean |v|) instead of the step at v = 0. LSH-DIN and the dot
        products teach the projection; SimTier's counts, steps again, give no gradient and read what it has learned.
        """
        v = (embedding - self.centre) @ self.projection
        if self.thresholds is not None:
            v = torch.cat([v - limit for limit in self.thresholds], dim=1)
        hard = torch.where(v >= 0, 1.0, -1.0)
        soft = torch.tanh(v / v.detach().abs().mean())
        return hard + (soft - soft.detach())

    def _lsh_part(self, name: str, start: Tensor | None) -> None:
        if self.config.lsh == "learned":
            self.register_parameter(name, None if start is None else nn.Parameter(start))
        else:
            self.register_buffer(name, start)

    def history(self, users: Users) -> Tensor:
        """Tokens of the users' behaviours [B, L, d], zero where padded."""
        vectors = users.vectors if self.history_gradient else users.vectors.detach()
        return self.tokens(vectors, users.actions, users.ages) * users.valid[:, :, None]


def recency_buckets(ages: Tensor) -> Tensor:
    """Bucket of each age in milliseconds, 0 = under a minute."""
    return torch.bucketize(ages, torch.tensor(RECENCY_EDGES, device=ages.device), right=True)
