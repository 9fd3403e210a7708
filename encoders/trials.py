"""Trained models by what they were trained on and how: an experiment asks for a model and trains it at most once.

The key of a model is the SHA-256 of the data's fingerprint, the options and `FORMAT`. In the cache folder, `<key>/` is
its bundle, `<key>.checkpoint` a training that has not ended, `<key>.lock` a file whose lock the process holds that is
training it. Guarantees: two processes that ask for the same model train it once; whatever is killed goes on where it
was when it is asked for again; a bundle in the cache is whole.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from encoders.bundle import TENSORS, BundleError, load_model, save_bundle
from encoders.data.dataset import Dataset
from encoders.data.fingerprint import fingerprint
from encoders.lock import alone
from encoders.train import Fitted, Report, TrainOptions, fit, silence

FORMAT = 2  # raised when equal options no longer train equal models


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
