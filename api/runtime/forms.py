"""The fastest form of a captured group of operations: as it is, or with generated functions (native.py), as measured on
the example when a model is loaded. Forms differ from the module by rounding alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from api.runtime import native
from api.runtime.lower import lowered

_RUNS = 9  # of which the least counts
_ERROR = 1e-3  # of rounding, at most
LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Form:
    """`alone`: the generated function, where that is all of the call."""

    call: Callable[..., Any]
    alone: native.Alone | None = None


def forms(module: fx.GraphModule, given: tuple[Any, ...]) -> list[Form]:
    """All forms, for inputs of which `given` is an example. `module` is left as it is."""
    plain = Form(lowered(module, given))
    try:
        fused = native.fused(module)
        form = None if fused is None else Form(lowered(fused, given), native.alone(fused))
    except Exception:  # what torch can run is served, whatever is wrong with what is made of it
        LOG.exception("a group of operations stays torch's: no function can be made of it")
        return [plain]
    if form is None:
        return [plain]
    if not _alike(form.call(*given), plain.call(*given)):
        LOG.error("a group of operations stays torch's: its function gives something else")
        return [plain]
    return [plain, form]


def _alike(found: Any, wanted: Any) -> bool:
    """Whether they differ by rounding alone."""
    if not isinstance(wanted, Tensor):
        same = (
            isinstance(found, tuple | list) and len(found) == len(wanted) if isinstance(wanted, tuple | list) else False
        )
        return all(map(_alike, found, wanted)) if same else bool(found == wanted)
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(found, wanted)
    size = float(wanted.abs().nan_to_num(posinf=0.0).max())
    return torch.allclose(found, wanted, rtol=_ERROR, atol=_ERROR * size, equal_nan=True)


def seconds(calls: Sequence[Callable[..., Any]], given: tuple[Any, ...]) -> list[float]:
    """The time of each call, undisturbed: whatever else runs can only add to it. In turns, for a machine's speed
    drifts."""
    took, now = [math.inf] * len(calls), clock(given)
    for _ in range(_RUNS):
        for at, call in enumerate(calls):
            began = now()
            call(*given)
            took[at] = min(took[at], now() - began)
    return took


def clock(values: Iterable[Any]) -> Callable[[], float]:
    """Seconds of this thread's CPU; where values are on a GPU those that pass until it has done all."""
    device = next((one.device for one in values if isinstance(one, Tensor) and one.is_cuda), None)
    if device is None:
        return time.thread_time

    def now() -> float:
        torch.cuda.current_stream(device).synchronize()  # not the device: another stream may be recorded as a graph
        return time.perf_counter()

    return now
