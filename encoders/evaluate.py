"""Ranking metrics, and a model's (or a baseline's) figures on a slice of time. Last step of training; also a command.

All metrics take scores [n], labels bool [n] and, where users matter, user numbers [n]; higher scores rank first.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from encoders import lsh
from encoders.batches import Batches, Groups
from encoders.bundle import Bundle
from encoders.data.dataset import DataError, Dataset
from encoders.model import AIF

Scores = npt.NDArray[np.floating]
Labels = npt.NDArray[np.bool_]
Figures = dict[str, float | None]

BATCH_GROUPS = 64
TRAIN_PART, VALIDATION_PART = 0.8, 0.1  # of the examples in time order; the rest is the test slice


@dataclasses.dataclass(frozen=True)
class Split:
    """Times (ms) that part the data: training before `validation` <= validation before `test` <= test."""

    start: int  # the first example
    validation: int
    test: int
    end: int  # behind the last behaviour


def split_of(data: Dataset) -> Split:
    """The global time split. Raises DataError where a part would be empty."""
    time = np.sort(data.examples.time)
    if not len(time):
        raise DataError("the data hold no examples")
    cuts = [int(time[int(len(time) * part)]) for part in (TRAIN_PART, TRAIN_PART + VALIDATION_PART)]
    split = Split(int(time[0]), cuts[0], cuts[1], int(time[-1]) + 1)
    if not split.start < split.validation < split.test < split.end:
        raise DataError("the data's times do not part into training, validation and test")
    return split


def auc(scores: Scores, labels: Labels) -> float:
    """Share of (positive, negative) pairs that are in order, ties counting half; NaN where a class is empty."""
    return gauc(scores, labels, np.zeros(len(scores), dtype=np.int64))


def gauc(scores: Scores, labels: Labels, users: npt.NDArray[np.integer]) -> float:
    """Mean of the users' AUC, weighted by their examples; users with one class only are left out; NaN where none is
    left.
    """
    order = np.lexsort((scores, users))
    user, score, label = users[order], scores[order], labels[order]
    n = len(user)
    new_user = np.diff(user, prepend=user[:1] - 1) != 0
    user_start = np.flatnonzero(new_user)
    tie_start = np.flatnonzero(new_user | (np.diff(score, prepend=0) != 0))
    tie_size = np.diff(tie_start, append=n)
    group = np.cumsum(new_user) - 1
    rank = np.repeat(tie_start + (tie_size - 1) / 2, tie_size) - user_start[group] + 1  # mean rank within the user
    size = np.diff(user_start, append=n)
    positive = np.bincount(group, weights=label, minlength=len(size))
    negative = size - positive
    rank_sum = np.bincount(group, weights=rank * label, minlength=len(size))
    mixed = (positive > 0) & (negative > 0)
    if not mixed.any():
        return float("nan")
    per_user = (rank_sum - positive * (positive + 1) / 2)[mixed] / (positive * negative)[mixed]
    return float(np.average(per_user, weights=size[mixed]))


def log_loss(logits: Scores, labels: Labels) -> float:
    """Mean negative log-likelihood of the labels under sigmoid(logits)."""
    logits = np.asarray(logits, dtype=np.float64)
    return float(np.mean(np.logaddexp(0, logits) - logits * labels))


def figures(logits: Scores, labels: Labels, users: npt.NDArray[np.integer]) -> Figures:
    """GAUC, AUC and LogLoss, None where the labels do not give one, and the number of examples."""
    return {
        "gauc": _rounded(gauc(logits, labels, users)),
        "auc": _rounded(auc(logits, labels)),
        "logloss": _rounded(log_loss(logits, labels)),
        "examples": len(labels),
    }


def _rounded(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def predict(model: AIF, batches: Batches, groups: Groups) -> tuple[Scores, Labels, npt.NDArray[np.int64]]:
    """Logits, labels and users of the groups' examples."""
    logits, labels, users = [], [], []
    model.eval()
    with torch.inference_mode():
        for batch in batches.batches(groups, model, BATCH_GROUPS):
            counted = batch.counted
            logits.append(model(batch.users, batch.candidates)[counted].numpy())
            labels.append(batch.clicked[counted].numpy() > 0)
            users.append(np.repeat(batch.groups.user, counted.sum(dim=1).numpy()))
    return np.concatenate(logits), np.concatenate(labels), np.concatenate(users)


def evaluate(bundle: Bundle, data: Dataset) -> dict[str, Figures]:
    """Figures of the bundle, of popularity and of chance on the test slice of the data. Raises DataError."""
    manifest, model = bundle.manifest, bundle.model
    if data.items.embeddings.shape[1] != manifest.config.embedding_dim:
        raise DataError("the data's embeddings are not as long as the bundle's")
    batches = Batches(data, manifest.features, manifest.config)
    batches.sign(lsh.signatures(batches.embedding, model.centre.numpy(), model.projection.numpy()))
    split = split_of(data)
    groups = batches.groups(split.test, split.end)
    return {"model": figures(*predict(model, batches, groups)), **baselines(data, split.test, split.end)}


def baselines(data: Dataset, since: int, until: int) -> dict[str, Figures]:
    """Figures of popularity (smoothed click rate of the item before `since`) and of chance on `since` <= time <
    `until`.
    """
    log = data.examples
    past, now = log.time < since, (log.time >= since) & (log.time < until)
    rate = max(1e-6, min(1 - 1e-6, float(log.clicked[past].mean()) if past.any() else 0.5))
    M, weight = len(data.items.ids), 20.0
    shown = np.bincount(log.item[past], minlength=M)
    clicks = np.bincount(log.item[past], weights=log.clicked[past], minlength=M)
    popularity = (clicks + weight * rate) / (shown + weight)
    logits = np.log(popularity / (1 - popularity))[log.item[now]]
    chance = np.random.default_rng(0).standard_normal(int(now.sum())) * 1e-3 + np.log(rate / (1 - rate))
    labels, users = log.clicked[now], log.user[now].astype(np.int64)
    return {"popularity": figures(logits, labels, users), "chance": figures(chance, labels, users)}
