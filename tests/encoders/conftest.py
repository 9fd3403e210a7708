"""Bundles of two shapes and random inputs for them, shared by the tests of this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from encoders import lsh
from encoders.bundle import Bundle, seeded_bundle
from encoders.config import ModelConfig
from encoders.features import ItemEncoder, ProfileEncoder
from encoders.fold import Behaviours, EncodedItems, ItemFold
from encoders.inputs import Candidates, Users

TINY = ModelConfig(
    width=16, dim=8, bridges=3, bits=16, crosses=2, window=5, short_window=2, length=20, recent=3, head=(12, 8),
    embedding_dim=12, heads=2, hidden=10, category_dim=4, tier_edges=(6, 9), din_shift=0.4, din_scale=3.0,
)  # fmt: skip
VARIANTS = dataclasses.replace(TINY, dots=2, bridge_dots=1, bridge_top=2, bridge_temperature=1.7)
CONFIGS = {
    "tiny": TINY,
    "variants": VARIANTS,
    "default": ModelConfig(din_shift=0.53, din_scale=7.0),
    "no hidden head": ModelConfig(head=()),
}
# Other work on the machine must not fail a property.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

NOW = 1_767_225_600_000


@dataclasses.dataclass
class SomeItem:
    features: dict[str, Any]
    embedding: Any
    crosses: list[str]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class World:
    """A bundle with items that it has encoded, and random histories over them."""

    bundle: Bundle
    items: list[SomeItem]
    rows: EncodedItems

    def behaviours(self, random: np.random.Generator, length: int, later: int = 0) -> Behaviours:
        """`length` behaviours up to NOW and `later` ones behind it; a few share their time."""
        item = random.integers(0, len(self.items), length + later)
        age = np.sort(random.choice([0, 1, 59_999, 60_000, 10**6, 10**8, 10**10, 4 * 10**11], length))[::-1]
        return Behaviours(
            vectors=self.rows.vector[item],
            signatures=self.rows.signature[item],
            crosses=self.rows.crosses[item],
            actions=random.integers(0, 5, length + later).astype(np.uint8),  # codes beyond 2 are not the bundle's
            times=np.concatenate([NOW - age, np.full(later, NOW + 1)]).astype(np.int64),
        )

    def batch(self, lengths: list[int], profiles: list[Any], seed: int = 0) -> tuple[Users, Candidates]:
        """Users with histories of these lengths in one padded batch; each sees seven candidates of its own."""
        config, spec = self.bundle.manifest.config, self.bundle.manifest.features
        random = np.random.default_rng(seed)
        histories = [self.behaviours(random, length) for length in lengths]
        L = max(lengths)

        def padded(column: Callable[[Any], np.ndarray], shape: tuple[int, ...], kind: Any) -> torch.Tensor:
            out = np.zeros((len(lengths), L, *shape), dtype=kind)
            for row, history in enumerate(histories):
                if lengths[row]:
                    out[row, L - lengths[row] :] = column(history)
            return torch.from_numpy(out)

        users = Users(
            profile=ProfileEncoder(spec).features(profiles),
            known=torch.tensor([bool(profile) for profile in profiles]),
            vectors=padded(lambda h: h.vectors, (config.dim,), np.float32),
            signatures=padded(lambda h: lsh.signs(h.signatures), (config.bits,), np.float32),
            crosses=padded(lambda h: h.crosses, (config.crosses,), np.int64),
            actions=padded(lambda h: np.minimum(h.actions, 2), (), np.int64),
            ages=padded(lambda h: NOW - h.times, (), np.int64),
            valid=padded(lambda h: np.ones(len(h), dtype=bool), (), bool),
        )
        columns = ItemEncoder(spec, config.embedding_dim, config.crosses).columns(self.items)
        candidates = Candidates(
            features=columns.features,
            signatures=torch.from_numpy(lsh.signs(self.rows.signature)),
            crosses=torch.from_numpy(columns.crosses.astype(np.int64)),
            index=torch.from_numpy(random.integers(0, len(self.items), (len(lengths), 7))),
        )
        return users, candidates


def some_items(count: int, embedding_dim: int, seed: int = 0) -> list[SomeItem]:
    random = np.random.default_rng(seed)
    pool = [f"category:{k}" for k in range(6)] + [f"brand:{k}" for k in range(4)] + ["never seen", "nor this"]
    return [
        SomeItem(
            features={
                "category": f"c{k % 5}",
                "words": [f"w{j}" for j in range(k % 4)],
                **({"price": float(k)} if k % 3 else {}),
                **({"brand": "b"} if k % 2 else {}),
            },
            embedding=random.standard_normal(embedding_dim).round(4).tolist(),
            crosses=random.choice(pool, k % 5, replace=False).tolist(),
            attributes={"bid": 0.5, "title": "x"},
        )
        for k in range(count)
    ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """`world(name of CONFIGS or a config, seed)`, remembered for the session."""
    made: dict[tuple[str | ModelConfig, int], World] = {}

    def make(name: str | ModelConfig = "tiny", seed: int = 0) -> World:
        if (name, seed) not in made:
            path: Path = tmp_path_factory.mktemp("bundles") / "bundle"
            config = CONFIGS[name] if isinstance(name, str) else name
            bundle = seeded_bundle(path, config, seed, precision="fp32")
            items = some_items(60, bundle.manifest.config.embedding_dim, seed)
            made[name, seed] = World(bundle, items, ItemFold(bundle).encode(items))
        return made[name, seed]

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
