"""What a training says while it runs: a line per epoch, a bar on a terminal, and a log as CSV.

The log has a row every `EVERY` steps and one per epoch, the latter with the validation slice's figures. A training
that goes on from a checkpoint takes out the rows behind it first, so that no step stands there twice.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

COLUMNS = ("step", "epoch", "examples", "seconds", "loss", "gauc", "auc", "logloss", "learning_rate")
EVERY = 100  # steps


class Log:
    """The CSV log at `path`, or none at all."""

    def __init__(self, path: Path | None, step: int) -> None:
        """Go on behind `step`; rows of later steps are taken out."""
        self._file = None
        if path is None:
            return
        kept = _rows(path, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        with fresh.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept])
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8", newline="")

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the row's `COLUMNS`; what it lacks stays empty."""
        if self._file is not None:
            values = (row.get(name) for name in COLUMNS)
            csv.writer(self._file, lineterminator="\n").writerow(["" if value is None else value for value in values])
            self._file.flush()


def _rows(path: Path, step: int) -> list[list[str]]:
    """Whole rows up to `step`; a kill may have cut the last."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
    except FileNotFoundError:
        return []
    return [row for row in rows if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) <= step]


def epoch_line(row: Mapping[str, Any], left: float) -> str:
    """One epoch of the curve, and the seconds that may be left at most."""
    return (
        f"epoch {row['epoch']}: loss {row['loss']:.4f}, validation GAUC {row['gauc']}, AUC {row['auc']}, "
        f"LogLoss {row['logloss']}; at most {max(0.0, left):.0f} s left"
    )
