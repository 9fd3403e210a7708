"""Trained models by what they were trained on and how: an experiment asks for a model and trains it at most once.

The key of a model is the SHA-256 of the data's fingerprint, the options and `FORMAT`. In the cache folder, `<key>/` is
its bundle, `<key>.checkpoint` a training that has not ended, `<key>.lock` a file whose lock the process holds that is
training it. Guarantees: two processes that ask for the same model train it once; whatever is killed goes on where it
was when it is asked for again; a bundle in the cache is whole.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from encoders.bundle import TENSORS, BundleError, load_model, save_bundle
from encoders.checkpoint import CheckpointError
from encoders.data.dataset import DataError, Dataset
from encoders.data.fingerprint import fingerprint
from encoders.data.source import open_dataset
from encoders.lock import alone
from encoders.train import Fitted, Report, TrainingError, TrainOptions, fit, silence

FORMAT = 1  # raised when equal options no longer train equal models

Source = str | Callable[[], Dataset]  # what `open_dataset` takes, or a picklable function, e.g. a functools.partial


def key_of(data: str, options: TrainOptions) -> str:
    """Name of a trained model; `data` is the data's fingerprint."""
    named = json.dumps([FORMAT, data, options.to_json()], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def trained(
    data: Dataset, options: TrainOptions, cache: Path, *, name: str | None = None, report: Report = silence
) -> Fitted:
    """The model out of the cache, or trained now. `name`: the data's fingerprint, where it is known.

    Raises as `fit` does, and BundleError where the cache cannot be read or written.
    """
    key = key_of(name or fingerprint(data), options)
    folder, checkpoint = cache / key, cache / f"{key}.checkpoint"
    with alone(cache / f"{key}.lock"):
        if (folder / TENSORS).exists():
            return stored(folder)
        fitted = fit(data, options, checkpoint=checkpoint, report=report)
        save_bundle(folder, fitted.model, fitted.config, fitted.spec, "fp32", fitted.history(), options.model)
        checkpoint.unlink(missing_ok=True)
        return stored(folder)


def stored(folder: Path) -> Fitted:
    """The trained model of a bundle. Raises BundleError."""
    loaded = load_model(folder)
    manifest, metrics = loaded.manifest, loaded.manifest.metrics
    try:
        options = TrainOptions.from_json(metrics["options"])
        epochs, seconds, curve = int(metrics["epochs"]), float(metrics["seconds"]), list(metrics["curve"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder} does not say how its model was trained: {error!r}") from error
    return Fitted(loaded.model, manifest.features, manifest.config, options, epochs, seconds, curve)


def run_trials(
    source: Source, options: Sequence[TrainOptions], cache: Path, processes: int = 2, report: Report = print
) -> list[Fitted]:
    """Train every model that the cache lacks, `processes` at a time with one thread each; all, in the given order.

    Each process opens the data for itself. What a kill of this process or of a worker leaves is gone on with at the
    next call. A trial that fails does not stop the others; the first failure is raised when all have ended.
    """
    distinct = list(dict.fromkeys(options))
    workers = concurrent.futures.ProcessPoolExecutor(
        max_workers=min(processes, max(1, len(distinct))),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_open,
        initargs=(source,),
    )
    folders: dict[TrainOptions, Path] = {}
    failure: Exception | None = None
    try:
        waiting = {workers.submit(_trial, wanted, cache): wanted for wanted in distinct}
        for number, future in enumerate(concurrent.futures.as_completed(waiting), start=1):
            wanted = waiting[future]
            begin = f"{number} of {len(distinct)}: {wanted.model}, seed {wanted.seed}"
            try:
                folders[wanted] = future.result()
            except (DataError, TrainingError, CheckpointError, BundleError) as error:
                failure = failure or error
                report(f"{begin} failed: {error}")
                continue
            fitted = stored(folders[wanted])
            report(
                f"{begin}: {fitted.epochs} epochs in {fitted.seconds:.0f} s, validation GAUC {fitted.best['gauc']}"
                if fitted.curve
                else f"{begin}: no epoch"
            )
    except BrokenProcessPool as error:
        raise TrainingError("a process that trained a model was killed; ask again to go on") from error
    finally:
        workers.shutdown(cancel_futures=True)
    if failure:
        raise failure
    return [stored(folders[wanted]) for wanted in options]


@dataclasses.dataclass
class _Worker:
    """What a worker process has opened."""

    data: Dataset | None = None
    name: str = ""


_worker = _Worker()


def _open(source: Source) -> None:
    torch.set_num_threads(1)
    _worker.data = open_dataset(source) if isinstance(source, str) else source()
    _worker.name = fingerprint(_worker.data)


def _trial(options: TrainOptions, cache: Path) -> Path:
    assert _worker.data is not None
    trained(_worker.data, options, cache, name=_worker.name)
    return cache / key_of(_worker.name, options)
