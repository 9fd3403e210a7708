"""What a trained model is worth on a slice of time. Last step of training, the `evaluate` command and every experiment.

`measure` gives an `Evaluation` (encoders/evaluation.py): the scores of the slice's impressions; the ranks of clicked
items among the whole catalogue, for a sample of requests; and the scores of common shortlists. The samples depend on
the data and `Sampling` alone. `figures` is the short form, for the progress of a training and a bundle's manifest.

Protocol: the split is one in time for all users; a request sees the history strictly before it (encoders/batches.py);
nothing is chosen on the slice that is measured. A full-catalogue ranking has every item that is alive at the request
(added <= time < removed), except those already in the user's history, unless this very request clicks them: to rank
high what was seen before is no mistake, and no click is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from encoders.batches import Batches, Groups
from encoders.bundle import Loaded
from encoders.data.dataset import DataError, Dataset
from encoders.evaluation import F4, I4, Catalogue, Evaluation, Shortlists, shown_of
from encoders.features import FeatureSpec
from encoders.metrics import I8, Labels, Scores, auc, gauc, log_loss, ranks
from encoders.ranker import Ranker
from encoders.unseen import unseen

Figures = dict[str, float | None]
# Users [Q], candidates [Q, K], items of their behaviours [Q, W] (-1 on the left) -> click probabilities [Q, K].
Truth = Callable[[I4, I4, I4], npt.NDArray[np.floating]]
_Score = Callable[[Groups, I8], Scores]  # groups [B], items [B, K] -> scores [B, K]

BATCH_GROUPS = 64
TRAIN_PART, VALIDATION_PART = 0.8, 0.1  # of the examples in time order; the rest is the test slice
_TOGETHER = 8  # requests that the catalogue is scored for at a time
_ROOM = 1 << 18  # candidates times behaviours scored at a time; more leaves the caches, less is all overhead


@dataclasses.dataclass(frozen=True)
class Split:
    """Times (ms) that part the data: training before `validation` <= validation before `test` <= test."""

    start: int  # the first example
    validation: int
    test: int
    end: int  # behind the last example


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


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How much is ranked beyond the impressions; 0 leaves a part out. Equal samplings take equal samples."""

    requests: int = 500  # with a click, whose clicked items are ranked among the catalogue
    shortlists: int = 200  # requests for which a common shortlist is scored
    candidates: int = 2_000  # of a shortlist; fewer where fewer items are alive
    seed: int = 0


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(
    model: Ranker,
    batches: Batches,
    data: Dataset,
    groups: Groups,
    *,
    name: str,
    seed: int = 0,
    sampling: Sampling | None = None,
    truth: Truth | None = None,
) -> Evaluation:
    """Evaluate a model on the groups of a slice. `truth` gives the shortlists' click probabilities, for the regret.

    Costs one pass over the impressions, `sampling.requests` over the catalogue and `sampling.shortlists` over
    `sampling.candidates`. Raises DataError where there is no group, or a score is not finite.
    """
    _some(groups)
    scores, labels, users = predict(model, batches, groups)

    def score(some: Groups, items: I8) -> Scores:
        return score_items(model, batches, some, items)

    return _evaluation(name, seed, (scores, labels, users), score, data, groups, sampling or Sampling(), truth)


def measure_popularity(
    data: Dataset, groups: Groups, since: int, sampling: Sampling | None = None, truth: Truth | None = None
) -> Evaluation:
    """As `measure`: scores by the item's smoothed click rate before `since`."""
    _some(groups)
    logits = _popularity(data, since)
    places = _places(groups)
    seen = logits[data.examples.item[places]], data.examples.clicked[places], data.examples.user[places]
    return _evaluation(
        "popularity", 0, seen, lambda _, items: logits[items], data, groups, sampling or Sampling(), truth
    )


def predict(model: Ranker, batches: Batches, groups: Groups) -> tuple[Scores, Labels, I8]:
    """Logits, labels and users of the groups' examples, in the order of the groups."""
    start = np.cumsum(groups.size) - groups.size
    logits = np.empty(int(groups.size.sum()), dtype=np.float32)
    model.eval()
    with torch.inference_mode():
        for part in batches.plan(groups, BATCH_GROUPS):
            batch = batches.batch(groups.select(part), model)
            counted = batch.counted
            to = np.where(counted.numpy(), start[part][:, None] + np.arange(counted.shape[1]), 0)[counted.numpy()]
            logits[to] = model(batch.users, batch.candidates)[counted].float().numpy()
    places = _places(groups)
    return logits, np.asarray(batches.examples.clicked[places]), np.repeat(groups.user, groups.size)


def score_items(
    model: Ranker, batches: Batches, groups: Groups, items: npt.NDArray[np.integer], room: int = _ROOM
) -> F4:
    """Logits [B, K] of any items [B, K] for the requests of B groups; the user side is built once. `room` bounds the
    candidates times behaviours that are scored at a time.
    """
    model.eval()
    with torch.inference_mode():
        users = batches.users(groups, model)
        step = max(1, room // max(1, users.valid.numel()))
        parts = [
            model(users, batches.candidates(items[:, at : at + step])).float().numpy()
            for at in range(0, items.shape[1], step)
        ]
    return np.concatenate(parts, axis=1)


def _evaluation(
    name: str,
    seed: int,
    seen: tuple[Scores, Labels, npt.NDArray[np.integer]],
    score: _Score,
    data: Dataset,
    groups: Groups,
    sampling: Sampling,
    truth: Truth | None,
) -> Evaluation:
    def finite(scores: Scores) -> F4:
        if not np.isfinite(scores).all():
            raise DataError(f"{name} gives scores that are not finite")
        return np.asarray(scores, dtype=np.float32)

    def checked(some: Groups, items: I8) -> F4:
        return finite(score(some, items))

    places = _places(groups)
    return Evaluation(
        name=name,
        seed=seed,
        users=seen[2].astype(np.int64),
        labels=np.asarray(seen[1], dtype=bool),
        scores=finite(seen[0]),
        catalogue=_catalogue(checked, data, groups, sampling) if sampling.requests else None,
        shortlists=_shortlists(checked, data, groups, sampling, truth) if sampling.shortlists else None,
        shown=shown_of(data.examples.item[places], data.examples.time[places], groups.size),
    )


def _catalogue(score: _Score, data: Dataset, groups: Groups, sampling: Sampling) -> Catalogue | None:
    """None where no request has a click on an item that is alive."""
    clicked = np.bincount(_groups_of(groups), weights=data.examples.clicked[_places(groups)], minlength=len(groups)) > 0
    chosen = _sample(np.flatnonzero(clicked), sampling.requests, sampling.seed)
    gone, parts, kept, sizes = 0, [], [], []
    for at in range(0, len(chosen), _TOGETHER):
        some = groups.select(chosen[at : at + _TOGETHER])
        times = data.examples.time[some.first]
        alive = _alive(data, times)  # [B, M]
        items = np.flatnonzero(alive.any(axis=0))
        scores = score(some, np.broadcast_to(items, (len(some), len(items))))
        for b, place in enumerate(chosen[at : at + _TOGETHER]):
            wanted = _clicks(data, some, b)
            gone += int((~alive[b, wanted]).sum())
            wanted = wanted[alive[b, wanted]]
            if len(wanted):
                ranked = alive[b].copy()
                ranked[_history(data, some, b)] = False
                ranked[wanted] = True
                inside = ranked[items]
                parts.append(ranks(scores[b, inside][None], np.isin(items[inside], wanted)[None]))
                kept.append(place)
                sizes.append(int(inside.sum()))
    if not parts:
        return None
    return Catalogue(
        user=groups.user[kept],
        first=groups.first[kept],
        size=np.array(sizes, dtype=np.int64),
        query=np.repeat(np.arange(len(parts)), [len(part.above) for part in parts]),
        above=np.concatenate([part.above for part in parts]),
        tied=np.concatenate([part.tied for part in parts]),
        gone=gone,
    )


def _shortlists(
    score: _Score, data: Dataset, groups: Groups, sampling: Sampling, truth: Truth | None
) -> Shortlists | None:
    """None where a sampled request has no item alive."""
    random = np.random.default_rng([sampling.seed, 1])
    some = groups.select(_sample(np.arange(len(groups)), sampling.shortlists, sampling.seed))
    times = data.examples.time[some.first]
    alive = [np.flatnonzero(_alive(data, times[[b]])[0]) for b in range(len(some))]
    K = min(sampling.candidates, *(len(row) for row in alive))
    if not K:
        return None
    items = np.stack([row[random.choice(len(row), K, replace=False, shuffle=False)] for row in alive])
    parts = [
        score(some.select(np.arange(at, min(at + _TOGETHER, len(some)))), items[at : at + _TOGETHER])
        for at in range(0, len(some), _TOGETHER)
    ]
    known = None
    if truth is not None:
        rows = [
            truth(some.user[[b]].astype(np.int32), items[[b]].astype(np.int32), _history(data, some, b)[None])
            for b in range(len(some))
        ]
        known = np.concatenate(rows).astype(np.float32)
    return Shortlists(some.user, some.first, items.astype(np.int32), np.concatenate(parts), known)


def _sample(places: I8, count: int, seed: int) -> I8:
    """Up to `count` of the places, ascending."""
    return np.sort(np.random.default_rng([seed, 0]).permutation(places)[:count])


def _alive(data: Dataset, times: I8) -> npt.NDArray[np.bool_]:
    """[B, M]: which items are there at each time."""
    found: npt.NDArray[np.bool_] = (data.items.added <= times[:, None]) & (times[:, None] < data.items.removed)
    return found


def _clicks(data: Dataset, groups: Groups, place: int) -> I8:
    """Distinct items clicked in a group."""
    own = slice(int(groups.first[place]), int(groups.first[place] + groups.size[place]))
    return np.unique(data.examples.item[own][data.examples.clicked[own]]).astype(np.int64)


def _history(data: Dataset, groups: Groups, place: int) -> I4:
    """Items of all the behaviours strictly before a group, oldest first."""
    user = data.log.user.dtype.type(groups.user[place])  # of another type, the whole log would be copied
    begin = int(np.searchsorted(data.log.user, user))
    return np.asarray(data.log.item[begin : int(groups.history[place])])


def _groups_of(groups: Groups) -> I8:
    return np.repeat(np.arange(len(groups)), groups.size)


def _places(groups: Groups) -> I8:
    """Places of the groups' examples, group by group."""
    start = np.cumsum(groups.size) - groups.size
    places: I8 = np.repeat(groups.first - start, groups.size) + np.arange(int(groups.size.sum()))
    return places


def _some(groups: Groups) -> None:
    if not len(groups):
        raise DataError("the slice to be measured holds no examples")


# Figures of a bundle --------------------------------------------------------------------------------------------------


def figures(logits: Scores, labels: Labels, users: npt.NDArray[np.integer]) -> Figures:
    """GAUC, AUC and LogLoss, None where the labels do not give one, and the number of examples."""
    return {
        "gauc": _rounded(gauc(logits, labels, users)),
        "auc": _rounded(auc(logits, labels)),
        "logloss": _rounded(log_loss(logits, labels)),
        "examples": len(labels),
    }


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a bundle's manifest and the `evaluate` command say of the test slice."""

    figures: dict[str, Figures]  # of the model, of popularity and of chance
    counts: dict[str, int]  # `Evaluation.counts`
    unseen: dict[str, int]  # `unseen.unseen`


def evaluate(bundle: Loaded, data: Dataset) -> Measured:
    """Measure the bundle on the test slice of the data. Raises DataError."""
    return on_test_slice(bundle.model, bundle.manifest.features, batches_of(bundle, data), data)


def check_split(bundle: Loaded, data: Dataset) -> None:
    """Raises DataError where the data's test slice begins before that of the bundle's training data, which the bundle
    may have seen.
    """
    own, begins = bundle.manifest.metrics.get("test_begins"), split_of(data).test
    if own is not None and begins < own:
        at, since = (np.datetime64(time, "ms").astype("datetime64[s]") for time in (begins, own))
        raise DataError(f"the test slice of these data begins at {at}, but the bundle has seen examples up to {since}")


def on_test_slice(model: Ranker, spec: FeatureSpec, batches: Batches, data: Dataset) -> Measured:
    """As `evaluate`, of a model and the data encoded for it."""
    split = split_of(data)
    groups = batches.groups(split.test, split.end)
    found = measure(model, batches, data, groups, name="model", sampling=Sampling(requests=0, shortlists=0))
    own = figures(found.scores, found.labels, found.users)
    return Measured(
        figures={"model": own, **baselines(data, split.test, split.end)},
        counts=found.counts,
        unseen=unseen(data, spec, split.validation, split.test, split.end),
    )


def batches_of(bundle: Loaded, data: Dataset) -> Batches:
    """The data encoded and signed as the bundle does. Raises DataError where they do not fit."""
    manifest, model = bundle.manifest, bundle.model
    if data.items.embeddings.shape[1] != manifest.config.embedding_dim:
        raise DataError("the data's embeddings are not as long as the bundle's")
    batches = Batches(data, manifest.features, manifest.config)
    batches.sign_by(model)
    return batches


def baselines(data: Dataset, since: int, until: int) -> dict[str, Figures]:
    """Figures of popularity (smoothed click rate of the item before `since`) and of chance on `since` <= time <
    `until`.
    """
    log = data.examples
    now = (log.time >= since) & (log.time < until)
    chance = np.random.default_rng(0).standard_normal(int(now.sum())) * 1e-3 + _logit(_click_rate(data, since))
    labels, users = log.clicked[now], log.user[now].astype(np.int64)
    return {
        "popularity": figures(_popularity(data, since)[log.item[now]], labels, users),
        "chance": figures(chance, labels, users),
    }


def _popularity(data: Dataset, since: int) -> npt.NDArray[np.float64]:
    """Logit [M] of each item's click rate before `since`, drawn towards that of all."""
    log = data.examples
    past = log.time < since
    M, weight = len(data.items.ids), 20.0
    shown = np.bincount(log.item[past], minlength=M)
    clicks = np.bincount(log.item[past], weights=log.clicked[past], minlength=M)
    return _logit((clicks + weight * _click_rate(data, since)) / (shown + weight))


def _click_rate(data: Dataset, since: int) -> float:
    past = data.examples.time < since
    rate = float(data.examples.clicked[past].mean()) if past.any() else 0.5
    return max(1e-6, min(1 - 1e-6, rate))


def _logit(rate: npt.ArrayLike) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.log(np.asarray(rate) / (1 - np.asarray(rate)))
    return found


def _rounded(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None
