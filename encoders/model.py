"""The whole AIF network: user tower, item tower, BEA, LSH-DIN, SimTier, SIM cross features and the head, in training
form.

Training runs `AIF.forward` on users with candidates; serving runs `encoders.fold`, which computes the same score from
pieces folded on either side (DESIGN.md section 3). Guarantees: every block that can be empty (no profile, no history,
no SimTier window, a cross the user never met, an item without cross, a missing feature) has a learned default, and no
input gives NaN. A component named in `ModelConfig.without` adds nothing to the score, in training and in serving, and
its weights do not learn.

Three classes, so that rivals (encoders/baselines.py) share what is not in dispute: `Ranker` has what every model has
(towers, tokens, LSH), `Frame` the first layer around a user's interest in an item, `AIF` the interest by BEA and
LSH-DIN.

Letters in the shape comments: B users, K candidates per user, M distinct items, L behaviours (padded on the left,
oldest first), R newest `recent` of them, d dim, h width, n bridges, b bits, t tiers, C crosses per item.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders import lsh

# A behaviour's age falls into bucket = number of edges <= age; milliseconds.
_MINUTE, _HOUR, DAY = 60_000, 3_600_000, 86_400_000
RECENCY_EDGES: tuple[int, ...] = (
    _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR, 3 * _HOUR, 8 * _HOUR, DAY, 2 * DAY, 4 * DAY, 7 * DAY,
    14 * DAY, 30 * DAY, 60 * DAY, 120 * DAY, 365 * DAY,
)  # fmt: skip
NO_CROSS = 0  # slot of an unused place among an item's crosses
SIM_COUNTS = 2  # log1p(count) and recency stand before the mean token in SIM(u, c)
COMPONENTS = ("bea", "lsh_din", "simtier", "sim", "self_attention", "profile_attention")  # what `without` may name
LSH = ("random", "learned", "cosine")  # what ModelConfig.lsh may be
CROSS_TABLES = ("exact", "frequent", "recent", "hashed", "sketch")  # what ModelConfig.cross_table may be
_KMEANS_ROUNDS = 25
_NO_SPREAD = 1e-4  # root mean square of differences between vectors that are rounding, not features
# Of the count sketch: one odd number per hash, whose product with a slot gives bucket and sign (multiply-shift).
_SKETCH = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; stands in the bundle's manifest. Feature sizes come from the `FeatureSpec`."""

    width: int = 64  # h, outputs of the folded first layer
    dim: int = 64  # d, item vectors, tokens, user vector
    bridges: int = 16  # n
    bits: int = 128  # b, a multiple of 8
    crosses: int = 6  # C, kept per item
    window: int = 1_000  # newest behaviours that SimTier counts
    length: int = 0  # newest behaviours that enter at all, in training and serving; 0 = as many as `window`
    short_window: int = 16  # newest behaviours that it counts once more: what the user is about now; 0 = none
    recent: int = 50  # newest behaviours that the user tower attends to
    head: tuple[int, ...] = (32,)  # hidden layers after the first
    embedding_dim: int = 128  # of the items' frozen embedding
    heads: int = 4
    hidden: int = 128  # of the towers and of the FFN
    category_dim: int = 16  # per categorical feature
    tier_edges: tuple[int, ...] = (48, 54, 59, 64, 69, 74, 80)  # a behaviour's tier = number of edges <= equal bits
    din_shift: float = 0.5  # LSH-DIN uses din_scale * (matches / b - din_shift)
    din_scale: float = 2.0
    without: tuple[str, ...] = ()  # of COMPONENTS: switched off
    dots: int = 8  # dot products of the user with the item's LSH signature
    bridge_dots: int = 0  # dot products of the user with the item's bridge weights
    bridge_temperature: float = 2.0  # factor of the affinities between bridges and items, and bridges and tokens
    bridge_top: int = 0  # bridges that an item attends to; 0 = all
    bridge_dropout: float = 0.0  # chance of a bridge to be left out of a training step
    bridge_diversity: float = 0.0  # weight of the penalty on the bridges' mean squared pairwise cosine
    attention: tuple[int, ...] = (64, 16)  # hidden layers of the rivals' target attention
    lsh: str = "random"  # the signatures' projection; "cosine" has the exact cosine for the share of equal bits
    bits_per_projection: int = 1  # 1 = its sign, 2 = a thermometer over two thresholds
    cross_table: str = "frequent"  # of a user's crosses: exact, a kind that keeps `cross_rows`, or one that pools them
    cross_rows: int = 512  # most rows of that table; the exact one has a row for every cross met

    def __post_init__(self) -> None:
        """Raises ValueError where sizes do not fit each other."""
        sizes = (self.width, self.dim, self.bridges, self.bits, self.crosses, self.window, self.recent, self.hidden)
        if min(*sizes, self.embedding_dim, self.heads, self.category_dim, *self.head, *self.attention) < 1:
            raise ValueError("every size of the config must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not part {self.dim} dimensions")
        if self.bits % 8:
            raise ValueError(f"{self.bits} bits do not fill whole bytes")
        if list(self.tier_edges) != sorted(set(self.tier_edges) & set(range(1, self.bits + 1))):
            raise ValueError(f"the tier edges {self.tier_edges} do not ascend within 1..{self.bits}")
        if unknown := sorted(set(self.without) - set(COMPONENTS)):
            raise ValueError(f"{unknown[0]!r} cannot be switched off; known are {', '.join(COMPONENTS)}")
        if self.short_window < 0 or (self.length and self.length < max(self.window, self.recent)):
            raise ValueError("the short window must not be negative, nor a history shorter than its windows")
        if self.dots < 0 or self.bridge_dots < 0 or not 0 <= self.bridge_top <= self.bridges:
            raise ValueError("dot products must not be negative, nor bridge_top be above the number of bridges")
        if self.bridge_temperature <= 0 or not 0 <= self.bridge_dropout < 1 or self.bridge_diversity < 0:
            raise ValueError("the bridges' temperature must be > 0, their dropout in [0, 1), their diversity >= 0")
        if self.lsh not in LSH or self.bits_per_projection not in (1, 2):
            raise ValueError(f"lsh must be one of {', '.join(LSH)}, with 1 or 2 bits per projection")
        if self.cross_table not in CROSS_TABLES:
            raise ValueError(f"the table of crosses must be one of {', '.join(CROSS_TABLES)}")
        if not len(_SKETCH) <= self.cross_rows < 1 << 16:
            raise ValueError(f"a table of crosses has {len(_SKETCH)} to 65535 rows, not {self.cross_rows}")

    @property
    def tiers(self) -> int:
        return len(self.tier_edges) + 1

    @property
    def longest(self) -> int:
        """Newest behaviours that enter: of a longer history the rest is left out, in training and serving."""
        return self.length or max(self.window, self.recent)

    @property
    def windows(self) -> tuple[int, ...]:
        """Behaviours in each of SimTier's histograms."""
        return (self.window, min(self.short_window, self.window)) if self.short_window else (self.window,)

    @property
    def unservable(self) -> str:
        """Why a model of this config is for training and comparison only; empty where it can be served."""
        if self.lsh == "cosine":
            return "a model on exact cosines cannot be served, because rows hold signatures"
        return "a count sketch of the crosses cannot be served" if self.cross_table == "sketch" else ""

    def has(self, component: str) -> bool:
        """Is this one of COMPONENTS switched on?"""
        return component not in self.without


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the feature spec adds to the config. A tower's sizes: rows of its category table, categories, numerics."""

    item: tuple[int, int, int]
    user: tuple[int, int, int]
    actions: int  # named actions; code 0 = unknown comes on top
    cross_kinds: tuple[int, ...] = ()  # kind of each cross that owns a slot, from slot 1 on; 0 = of no kind


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
    signatures: Tensor  # f4 [B, L, b], -1 or +1; where lsh = "cosine", directions of length sqrt b [B, L, e]
    crosses: Tensor  # i8 [B, L, C], slots, 0 = none
    actions: Tensor  # i8 [B, L]
    ages: Tensor  # i8 [B, L], milliseconds, >= 0
    valid: Tensor  # bool [B, L], False = padding


@dataclasses.dataclass(frozen=True)
class Candidates:
    """K candidates of each of the B users, as indices of M distinct items."""

    features: Features  # of the M items
    signatures: Tensor  # f4 [M, b] or [M, e], as those of Users
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


class UserTower(nn.Module):
    """Profile and recent tokens -> user vector. A learned null token stands first, so attention always has a key.

    Without self-attention, the tokens stay as they are; without profile attention, its part of the vector is zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.self_attention, self.profile_attention = config.has("self_attention"), config.has("profile_attention")
        self.null = nn.Parameter(torch.randn(d) * 0.1)
        self.qkv = nn.Linear(d, 3 * d)
        self.mix = nn.Linear(d, d)
        self.norm1 = nn.LayerNorm(d)
        self.ffn_in = nn.Linear(d, config.hidden)
        self.ffn_out = nn.Linear(config.hidden, d)
        self.norm2 = nn.LayerNorm(d)
        self.query = nn.Linear(d, d)
        self.out = nn.Linear(3 * d, d)
        for layer in (self.qkv, self.mix, self.norm1, self.ffn_in, self.ffn_out, self.norm2):
            layer.requires_grad_(self.self_attention)
        self.query.requires_grad_(self.profile_attention)

    def forward(self, profile: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """profile [B, d], tokens [B, R, d], valid bool [B, R] -> [B, d]."""
        B, _, d = tokens.shape
        x = torch.cat([self.null.expand(B, 1, d), tokens], dim=1)  # [B, R + 1, d]
        keep = functional.pad(valid, (1, 0), value=True)  # [B, R + 1]
        if self.self_attention:
            x = self._attend(x, keep)
        weight = keep[:, :, None].to(x.dtype)
        pooled = (x * weight).sum(dim=1) / weight.sum(dim=1)  # [B, d]
        focused = self._focus(profile, x, keep) if self.profile_attention else torch.zeros_like(profile)
        out: Tensor = self.out(torch.cat([profile, pooled, focused], dim=1))
        return out

    def _attend(self, x: Tensor, keep: Tensor) -> Tensor:
        """One transformer layer over the tokens [B, R + 1, d]."""
        B, _, d = x.shape
        q, k, v = (
            self.qkv(x).view(B, -1, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        )  # [B, heads, R + 1, d / heads]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = self.norm1(x + self.mix(attended.transpose(1, 2).reshape(B, -1, d)))
        out: Tensor = self.norm2(x + self.ffn_out(functional.relu(self.ffn_in(x))))
        return out

    def _focus(self, profile: Tensor, x: Tensor, keep: Tensor) -> Tensor:
        """The tokens as the profile attends to them [B, d]."""
        affinity = (x @ self.query(profile)[:, :, None]).squeeze(2) / math.sqrt(x.shape[2])  # [B, R + 1]
        focus = torch.softmax(affinity.masked_fill(~keep, -math.inf), dim=1)
        return (focus[:, None, :] @ x).squeeze(1)


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
        self.no_profile = nn.Parameter(torch.randn(d) * 0.1)
        self.action_table = nn.Parameter(torch.randn(sizes.actions + 1, d) * 0.1)
        self.recency_table = nn.Parameter(torch.randn(len(RECENCY_EDGES) + 1, d) * 0.1)
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


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What either side has computed when users and candidates meet."""

    users: Users
    candidates: Candidates
    x: Tensor  # [M, d], item vectors
    profile: Tensor  # [B, d]
    user: Tensor  # [B, d], user vectors
    tokens: Tensor  # [B, L, d], zero where padded
    index: Tensor  # i8 [B, K], the candidates' places in x
    bits: int  # b

    @functools.cached_property
    def matches(self) -> Tensor:
        """Equal bits of every candidate's signature with every behaviour's [B, K, L]; exact, also under autocast.

        With directions for signatures, b (1 + cosine) / 2.
        """
        theirs, ours = self.candidates.signatures, self.users.signatures
        with torch.autocast(ours.device.type, enabled=False):
            return (self.bits + theirs[self.index] @ ours.transpose(1, 2)) / 2


class Frame(Ranker):
    """The user tower, SimTier, SIM, dot products, the first layer and the head, around a model's `interest`."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        h, d, t = config.width, config.dim, config.tiers * len(config.windows)
        simtier, sim = config.has("simtier"), config.has("sim")
        self.user_tower = UserTower(config)
        self.tier_table = nn.Parameter(torch.randn(t, d) * 0.05, requires_grad=simtier)
        self.no_window = nn.Parameter(torch.zeros(d), requires_grad=simtier)
        self.no_cross = nn.Parameter(torch.zeros(d + SIM_COUNTS), requires_grad=sim)
        # W1, the first layer, as blocks of columns.
        self.W1u = first_layer_block(h, d)
        self.W1x = first_layer_block(h, d)
        self.W1t = first_layer_block(h, d, learns=simtier)
        kinds = [first_layer_block(h, d + SIM_COUNTS) for _ in range(max(sizes.cross_kinds, default=0) + 1)]
        self.W1s = nn.Parameter(torch.stack([block.detach() for block in kinds]), requires_grad=sim)  # one per kind
        self.cross_kinds = torch.tensor([0, *sizes.cross_kinds], device="cpu")  # by slot
        self.b1 = nn.Parameter(torch.zeros(h))
        signature = config.embedding_dim if config.lsh == "cosine" else config.bits
        self.dots = Dots(config.dots, signature, config, config.bits**-0.5) if config.dots else None
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([h, *config.head, 1]))

    def interest(self, meeting: Meeting) -> Tensor:
        """The first layer's part from the user's history and the item [B, K, h]."""
        raise NotImplementedError

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        meeting, config = self._meet(users, candidates), self.config
        z = (
            (meeting.user @ self.W1u.T)[:, None, :]
            + (meeting.x @ self.W1x.T)[meeting.index]
            + self.interest(meeting)
            + self.b1
        )  # [B, K, h]
        if config.has("simtier"):
            z = z + self._simtier(meeting.matches, users.valid) @ self.W1t.T
        if config.has("sim"):
            z = z + self._sim(users, meeting.tokens, candidates.crosses[meeting.index])
        if self.dots:
            z = z + self.dots(meeting.user, candidates.signatures[meeting.index])
        for layer in self.head:
            z = layer(functional.relu(z))
        out: Tensor = z.squeeze(2)
        return out

    def serving_flops(self, length: int, window: int) -> float:
        """Of the folded frame: the first layer's sums, SimTier's popcounts and table, the crosses' rows, the dot
        products, the head.
        """
        config, h = self.config, self.config.width
        total = 2.0 * h  # joint_i + P_u, and the first ReLU
        if config.has("simtier"):
            words = config.bits / 64
            pair = 3 * words + 2 * (config.tiers - 1)  # XOR, popcount, add; compare with each edge and count
            short = sum(config.windows[1:])
            counted = min(length, window, lsh.COUNTED + short) + min(length, short)
            total += counted * pair + 2 * h * config.tiers * len(config.windows)
        if config.has("sim"):
            total += h * (config.crosses + 1)  # a row of G per cross, and the mean
        if self.dots:
            total += 2.0 * h * config.bits
        return total + sum(2.0 * a * b for a, b in itertools.pairwise([h, *config.head, 1]))

    def _meet(self, users: Users, candidates: Candidates) -> Meeting:
        R = self.config.recent
        tokens = self.history(users)
        profile = self.profiles(users.profile, users.known)
        return Meeting(
            users=users,
            candidates=candidates,
            x=self.item_vectors(candidates.features),
            profile=profile,
            user=self.user_tower(profile, tokens[:, -R:], users.valid[:, -R:]),
            tokens=tokens,
            index=candidates.index,
            bits=self.config.bits,
        )

    def _simtier(self, matches: Tensor, valid: Tensor) -> Tensor:
        """SimTier(u,i): log1p of the windows' histograms over tiers, times the tiers' embeddings [B, K, d]."""
        counts = torch.cat([self._tier_counts(matches[:, :, -w:], valid[:, -w:]) for w in self.config.windows], dim=2)
        known = valid.any(dim=1)[:, None, None]
        return torch.where(known, torch.log1p(counts) @ self.tier_table, self.no_window)

    def _tier_counts(self, matches: Tensor, valid: Tensor) -> Tensor:
        """Behaviours in each tier [B, K, t]."""
        inside = valid[:, None, :]
        at_least = [inside.sum(dim=2).expand(matches.shape[:2])]  # behaviours in tier >= 0, 1, ...; each [B, K]
        at_least += [((matches >= edge) & inside).sum(dim=2) for edge in self.config.tier_edges]
        reached = torch.stack([*at_least, torch.zeros_like(at_least[0])], dim=2)  # [B, K, t + 1]
        return (reached[:, :, :-1] - reached[:, :, 1:]).to(torch.float32)

    def _sim(self, users: Users, tokens: Tensor, wanted: Tensor) -> Tensor:
        """W1s SIM(u, c_i): mean over the item's crosses of the user's row of each [B, K, h].

        `wanted` [B, K, C]: slots of the items' crosses.
        """
        row = torch.arange(len(wanted), device=wanted.device)[:, None, None] << 16  # a key is (user, slot)
        used = (users.crosses != NO_CROSS) & users.valid[:, :, None]  # [B, L, C]
        absent = self.absent_cross()
        if not used.any():
            return absent.expand(*wanted.shape[:2], -1)
        found, order = torch.sort((row | users.crosses)[used], stable=True)
        keys, count = torch.unique_consecutive(found, return_counts=True)
        member = (torch.nonzero(used.flatten()).squeeze(1) // users.crosses.shape[2])[order]  # places in [B * L]
        newest = member[count.cumsum(0) - 1]  # behaviours stand oldest first
        mean = functional.embedding_bag(member, tokens.flatten(0, 1), count.cumsum(0) - count, mode="mean")
        counts = sim_counts(count.to(torch.float32), users.ages.flatten()[newest])
        rows = self.fold_crosses(keys & 0xFFFF, torch.cat([counts, mean], dim=1))  # [keys, h]
        if self.config.cross_table == "sketch":
            found_rows = _sketched(keys, rows - absent, row, wanted, self.config.cross_rows) + absent
        else:
            kept = kept_crosses(keys >> 16, count, newest, self.config)
            found_rows = _looked_up(keys[kept], torch.cat([rows[kept], absent[None, :]]), row | wanted)
        counted = (wanted != NO_CROSS).to(torch.float32)  # [B, K, C]
        mean = (counted[:, :, None, :] @ found_rows).squeeze(2) / counted.sum(dim=2, keepdim=True).clamp(min=1)
        return torch.where(counted.sum(dim=2, keepdim=True) > 0, mean, absent)

    def fold_crosses(self, slots: Tensor, summaries: Tensor) -> Tensor:
        """G_u [m, h]: W1s SIM(u, c) of summaries [m, d + 2] in the crosses `slots` i8 [m], by their kind's weights."""
        kinds = self.cross_kinds[torch.where(slots < len(self.cross_kinds), slots, 0)]
        order = torch.argsort(kinds, stable=True)
        parts = torch.split(summaries[order], torch.bincount(kinds, minlength=len(self.W1s)).tolist())
        rows = torch.cat([part @ W.T for part, W in zip(parts, self.W1s, strict=True)])
        return rows[torch.argsort(order)]

    def absent_cross(self) -> Tensor:
        """The row of a cross that the user never met, and of an item without crosses [h]."""
        return self.W1s[0] @ self.no_cross


class Dots(nn.Module):
    """Dot products of a user with an item's fixed representation r_i, as a block of the first layer: W1 Q_u r_i.

    Q_u [k, m] is linear in the user vector. The block is linear in r_i, so it folds into one matrix per user [h, m]
    that meets r_i anyway (D_u for signatures, C_u for bridge weights): no byte per item and no work per candidate more.
    """

    def __init__(self, count: int, size: int, config: ModelConfig, scale: float) -> None:
        """`count` dot products with representations of `size` numbers; `scale` brings them to a variance near 1."""
        super().__init__()
        self.count, self.scale = count, scale
        self.query = nn.Linear(config.dim, count * size)
        self.W1 = first_layer_block(config.width, count)

    def queries(self, user: Tensor) -> Tensor:
        """Q_u, scaled [B, k, m]."""
        out: Tensor = self.scale * self.query(user).unflatten(1, (self.count, -1))
        return out

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        """user [B, d], items [B, K, m] -> the first layer's part [B, K, h]."""
        return items @ self.queries(user).transpose(1, 2) @ self.W1.T

    def fold(self, user: Tensor) -> Tensor:
        """user [d] -> the matrix that r_i is multiplied with [h, m]."""
        return self.W1 @ self.queries(user[None])[0]


class AIF(Frame):
    """The network that is served: the user's interest in an item by BEA and LSH-DIN."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        h, d = config.width, config.dim
        bea, din = config.has("bea"), config.has("lsh_din")
        self.bridges = nn.Parameter(torch.randn(config.bridges, d), requires_grad=bea or config.bridge_dots > 0)
        self.no_din = nn.Parameter(torch.zeros(d), requires_grad=din)
        self.W1b = first_layer_block(h, d, learns=bea)
        self.W1d = first_layer_block(h, d, learns=din)
        self.bridge_dots = Dots(config.bridge_dots, config.bridges, config, 1.0) if config.bridge_dots else None

    # Item side ------------------------------------------------------------------------------------------------------

    def bridge_weights(self, x: Tensor) -> Tensor:
        """w_i = softmax(temperature B x_i / sqrt d) [M, n], over the `bridge_top` best where that is set."""
        config = self.config
        affinity = self._affinity(x)
        if self.training and config.bridge_dropout:
            affinity = affinity.masked_fill(self._dropped(), -math.inf)
        if config.bridge_top:
            worst = affinity.topk(config.bridge_top, dim=1).values[:, -1:]
            affinity = affinity.masked_fill(affinity < worst, -math.inf)
        return torch.softmax(affinity, dim=1)

    # User side ------------------------------------------------------------------------------------------------------

    def bridge_values(self, profile: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """V_u = softmax(temperature B U^T / sqrt d) U [B, n, d], U = recent tokens and the profile."""
        U = torch.cat([profile[:, None, :], tokens], dim=1)  # [B, 1 + R, d]
        keep = functional.pad(valid, (1, 0), value=True)
        affinity = self._affinity(U).transpose(1, 2)  # [B, n, 1 + R]
        return torch.softmax(affinity.masked_fill(~keep[:, None, :], -math.inf), dim=2) @ U

    def _affinity(self, x: Tensor) -> Tensor:
        """x [..., d] with every bridge [..., n]."""
        return x @ self.bridges.T * (self.config.bridge_temperature / math.sqrt(self.config.dim))

    # Where both meet ------------------------------------------------------------------------------------------------

    def interest(self, meeting: Meeting) -> Tensor:
        """BEA and LSH-DIN, through their blocks of the first layer [B, K, h]."""
        config, R, index = self.config, self.config.recent, meeting.index
        tokens, valid = meeting.tokens, meeting.users.valid
        z = self.b1.new_zeros(*index.shape, config.width)
        if config.has("bea") or self.bridge_dots:
            w = self.bridge_weights(meeting.x)[index]  # [B, K, n]
            if config.has("bea"):
                V = self.bridge_values(meeting.profile, tokens[:, -R:], valid[:, -R:])  # [B, n, d]
                z = z + (w @ V) @ self.W1b.T
            if self.bridge_dots:
                z = z + self.bridge_dots(meeting.user, w)
        if config.has("lsh_din"):
            z = z + self.long_interest(meeting) @ self.W1d.T
        return z

    def long_interest(self, meeting: Meeting) -> Tensor:
        """DIN(u,i): mean over the history of similarity times token [B, K, d]."""
        config, valid = self.config, meeting.users.valid
        similarity = config.din_scale * (meeting.matches / config.bits - config.din_shift)  # [B, K, L]
        count = valid.sum(dim=1)[:, None, None]  # [B, 1, 1]
        mean = similarity @ meeting.tokens / count.clamp(min=1)  # padded tokens are zero
        return torch.where(count > 0, mean, self.no_din)

    def training_forward(
        self, users: Users, candidates: Candidates, clicked: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ranker`; the penalty is that of bridges which point the same way."""
        logits, penalty = super().training_forward(users, candidates, clicked, counted)
        if self.config.bridge_diversity and self.config.bridges > 1:
            unit = functional.normalize(self.bridges, dim=1)
            cosine = (unit @ unit.T).fill_diagonal_(0.0)
            pairs = len(unit) * (len(unit) - 1)
            penalty = penalty + self.config.bridge_diversity * cosine.square().sum() / pairs
        return logits, penalty

    def serving_flops(self, length: int, window: int) -> float:
        """Of the folded form: the frame, C_u w_i and D_u s_i; that is `fold.join_scores` with the head."""
        config, total = self.config, super().serving_flops(length, window)
        if config.has("bea") or self.bridge_dots:
            total += 2.0 * config.width * config.bridges
        return total + self.long_flops(length) if config.has("lsh_din") else total

    def long_flops(self, length: int) -> float:  # noqa: ARG002  does not depend on it
        """Of `long_interest`, per candidate: D_u s_i, which the dot products share."""
        return 0.0 if self.dots else 2.0 * self.config.width * self.config.bits

    @torch.no_grad()
    def start_bridges(self, vectors: Tensor) -> None:
        """Start the bridges at the k-means centres of item vectors [M, d], M >= n, taken before training.

        Only the centres' differences matter to a softmax, so they are centred; their length is that of random bridges,
        or all affinities would start near zero. Draws from torch's random state. Raises ValueError for too few vectors.
        """
        centres = _kmeans(vectors, self.config.bridges)
        centres = centres - vectors.mean(dim=0)
        self.bridges.copy_(functional.normalize(centres, dim=1) * math.sqrt(self.config.dim))

    def _dropped(self) -> Tensor:
        """Which bridges this training step does without, bool [n]; never all of them."""
        chance = torch.rand(self.config.bridges, device=self.bridges.device)
        return (chance < self.config.bridge_dropout) & (chance < chance.max())


def kept_crosses(user: Tensor, count: Tensor, newest: Tensor, config: ModelConfig) -> Tensor:
    """Which crosses the users' tables keep, bool [keys]; the keys ascend by user, then slot. `fold` has it for one.

    A capped table keeps a user's first `cross_rows` crosses: "frequent" orders them by `count`, "recent" by the place
    of the `newest` behaviour; each breaks ties by the other, and then by slot.
    """
    size = torch.bincount(user)
    if config.cross_table not in ("frequent", "recent") or int(size.max()) <= config.cross_rows:
        return torch.ones(len(user), dtype=torch.bool, device=user.device)
    first, second = (count, newest) if config.cross_table == "frequent" else (newest, count)
    order = torch.argsort(first << 32 | second, descending=True, stable=True)
    order = order[torch.argsort(user[order], stable=True)]
    place = torch.arange(len(order), device=user.device) - (size.cumsum(0) - size)[user[order]]  # among the user's
    kept = torch.empty(len(order), dtype=torch.bool, device=user.device)
    kept[order] = place < config.cross_rows
    return kept


def _looked_up(keys: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """Rows [keys + 1, h] of the wanted keys, the last one where there is none [B, K, C, h]."""
    place = torch.searchsorted(keys, wanted)
    met = functional.pad(keys, (0, 1), value=-1)[place] == wanted
    return rows[torch.where(met, place, len(keys))]


def _sketched(keys: Tensor, rows: Tensor, user: Tensor, wanted: Tensor, size: int) -> Tensor:
    """The same out of a count sketch (Charikar et al., 2002) of `size` rows for each user: in each of a few small
    tables a cross is added to its bucket with its sign; what is read is the mean over the tables of bucket times sign,
    not their median, so that it stays linear. `rows` are less the default.
    """
    width = size // len(_SKETCH)
    estimate = rows.new_zeros(*wanted.shape, rows.shape[1])
    for factor in _SKETCH:
        bucket, sign = _hashed(keys & 0xFFFF, factor, width)
        table = rows.new_zeros(len(user) * width, rows.shape[1]).index_add(
            0, (keys >> 16) * width + bucket, sign[:, None] * rows
        )
        bucket, sign = _hashed(wanted, factor, width)
        estimate = estimate + sign[..., None] * table[(user >> 16) * width + bucket] / len(_SKETCH)
    return estimate


def _hashed(slots: Tensor, factor: int, width: int) -> tuple[Tensor, Tensor]:
    """Bucket 0..width-1 and sign of each slot."""
    mixed = slots * factor & 0xFFFFFFFF
    return (mixed >> 17) * width >> 15, (1 - 2 * (mixed >> 16 & 1)).to(torch.float32)


def recency_buckets(ages: Tensor) -> Tensor:
    """Bucket of each age in milliseconds, 0 = under a minute."""
    return torch.bucketize(ages, torch.tensor(RECENCY_EDGES, device=ages.device), right=True)


def sim_counts(count: Tensor, age: Tensor) -> Tensor:
    """The first columns of SIM(u, c): log1p(count), and recency = 1 / (1 + days since the newest) [..., 2]."""
    days = age.to(torch.float32) / DAY
    return torch.stack([torch.log1p(count), 1 / (1 + days)], dim=-1)


def first_layer_block(rows: int, columns: int, *, learns: bool = True) -> nn.Parameter:
    """Columns of W1, scaled so that six blocks together keep the variance of their inputs."""
    return nn.Parameter(torch.randn(rows, columns) / math.sqrt(3 * columns), requires_grad=learns)


def _kmeans(vectors: Tensor, count: int) -> Tensor:
    """Centres [count, d] by Lloyd's rounds from k-means++ seeds; a centre that loses all its vectors stays."""
    if len(vectors) < count:
        raise ValueError(f"{len(vectors)} vectors are too few for {count} centres")
    chosen = [int(torch.randint(len(vectors), ()))]
    nearest = (vectors - vectors[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count:
        weights = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1)))
        nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(dim=1))
    centres = vectors[chosen].clone()
    for _ in range(_KMEANS_ROUNDS):
        owner = torch.cdist(vectors, centres).argmin(dim=1)
        size = torch.bincount(owner, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors)
        centres = torch.where(size[:, None] > 0, sums / size.clamp(min=1)[:, None], centres)
    return centres


def shapes(model: AIF) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the state, in order."""
    state: dict[str, Any] = model.state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}
