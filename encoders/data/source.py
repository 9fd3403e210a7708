"""The name of a data set, as commands take it -> Dataset: `synthetic`, or a folder that one of the readers knows."""

from __future__ import annotations

from pathlib import Path

from encoders.data import movielens, synthetic
from encoders.data.dataset import Dataset

SYNTHETIC = "synthetic"


def open_dataset(name: str, seed: int = 0) -> Dataset:
    """`seed` makes the synthetic marketplace; a folder does not need it. Raises DataError."""
    return synthetic.generate(seed=seed) if name == SYNTHETIC else movielens.read(Path(name))
