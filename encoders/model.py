"""The whole AIF network: user tower, item tower, BEA, LSH-DIN, SimTier, SIM cross features and the head, in training
form.

Training runs `AIF.forward` on users with candidates; serving runs `encoders.fold`, which computes the same score from
pieces folded on either side (DESIGN.md section 3). Guarantees: every block that can be empty (no profile, no history,
no SimTier window, a cross the user never met, an item without cross, a missing feature) has a learned default, and no
input gives NaN.

Letters in the shape comments: B users, K candidates per user, M distinct items, L behaviours (padded on the left,
oldest first), R newest `recent` of them, d dim, h width, n bridges, b bits, t tiers, C crosses per item.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# A behaviour's age falls into bucket = number of edges <= age; milliseconds.
_MINUTE, _HOUR, _DAY = 60_000, 3_600_000, 86_400_000
RECENCY_EDGES: tuple[int, ...] = (
    _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR, 3 * _HOUR, 8 * _HOUR, _DAY, 2 * _DAY, 4 * _DAY, 7 * _DAY,
    14 * _DAY, 30 * _DAY, 60 * _DAY, 120 * _DAY, 365 * _DAY,
)  # fmt: skip
NO_CROSS = 0  # slot of an unused place among an item's crosses
SIM_COUNTS = 2  # log1p(count) and recency stand before the mean token in SIM(u, c)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; stands in the bundle's manifest. Feature sizes come from the `FeatureSpec`."""

    width: int = 64  # h, outputs of the folded first layer
    dim: int = 64  # d, item vectors, tokens, user vector
    bridges: int = 16  # n
    bits: int = 128  # b, a multiple of 8
    crosses: int = 6  # C, kept per item
    window: int = 1_000  # newest behaviours that SimTier counts
    recent: int = 50  # newest behaviours that the user tower attends to
    head: tuple[int, ...] = (32,)  # hidden layers after the first
    embedding_dim: int = 128  # of the items' frozen embedding
    heads: int = 4
    hidden: int = 128  # of the towers and of the FFN
    category_dim: int = 16  # per categorical feature
    tier_edges: tuple[int, ...] = (48, 54, 59, 64, 69, 74, 80)  # a behaviour's tier = number of edges <= equal bits
    din_shift: float = 0.5  # LSH-DIN uses din_scale * (matches / b - din_shift)
    din_scale: float = 2.0

    def __post_init__(self) -> None:
        """Raises ValueError where sizes do not fit each other."""
        sizes = (self.width, self.dim, self.bridges, self.bits, self.crosses, self.window, self.recent, self.hidden)
        if min(*sizes, self.embedding_dim, self.heads, self.category_dim, *self.head) < 1:
            raise ValueError("every size of the config must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not part {self.dim} dimensions")
        if self.bits % 8:
            raise ValueError(f"{self.bits} bits do not fill whole bytes")
        if list(self.tier_edges) != sorted(set(self.tier_edges) & set(range(1, self.bits + 1))):
            raise ValueError(f"the tier edges {self.tier_edges} do not ascend within 1..{self.bits}")

    @property
    def tiers(self) -> int:
        return len(self.tier_edges) + 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the feature spec adds to the config. A tower's sizes: rows of its category table, categories, numerics."""

    item: tuple[int, int, int]
    user: tuple[int, int, int]
    actions: int  # named actions; code 0 = unknown comes on top


@dataclasses.dataclass(frozen=True)
class Features:
    """Encoded features of M items or profiles."""

    ids: Tensor  # i8 [sum of bag lengths], rows of the tower's category table
    offsets: Tensor  # i8 [M * categories], start of each bag
    numerics: Tensor  # f4 [M, numerics], standardised, NaN = missing
    dense: Tensor  # f4 [M, e]: an item's embedding; the constant 1 for a profile


@dataclasses.dataclass(frozen=True)
class Users:
    """B users with their histories, as seen at each user's own `as_of`."""

    profile: Features
    known: Tensor  # bool [B], False = no profile
    vectors: Tensor  # f4 [B, L, d], item vectors (no gradient)
    signatures: Tensor  # f4 [B, L, b], -1 or +1
    crosses: Tensor  # i8 [B, L, C], slots, 0 = none
    actions: Tensor  # i8 [B, L]
    ages: Tensor  # i8 [B, L], milliseconds, >= 0
    valid: Tensor  # bool [B, L], False = padding


@dataclasses.dataclass(frozen=True)
class Candidates:
    """K candidates of each of the B users, as indices of M distinct items."""

    features: Features  # of the M items
    signatures: Tensor  # f4 [M, b], -1 or +1
    crosses: Tensor  # i8 [M, C]
    index: Tensor  # i8 [B, K]


class Tower(nn.Module):
    """Features -> vector: mean-pooled category embeddings, numerics and the dense input through one hidden layer."""

    def __init__(self, rows: int, categories: int, numerics: int, dense: int, config: ModelConfig) -> None:
        super().__init__()
        self.categories = categories
        self.table = nn.Parameter(torch.randn(rows, config.category_dim) * 0.1)
        self.missing = nn.Parameter(torch.zeros(numerics))  # stands for a numeric feature that is absent
        self.inner = nn.Linear(categories * config.category_dim + numerics + dense, config.hidden)
        self.outer = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Features) -> Tensor:
        rows = len(x.dense)
        bags = functional.embedding_bag(x.ids, self.table, x.offsets, mode="mean")  # [M * categories, category_dim]
        numerics = torch.where(torch.isnan(x.numerics), self.missing, x.numerics)
        joined = torch.cat([bags.reshape(rows, self.categories * self.table.shape[1]), numerics, x.dense], dim=1)
        out: Tensor = self.outer(functional.relu(self.inner(joined)))  # [M, d]
        return out


class UserTower(nn.Module):
    """Profile and recent tokens -> user vector. A learned null token stands first, so attention always has a key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.null = nn.Parameter(torch.randn(d) * 0.1)
        self.qkv = nn.Linear(d, 3 * d)
        self.mix = nn.Linear(d, d)
        self.norm1 = nn.LayerNorm(d)
        self.ffn_in = nn.Linear(d, config.hidden)
        self.ffn_out = nn.Linear(config.hidden, d)
        self.norm2 = nn.LayerNorm(d)
        self.query = nn.Linear(d, d)
        self.out = nn.Linear(3 * d, d)

    def forward(self, profile: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """profile [B, d], tokens [B, R, d], valid bool [B, R] -> [B, d]."""
        B, _, d = tokens.shape
        x = torch.cat([self.null.expand(B, 1, d), tokens], dim=1)  # [B, R + 1, d]
        keep = functional.pad(valid, (1, 0), value=True)  # [B, R + 1]
        q, k, v = (
            self.qkv(x).view(B, -1, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        )  # [B, heads, R + 1, d / heads]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = self.norm1(x + self.mix(attended.transpose(1, 2).reshape(B, -1, d)))
        x = self.norm2(x + self.ffn_out(functional.relu(self.ffn_in(x))))
        weight = keep[:, :, None].to(x.dtype)
        pooled = (x * weight).sum(dim=1) / weight.sum(dim=1)  # [B, d]
        affinity = (x @ self.query(profile)[:, :, None]).squeeze(2) / math.sqrt(d)  # [B, R + 1]
        focus = torch.softmax(affinity.masked_fill(~keep, -math.inf), dim=1)
        focused = (focus[:, None, :] @ x).squeeze(1)  # [B, d]
        out: Tensor = self.out(torch.cat([profile, pooled, focused], dim=1))
        return out


class AIF(nn.Module):
    """The network. The buffers `projection` and `centre` define the LSH; they are drawn or measured, not trained."""

    projection: Tensor
    centre: Tensor

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        h, d, t = config.width, config.dim, config.tiers
        self.item_tower = Tower(*sizes.item, config.embedding_dim, config)
        self.profile_tower = Tower(*sizes.user, 1, config)
        self.user_tower = UserTower(config)
        self.no_profile = nn.Parameter(torch.randn(d) * 0.1)
        self.action_table = nn.Parameter(torch.randn(sizes.actions + 1, d) * 0.1)
        self.recency_table = nn.Parameter(torch.randn(len(RECENCY_EDGES) + 1, d) * 0.1)
        self.bridges = nn.Parameter(torch.randn(config.bridges, d))
        self.tier_table = nn.Parameter(torch.randn(t, d) * 0.05)
        self.no_din = nn.Parameter(torch.zeros(d))
        self.no_window = nn.Parameter(torch.zeros(d))
        self.no_cross = nn.Parameter(torch.zeros(d + SIM_COUNTS))
        # W1, the first layer, as blocks of columns.
        self.W1u = _block(h, d)
        self.W1x = _block(h, d)
        self.W1b = _block(h, d)
        self.W1d = _block(h, d)
        self.W1t = _block(h, d)
        self.W1s = _block(h, d + SIM_COUNTS)
        self.b1 = nn.Parameter(torch.zeros(h))
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([h, *config.head, 1]))
        self.register_buffer("projection", torch.zeros(config.embedding_dim, config.bits))
        self.register_buffer("centre", torch.zeros(config.embedding_dim))

    # Item side ------------------------------------------------------------------------------------------------------

    def item_vectors(self, features: Features) -> Tensor:
        """x_i [M, d]."""
        out: Tensor = self.item_tower(features)
        return out

    def bridge_weights(self, x: Tensor) -> Tensor:
        """w_i = softmax(B x_i / sqrt d) [M, n]."""
        return torch.softmax(x @ self.bridges.T / math.sqrt(self.config.dim), dim=1)

    # User side ------------------------------------------------------------------------------------------------------

    def profiles(self, features: Features, known: Tensor) -> Tensor:
        """Profile vectors [B, d]; the learned default where not `known`."""
        return torch.where(known[:, None], self.profile_tower(features), self.no_profile)

    def tokens(self, vectors: Tensor, actions: Tensor, ages: Tensor) -> Tensor:
        """e_j = item vector + action embedding + recency embedding [..., d]."""
        return vectors + self.token_table()[actions * len(self.recency_table) + recency_buckets(ages)]

    def token_table(self) -> Tensor:
        """Action and recency embeddings summed for every pair of codes [(actions + 1) * recencies, d]."""
        return (self.action_table[:, None, :] + self.recency_table[None, :, :]).flatten(0, 1)

    def bridge_values(self, profile: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """V_u = softmax(B U^T / sqrt d) U [B, n, d], U = recent tokens and the profile."""
        U = torch.cat([profile[:, None, :], tokens], dim=1)  # [B, 1 + R, d]
        keep = functional.pad(valid, (1, 0), value=True)
        affinity = self.bridges @ U.transpose(1, 2) / math.sqrt(self.config.dim)  # [B, n, 1 + R]
        return torch.softmax(affinity.masked_fill(~keep[:, None, :], -math.inf), dim=2) @ U

    # Where both meet ------------------------------------------------------------------------------------------------

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        config, R = self.config, self.config.recent
        x = self.item_vectors(candidates.features)  # [M, d]
        w = self.bridge_weights(x)  # [M, n]
        tokens = self.tokens(users.vectors.detach(), users.actions, users.ages)  # [B, L, d]
        tokens = tokens * users.valid[:, :, None]
        profile = self.profiles(users.profile, users.known)  # [B, d]
        user = self.user_tower(profile, tokens[:, -R:], users.valid[:, -R:])  # [B, d]
        V = self.bridge_values(profile, tokens[:, -R:], users.valid[:, -R:])  # [B, n, d]

        index = candidates.index  # [B, K]
        matches = (config.bits + candidates.signatures[index] @ users.signatures.transpose(1, 2)) / 2  # [B, K, L]
        z = (
            (user @ self.W1u.T)[:, None, :]
            + (x @ self.W1x.T)[index]
            + (w[index] @ V) @ self.W1b.T
            + self._din(matches, tokens, users.valid) @ self.W1d.T
            + self._simtier(matches[:, :, -config.window :], users.valid[:, -config.window :]) @ self.W1t.T
            + self._sim(users, tokens, candidates.crosses[index]) @ self.W1s.T
            + self.b1
        )  # [B, K, h]
        for layer in self.head:
            z = layer(functional.relu(z))
        out: Tensor = z.squeeze(2)
        return out

    def _din(self, matches: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """DIN(u,i): mean over the history of similarity times token [B, K, d]."""
        similarity = self.config.din_scale * (matches / self.config.bits - self.config.din_shift)  # [B, K, L]
        count = valid.sum(dim=1)[:, None, None]  # [B, 1, 1]
        mean = similarity @ tokens / count.clamp(min=1)  # padded tokens are zero
        return torch.where(count > 0, mean, self.no_din)

    def _simtier(self, matches: Tensor, valid: Tensor) -> Tensor:
        """SimTier(u,i): log1p of the window's histogram over tiers, times the tiers' embeddings [B, K, d]."""
        inside = valid[:, None, :]
        at_least = [inside.sum(dim=2).expand(matches.shape[:2])]  # behaviours in tier >= 0, 1, ...; each [B, K]
        at_least += [((matches >= edge) & inside).sum(dim=2) for edge in self.config.tier_edges]
        reached = torch.stack([*at_least, torch.zeros_like(at_least[0])], dim=2)  # [B, K, t + 1]
        counts = (reached[:, :, :-1] - reached[:, :, 1:]).to(torch.float32)  # [B, K, t]
        return torch.where(at_least[0][:, :, None] > 0, torch.log1p(counts) @ self.tier_table, self.no_window)

    def _sim(self, users: Users, tokens: Tensor, wanted: Tensor) -> Tensor:
        """SIM(u, c_i): mean over the item's crosses of the user's summary of each [B, K, d + 2].

        `wanted` [B, K, C]: slots of the items' crosses.
        """
        row = torch.arange(len(wanted), device=wanted.device)[:, None, None] << 16  # a key is (user, slot)
        used = (users.crosses != NO_CROSS) & users.valid[:, :, None]  # [B, L, C]
        keys, group = torch.unique((row | users.crosses)[used], return_inverse=True)
        who, when, _ = torch.nonzero(used, as_tuple=True)
        count = torch.zeros(len(keys), device=wanted.device).index_add(
            0, group, torch.ones(len(group), device=wanted.device)
        )
        sums = torch.zeros(len(keys), tokens.shape[2], device=wanted.device).index_add(0, group, tokens[who, when])
        youngest = torch.full((len(keys),), torch.iinfo(torch.int64).max, device=wanted.device)
        youngest = youngest.scatter_reduce(0, group, users.ages[who, when], "amin")
        summary = torch.cat([sim_counts(count, youngest), sums / count[:, None]], dim=1)  # [keys, d + 2]
        table = torch.cat([summary, self.no_cross[None, :]])  # the last row is the default

        keyed = row | wanted  # [B, K, C]
        place = torch.searchsorted(keys, keyed)
        found = functional.pad(keys, (0, 1), value=-1)[place] == keyed
        place = torch.where(found, place, len(keys))
        counted = (wanted != NO_CROSS).to(torch.float32)  # [B, K, C]
        mean = (counted[:, :, None, :] @ table[place]).squeeze(2) / counted.sum(dim=2, keepdim=True).clamp(min=1)
        return torch.where(counted.sum(dim=2, keepdim=True) > 0, mean, self.no_cross)


def recency_buckets(ages: Tensor) -> Tensor:
    """Bucket of each age in milliseconds, 0 = under a minute."""
    return torch.bucketize(ages, torch.tensor(RECENCY_EDGES, device=ages.device), right=True)


def sim_counts(count: Tensor, age: Tensor) -> Tensor:
    """The first columns of SIM(u, c): log1p(count), and recency = 1 / (1 + days since the newest) [..., 2]."""
    days = age.to(torch.float32) / _DAY
    return torch.stack([torch.log1p(count), 1 / (1 + days)], dim=-1)


def _block(rows: int, columns: int) -> nn.Parameter:
    """Columns of W1, scaled so that six blocks together keep the variance of their inputs."""
    return nn.Parameter(torch.randn(rows, columns) / math.sqrt(3 * columns))


def shapes(model: AIF) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the state, in order."""
    state: dict[str, Any] = model.state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}
