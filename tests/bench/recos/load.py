"""What is asked of the models, and when: seeded, the same for every runner."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from encoders.zoo.bst import BST, BSTConfig
from encoders.zoo.din import DIN, DINConfig
from encoders.zoo.dlrm import DLRM, DLRMConfig
from encoders.zoo.wnd import WideAndDeep, WideAndDeepConfig

MODELS = ("wnd", "din", "dlrm", "bst")
USUAL = 164  # candidates, the median of the sizes below
POOL = 48  # queries of a model
_MEDIAN, _SPREAD, _MOST = 5.1, 0.2, 1_024  # lognormal, and the cap
_ROWS = 10_000


@dataclasses.dataclass(frozen=True)
class Query:
    model: str
    inputs: tuple[Tensor, ...]  # the last one is the candidates'

    @property
    def rows(self) -> int:
        return len(self.inputs[-1])


def repeated(one: Query) -> Query:
    """The same with the user's inputs once for each candidate."""
    return Query(one.model, (*(value.expand(one.rows, *value.shape[1:]) for value in one.inputs[:-1]), one.inputs[-1]))


def modules(seed: int) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    made = (WideAndDeep(WideAndDeepConfig()), DIN(DINConfig()), DLRM(DLRMConfig()), BST(BSTConfig()))
    return {name: module.eval() for name, module in zip(MODELS, made, strict=True)}


def query(name: str, rows: int, random: torch.Generator) -> Query:
    def ids(*shape: int) -> Tensor:
        return torch.randint(0, _ROWS, shape, generator=random)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def seen(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) > 0.1

    user: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "wnd": lambda: (ids(1, 18), numbers(1, 13)),
        "din": lambda: (ids(1, 4), ids(1, 250, 2), seen(1, 250)),
        "dlrm": lambda: (numbers(1, 13), ids(1, 6, 80)),
        "bst": lambda: (ids(1, 4), ids(1, 20, 2), seen(1, 20)),
    }
    item = {"wnd": (9,), "din": (2,), "dlrm": (2, 80), "bst": (2,)}[name]
    return Query(name, (*user[name](), ids(rows, *item)))


def pool(seed: int) -> dict[str, list[Query]]:
    random, sizes = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    rows = np.minimum(_MOST, np.maximum(2, sizes.lognormal(_MEDIAN, _SPREAD, POOL))).astype(int)
    return {name: [query(name, int(one), random) for one in rows] for name in MODELS}


def chosen(model: str, count: int, seed: int) -> list[tuple[str, int]]:
    """Model and place in the pool of each of so many queries; `mix` takes all models equally often."""
    random = np.random.default_rng(seed)
    names = MODELS if model == "mix" else (model,)
    which, places = random.integers(len(names), size=count), random.integers(POOL, size=count)
    return [(names[at], place) for at, place in zip(which.tolist(), places.tolist(), strict=True)]


SHAPES: dict[str, Callable[[float], float]] = {  # of the peak's rate, at a share of the time
    "pulse": lambda at: 1.0 if at % 0.25 < 0.1 else 0.25,
    "unimodal": lambda at: 0.25 + 0.75 * math.exp(-(((at - 0.5) / 0.18) ** 2)),
    "bimodal": lambda at: 0.25 + 0.75 * max(math.exp(-(((at - where) / 0.1) ** 2)) for where in (0.28, 0.72)),
    "steady": lambda at: 1.0,
}


def arrivals(shape: str, peak: float, seconds: float, seed: int) -> list[float]:
    """Moments (s) of an inhomogeneous Poisson process whose highest rate is `peak` a second."""
    random = np.random.default_rng(seed)
    candidates = np.sort(random.uniform(0, seconds, random.poisson(peak * seconds)))
    kept = random.random(len(candidates)) < [SHAPES[shape](at / seconds) for at in candidates]
    return [float(at) for at in candidates[kept]]
