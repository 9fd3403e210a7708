"""The frame of the experiments that train models: variants x seeds -> evaluations on the test slice.

Every trial (one variant, one seed) is trained, measured and kept in `.local/state/trials` by data and options, so a run
that was stopped, or ran out of its `MINUTES`, goes on where it was when it is started again. Two processes of one
thread each work side by side; first every variant's first seed, then the second ... A training that diverges is kept
too, as `Failed`: `attempts` gives it to the experiment, `trials` raises it when all others have ended.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from encoders.batches import Batches
from encoders.data import oracle, synthetic
from encoders.data.dataset import DataError, Dataset
from encoders.data.fingerprint import fingerprint
from encoders.data.source import open_dataset
from encoders.evaluate import Sampling, Truth, measure, split_of
from encoders.evaluation import Evaluation
from encoders.intervals import Interval
from encoders.train import Fitted, TrainingError, TrainOptions
from encoders.trials import key_of, trained
from infra.settings import load

MEASURE_FORMAT = 1  # raised when equal trials no longer give equal evaluations


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that every process can open for itself: a marketplace, or a folder."""

    name: str
    world: synthetic.Marketplace | None = None
    world_seed: int = 0
    folder: str = ""
    change: Callable[[Dataset], Dataset] | None = None  # a module's function, applied to what was read
    learnt: Callable[[Dataset], Dataset] | None = None  # the same, applied to what is trained on, but not measured

    def open(self) -> tuple[Dataset, Truth | None]:
        """The data set, and the true click probabilities where there are such."""
        if self.world is None:
            data, truth = open_dataset(self.folder), None
        else:
            made = synthetic.with_oracle(self.world, self.world_seed)
            data, truth = made.data, functools.partial(_truth, made.oracle.hidden)
        return (self.change(data) if self.change else data), truth


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of an experiment's table."""

    name: str
    options: TrainOptions  # the seed is replaced


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of one variant with one seed."""

    evaluation: Evaluation
    validation_gauc: float
    epochs: int
    seconds: float
    notes: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failed:
    """A variant and seed whose training diverged."""

    message: str


Notes = Callable[[Fitted, Batches, Dataset], dict[str, float]]  # a module's function: what a trained model shows


def ml_100k() -> str:
    """The folder of MovieLens 100K. Raises DataError where it is not there."""
    folder = os.environ.get("ML_100K", "../shared/data/ml-100k")
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not there; ML_100K= names the folder of MovieLens 100K")
    return folder


class OutOfTimeError(Exception):
    """The minutes are spent before all trials are done; what was done is kept."""


def trials(
    source: Source,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    report: Callable[[str], None] = print,
) -> dict[str, list[Trial]]:
    """Variant -> its trials, one per seed. Trains what the cache lacks. Raises OutOfTimeError (see `MINUTES`), and
    TrainingError where a training diverged.
    """
    found: dict[str, list[Trial]] = {}
    for name, outcomes in attempts(source, variants, seeds, sampling, report=report).items():
        found[name] = []
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                raise TrainingError(f"{name}: {outcome.message}")
            found[name].append(outcome)
    return found


def attempts(
    source: Source,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    notes: Notes | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, list[Trial | Failed]]:
    """As `trials`, where a training may diverge. `notes` is run on every trained model, and kept by its name."""
    cache = load().state / "trials"
    wanted = [(variant.name, dataclasses.replace(variant.options, seed=seed)) for seed in seeds for variant in variants]
    deadline = time.monotonic() + 60 * float(os.environ.get("MINUTES", "inf"))
    pool = concurrent.futures.ProcessPoolExecutor(
        max_workers=min(2, len(wanted)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_open,
        initargs=(source, cache, sampling, notes),
    )
    found: dict[tuple[str, int], Trial | Failed] = {}
    try:
        waiting = {pool.submit(_trial, name, options): (name, options) for name, options in wanted}
        while waiting:
            left = deadline - time.monotonic()
            done, _ = concurrent.futures.wait(
                waiting, None if left == float("inf") else max(0.0, left), concurrent.futures.FIRST_COMPLETED
            )
            if not done:
                raise OutOfTimeError(
                    f"{len(found)} of {len(wanted)} trials are done; the same command goes on from here"
                )
            for future in done:
                name, options = waiting.pop(future)
                trial = found[name, options.seed] = future.result()
                begin = f"  {len(found)}/{len(wanted)} {source.name}: {name}, seed {options.seed}: "
                if isinstance(trial, Failed):
                    report(f"{begin}diverged, {trial.message}")
                    continue
                report(
                    f"{begin}validation GAUC {trial.validation_gauc:.4f} after {trial.epochs} epochs in "
                    f"{trial.seconds:.0f} s"
                )
    except BaseException:
        for process in list((pool._processes or {}).values()):  # what they trained so far is in their checkpoints
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return {variant.name: [found[variant.name, seed] for seed in seeds] for variant in variants}


def stop_here(error: OutOfTimeError) -> None:
    """End the command: the run is a part of the whole, not a failure of it."""
    print(f"MINUTES are spent: {error}.")
    sys.exit(0)


def cells(interval: Interval, name: str) -> dict[str, float | None]:
    """An interval as three fields of a table's row."""
    values = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {field: round(value, 5) if np.isfinite(value) else None for field, value in values.items()}


# In the workers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Worker:
    """What a worker has opened."""

    data: Dataset  # what is measured
    truth: Truth | None
    training: Dataset
    name: str  # fingerprint of what is trained on
    cache: Path
    sampling: Sampling
    notes: Notes | None


_worker: list[_Worker] = []


def _open(source: Source, cache: Path, sampling: Sampling, notes: Notes | None) -> None:
    torch.set_num_threads(1)
    data, truth = source.open()
    training = source.learnt(data) if source.learnt else data
    _worker[:] = [_Worker(data, truth, training, fingerprint(training), cache, sampling, notes)]


def _trial(name: str, options: TrainOptions) -> Trial | Failed:
    (own,) = _worker
    key = key_of(own.name, options)
    failed = own.cache / f"{key}.failed"  # equal options diverge again
    if failed.exists():
        return Failed(failed.read_text())
    try:
        fitted = trained(own.training, options, own.cache, name=own.name)
    except TrainingError as error:
        _write(failed, str(error))
        (own.cache / f"{key}.checkpoint").unlink(missing_ok=True)
        return Failed(str(error))
    batches = functools.cache(functools.partial(fitted.batches, own.data))
    sampled = dataclasses.asdict(own.sampling)
    measured = sampled if own.training is own.data else [sampled, fingerprint(own.data)]
    path = own.cache / f"{key}.{_digest(measured)}.npz"
    if not path.exists():
        split = split_of(own.data)
        groups = batches().groups(split.test, split.end)
        measure(
            fitted.model, batches(), own.data, groups, name=name, seed=options.seed, sampling=own.sampling,
            truth=own.truth,
        ).save(path)  # fmt: skip
    notes: dict[str, float] = {}
    if own.notes is not None:
        noted = own.cache / f"{key}.{_digest([own.notes.__module__, own.notes.__qualname__])}.json"
        if not noted.exists():
            _write(noted, json.dumps(own.notes(fitted, batches(), own.data)))
        notes = json.loads(noted.read_text())
    best = float(fitted.best["gauc"] or 0.0)
    return Trial(Evaluation.load(path), best, fitted.epochs, fitted.seconds, notes)


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps([MEASURE_FORMAT, what]).encode()).hexdigest()[:8]


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    staging = path.with_name(f".{path.name}.part")
    staging.write_text(text)
    staging.replace(path)


def _truth(
    hidden: oracle.Hidden, users: npt.NDArray[np.int32], items: npt.NDArray[np.int32], past: npt.NDArray[np.int32]
) -> npt.NDArray[np.floating]:
    return oracle.sigmoid(oracle.logits(oracle.terms_of(hidden, users, items, past)))


def of(trials_of: Mapping[str, Sequence[Trial]]) -> dict[str, list[Evaluation]]:
    """The evaluations alone, as `encoders.evaluation` takes them."""
    return {name: [trial.evaluation for trial in found] for name, found in trials_of.items()}
