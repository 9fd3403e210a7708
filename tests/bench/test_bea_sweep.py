"""How benchmark `bea_sweep` measures the use of bridges, counts diverged runs and concludes, and what the experiments'
frame keeps.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.config import ModelConfig
from encoders.data import synthetic
from encoders.evaluation import Evaluation
from encoders.train import TrainingError, TrainOptions, fit
from infra.settings import Settings
from tests.bench import bea_sweep, experiment
from tests.bench.bea_sweep import DEFAULT, FEW, MANY, NO_BEA, PLAIN, REMEDIES, SETTINGS, USUAL, Line, usage_of
from tests.bench.experiment import Failed, Source, Trial, Variant
from tests.bench.report import Report

WORLD = synthetic.Marketplace(users=40, items=60, examples=600, categories=6, past=10)
SMALL = ModelConfig(width=8, dim=8, bridges=4, bits=16, window=10, recent=5, head=(4,), heads=2, hidden=8,
                    category_dim=4, tier_edges=(6, 8, 10))  # fmt: skip
SHARES = torch.full((4,), 0.25, dtype=torch.float64)


def test_usage_of_weights_that_say_nothing_of_the_item() -> None:
    found = usage_of(torch.full((4, 4), 0.25), SHARES, torch.ones(4, 3))
    assert found["bridges_used"] == pytest.approx(4)
    assert found["bridges_told_apart"] == pytest.approx(1)
    assert found["entropy_of_mean"] == pytest.approx(found["mean_entropy"]) == pytest.approx(math.log(4))
    assert found["cosine"] == pytest.approx(1)


def test_usage_of_a_bridge_for_every_item_and_of_one_for_all() -> None:
    found = usage_of(torch.eye(4), SHARES, torch.eye(4))
    assert [found["bridges_used"], found["bridges_told_apart"]] == pytest.approx([4, 4])
    assert found["mean_entropy"] == found["cosine"] == 0
    one = torch.zeros(4, 4)
    one[:, 2] = 1
    assert usage_of(one, SHARES, torch.eye(4))["bridges_used"] == pytest.approx(1)


def test_usage_weighs_items_by_their_impressions_and_takes_a_single_bridge() -> None:
    shares = torch.tensor([0.75, 0.25, 0, 0], dtype=torch.float64)
    found = usage_of(torch.eye(4), shares, torch.eye(4))
    assert found["entropy_of_mean"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert usage_of(torch.ones(4, 1), SHARES, torch.ones(1, 3))["cosine"] == 0


def test_every_line_has_options_of_its_own() -> None:
    lines = [line for part in bea_sweep.parts(quick=True).values() for line in part.lines]
    lines += [Line(name, bridges, setting) for name in REMEDIES for bridges in (FEW, MANY) for setting in SETTINGS]
    variants = [line.variant(TrainOptions()) for line in set(lines)]
    assert (
        len({variant.options for variant in variants}) == len({variant.name for variant in variants}) == len(set(lines))
    )
    assert REMEDIES[DEFAULT].on(TrainOptions(), ModelConfig().bridges) == TrainOptions()
    assert Line("top 4", 4).variant(TrainOptions()).options.config.bridge_top == 0
    assert Line(NO_BEA, 1).variant(TrainOptions()).options.config.without == ("bea",)


def runs(skill: float, diverged: int = 0) -> list[Trial | Failed]:
    """Three seeds; 40 users with ten impressions each."""
    found: list[Trial | Failed] = [Failed("the loss is nan") for _ in range(diverged)]
    users, labels = np.repeat(np.arange(40), 10), np.tile([True, False], 200)
    for seed in range(3 - diverged):
        scores = (np.random.default_rng(seed).standard_normal(400) + skill * labels).astype(np.float32)
        found.append(
            Trial(Evaluation("m", seed, users, labels, scores), 0.7, 9, 1.0, {"converged": 1.0, "cosine": 0.0})
        )
    return found


def test_failure_is_a_loss_beyond_noise_or_a_run_that_diverged() -> None:
    assert bea_sweep._fails(runs(1.0), runs(0.3))
    assert not bea_sweep._fails(runs(1.0), runs(1.0))
    assert not bea_sweep._fails(runs(0.3), runs(1.0))
    assert bea_sweep._fails(runs(0.3), runs(3.0, diverged=1))
    assert bea_sweep._fails([Failed("")] * 3, [Failed("")] * 3)


def test_figures_and_search_say_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    found = {Line(PLAIN, 1): runs(0.5), Line(PLAIN, FEW): runs(1.0), Line(PLAIN, MANY): runs(0.3, diverged=1)}
    report = Report("bea_sweep", 0, quick=True)
    bea_sweep._figures(report, found, list(found), "")
    assert report.figures["bea_plain_plateau_bridges"]["value"] == FEW
    drop = report.figures["bea_plain_drop_at_64"]
    assert 0 < float(str(drop["low"])) < float(str(drop["value"])) < float(str(drop["high"]))
    table = bea_sweep._sweep(found, list(found))
    assert (table[2]["diverged"], table[2]["not_converged"]) == (1, 0)
    row = bea_sweep._gap(Source("here"), found, PLAIN, USUAL)
    assert row["fails"]
    assert row["drop"] == pytest.approx(drop["value"], abs=1e-5)
    assert "gauc_without" not in row
    control = bea_sweep._gap(Source("here"), found | {Line(NO_BEA, 1): runs(0.3)}, PLAIN, USUAL)
    assert row["gauc_64"] < control["gauc_without"] < row["gauc_16"]  # type: ignore[operator]
    bea_sweep._holm([row])
    bea_sweep._conclude(report, [row], [found])
    assert report.figures["bea_settings_failed"]["value"] == report.figures["bea_runs_diverged"]["value"] == 1
    assert "1 settings in which 64 plain bridges lose more than noise" in capsys.readouterr().out


def test_holm_multiplies_the_least_p_by_the_number_of_settings() -> None:
    searched: list[dict[str, object]] = [{"remedy": PLAIN, "p": p} for p in (0.03, 0.01, 0.04)]
    searched.append({"remedy": DEFAULT, "p": 0.001})
    bea_sweep._holm(searched)
    assert [row.get("p_holm") for row in searched] == [0.06, 0.03, 0.06, None]


def test_the_frame_keeps_notes_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_worker", [])
    options = TrainOptions(config=SMALL, epochs=1, bridges_from_data=True)
    experiment._open(Source("here", world=WORLD), tmp_path, bea_sweep.SAMPLING, bea_sweep.usage)
    found = experiment._trial("one", options)
    assert isinstance(found, Trial)
    assert 1 <= found.notes["bridges_told_apart"] <= found.notes["bridges_used"] <= 4
    assert found.notes["converged"] == 0
    (noted,) = tmp_path.glob("*.json")
    noted.write_text('{"kept": 1.0}')
    again = experiment._trial("one", options)
    assert isinstance(again, Trial)
    assert again.notes == {"kept": 1.0}
    assert np.array_equal(again.evaluation.scores, found.evaluation.scores)
    broken = dataclasses.replace(options, learning_rate=1e30, epochs=3)
    first = experiment._trial("broken", broken)
    assert isinstance(first, Failed)
    assert not list(tmp_path.glob("*.checkpoint"))
    (kept,) = tmp_path.glob("*.failed")
    kept.write_text("as before")
    assert experiment._trial("broken", broken) == Failed("as before")


def test_trials_raise_what_attempts_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant("broken", TrainOptions(config=SMALL, epochs=3, learning_rate=1e30))
    monkeypatch.setattr(experiment, "load", lambda: Settings(state=tmp_path))
    with pytest.raises(TrainingError, match=r"broken: the loss is|broken: a score"):
        experiment.trials(Source("here", world=WORLD), [variant], [0], bea_sweep.SAMPLING, report=lambda _: None)


def test_weights_that_break_in_an_epochs_last_step_are_a_training_error() -> None:
    data = synthetic.generate(WORLD)
    options = TrainOptions(config=SMALL, epochs=1, learning_rate=1e30, batch_groups=10_000)  # one step
    with pytest.raises(TrainingError, match="a score of the validation slice is not finite with learning rate"):
        fit(data, options, report=lambda _: None)
