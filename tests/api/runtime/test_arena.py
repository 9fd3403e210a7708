"""Slots are a thread's own, are used again, and hold what the layers that have them write."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from api.runtime import arena, forms
from api.runtime.graph import capture


def test_a_slot_is_as_large_as_its_largest_use_and_its_memory_stays() -> None:
    def run() -> None:
        small = arena.lent(0, 3, 5)
        assert arena.lent(0, 3, 5).data_ptr() == small.data_ptr()
        large = arena.lent(0, 30, 5)
        assert arena.lent(0, 3, 5).data_ptr() == large.data_ptr()
        other = arena.lent(1, 2, 2)
        assert other.data_ptr() != large.data_ptr()
        held.append(arena.held())

    held: list[int] = []
    for work in (run, lambda: held.append(arena.held())):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert held == [4 * (30 * 5 + 2 * 2), 0], "and each thread has its own"


class Tower(nn.Module):
    """Three layers; the second one's result is given away through a view, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, size) for size in (64, 64, 64, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.ops.aten.relu.default(self.layers[0](x))
        second = self.layers[1](first)
        third = torch.ops.aten.sigmoid.default(self.layers[2](second))
        return torch.ops.aten.view.default(self.layers[3](third), [-1]), torch.ops.aten.squeeze.default(second)


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False), (False, True)])
def test_layers_share_slots_whose_results_are_read_no_more(
    modes: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "seconds", lambda form, *_: -getattr(form, "slot", -2))  # made for it, and lent
    tower = Tower().eval()
    graph = capture(tower, (torch.randn(9, 64),), (0,), grain_s=10.0)
    (operator,) = graph.operators
    called = [getattr(one, "__self__", None) for one in operator.run.__globals__.values()]
    made = [one for one in called if isinstance(one, forms._Generated)]
    assert [one.slot for one in made] == [0, -1, 0], "what the second one gives is given away, through a view"
    found = []
    for x, mode in zip(torch.randn(2, 9, 64), modes, strict=True):
        with torch.inference_mode(mode), torch.no_grad():
            found.append((graph.run(x), tower(x)))
    for ours, theirs in found:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
