"""A bundle against rivals trained as it was: same data, split, seed and options. Behind `evaluate --against`.

The rivals come out of the cache of trained models (encoders/trials.py). One seed on either side: the intervals tell
how far other users would change the figures, not how far another training would; experiments train several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from encoders.bundle import Loaded
from encoders.data.dataset import Dataset
from encoders.evaluate import Sampling, measure, split_of
from encoders.evaluation import Evaluation, compare, rows
from encoders.intervals import Interval
from encoders.train import Fitted, Report, TrainOptions
from encoders.trials import trained

_IMPRESSIONS = Sampling(requests=0, shortlists=0)


def against(bundle: Loaded, data: Dataset, names: Sequence[str], cache: Path, report: Report = print) -> list[str]:
    """Lines of a table on the test slice. Raises as `trials.trained` does."""
    own, manifest = options_of(bundle), bundle.manifest
    ours = Fitted(bundle.model, manifest.features, manifest.config, own, 0, 0.0, [])
    runs = {"bundle": [_measured(ours, data, "bundle")]}
    for name in names:
        options = dataclasses.replace(own, model=name, distil=0.0, bridges_from_data=False)
        runs[name] = [_measured(trained(data, options, cache, report=report), data, name)]
    lines = [f"{'model':<12}{'GAUC (95 % interval)':>28}{'AUC':>9}{'LogLoss':>9}{'bundle minus it':>30}{'p':>8}"]
    for row in rows(runs):
        figures = row.figures
        line = f"{row.name:<12}{_interval(figures['gauc']):>28}{figures['auc'].value:>9.4f}"
        line += f"{figures['logloss'].value:>9.4f}"
        if row.name != "bundle":
            gap = compare(runs["bundle"], runs[row.name])["gauc"]
            line += f"{_interval(gap.difference):>30}{gap.p:>8.4f}"
        lines.append(line)
    return lines


def options_of(bundle: Loaded) -> TrainOptions:
    """How a bundle was trained; of an older one, as much as its manifest says."""
    manifest = bundle.manifest
    try:
        return TrainOptions.from_json(manifest.metrics["options"])
    except (KeyError, TypeError, ValueError):
        return TrainOptions(manifest.model, manifest.config, int(manifest.metrics.get("seed", 0)))


def _measured(fitted: Fitted, data: Dataset, name: str) -> Evaluation:
    batches, split = fitted.batches(data), split_of(data)
    groups = batches.groups(split.test, split.end)
    return measure(fitted.model, batches, data, groups, name=name, seed=fitted.options.seed, sampling=_IMPRESSIONS)


def _interval(found: Interval) -> str:
    return f"{found.value:.4f} ({found.low:.4f} .. {found.high:.4f})"
