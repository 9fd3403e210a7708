"""The fastest form of a captured group of operations: as it is, or with generated functions (native.py), as measured on
the example when a model is loaded. Forms differ from the module by rounding alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from api.runtime import native
from api.runtime.lower import lowered

Form = Callable[..., Any]
_RUNS = 9  # of which the least counts


def forms(module: fx.GraphModule, given: tuple[Any, ...]) -> list[Form]:
    """All forms, for inputs of which `given` is an example. `module` is left as it is."""
    fused = native.fused(module)
    return [lowered(one, given) for one in (module, fused) if one is not None]


def seconds(form: Form, *calls: tuple[Any, ...]) -> float:
    """The time of all calls one after the other, undisturbed: whatever else runs can only add to it."""
    took, now = [], clock([value for given in calls for value in given])
    for _ in range(_RUNS):
        began = now()
        for given in calls:
            form(*given)
        took.append(now() - began)
    return min(took)


def clock(values: Iterable[Any]) -> Callable[[], float]:
    """Seconds of this thread's CPU; where values are on a GPU those that pass until it has done all."""
    device = next((one.device for one in values if isinstance(one, Tensor) and one.is_cuda), None)
    if device is None:
        return time.thread_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
