"""Captured operators give the module's bits, for any number of rows and any grain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from api.runtime.graph import GraphError, capture
from encoders.zoo.bst import BST, BSTConfig
from encoders.zoo.din import DIN, DINConfig
from encoders.zoo.dlrm import DLRM, DLRMConfig
from encoders.zoo.wnd import WideAndDeep, WideAndDeepConfig

ROWS = 20


def ids(*shape: int) -> Tensor:
    return torch.randint(0, ROWS, shape)


def query(name: str, rows: int) -> tuple[Tensor, ...]:
    user: dict[str, list[Tensor]] = {
        "wnd": [ids(1, 18), torch.randn(1, 13)],
        "din": [ids(1, 4), ids(1, 9, 2), torch.rand(1, 9) > 0.3],
        "dlrm": [torch.randn(1, 13), ids(1, 6, 80)],
        "bst": [ids(1, 4), ids(1, 20, 2), torch.rand(1, 20) > 0.3],
    }
    item = {"wnd": (9,), "din": (2,), "dlrm": (2, 80), "bst": (2,)}[name]
    return (*user[name], ids(rows, *item))


def model(name: str) -> nn.Module:
    torch.manual_seed(1)
    made: dict[str, Any] = {
        "wnd": lambda: WideAndDeep(WideAndDeepConfig(rows=ROWS, hidden=(32, 16))),
        "din": lambda: DIN(DINConfig(rows=ROWS, dim=8)),
        "dlrm": lambda: DLRM(DLRMConfig(rows=ROWS, dim=8)),
        "bst": lambda: BST(BSTConfig(rows=ROWS, hidden=(32, 16))),
    }
    module: nn.Module = made[name]()
    return module


@pytest.mark.parametrize("name", ["wnd", "din", "dlrm", "bst"])
@pytest.mark.parametrize("grain_s", [0.0, 1e-4, 10.0])
def test_operators_give_the_modules_bits(name: str, grain_s: float) -> None:
    module = model(name)
    example = query(name, 8)
    graph = capture(module, example, [None] * (len(example) - 1) + [0], grain_s)
    for rows in (2, 8, 33):
        given = query(name, rows)
        with torch.inference_mode():
            assert torch.equal(graph.run(*given), module(*given))
    for at, one in enumerate(graph.operators):
        assert all(before < at for before in one.waits)
        assert all(at in graph.operators[before].then for before in one.waits)
    counts = {0.0: len(graph.operators) > 10, 10.0: len(graph.operators) == 1}
    assert counts.get(grain_s, True)


def test_branches_wait_for_what_they_need_alone() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            left, right = a.sin().cos(), b.exp().log1p()
            return left + right, left

    graph = capture(Two(), (torch.ones(3), torch.ones(3)), grain_s=0.0)
    starts = [one for one in graph.operators if not one.waits]
    assert len(starts) == 2
    assert max(len(one.waits) for one in graph.operators) == 2
    total, left = graph.run(torch.zeros(3), torch.zeros(3))
    assert torch.equal(left, torch.zeros(3).sin().cos())
    assert torch.equal(total, left + torch.zeros(3).exp().log1p())


def test_what_cannot_be_followed_is_said() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(GraphError, match=r"torch\.export cannot follow the module"):
        capture(Branches(), (torch.ones(3),))
