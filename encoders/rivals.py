"""A bundle against rivals trained as it was: same data, split, seed and options. Behind `evaluate --against`.

The rivals come out of the cache of trained models (encoders/trials.py); they train until they have converged, or for as
many epochs as the bundle at most, but under no limit of time. One seed on either side: the intervals tell how far other
users would change the figures, not how far another training would; experiments train several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from encoders.bundle import Loaded
from encoders.data.dataset import Dataset
from encoders.evaluate import Sampling, measure, split_of
from encoders.evaluation import Evaluation, compare, rows
from encoders.intervals import Interval
from encoders.train import Fitted, Report, TrainOptions
from encoders.trials import trained

_RANKED = ("hr@10", "ndcg@10", "hr@100", "ndcg@100")


def against(
    bundle: Loaded,
    data: Dataset,
    data_name: str,
    names: Sequence[str],
    cache: Path,
    requests: int = 0,
    report: Report = print,
) -> list[str]:
    """Lines of a table on the test slice, and of one over the whole catalogue for up to so many requests with a click.
    `data_name`: the data's fingerprint, where there are rivals. Raises as `trials.trained` does.
    """
    own, manifest, sampling = options_of(bundle), bundle.manifest, Sampling(requests=requests, shortlists=0)
    ours = Fitted(bundle.model, manifest.features, manifest.config, own, 0, 0.0, [])
    runs = {"bundle": [_measured(ours, data, "bundle", sampling)]}
    for name in names:
        options = dataclasses.replace(own, model=name, distil=0.0, bridges_from_data=False, minutes=None)
        runs[name] = [_measured(trained(data, options, cache, name=data_name, report=report), data, name, sampling)]
    lines = []
    if names and own.minutes is not None:
        lines.append(f"the bundle was trained for {own.minutes:g} minutes at most, its rivals under no limit of time")
    return lines + _impressions(runs) + (_catalogue(runs) if requests else [])


def _impressions(runs: Mapping[str, list[Evaluation]]) -> list[str]:
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


def _catalogue(runs: Mapping[str, list[Evaluation]]) -> list[str]:
    """Where the clicked items stand among all that are there and not seen yet."""
    found = rows(runs)
    if any(metric not in row.figures for row in found for metric in _RANKED):
        return ["no request of the test slice has a click on an item that is there, so none is ranked"]
    lines = ["", f"{'whole catalogue':<16}" + "".join(f"{metric.upper():>28}" for metric in _RANKED)]
    return lines + [
        f"{row.name:<16}" + "".join(f"{_interval(row.figures[metric]):>28}" for metric in _RANKED) for row in found
    ]


def options_of(bundle: Loaded) -> TrainOptions:
    """How a bundle was trained; of an older one, as much as its manifest says."""
    manifest = bundle.manifest
    try:
        return TrainOptions.from_json(manifest.metrics["options"])
    except (KeyError, TypeError, ValueError):
        return TrainOptions(manifest.model, manifest.config, int(manifest.metrics.get("seed", 0)))


def _measured(fitted: Fitted, data: Dataset, name: str, sampling: Sampling) -> Evaluation:
    batches, split = fitted.batches(data), split_of(data)
    groups = batches.groups(split.test, split.end)
    return measure(fitted.model, batches, data, groups, name=name, seed=fitted.options.seed, sampling=sampling)


def _interval(found: Interval) -> str:
    return f"{found.value:.4f} ({found.low:.4f} .. {found.high:.4f})"
