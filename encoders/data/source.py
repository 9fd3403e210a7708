"""The name of a data set, as commands take it -> Dataset: `synthetic`, a prepared folder, or MovieLens in any form."""

from __future__ import annotations

from pathlib import Path

from encoders.data import movielens, prepared, synthetic
from encoders.data.dataset import Dataset

SYNTHETIC = "synthetic"


def open_dataset(name: str, seed: int = 0) -> Dataset:
    """`seed` makes the synthetic marketplace; a folder does not need it. Raises DataError."""
    if name == SYNTHETIC:
        return synthetic.generate(seed=seed)
    folder = Path(name)
    return prepared.open_prepared(folder) if prepared.is_prepared(folder) else movielens.read(folder)
