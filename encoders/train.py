"""Data set -> bundle: builds the feature spec, measures the LSH's centre and tiers, trains, and keeps the best weights.

The split is by time: the model trains on the first 80 % of the behaviours, stops where the validation slice (the next
10 %) no longer improves, and its figures on the rest go into the manifest beside those of popularity and chance. Equal
data, seed and number of threads give equal weights, unless the time limit ends the training.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from encoders import lsh
from encoders.batches import Batches, Groups
from encoders.bundle import Precision, new_model, save_bundle
from encoders.data.dataset import DataError, Dataset
from encoders.evaluate import BATCH_GROUPS, Split, baselines, figures, predict, split_of
from encoders.features import Categorical, FeatureSpec, Numeric
from encoders.model import AIF, ModelConfig

_EPOCHS = 30  # at most; early stopping usually ends sooner
_PATIENCE = 3  # epochs without a better validation slice
_LEAST_GAIN = 5e-4  # of the validation GAUC that counts as better
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 1e-3
_TABLE_DECAY = 0.3  # of the category tables, which would otherwise learn items by heart
_AVERAGED_STEPS = 200  # the weights kept are a moving average over about as many steps
_VOCABULARY = 16_384  # most frequent crosses, which own slots
_BUCKETS = 65_536  # per categorical feature, at most
_SAMPLE = 4_000  # groups on which tiers are measured

Report = Callable[[str], None]


def train(
    data: Dataset,
    out: Path,
    *,
    precision: Precision = "fp16",
    seed: int = 0,
    minutes: float = 1.0,
    config: ModelConfig | None = None,
    report: Report = print,
) -> dict[str, Any]:
    """Train on `data`, write the bundle to `out`, give its metrics. Raises DataError and BundleError."""
    started = time.monotonic()
    split = split_of(data)
    spec = spec_of(data, split)
    config = dataclasses.replace(config or ModelConfig(), embedding_dim=data.items.embeddings.shape[1])
    config, centre, signatures = _measured(data, spec, config, split, seed)
    batches = Batches(data, spec, config)
    batches.sign(signatures)
    model = new_model(config, spec, seed)
    model.centre.copy_(torch.from_numpy(centre))
    training = batches.groups(split.start, split.validation)
    validation = batches.groups(split.validation, split.test)
    report(
        f"training on {int(training.size.sum())} examples in {len(training)} requests, "
        f"validation on {int(validation.size.sum())}; at most {minutes:g} minutes, Ctrl-C stops"
    )
    epochs = _fit(model, batches, training, validation, seed, started + 60 * minutes, report)
    test = batches.groups(split.test, split.end)
    metrics = {
        "data": data.name,
        "seed": seed,
        "epochs": epochs,
        "seconds": round(time.monotonic() - started, 1),
        "test": {"model": figures(*predict(model, batches, test)), **baselines(data, split.test, split.end)},
    }
    save_bundle(out, model, config, spec, precision, metrics)
    return metrics


def spec_of(data: Dataset, split: Split) -> FeatureSpec:
    """The feature spec that the data call for; numbers and vocabularies from items that are there before validation."""
    items = data.items
    seen = [k for k in range(len(items.ids)) if items.added[k] < split.validation]
    features = [items.features[k] for k in seen]
    crosses = Counter(cross for k in seen for cross in items.crosses[k])
    return FeatureSpec(
        item_categories=_categories(features),
        item_numerics=_numerics(features),
        user_categories=_categories(data.profiles.features),
        user_numerics=_numerics(data.profiles.features),
        crosses=tuple(sorted(name for name, _ in crosses.most_common(_VOCABULARY))),
        actions=data.actions,
        attributes=_numeric_attributes(items.attributes),
    )


def _measured(
    data: Dataset, spec: FeatureSpec, config: ModelConfig, split: Split, seed: int
) -> tuple[ModelConfig, np.ndarray, np.ndarray]:
    """Config with tier edges and DIN's centring, the centre of the embeddings, and the items' signatures."""
    embeddings = data.items.embeddings
    centre = embeddings[data.items.added < split.validation].mean(axis=0)
    signatures = lsh.signatures(embeddings, centre, lsh.projection(config.embedding_dim, config.bits, seed))
    batches = Batches(data, spec, config)
    groups = batches.groups(split.start, split.validation)
    chosen = np.random.default_rng(seed).permutation(len(groups))[:_SAMPLE]
    sample = batches.matches_sample(groups.select(chosen), signatures)
    if not sample.size:
        raise DataError("no user has a history before another behaviour, so there is nothing to learn from")
    spread = max(0.02, float(sample.std()) / config.bits)
    measured = dataclasses.replace(
        config,
        tier_edges=lsh.tier_edges(sample, config.tiers, config.bits),
        din_shift=round(float(sample.mean()) / config.bits, 6),
        din_scale=round(0.5 / spread, 6),
    )
    return measured, centre, signatures


def _fit(
    model: AIF, batches: Batches, training: Groups, validation: Groups, seed: int, deadline: float, report: Report
) -> int:
    """Train until validation stops improving or the deadline, keep the best weights, give the number of epochs."""
    random = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(_parameter_groups(model), lr=_LEARNING_RATE)
    average = _Average(model)
    best, best_state, best_epoch, epoch = -np.inf, copy.deepcopy(model.state_dict()), 0, 0
    started = time.monotonic()
    while epoch < _EPOCHS and epoch - best_epoch < _PATIENCE and time.monotonic() < deadline:
        epoch += 1
        loss = _epoch(model, average, batches, training, optimiser, random, deadline)
        measured = figures(*predict(average.model, batches, validation))
        score = measured["gauc"] or measured["auc"] or -(measured["logloss"] or 0.0)
        if score > best + _LEAST_GAIN:
            best, best_state, best_epoch = score, copy.deepcopy(average.model.state_dict()), epoch
        left = min((time.monotonic() - started) / epoch * (_EPOCHS - epoch), deadline - time.monotonic())
        report(
            f"epoch {epoch}: loss {loss:.4f}, validation GAUC {measured['gauc']}, AUC {measured['auc']}, "
            f"LogLoss {measured['logloss']}; at most {max(0.0, left):.0f} s left"
        )
    model.load_state_dict(best_state)
    return epoch


class _Average:
    """A moving average of a model's weights, which ranks better than the weights of any one step."""

    def __init__(self, model: AIF) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._steps = 0

    def update(self, model: AIF) -> None:
        self._steps += 1
        share = max(1 / _AVERAGED_STEPS, 9 / (10 + self._steps))  # the first steps fade fast
        for mean, weights in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(weights.detach(), share)


def _parameter_groups(model: AIF) -> list[dict[str, Any]]:
    tables = [model.item_tower.table, model.profile_tower.table]
    rest = [weights for weights in model.parameters() if not any(weights is table for table in tables)]
    return [{"params": rest, "weight_decay": _WEIGHT_DECAY}, {"params": tables, "weight_decay": _TABLE_DECAY}]


def _epoch(
    model: AIF,
    average: _Average,
    batches: Batches,
    groups: Groups,
    optimiser: torch.optim.Optimizer,
    random: np.random.Generator,
    deadline: float,
) -> float:
    """One pass over the groups; the mean loss per example."""
    model.train()
    total, count = 0.0, 0
    steps = batches.batches(groups, model, BATCH_GROUPS, random)
    for batch in tqdm(steps, total=-(-len(groups) // BATCH_GROUPS), unit=" batches", leave=False, disable=None):
        logits = model(batch.users, batch.candidates)[batch.counted]
        loss = functional.binary_cross_entropy_with_logits(logits, batch.clicked[batch.counted])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        average.update(model)
        total, count = total + float(loss.detach()) * len(logits), count + len(logits)
        if time.monotonic() > deadline:
            break
    return total / max(1, count)


def _categories(rows: Sequence[Mapping[str, Any]]) -> tuple[Categorical, ...]:
    """A categorical feature for each name with strings; four times as many buckets as values, a power of two."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                values.setdefault(name, set()).add(value)
            elif isinstance(value, list):
                values.setdefault(name, set()).update(value)
    return tuple(
        Categorical(name, min(_BUCKETS, max(16, 1 << (4 * len(found)).bit_length())))
        for name, found in sorted(values.items())
    )


def _numerics(rows: Sequence[Mapping[str, Any]]) -> tuple[Numeric, ...]:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                values.setdefault(name, []).append(float(value))
    return tuple(
        Numeric(name, round(float(np.mean(found)), 6), round(float(np.std(found)), 6) or 1.0)
        for name, found in sorted(values.items())
    )


def _numeric_attributes(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(sorted({name for row in rows for name, value in row.items() if isinstance(value, (int, float))}))
