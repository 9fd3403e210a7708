"""A data set and options with which a training takes a second, for the tests that train in other processes too."""

from __future__ import annotations

from encoders.config import ModelConfig
from encoders.data.dataset import Dataset
from encoders.data.synthetic import Marketplace, generate
from encoders.train import TrainOptions

CONFIG = ModelConfig(
    width=16, dim=16, bridges=4, bits=32, crosses=2, window=10, recent=4, head=(8,), heads=2, hidden=16,
    category_dim=4, tier_edges=(14, 18), attention=(8,),
)  # fmt: skip
OPTIONS = TrainOptions(config=CONFIG, seed=3, epochs=3, batch_groups=16)


def small_data() -> Dataset:
    return generate(Marketplace(users=40, items=80, examples=1_500, days=6, categories=6, brands=8, past=10), seed=1)
