"""The bundle: one model as a folder of `model.safetensors` and `manifest.json`. Written by training, read by every job.

`manifest.json` (UTF-8 JSON, format 2): `format`; `version` = first 16 hex digits of the SHA-256 of the rest, so it
follows from the content; `model` (its name in `baselines.MODELS`; absent = "aif"); `config` (ModelConfig, with the tier
edges; absent fields have their defaults); `features` (FeatureSpec, with crosses and actions); `row` (the arguments of
the index's RowLayout); `tensors` = SHA-256 of the tensors' file and the shape of each; `metrics` of training.
Guarantees: `save_bundle` makes the folder appear whole or not at all; `load_model` gives a model whose every byte is
the one that was hashed, whose shapes fit and whose weights are finite float32, or raises BundleError; `load_bundle`
does so for what can be served, which is AIF alone. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import safetensors.torch
import torch

from encoders.baselines import MODELS, build
from encoders.config import ModelConfig
from encoders.features import Categorical, FeatureSpec, Numeric, SpecError
from encoders.model import AIF
from encoders.ranker import Ranker

FORMAT = 2
MANIFEST = "manifest.json"
TENSORS = "model.safetensors"
SERVED = "aif"  # the one model that can be served

Precision = Literal["fp16", "fp32"]


class BundleError(Exception):
    """A bundle that cannot be written or must not be used; the message is one sentence."""


class BundleUnreadableError(BundleError):
    """A file of it that is not there or cannot be read now; what it holds may be right."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    version: str  # 16 hex digits, from the content
    config: ModelConfig
    features: FeatureSpec
    precision: Precision  # of the rows
    metrics: Mapping[str, Any]
    model: str = SERVED  # a name in MODELS

    @property
    def row(self) -> dict[str, Any]:
        """Arguments of the index's RowLayout."""
        return _row(self.config, self.features, self.precision)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A manifest with its model, in evaluation mode and without gradients."""

    manifest: Manifest
    model: Ranker
    sha256: str  # of manifest.json, as `models` events carry it


@dataclasses.dataclass(frozen=True)
class Bundle(Loaded):
    """What can be served."""

    model: AIF


def save_bundle(
    path: Path,
    model: Ranker,
    config: ModelConfig,
    features: FeatureSpec,
    precision: Precision = "fp16",
    metrics: Mapping[str, Any] | None = None,
    model_name: str = SERVED,
) -> str:
    """Write a bundle at `path`, which must not exist or be empty; gives the SHA-256 of its manifest.

    1. write both files into a temporary folder beside `path`; 2. sync them; 3. rename the folder.
    Raises BundleError where the folder is taken, cannot be written, or the weights are not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BundleError(f"tensor {name} is not finite, so the bundle is not written")
    blob = safetensors.torch.save(tensors)
    content = {
        "format": FORMAT,
        "model": model_name,
        "config": dataclasses.asdict(config),
        "features": features.to_json(),
        "row": _row(config, features, precision),
        "tensors": {"sha256": _sha256(blob), "shapes": {name: list(t.shape) for name, t in sorted(tensors.items())}},
        "metrics": dict(metrics or {}),
    }
    manifest = json.dumps({"version": _version(content), **content}, indent=1, sort_keys=True, allow_nan=False).encode()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BundleError(f"{path} is already there; choose another folder or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write(staging / TENSORS, blob)
            _write(staging / MANIFEST, manifest)
            staging.chmod(0o755)
            staging.rename(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise BundleError(f"the bundle cannot be written to {path}: {error.strerror}") from error
    return _sha256(manifest)


def load_bundle(path: Path, sha256: str | None = None) -> Bundle:
    """Read and check the bundle at `path`, for serving. `sha256`, where given, must be that of its manifest. Raises
    BundleError.
    """
    loaded = _load(path, sha256, served=True)
    return Bundle(loaded.manifest, cast(AIF, loaded.model), loaded.sha256)


def load_model(path: Path, sha256: str | None = None) -> Loaded:
    """As `load_bundle`, of any model. Raises BundleError."""
    return _load(path, sha256, served=False)


def _load(path: Path, sha256: str | None, served: bool) -> Loaded:
    raw = _read(path / MANIFEST)
    found = _sha256(raw)
    if sha256 is not None and sha256.lower() != found:
        raise BundleError(f"the manifest's SHA-256 is {found}, not {sha256}")
    fields = _parse(raw)
    manifest = _manifest(fields)
    if served and manifest.model != SERVED:
        raise BundleError(f"{path} holds a {manifest.model} model, which cannot be served")
    if served and (reason := manifest.config.unservable):
        raise BundleError(f"{path}: {reason}")
    try:
        tensors_hash, shapes = str(fields["tensors"]["sha256"]), dict(fields["tensors"]["shapes"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"the manifest does not read: {error!r}") from error

    blob = _read(path / TENSORS)
    if _sha256(blob) != tensors_hash:
        raise BundleError(f"{TENSORS} has SHA-256 {_sha256(blob)}, the manifest says {tensors_hash}")
    try:
        tensors = safetensors.torch.load(blob)
    except safetensors.SafetensorError as error:
        raise BundleError(f"{TENSORS} is not a safetensors file: {error}") from error
    model = _empty_model(manifest)
    _check_tensors(tensors, model, shapes)
    model.load_state_dict(tensors, assign=True)
    return Loaded(manifest, model.requires_grad_(False).eval(), found)


def manifest_sha256(path: Path) -> str:
    """SHA-256 of the manifest of the bundle at `path`, as `models` events carry it. Raises BundleError."""
    return _sha256(_read(path / MANIFEST))


def seeded_bundle(
    path: Path,
    config: ModelConfig | None = None,
    seed: int = 0,
    *,
    features: FeatureSpec | None = None,
    precision: Precision = "fp16",
) -> Bundle:
    """Write and load an untrained bundle for benchmarks and tests; equal arguments give equal bytes.

    All weights, the learned defaults too, are random and of trained scale, so that no error hides in a zero.
    """
    config, features = config or ModelConfig(), features or SAMPLE_SPEC
    model = new_model(config, features, seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1.5).add_(torch.randn(weights.shape, generator=random), alpha=0.1)
    save_bundle(path, model, config, features, precision, {"untrained": True})
    return load_bundle(path)


def new_model(config: ModelConfig, features: FeatureSpec, seed: int) -> AIF:
    """An AIF with weights and LSH projection drawn from `seed`; the global random state stays as it is."""
    return cast(AIF, build(SERVED, config, features.sizes, seed))


SAMPLE_SPEC = FeatureSpec(
    item_categories=(Categorical("category", 64), Categorical("brand", 512), Categorical("words", 4_096)),
    item_numerics=(Numeric("price", 50.0, 40.0),),
    user_categories=(Categorical("segment", 64),),
    user_numerics=(Numeric("age", 35.0, 12.0),),
    crosses=tuple(f"category:{k}" for k in range(32)) + tuple(f"brand:{k}" for k in range(128)),
    actions=("view", "click"),
    attributes=("bid", "in_stock"),
)


def _row(config: ModelConfig, features: FeatureSpec, precision: Precision) -> dict[str, Any]:
    return {
        "width": config.width,
        "bridges": config.bridges,
        "bits": config.bits,
        "dim": config.dim,
        "crosses": config.crosses,
        "precision": precision,
        "attributes": list(features.attributes),
    }


def _parse(raw: bytes) -> dict[str, Any]:
    """The manifest's object, of a known format and with the version that its content gives."""
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise BundleError(f"{MANIFEST} names no format")
    if fields["format"] != FORMAT:
        raise BundleError(f"the bundle has format {fields['format']!r}, this program reads format {FORMAT}")
    content = {name: value for name, value in fields.items() if name != "version"}
    if fields.get("version") != _version(content):
        raise BundleError(f"the bundle says version {fields.get('version')!r}, its content gives {_version(content)}")
    return fields


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    try:
        sizes: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields["config"].items()
        }
        config = ModelConfig(**sizes)
        features = FeatureSpec.from_json(fields["features"])
        precision = fields["row"]["precision"]
        metrics = dict(fields["metrics"])
        name = str(fields.get("model", SERVED))
    except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
        raise BundleError(f"the manifest does not read: {error}") from error
    if precision not in ("fp16", "fp32"):
        raise BundleError(f"rows of precision {precision!r} are not known")
    if name not in MODELS:
        raise BundleError(f"models of the name {name!r} are not known")
    manifest = Manifest(fields["version"], config, features, cast(Precision, precision), metrics, name)
    if fields["row"] != manifest.row:
        raise BundleError("the manifest's row does not fit its config")
    return manifest


def _empty_model(manifest: Manifest) -> Ranker:
    """The model to load weights into; what may come from elsewhere, the one that is served, without memory for its own,
    so that absurd sizes in a manifest cost nothing.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if manifest.model == SERVED else "cpu"):
            return MODELS[manifest.model](manifest.config, manifest.features.sizes)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise BundleError(f"the manifest's config does not make a model: {error}") from error


def _check_tensors(tensors: Mapping[str, torch.Tensor], model: Ranker, shapes: Mapping[str, Any]) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise BundleError(f"tensors are missing: {', '.join(missing[:5])}")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise BundleError(f"tensors that the model does not have: {', '.join(extra[:5])}")
    for name, tensor in tensors.items():
        if list(tensor.shape) != wanted[name] or shapes.get(name) != wanted[name]:
            raise BundleError(f"tensor {name} has shape {list(tensor.shape)}, the config needs {wanted[name]}")
        if tensor.dtype != torch.float32:
            raise BundleError(f"tensor {name} is {tensor.dtype}, not float32")
        if not torch.isfinite(tensor).all():
            raise BundleError(f"tensor {name} holds a weight that is not finite")


def _version(content: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())[:16]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleUnreadableError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
