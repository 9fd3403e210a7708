"""Model folders for tests: the published models, and small ones that show one thing each."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from api.runtime.folder import DTYPES, EXACT
from tests.api.runtime.test_graph import model, query

ZOO = ("wnd", "din", "dlrm", "bst")
KINDS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Kinds(nn.Module):
    """Every datatype comes back in another order, with its bits."""

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.flip(0) for name, tensor in tensors.items()}


class Slow(nn.Module):
    """About a second for three million numbers."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(300):
            x = torch.sin(x)
        return x


class Double(nn.Module):
    """Its constant makes the export hold an operation in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(2.0)


def save(
    folder: Path,
    name: str,
    module: nn.Module,
    example: tuple[Any, ...],
    shapes: Any = None,
    extra: dict[str, str] | None = None,
    **named: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.pt2"
    program = export(module.eval(), example, named, dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers that share memory
        torch.export.save(program, path, extra_files=extra)
    return path


def save_zoo(folder: Path) -> None:
    """As `wnd`, and once more as `wnd-exact` ..."""
    for name in ZOO:
        example = query(name, 8)
        shapes = (*[None] * (len(example) - 1), {0: Dim("rows", min=2)})
        save(folder, name, model(name), example, shapes)
        save(folder, f"{name}-exact", model(name), example, shapes, {EXACT: ""})


def save_kinds(folder: Path) -> None:
    """`kinds`: an input of each datatype and the shape [n, 2]."""
    rows = Dim("rows", min=2, max=1_000)
    example = {name: torch.ones(3, 2).to(dtype) for name, dtype in KINDS.items()}
    save(folder, "kinds", Kinds(), (example,), ({name: {0: rows} for name in KINDS},))
