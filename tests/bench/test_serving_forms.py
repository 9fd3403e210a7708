"""Every serving form that is timed gives the scores of its model's forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.baselines import ETA, MODELS, build
from encoders.bundle import SAMPLE_SPEC
from encoders.config import ModelConfig
from encoders.ranker import Ranker
from tests.bench import serving_forms
from tests.bench.scene import Scene
from tests.bench.serving_forms import Form

SMALL = ModelConfig(
    width=16,
    dim=16,
    bridges=3,
    window=40,
    length=1_000,
    recent=10,
    head=(8,),
    heads=2,
    hidden=12,
    category_dim=4,
    attention=(8, 4),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(300, 70, SMALL)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "aif"])  # whose kernel compiles per layout
@torch.inference_mode()
def test_forms_are_the_forward_pass(name: str, scene: Scene, tmp_path: Path) -> None:
    forms = serving_forms.checked_forms(name, SMALL, scene, tmp_path / name)
    exact = [form for form in forms if form.most_error == serving_forms.EXACT]
    assert exact
    assert all(serving_forms.check(untrained(name), scene, form) < 1e-3 for form in exact if name != "eta")


@torch.inference_mode()
def test_aif_is_served_from_an_arena(tmp_path: Path) -> None:
    config = ModelConfig()
    scene = Scene(300, 70, config)
    (form,) = serving_forms.checked_forms("aif", config, scene, tmp_path)
    assert serving_forms.check(untrained("aif", config), scene, form) < 0.02
    wrong = Form("off by one item", lambda places: np.roll(form.scores(places), 1))
    with pytest.raises(AssertionError, match="standard deviations"):
        serving_forms.check(untrained("aif", config), scene, wrong)


@pytest.mark.parametrize("without", ["lsh_din", "bea", "simtier", "sim"])
@torch.inference_mode()
def test_ablations_have_forms(without: str, tmp_path: Path) -> None:
    config = ModelConfig(without=(without,), dots=4)
    assert serving_forms.checked_forms("aif", config, Scene(300, 70, config), tmp_path)


def test_nearest_behaviours_are_those_with_the_most_equal_bits() -> None:
    random = np.random.default_rng(0)
    theirs, ours = (random.integers(0, 2**63, (n, 2), dtype=np.int64).view(np.uint64) for n in (9, 100))
    distance = np.bitwise_count(theirs[:, None] ^ ours[None]).sum(axis=2)
    found = serving_forms.nearest(theirs, ours, 7)
    assert [len(set(row)) for row in found.tolist()] == [7] * 9
    picked = np.sort(np.take_along_axis(distance, found, axis=1), axis=1)
    np.testing.assert_array_equal(picked, np.sort(distance, axis=1)[:, :7])
    assert np.sort(serving_forms.nearest(theirs, ours, 200), axis=1).tolist() == [list(range(100))] * 9


def test_contenders_are_measured_side_by_side() -> None:
    contenders = {"two towers": ("dssm", SMALL), "gates": ("cold", SMALL)}
    spent = serving_forms.measure_all(contenders, candidates=200, length=20, repetitions=3, catalogue=500)
    assert list(spent) == list(contenders)
    assert all(len(samples) == 3 and min(samples) > 0 for samples in spent.values())
    assert ETA.top == 48  # what `FEWER` and the docstring of `check` reckon with


def untrained(name: str, config: ModelConfig = SMALL) -> Ranker:
    return build(name, config, SAMPLE_SPEC.sizes).eval().requires_grad_(False)
