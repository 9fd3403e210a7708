"""A training in progress as one file, from which it goes on after a kill. Written and read by encoders/train.py.

The file is safetensors: the tensors, and as its metadata one JSON object of the numbers beside them and of what the
training is about (format, data, options). Guarantees: the file is replaced whole or not at all; a checkpoint of
another training is never taken; numbers come back bit for bit; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

FORMAT = 1  # raised when a training would no longer go on as it began


class CheckpointError(Exception):
    """A checkpoint that cannot be written or must not be used; the message is one sentence."""


def save(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Write the checkpoint: 1. a file beside it; 2. sync; 3. rename. Raises CheckpointError."""
    note = json.dumps({"format": FORMAT, "about": about, "numbers": numbers})
    blob = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"training": note})
    fresh = path.with_name(f".{path.name}.new")  # one name, so that what a kill leaves is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise CheckpointError(f"the checkpoint cannot be written to {path}: {error.strerror}") from error


def load(path: Path, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and numbers of the checkpoint at `path`, None where there is none. Raises CheckpointError."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})["training"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a mapping
        found, theirs, numbers = note["format"], dict(note["about"]), dict(note["numbers"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of a training: {error}") from error
    if found != FORMAT:
        raise CheckpointError(f"the checkpoint {path} has format {found!r}, this program goes on from format {FORMAT}")
    ours = json.loads(json.dumps(about))
    if other := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise CheckpointError(f"the checkpoint {path} is of a training with other {', '.join(other)}")
    return tensors, numbers
