"""Data set -> what training takes from it before the first step: feature spec, LSH centre, tier edges, batches.

Only what is there before the validation slice is looked at, so neither slice can tell the model anything.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders import lsh
from encoders.batches import PART, Batches, Groups, in_parts
from encoders.config import ModelConfig
from encoders.data.dataset import DataError, Dataset
from encoders.evaluate import Split
from encoders.features import Categorical, FeatureSpec, Numeric

_VOCABULARY = 16_384  # most frequent crosses, which own slots
_BUCKETS = 65_536  # per categorical feature, at most
_SAMPLE = 4_000  # groups on which tiers are measured
_THRESHOLD_SAMPLE = 50_000  # items on which the thresholds of two bits per projection are measured


@dataclasses.dataclass(frozen=True)
class Material:
    """A data set made ready for the training of one model."""

    spec: FeatureSpec
    config: ModelConfig  # with the tier edges and DIN's centring
    known: npt.NDArray[np.int64]  # places of the items that were there before validation
    centre: npt.NDArray[np.float32]  # [e], mean of their embeddings
    thresholds: npt.NDArray[np.float32] | None  # [2, p], of the LSH's projections, where these give two bits each
    batches: Batches  # signed
    training: Groups
    validation: Groups


def material_of(data: Dataset, split: Split, config: ModelConfig, seed: int) -> Material:
    """Measure what the config leaves open, and encode the data. Raises DataError."""
    spec = spec_of(data, split)
    if config.cross_table == "hashed":
        spec = dataclasses.replace(spec, crosses=(), cross_slots=config.cross_rows + 1)
    embeddings = data.items.embeddings
    config = dataclasses.replace(config, embedding_dim=embeddings.shape[1])
    known = np.flatnonzero(data.items.added < split.validation)
    if not len(known):
        raise DataError("no item was there before the validation slice")
    centre = _mean(embeddings, known)
    projection = lsh.projection(config.embedding_dim, config.bits, seed, config.bits_per_projection)
    thresholds = None
    if config.bits_per_projection == 2:
        some = np.sort(np.random.default_rng(seed).permutation(known)[:_THRESHOLD_SAMPLE])
        thresholds = lsh.thresholds(embeddings[some], centre, projection)
    batches = Batches(data, spec, config)
    if config.lsh == "cosine":
        batches.sign(in_parts(lambda part: lsh.directions(part, centre, config.bits), embeddings))
    else:
        batches.sign(in_parts(lambda part: lsh.signatures(part, centre, projection, thresholds), embeddings))
    training = batches.groups(split.start, split.validation)
    chosen = np.random.default_rng(seed).permutation(len(training))[:_SAMPLE]
    sample = batches.matches_sample(training.select(chosen))
    if not sample.size:
        raise DataError("no user has a history before another behaviour, so there is nothing to learn from")
    spread = max(0.02, float(sample.std()) / config.bits)
    measured = dataclasses.replace(
        config,
        tier_edges=lsh.tier_edges(sample, config.tiers, config.bits),
        din_shift=round(float(sample.mean()) / config.bits, 6),
        din_scale=round(0.5 / spread, 6),
    )
    validation = batches.groups(split.validation, split.test)
    return Material(spec, measured, known, centre, thresholds, batches, training, validation)


def spec_of(data: Dataset, split: Split) -> FeatureSpec:
    """The feature spec that the data call for: numbers and vocabularies of the items that are there before validation,
    and of the profiles of users with an example before it.
    """
    items = data.items
    seen = np.flatnonzero(items.added < split.validation)
    users = np.unique(data.examples.user[data.examples.time < split.validation])
    item, user = _Measured(), _Measured()
    crosses: Counter[str] = Counter()
    for k in seen.tolist():
        item.add(items.features[k])
        crosses.update(items.crosses[k])
    for k in users.tolist():
        user.add(data.profiles.features[k])
    return FeatureSpec(
        item_categories=item.categories(),
        item_numerics=item.numerics(),
        user_categories=user.categories(),
        user_numerics=user.numerics(),
        crosses=tuple(sorted(name for name, _ in crosses.most_common(_VOCABULARY))),
        actions=data.actions,
        attributes=_numeric_attributes(items.attributes),
    )


class _Measured:
    """What features hold, counted as they pass by: items may be more than fit in memory as objects."""

    def __init__(self) -> None:
        self._strings: dict[str, set[str]] = {}
        self._numbers: dict[str, array[float]] = {}

    def add(self, features: Mapping[str, Any]) -> None:
        for name, value in features.items():
            if isinstance(value, str):
                self._strings.setdefault(name, set()).add(value)
            elif isinstance(value, list):
                self._strings.setdefault(name, set()).update(value)
            elif isinstance(value, (int, float)):
                self._numbers.setdefault(name, array("d")).append(value)

    def categories(self) -> tuple[Categorical, ...]:
        """A categorical feature for each name with strings; four times as many buckets as values, a power of two."""
        return tuple(
            Categorical(name, min(_BUCKETS, max(16, 1 << (4 * len(found)).bit_length())))
            for name, found in sorted(self._strings.items())
        )

    def numerics(self) -> tuple[Numeric, ...]:
        return tuple(
            Numeric(name, round(float(np.mean(found)), 6), round(float(np.std(found)), 6) or 1.0)
            for name, found in sorted(self._numbers.items())
        )


def _mean(embeddings: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Mean of the rows, a part at a time: the embeddings may be a memory map."""
    total = np.zeros(embeddings.shape[1])
    for at in range(0, len(rows), PART):
        total += embeddings[rows[at : at + PART]].sum(axis=0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)


def _numeric_attributes(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(sorted({name for row in rows for name, value in row.items() if isinstance(value, (int, float))}))
