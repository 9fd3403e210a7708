from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from encoders.baselines import MODELS, build
from encoders.bundle import (
    SAMPLE_SPEC,
    BundleError,
    load_bundle,
    load_model,
    manifest_sha256,
    new_model,
    save_bundle,
    seeded_bundle,
)
from encoders.config import ModelConfig

SMALL = ModelConfig(
    width=8, dim=8, bridges=2, bits=16, head=(4,), embedding_dim=6, heads=2, hidden=8, category_dim=2,
    tier_edges=(1, 2, 3, 4, 5, 6, 7),
)  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    seeded_bundle(tmp_path / "bundle", SMALL, seed=3)
    return tmp_path / "bundle"


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None], *, version: bool = True) -> None:
    """Change the manifest; with `version` also make its version fit again, as an attacker or a careful hand would."""
    fields = json.loads((bundle / "manifest.json").read_text())
    change(fields)
    if version:
        content = {name: value for name, value in fields.items() if name != "version"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        fields["version"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    (bundle / "manifest.json").write_text(json.dumps(fields))


def retensor(bundle: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors; hash and shapes in the manifest follow."""
    tensors = safetensors.torch.load_file(bundle / "model.safetensors")
    change(tensors)
    blob = safetensors.torch.save(tensors)
    (bundle / "model.safetensors").write_bytes(blob)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    rewrite(
        bundle, lambda fields: fields.update(tensors={"sha256": hashlib.sha256(blob).hexdigest(), "shapes": shapes})
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = new_model(SMALL, SAMPLE_SPEC, seed=5)
    sha256 = save_bundle(tmp_path / "b", model, SMALL, SAMPLE_SPEC, "fp32", {"auc": 0.7})
    loaded = load_bundle(tmp_path / "b", sha256)
    assert loaded.manifest.config == SMALL
    assert loaded.manifest.features == SAMPLE_SPEC
    assert loaded.manifest.metrics == {"auc": 0.7}
    assert loaded.manifest.precision == "fp32"
    assert loaded.sha256 == sha256 == manifest_sha256(tmp_path / "b")
    assert not loaded.model.training
    assert not any(weights.requires_grad for weights in loaded.model.parameters())
    wanted = model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]  # nothing temporary stays
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["manifest.json", "model.safetensors"]


def test_row_gives_the_arguments_of_the_layout(bundle: Path) -> None:
    row = load_bundle(bundle).manifest.row
    assert row == {
        "width": 8, "bridges": 2, "bits": 16, "dim": 8, "crosses": 6, "precision": "fp16",
        "attributes": ["bid", "in_stock"],
    }  # fmt: skip
    assert json.loads((bundle / "manifest.json").read_text())["row"] == row


def test_version_follows_from_the_content(tmp_path: Path) -> None:
    one = seeded_bundle(tmp_path / "one", SMALL, seed=1)
    same = seeded_bundle(tmp_path / "same", SMALL, seed=1)
    other = seeded_bundle(tmp_path / "other", SMALL, seed=2)
    assert one.manifest.version == same.manifest.version != other.manifest.version
    assert one.sha256 == same.sha256
    model = new_model(SMALL, SAMPLE_SPEC, 1)
    save_bundle(tmp_path / "half", model, SMALL, SAMPLE_SPEC, "fp16")
    save_bundle(tmp_path / "full", model, SMALL, SAMPLE_SPEC, "fp32")
    assert load_bundle(tmp_path / "half").manifest.version != load_bundle(tmp_path / "full").manifest.version


def test_making_a_model_leaves_the_global_random_state(tmp_path: Path) -> None:
    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    new_model(SMALL, SAMPLE_SPEC, 1)
    assert torch.equal(torch.rand(3), wanted)


def test_loading_does_not_load_torchs_compiler(bundle: Path) -> None:
    """It is a second and 80 MB of every process."""
    code = (
        "import sys, pathlib; from encoders.bundle import load_bundle; load_bundle(pathlib.Path(sys.argv[1])); "
        "print(sys.modules.keys() & {'torch._dynamo', 'sympy'})"
    )
    found = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _nan(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[0].fill_(float("nan"))


Damage = Callable[[Path], None]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "cannot be read"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "cannot be read"),
    "no tensors": (lambda b: (b / "model.safetensors").unlink(), "cannot be read"),
    "not JSON": (lambda b: (b / "manifest.json").write_text("{"), "is not JSON"),
    "not UTF-8": (lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe{"), "is not JSON"),
    "not an object": (lambda b: (b / "manifest.json").write_text("[]"), "names no format"),
    "no format": (lambda b: rewrite(b, lambda f: f.pop("format")), "names no format"),
    "later format": (lambda b: rewrite(b, lambda f: f.update(format=3)), "format 3, this program reads format 2"),
    "edited manifest": (lambda b: rewrite(b, lambda f: f["metrics"].update(x=1), version=False), "its content gives"),
    "flipped tensor bit": (lambda b: _flip(b / "model.safetensors", -9), "model.safetensors has SHA-256"),
    "cut tensors": (
        lambda b: (b / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()[:-4]),
        "model.safetensors has SHA-256",
    ),
    "a pickle": (
        lambda b: (
            (b / "model.safetensors").write_bytes(b"\x80\x04K\x01."),
            rewrite(b, lambda f: f["tensors"].update(sha256=hashlib.sha256(b"\x80\x04K\x01.").hexdigest())),
        )[1],
        "is not a safetensors file",
    ),
    "missing tensor": (lambda b: retensor(b, lambda t: t.pop("W1b")), "tensors are missing: W1b"),
    "extra tensor": (lambda b: retensor(b, lambda t: t.update(more=torch.ones(1))), "does not have: more"),
    "other shape": (lambda b: retensor(b, lambda t: t.update(W1b=torch.ones(8, 9))), r"W1b has shape \[8, 9\]"),
    "other type": (lambda b: retensor(b, lambda t: t.update(W1b=t["W1b"].double())), "float64, not float32"),
    "NaN weight": (lambda b: retensor(b, _nan("user_tower.qkv.weight")), "not finite"),
    "NaN buffer": (lambda b: retensor(b, _nan("projection")), "not finite"),
    "other config": (lambda b: rewrite(b, lambda f: f["config"].update(bridges=3)), "row does not fit"),
    "other recent config": (lambda b: rewrite(b, lambda f: f["config"].update(hidden=9)), "has shape"),
    "absurd config": (lambda b: rewrite(b, lambda f: f["config"].update(hidden=10**12)), "has shape"),
    "unknown model": (lambda b: rewrite(b, lambda f: f.update(model="svm")), "'svm' are not known"),
    "unknown config": (lambda b: rewrite(b, lambda f: f["config"].update(depth=9)), "does not read"),
    "text for a number": (lambda b: rewrite(b, lambda f: f["config"].update(hidden="x")), "does not read"),
    "no heads": (lambda b: rewrite(b, lambda f: f["config"].update(heads=3)), "heads"),
    "descending edges": (lambda b: rewrite(b, lambda f: f["config"].update(tier_edges=[9] * 7)), "ascend"),
    "odd bits": (lambda b: rewrite(b, lambda f: (f["config"].update(bits=12), f["row"].update(bits=12))), "bits"),
    "bad precision": (lambda b: rewrite(b, lambda f: f["row"].update(precision="int4")), "'int4' are not known"),
    "bad features": (lambda b: rewrite(b, lambda f: f["features"].pop("crosses")), "feature spec does not read"),
    "more crosses": (lambda b: rewrite(b, lambda f: f["features"].update(actions=["a"])), "action_table has shape"),
    "no shapes": (lambda b: rewrite(b, lambda f: f["tensors"].pop("shapes")), "does not read"),
    "lying shapes": (lambda b: rewrite(b, lambda f: f["tensors"]["shapes"].update(W1b=[8, 9])), "W1b"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_refused(bundle: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


def test_a_wrong_hash_is_refused(bundle: Path) -> None:
    assert load_bundle(bundle, manifest_sha256(bundle).upper()).manifest.config == SMALL
    with pytest.raises(BundleError, match="SHA-256 is"):
        load_bundle(bundle, "0" * 64)


def test_rewriting_alone_changes_nothing(bundle: Path) -> None:
    """The tools of this test do not themselves break a bundle."""
    retensor(bundle, lambda tensors: None)
    assert load_bundle(bundle).manifest.config == SMALL


def test_a_taken_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="already there"):
        seeded_bundle(bundle, SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="already there"):
        seeded_bundle(tmp_path / "file", SMALL)
    with pytest.raises(BundleError, match="cannot be written"):
        seeded_bundle(tmp_path / "file" / "below", SMALL)
    (tmp_path / "empty").mkdir()
    assert seeded_bundle(tmp_path / "empty", SMALL, seed=3).sha256 == manifest_sha256(bundle)


def test_a_weight_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    model = new_model(SMALL, SAMPLE_SPEC, 0)
    with torch.no_grad():
        model.b1[0] = float("inf")
    with pytest.raises(BundleError, match="b1 is not finite"):
        save_bundle(tmp_path / "b", model, SMALL, SAMPLE_SPEC)
    assert list(tmp_path.iterdir()) == []


def test_config_fields_are_checked() -> None:
    for fields, message in (
        ({"bits": 12}, "whole bytes"),
        ({"heads": 3}, "3 heads"),
        ({"tier_edges": (3, 3)}, "ascend"),
        ({"tier_edges": (1, 200)}, "ascend"),
        ({"width": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(ModelConfig(), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"aif"}))
def test_a_rival_is_kept_but_not_served(name: str, tmp_path: Path) -> None:
    rival = build(name, SMALL, SAMPLE_SPEC.sizes, seed=2)
    save_bundle(tmp_path / "b", rival, SMALL, SAMPLE_SPEC, metrics={"seed": 2}, model_name=name)
    loaded = load_model(tmp_path / "b")
    assert loaded.manifest.model == name
    assert loaded.model.state_dict().keys() == rival.state_dict().keys()
    assert all(torch.equal(tensor, loaded.model.state_dict()[key]) for key, tensor in rival.state_dict().items())
    with pytest.raises(BundleError, match=f"holds a {name} model, which cannot be served"):
        load_bundle(tmp_path / "b")


def test_older_manifests_read(bundle: Path) -> None:
    """Those before rivals name no model and know fewer fields of the config."""

    def older(fields: dict[str, Any]) -> None:
        del fields["model"], fields["config"]["without"], fields["config"]["din_scale"]

    rewrite(bundle, older)
    manifest = load_bundle(bundle).manifest
    assert manifest.model == "aif"
    assert manifest.config == SMALL
