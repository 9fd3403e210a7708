"""The sizes and variants of a network: `ModelConfig` from the caller, `Sizes` from the data's feature spec."""

from __future__ import annotations

import dataclasses

COMPONENTS = ("bea", "lsh_din", "simtier", "sim", "self_attention", "profile_attention")  # what `without` may name
LSH = ("random", "learned", "cosine")  # what ModelConfig.lsh may be
CROSS_TABLES = ("exact", "frequent", "recent", "hashed", "sketch")  # what ModelConfig.cross_table may be
# Of the count sketch: one odd number per hash, whose product with a slot gives bucket and sign (multiply-shift).
SKETCH = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


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
        if not len(SKETCH) <= self.cross_rows < 1 << 16:
            raise ValueError(f"a table of crosses has {len(SKETCH)} to 65535 rows, not {self.cross_rows}")

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
