"""Memory of each lane for what an operator makes and reads again before it ends.

A lane runs one operator at a time, so all operators of all models share it: memory that was written a moment ago is
still in the core's cache, and nobody waits for the allocator. It is as large as its largest use was. What leaves an
operator is never here: it is the query's, and freed when its last reader has run (runtime.py).
"""

from __future__ import annotations

import threading

import torch

_MORE = 64  # a cache line


class _Memory(threading.local):
    held = torch.empty(0, dtype=torch.uint8)


_OWN = _Memory()


def scratch(size: int) -> int:
    """The address of so many bytes of this thread, of any content, until the next who asks."""
    if _OWN.held.numel() < size + _MORE:
        _OWN.held = torch.empty(size + _MORE, dtype=torch.uint8)
    return -(-_OWN.held.data_ptr() // _MORE) * _MORE


def held() -> int:
    """Bytes that this thread has."""
    return _OWN.held.nbytes
