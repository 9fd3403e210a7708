"""Data set -> trained model, one loop for AIF and all its rivals; and -> bundle, for the command and the demo.

The split is by time: a model trains on the first 80 % of the examples, stops where the validation slice (the next
10 %) no longer improves, and keeps the weights that were best there. The rest is never looked at before training has
ended. Guarantees: equal data, options and processes give equal weights, unless the time limit ends the training; a
training that was killed goes on from its checkpoint to the very weights it would have had. For that, all that is random
follows from (seed, epoch) and (seed, step): the random state need not be kept.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from encoders import checkpoint as checkpoints
from encoders.baselines import MODELS, build
from encoders.batches import Batches, Groups
from encoders.bundle import SERVED, Precision, save_bundle
from encoders.config import ModelConfig
from encoders.data.dataset import DataError, Dataset
from encoders.data.fingerprint import fingerprint
from encoders.distributed import ALONE, Peers
from encoders.evaluate import Figures, Split, figures, on_test_slice, predict, split_of
from encoders.features import FeatureSpec
from encoders.inputs import Features
from encoders.model import AIF
from encoders.progress import EVERY, Log, epoch_line
from encoders.ranker import Ranker
from encoders.spec import Material, material_of, spec_of
from encoders.unseen import lines, unseen

__all__ = ["Fitted", "TrainOptions", "TrainingError", "fit", "spec_of", "train"]

TEACHER = "din"  # the upper bound, which AIF may be distilled from
_CLIP = 5.0  # norm of the gradient
_SAVE_SECONDS = 30.0  # between two checkpoints within an epoch
_START_SAMPLE = 20_000  # items, and users, at which towers and bridges are scaled

Report = Callable[[str], None]


class TrainingError(Exception):
    """A training that cannot go on; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """All that decides what a training gives, beside the data."""

    model: str = SERVED  # a name in MODELS
    config: ModelConfig = dataclasses.field(default_factory=ModelConfig)  # tier edges and centring are measured
    seed: int = 0
    epochs: int = 60  # at most
    patience: int = 4  # epochs without a better validation slice, after which training has converged
    least_gain: float = 5e-4  # of the validation GAUC that counts as better
    learning_rate: float = 2e-3
    weight_decay: float = 0.5
    table_decay: float = 0.3  # of the category tables, which would otherwise learn items by heart
    averaged_steps: int = 200  # the weights kept are a moving average over about as many steps
    batch_groups: int = 64  # groups of a step, over all processes
    minutes: float | None = None  # training ends after this time at the latest
    distil: float = 0.0  # weight of the loss towards the logits of `TEACHER`, trained beside AIF; 0 = off
    distil_after: int = 500  # steps in which the teacher learns alone
    towers_from_data: bool = True  # towers start with vectors of mean 0 and variance 1
    bridges_from_data: bool = False  # bridges start at the centres of the item vectors
    autocast: bool = False  # bfloat16 in the forward pass

    def __post_init__(self) -> None:
        """Raises ValueError, naming the option, for a value that cannot be trained with."""
        if self.model not in MODELS:
            raise ValueError(f"model {self.model!r} is not known; known are {', '.join(MODELS)}")
        for name in ("epochs", "patience", "averaged_steps", "batch_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("seed", "least_gain", "weight_decay", "table_decay", "distil", "distil_after"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative")
        if not self.learning_rate > 0 or (self.minutes is not None and not self.minutes > 0):
            raise ValueError("the learning rate and the time limit must be above 0")
        if self.model != SERVED and (self.distil or self.bridges_from_data):
            raise ValueError(f"{self.model} has neither teacher nor bridges; only {SERVED} has")

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes, with the JSON types that reading it again gives."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TrainOptions:
        """Raises ValueError or TypeError where the fields are not options."""
        config = fields.get("config", {})
        sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
        return cls(**{**fields, "config": ModelConfig(**sizes)})


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained model, in evaluation mode, with what its bundle says of it."""

    model: Ranker
    spec: FeatureSpec
    config: ModelConfig
    options: TrainOptions
    epochs: int
    seconds: float
    curve: list[dict[str, Any]]  # one row per epoch, the columns of progress.COLUMNS

    def batches(self, data: Dataset) -> Batches:
        """The data encoded and signed as the model takes them."""
        batches = Batches(data, self.spec, self.config)
        batches.sign_by(self.model)
        return batches

    @property
    def best(self) -> dict[str, Any]:
        """The epoch whose weights were kept: the last that was better than the one kept before by `least_gain`."""
        kept = self.curve[0]
        for row in self.curve[1:]:
            if _better(_score(row), _score(kept), self.options):
                kept = row
        return kept

    def history(self) -> dict[str, Any]:
        """How it was trained, for the manifest's metrics."""
        return {
            "options": self.options.to_json(),
            "seed": self.options.seed,
            "epochs": self.epochs,
            "seconds": round(self.seconds, 1),
            "curve": self.curve,
        }


def train(
    data: Dataset,
    out: Path,
    options: TrainOptions | None = None,
    *,
    precision: Precision = "fp16",
    checkpoint: Path | None = None,
    log: Path | None = None,
    report: Report = print,
    peers: Peers = ALONE,
    source: str | None = None,
) -> dict[str, Any]:
    """Train on `data`, write the bundle to `out`, give its metrics. Raises as `fit` does, and BundleError.

    `source`: the data as commands name them, kept in the manifest so that `evaluate` finds them again.
    """
    run = _trained(data, options or TrainOptions(), checkpoint, log, report, peers)
    if not peers.leads:
        return {}
    fitted = run.fitted()
    found = on_test_slice(fitted.model, fitted.spec, run.material.batches, data)
    metrics = {
        "data": data.name,
        "source": source,
        "fingerprint": fingerprint(data),
        "test_begins": split_of(data).test,
        **fitted.history(),
        "test": found.figures,
        "counts": found.counts,
        "unseen": found.unseen,
    }
    save_bundle(out, fitted.model, fitted.config, fitted.spec, precision, metrics, fitted.options.model)
    return metrics


def fit(
    data: Dataset,
    options: TrainOptions,
    *,
    checkpoint: Path | None = None,
    log: Path | None = None,
    report: Report = print,
    peers: Peers = ALONE,
    save_seconds: float = _SAVE_SECONDS,
) -> Fitted:
    """Train a model until its validation slice no longer improves, and keep its best weights.

    `checkpoint`: file to go on from where it is there, written every `save_seconds` and after every epoch. `log`: CSV
    file (encoders/progress.py). Raises DataError, TrainingError, CheckpointError and PeerError.
    """
    return _trained(data, options, checkpoint, log, report, peers, save_seconds).fitted()


def _trained(
    data: Dataset,
    options: TrainOptions,
    checkpoint: Path | None,
    log: Path | None,
    report: Report,
    peers: Peers,
    save_seconds: float = _SAVE_SECONDS,
) -> _Run:
    """The run at its end."""
    if not peers.leads:
        report, log = silence, None
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        split = split_of(data)
        material = material_of(data, split, options.config, options.seed)
        report(_begins(material, options))
        _warn(material, data, split, report)
        run = _Run(options, material, peers, started)
        keep = _Keeper(checkpoint, _about(data, options) if checkpoint else {}, save_seconds, peers)
        keep.load(run, report)
        with Log(log, run.step) as lines:
            while not run.ended():
                _epoch(run, keep, lines)
                _validate(run, lines, report)
                keep.save(run)
    return run


class _Run:
    """A training in progress: everything that a step changes, and what it needs."""

    def __init__(self, options: TrainOptions, material: Material, peers: Peers, started: float) -> None:
        self.options, self.material, self.peers, self.started = options, material, peers, started
        self.model = _new(options.model, material, options)
        if options.bridges_from_data and isinstance(self.model, AIF):
            _start_bridges(self.model, material, options.seed)
        self.teacher = _new(TEACHER, material, options) if options.distil else None
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.best_weights = {name: tensor.clone() for name, tensor in self.average.state_dict().items()}
        self.optimiser = torch.optim.AdamW(_parameter_groups(self.learners, options), lr=options.learning_rate)
        self.step = 0  # steps done
        self.epoch = 0  # epochs done
        self.place = 0  # batches done of the epoch that is running
        self.loss = self.examples = 0.0  # sums over them
        self.seen = 0  # examples of all steps
        self.best: float | None = None  # score on the validation slice
        self.best_epoch = 0
        self.curve: list[dict[str, Any]] = []
        self.earlier = 0.0  # seconds before this process

    @property
    def learners(self) -> list[Ranker]:
        return [self.model] if self.teacher is None else [self.model, self.teacher]

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds to the time limit."""
        return math.inf if self.options.minutes is None else 60 * self.options.minutes - self.seconds

    def ended(self) -> bool:
        """Converged, or at a limit; all processes agree."""
        options = self.options
        converged = self.epoch - self.best_epoch >= options.patience
        (late,) = self.peers.agree([float(self.left <= 0)])
        return self.epoch >= options.epochs or converged or late > 0

    def row(self, loss: float) -> dict[str, Any]:
        """The columns of the log that do not come from validation."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "examples": self.seen,
            "seconds": round(self.seconds, 3),
            "loss": loss,
            "learning_rate": self.options.learning_rate,
        }

    def fitted(self) -> Fitted:
        self.average.load_state_dict(self.best_weights)
        model, material = self.average.eval(), self.material
        return Fitted(model, material.spec, material.config, self.options, self.epoch, self.seconds, self.curve)

    # What a checkpoint holds ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Copies of nothing: to be written at once."""
        out = {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        out |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for number, learner in enumerate(self.learners):
            out |= {f"model{number}.{name}": tensor for name, tensor in learner.state_dict().items()}
        for place, state in self.optimiser.state_dict()["state"].items():
            out |= {f"optimiser.{place}.{name}": tensor for name, tensor in state.items()}
        return out

    _NUMBERS = ("step", "epoch", "place", "loss", "examples", "seen", "best", "best_epoch", "curve")

    def numbers(self) -> dict[str, Any]:
        return {"seconds": self.seconds, **{name: getattr(self, name) for name in self._NUMBERS}}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take up what `tensors` and `numbers` gave. Raises KeyError and RuntimeError where they do not fit."""
        self.average.load_state_dict(_below("average.", tensors))
        self.best_weights = _below("best.", tensors)
        for number, learner in enumerate(self.learners):
            learner.load_state_dict(_below(f"model{number}.", tensors))
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimiser.", tensors).items():
            place, kind = name.split(".")
            states.setdefault(int(place), {})[kind] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": states})
        for name in self._NUMBERS:
            setattr(self, name, numbers[name])
        self.earlier = numbers["seconds"]


class _Keeper:
    """Writes the run's checkpoint now and then, and reads it at the start."""

    def __init__(self, path: Path | None, about: Mapping[str, Any], every: float, peers: Peers) -> None:
        self._path, self._about, self._every, self._peers = path, about, every, peers
        self._last = time.monotonic()

    def load(self, run: _Run, report: Report) -> None:
        found = checkpoints.load(self._path, self._about) if self._path else None
        if self._path and found:
            try:
                run.restore(*found)
            except (KeyError, RuntimeError, ValueError, TypeError) as error:
                raise checkpoints.CheckpointError(f"the checkpoint {self._path} does not fit: {error!r}") from error
            report(f"going on from {self._path} in epoch {run.epoch + 1}, at step {run.step}")
        (step,) = self._peers.agree([run.step])
        if step != run.step:
            raise checkpoints.CheckpointError("the processes of this training do not see the same checkpoint")

    def save(self, run: _Run) -> None:
        if self._path and self._peers.leads:
            checkpoints.save(self._path, self._about, run.tensors(), run.numbers())
            self._last = time.monotonic()

    def save_if_due(self, run: _Run) -> None:
        if time.monotonic() - self._last >= self._every:
            self.save(run)


# One epoch ------------------------------------------------------------------------------------------------------------


def _epoch(run: _Run, keep: _Keeper, lines: Log) -> None:
    """The rest of the epoch, from the place where the run stands."""
    options, training = run.options, run.material.training
    random = np.random.default_rng([options.seed, run.epoch])
    plan = run.material.batches.plan(training, options.batch_groups, random)
    for learner in run.learners:
        learner.train()
    for part in _bar(plan, run):
        loss, late = _step(run, training.select(part))
        if run.step % EVERY == 0 and run.place < len(plan):
            lines.write(run.row(loss))
        if late:
            break
        if run.place < len(plan):
            keep.save_if_due(run)


def _bar(plan: list[npt.NDArray[np.int64]], run: _Run) -> Iterator[npt.NDArray[np.int64]]:
    """The batches that are left, with a bar on a terminal."""
    hidden = None if run.peers.leads else True
    with tqdm(total=len(plan), initial=run.place, unit=" batches", leave=False, disable=hidden) as bar:
        for part in plan[run.place :]:
            yield part
            bar.update()
            gauc = run.curve[-1]["gauc"] if run.curve else None
            bar.set_postfix(epoch=run.epoch + 1, loss=f"{run.loss / run.examples:.4f}", gauc=gauc, refresh=False)


def _step(run: _Run, part: Groups) -> tuple[float, bool]:
    """One step on one batch: its mean loss, and whether the time is up."""
    run.optimiser.zero_grad()
    torch.default_generator.manual_seed(_drawn(run.options.seed, run.step, run.peers.rank))
    mine = run.peers.share(part)
    objective, loss = _losses(run, mine, int(part.size.sum())) if len(mine) else (None, 0.0)
    if objective is not None:
        objective.backward()  # type: ignore[no-untyped-call]
    weights = [weight for group in run.optimiser.param_groups for weight in group["params"]]
    loss, late = run.peers.add_up(weights, [loss, float(run.peers.leads and run.left <= 0)])
    if not math.isfinite(loss):
        raise _diverged(run, f"the loss is {loss} at step {run.step + 1}")
    for learner in run.learners:
        nn.utils.clip_grad_norm_(learner.parameters(), _CLIP)
    run.optimiser.step()
    _follow(run.average, run.model, max(1 / run.options.averaged_steps, 9 / (11 + run.step)))
    run.step, run.place = run.step + 1, run.place + 1
    size = int(part.size.sum())
    run.loss, run.examples, run.seen = run.loss + loss * size, run.examples + size, run.seen + size
    return loss, late > 0


def _losses(run: _Run, mine: Groups, total: int) -> tuple[Tensor, float]:
    """This process' part of what the step lessens, and of the model's mean loss over the batch's `total` examples."""
    options, batches = run.options, run.material.batches
    share = int(mine.size.sum()) / total
    logits, clicked, penalty = _forward(run.model, batches, mine, options.autocast)
    loss = functional.binary_cross_entropy_with_logits(logits, clicked) * share
    objective = loss + penalty * share
    if run.teacher is not None:
        taught, clicked, penalty = _forward(run.teacher, batches, mine, options.autocast)
        objective = objective + (functional.binary_cross_entropy_with_logits(taught, clicked) + penalty) * share
        if run.step >= options.distil_after:
            target = torch.sigmoid(taught.detach())
            towards = functional.binary_cross_entropy_with_logits(logits, target) * share
            objective = objective + options.distil * towards
    return objective, float(loss.detach())


def _forward(model: Ranker, batches: Batches, groups: Groups, autocast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels of the groups' examples [n], and the model's penalty."""
    batch = batches.batch(groups, model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, penalty = model.training_forward(batch.users, batch.candidates, batch.clicked, batch.counted)
    return logits.float()[batch.counted], batch.clicked[batch.counted], penalty.float()


def _follow(average: Ranker, model: Ranker, share: float) -> None:
    """Move the averaged weights by `share` towards the model's; they rank better than those of any one step."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


def _validate(run: _Run, lines: Log, report: Report) -> None:
    """End the epoch: figures of the averaged weights on the validation slice, and are they the best so far?"""
    run.epoch += 1
    material = run.material
    measured: Figures = {"gauc": None, "auc": None, "logloss": None}
    if run.peers.leads:
        logits, labels, users = predict(run.average, material.batches, material.validation)
        if not np.isfinite(logits).all():  # the epoch's last step may be the one that broke the weights
            raise _diverged(run, "a score of the validation slice is not finite")
        measured = figures(logits, labels, users)
    row = {**run.row(run.loss / max(1.0, run.examples)), **{key: measured[key] for key in ("gauc", "auc", "logloss")}}
    (score,) = run.peers.agree([_score(row)])
    if run.best is None or _better(score, run.best, run.options):
        run.best, run.best_epoch = score, run.epoch
        run.best_weights = {name: tensor.clone() for name, tensor in run.average.state_dict().items()}
    run.curve.append(row)
    run.place, run.loss, run.examples = 0, 0.0, 0.0
    lines.write(row)
    report(epoch_line(row, min(run.seconds / run.epoch * (run.options.epochs - run.epoch), run.left)))


def _diverged(run: _Run, what: str) -> TrainingError:
    return TrainingError(f"{what} with learning rate {run.options.learning_rate:g}: try a lower one")


def _better(score: float, kept: float, options: TrainOptions) -> bool:
    """Is a validation score worth other weights than those kept?"""
    return score > kept + options.least_gain


def _score(row: Mapping[str, Any]) -> float:
    """What early stopping goes by: GAUC, else AUC, else LogLoss, whichever the validation slice gives."""
    if row["gauc"] is not None:
        return float(row["gauc"])
    return float(row["auc"]) if row["auc"] is not None else -float(row["logloss"] or 0.0)


# Beginnings -----------------------------------------------------------------------------------------------------------


def _new(name: str, material: Material, options: TrainOptions) -> Ranker:
    """An untrained model that fits the data."""
    model = build(name, material.config, material.spec.sizes, options.seed)
    model.centre.copy_(torch.from_numpy(material.centre))
    if material.thresholds is not None and model.thresholds is not None:
        with torch.no_grad():  # they may be ones that learn
            model.thresholds.copy_(torch.from_numpy(material.thresholds))
    if options.towers_from_data:
        model.item_tower.standardise(_some_items(material, options.seed))
        users = np.unique(material.training.user)
        users = users[material.batches.known[users]]
        model.profile_tower.standardise(material.batches.profiles(_some(users, options.seed)))
    return model


def _start_bridges(model: AIF, material: Material, seed: int) -> None:
    """Start the bridges at the centres of the known items' vectors, where these are enough."""
    with torch.no_grad():
        vectors = model.item_vectors(_some_items(material, seed))
    if len(vectors) < model.config.bridges:
        return
    torch.manual_seed(seed)
    model.start_bridges(vectors)


def _some_items(material: Material, seed: int) -> Features:
    """Some of the items that were there before validation."""
    return material.batches.candidates(_some(material.known, seed)[None, :]).features


def _some(places: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(places)[:_START_SAMPLE]


def _parameter_groups(models: Iterable[Ranker], options: TrainOptions) -> list[dict[str, Any]]:
    models = list(models)
    tables = [table for model in models for table in (model.item_tower.table, model.profile_tower.table)]
    learn = [weights for model in models for weights in model.parameters() if weights.requires_grad]
    rest = [weights for weights in learn if not any(weights is table for table in tables)]
    return [
        {"params": rest, "weight_decay": options.weight_decay},
        {"params": tables, "weight_decay": options.table_decay},
    ]


def _begins(material: Material, options: TrainOptions) -> str:
    training, validation = material.training, material.validation
    limit = "" if options.minutes is None else f", at most {options.minutes:g} minutes"
    return (
        f"training {options.model} on {int(training.size.sum())} examples in {len(training)} requests, "
        f"validation on {int(validation.size.sum())}; until it has converged{limit}, Ctrl-C stops"
    )


def _warn(material: Material, data: Dataset, split: Split, report: Report) -> None:
    """Say what the data lack. Raises DataError where a slice is empty or training has one class only."""
    for name, groups in (("training", material.training), ("validation", material.validation)):
        if not len(groups):
            raise DataError(f"the {name} slice holds no examples")
    users, clicks, shown = _clicks(material.batches, material.training)
    if clicks.sum() in (0, shown.sum()):
        raise DataError(f"every example of the training slice has the label {bool(clicks.sum())}")
    if none := int((clicks == 0).sum()):
        report(f"{none} of {len(users)} users have no click in the training slice; their examples count all the same")
    users, clicks, shown = _clicks(material.batches, material.validation)
    mixed = int(((clicks > 0) & (clicks < shown)).sum())
    if not mixed:
        report("no user of the validation slice has both classes, so there is no GAUC; its AUC or LogLoss decides")
    new = unseen(data, material.spec, split.validation, split.validation, split.test)
    for line in lines(new, "validation"):
        report(line)


def _clicks(batches: Batches, groups: Groups) -> tuple[npt.NDArray[np.int64], ...]:
    """The groups' users, and the clicks and examples of each."""
    users, place = np.unique(groups.user, return_inverse=True)
    sums = np.array([batches.examples.clicked[f : f + s].sum() for f, s in zip(groups.first, groups.size, strict=True)])
    count = np.bincount(place, weights=sums, minlength=len(users)).astype(np.int64)
    return users, count, np.bincount(place, weights=groups.size, minlength=len(users)).astype(np.int64)


def _about(data: Dataset, options: TrainOptions) -> dict[str, Any]:
    """What a checkpoint must agree with. The limits may change from one go to the next."""
    named = {name: value for name, value in options.to_json().items() if name not in ("minutes", "epochs")}
    return {"data": fingerprint(data), **named}


def _drawn(seed: int, step: int, rank: int) -> int:
    """The random state of one step in one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def silence(_: str) -> None:
    """A `Report` that says nothing."""
