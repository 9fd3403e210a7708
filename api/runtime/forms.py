"""The fastest form of a captured group of operations: as it is, or with generated functions (native.py), as measured on
the example when a model is loaded. Forms differ from the module by rounding alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import fx

from api.runtime import native
from api.runtime.lower import lowered

Form = Callable[..., Any]
_RUNS = 9  # of which the least counts


def forms(module: fx.GraphModule, given: tuple[Any, ...]) -> list[Form]:
    """All forms, for inputs of which `given` is an example. `module` is left as it is."""
    fused = native.fused(module)
    return [lowered(one, given) for one in (module, fused) if one is not None]


def seconds(form: Form, *calls: tuple[Any, ...]) -> float:
    """CPU time of all calls one after the other, undisturbed: whatever else runs can only add to it."""
    took = []
    for _ in range(_RUNS):
        began = time.thread_time()
        for given in calls:
            form(*given)
        took.append(time.thread_time() - began)
    return min(took)
