"""Captured operators give the module's bits, for any number of rows and any grain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from api.runtime.graph import Graph, GraphError, capture
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


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def captured(name: str, rows: int = 40, **options: Any) -> tuple[nn.Module, Graph]:
    module, example = model(name), query(name, rows)
    return module, capture(module, example, [None] * (len(example) - 1) + [0], **options)


@pytest.mark.parametrize(
    ("name", "blocks", "grain_s"),
    [("wnd", (8, 16), 10.0), ("din", (8,), 0.0), ("dlrm", (8,), 10.0), ("bst", (8,), 0.0), ("dlrm", (), 0.0)],
)
def test_operators_give_what_the_module_gives(name: str, blocks: tuple[int, ...], grain_s: float) -> None:
    module, graph = captured(name, blocks=blocks, grain_s=grain_s)
    assert (graph.block is not None) == bool(blocks)
    for rows in (2, 8, 9, 33, 100):
        given = query(name, rows)
        with torch.inference_mode():
            found = graph.run(*given)
            torch.testing.assert_close(found, module(*given), **CLOSE)
            kept = found.clone()
            graph.run(*query(name, rows))
            assert torch.equal(found, kept), "what a lane uses again is not what it has given away"
        blocks = graph.blocks_of(rows)
        assert blocks == (max(1, round(rows / graph.block)) if graph.block else 1)
        for at, before in enumerate(graph.before):
            assert all(one < at for one in before)
            assert all(at in graph.then[one] for one in before)
        held = sum(value.nbytes for value in graph.run_values(given) if isinstance(value, Tensor))
        assert held <= graph.bytes_of(rows) + 1, "what its values take is known before"
    assert (len(graph.operators) > 5) == (grain_s == 0.0)


def test_exact_operators_give_the_modules_bits() -> None:
    module, graph = captured("bst", exact=True, grain_s=0.0)
    assert len(graph.operators) > 10
    for rows in (2, 33):
        given = query("bst", rows)
        with torch.inference_mode():
            assert torch.equal(graph.run(*given), module(*given))


def test_rows_that_depend_on_each_other_are_not_parted() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    graph = capture(Centred(), (torch.randn(40, 4),), (0,))
    assert graph.block is None
    x = torch.randn(100, 4)
    torch.testing.assert_close(graph.run(x), Centred()(x))


def test_inputs_of_different_rows_are_refused() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.exp() + y

    graph = capture(Sum(), (torch.randn(40, 4), torch.randn(40, 4)), (0, 0))
    with pytest.raises(GraphError, match="different numbers of rows"):
        graph.run(torch.randn(3, 4), torch.randn(4, 4))


def test_branches_wait_for_what_they_need_alone() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            left, right = a.sin().cos(), b.exp().log1p()
            return left + right, left

    graph = capture(Two(), (torch.ones(3), torch.ones(3)), grain_s=0.0)
    assert len(graph.first) == 2
    assert max(graph.waits) == 2
    total, left = graph.run(torch.zeros(3), torch.zeros(3))
    assert torch.equal(left, torch.zeros(3).sin().cos())
    assert torch.equal(total, left + torch.zeros(3).exp().log1p())


def test_what_cannot_be_followed_is_said() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(GraphError, match=r"torch\.export cannot follow the module"):
        capture(Branches(), (torch.ones(3),))
