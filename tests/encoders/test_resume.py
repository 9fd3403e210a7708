"""A training that was killed goes on to the weights it would have had, bit for bit."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from encoders.bundle import load_model
from encoders.checkpoint import CheckpointError
from encoders.data.dataset import Dataset
from encoders.train import TrainOptions, fit
from tests.encoders.small import OPTIONS, small_data

ROOT = Path(__file__).parents[2]
# Every part of a training that has a state: dropout, a teacher, bridges that start at centres.
FULL = dataclasses.replace(
    OPTIONS,
    config=dataclasses.replace(OPTIONS.config, bridge_dropout=0.3),
    distil=0.5,
    distil_after=5,
    bridges_from_data=True,
)
CHILD = """
import sys
from pathlib import Path
import torch
from encoders.bundle import save_bundle
from encoders.train import fit
from tests.encoders.small import small_data
from tests.encoders.test_resume import FULL
torch.set_num_threads(1)
folder = Path(sys.argv[1])
fitted = fit(small_data(), FULL, checkpoint=folder / "checkpoint", log=folder / "log.csv", save_seconds=0.0)
save_bundle(folder / "bundle", fitted.model, fitted.config, fitted.spec, "fp32", fitted.history())
"""


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_data()


def _figures(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_several_times_it_ends_as_an_unbroken_training(data: Dataset, tmp_path: Path) -> None:
    unbroken = fit(data, FULL, log=tmp_path / "unbroken.csv", report=print)
    steps = unbroken.curve[-1]["step"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", CHILD, str(tmp_path)]
    reached = []
    for after in (3, steps // 2):
        child = subprocess.Popen(argv, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
        seen: set[int] = set()  # checkpoints, one after each step
        while len(seen) < after and child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.002)
            if (tmp_path / "checkpoint").exists():
                seen.add((tmp_path / "checkpoint").stat().st_mtime_ns)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        reached.append(_step_of(tmp_path / "checkpoint"))
    assert 0 < reached[0] < reached[1] < steps
    last = subprocess.run(argv, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    assert f"at step {reached[1]}" in last.stdout
    loaded = load_model(tmp_path / "bundle")
    assert _equal(loaded.model, unbroken.model)
    assert _figures(loaded.manifest.metrics["curve"]) == _figures(unbroken.curve)
    assert _rows(tmp_path / "log.csv") == _rows(tmp_path / "unbroken.csv")


def _step_of(path: Path) -> int:
    with safetensors.safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["training"])["numbers"]["step"])


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return _figures(list(csv.DictReader(file)))


class _StoppedError(Exception):
    pass


def _stopping(at: str) -> Callable[[str], None]:
    def report(line: str) -> None:
        if line.startswith(at):
            raise _StoppedError

    return report


def test_stopped_between_epochs_it_goes_on(data: Dataset, tmp_path: Path) -> None:
    unbroken = fit(data, OPTIONS, report=print)
    for epoch in (1, 2):
        with pytest.raises(_StoppedError):
            fit(data, OPTIONS, checkpoint=tmp_path / "c", report=_stopping(f"epoch {epoch}"))
    lines: list[str] = []
    again = fit(data, OPTIONS, checkpoint=tmp_path / "c", report=lines.append)
    assert any("going on" in line for line in lines)
    assert _equal(again.model, unbroken.model)
    assert _figures(again.curve) == _figures(unbroken.curve)
    ended = fit(data, OPTIONS, checkpoint=tmp_path / "c", report=lines.append)  # nothing is left to do
    assert _equal(ended.model, unbroken.model)
    assert _figures(ended.curve) == _figures(unbroken.curve)


def test_a_longer_time_limit_goes_on(data: Dataset, tmp_path: Path) -> None:
    fit(data, dataclasses.replace(OPTIONS, minutes=1e-4), checkpoint=tmp_path / "c", report=print)
    fitted = fit(data, dataclasses.replace(OPTIONS, minutes=9.0), checkpoint=tmp_path / "c", report=print)
    assert fitted.epochs == OPTIONS.epochs


def test_the_checkpoint_of_another_training_is_refused(data: Dataset, tmp_path: Path) -> None:
    short = dataclasses.replace(OPTIONS, epochs=1)
    path = tmp_path / "c"
    fit(data, short, checkpoint=path, report=print)

    def refused(options: TrainOptions, message: str, other: Dataset = data) -> None:
        with pytest.raises(CheckpointError, match=message):
            fit(other, options, checkpoint=path, report=print)

    refused(dataclasses.replace(short, seed=4, learning_rate=1e-3), "with other learning_rate, seed$")
    refused(dataclasses.replace(short, config=dataclasses.replace(short.config, dim=8)), "with other config$")
    examples = dataclasses.replace(data.examples, clicked=~data.examples.clicked)
    refused(short, "with other data$", dataclasses.replace(data, examples=examples))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    refused(short, "has format 9, this program goes on from format 1")
    path.write_bytes(whole[:-10])
    refused(short, "is not a checkpoint")
    path.write_bytes(b"\x80\x04K\x01.")
    refused(short, "is not a checkpoint")


def test_a_checkpoint_that_cannot_be_written_says_so(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file/c"):
        fit(data, dataclasses.replace(OPTIONS, epochs=1), checkpoint=tmp_path / "file" / "c", report=print)
