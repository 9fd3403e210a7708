"""Memory of each lane for what an operator makes and reads again before it ends.

A lane runs one operator at a time, so all operators of all models share the same few slots: memory that was written a
moment ago is still in the core's cache, and nobody waits for the allocator. A slot is as large as its largest use was.
What leaves an operator is never here: it is the query's, and freed when its last reader has run (runtime.py).
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_VIEWS = 4_096  # shapes of a thread that are kept


class _Slots(threading.local):
    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}
        self.views: dict[tuple[int, int, int], Tensor] = {}


_SLOTS = _Slots()


def lent(slot: int, rows: int, columns: int) -> Tensor:
    """f4[rows, columns] of this thread, of any content, until the next who asks for the slot."""
    key = slot, rows, columns
    view = _SLOTS.views.get(key)
    if view is None:
        memory = _SLOTS.memory.get(slot)
        if memory is None or memory.numel() < rows * columns or len(_SLOTS.views) >= _VIEWS:
            _SLOTS.views.clear()
        if memory is None or memory.numel() < rows * columns:
            with torch.inference_mode(False):  # so that it can be written in either mode
                memory = _SLOTS.memory[slot] = torch.empty(rows * columns)
        view = _SLOTS.views[key] = memory[: rows * columns].view(rows, columns)
    return view


def held() -> int:
    """Bytes of this thread's slots."""
    return sum(memory.nbytes for memory in _SLOTS.memory.values())
