"""Benchmark `head_precision`: what the head's layers in bf16 or int8 do to scores and to the best 100, on real data.

AIF is trained on MovieLens 100K; requests of the test slice score every film that is there. The layers behind the first
one are then run once more as the processor's narrower multiply-adds would: bf16 factors with fp32 sums (VDPBF16PS), or
int8 factors with a step per output and per candidate and exact sums (VPDPBUSD). The narrow form may be served where at
least 99.9 % of the best 100 stay; `max_error` is the largest difference of a score, and stands beside the scores'
standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from encoders.data.source import open_dataset
from encoders.evaluate import score_items, split_of
from encoders.train import TrainOptions, fit
from tests.bench.experiment import ml_100k
from tests.bench.report import Report

BEST = 100
REQUESTS = 1_000
_TOGETHER = 16


def bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def int8(values: Tensor) -> Tensor:
    """In 127 steps to the largest of each row."""
    step = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (values / step).round() * step


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # of weights, of inputs
    "bf16": (bf16, bf16),
    "bf16 weights alone": (bf16, lambda x: x),
    "int8": (int8, int8),
    "int8 weights alone": (int8, lambda x: x),
}


class Narrow(nn.Module):
    """A linear layer whose factors are rounded; sums are fp32."""

    def __init__(self, layer: nn.Linear, form: str) -> None:
        super().__init__()
        weights, self._inputs = FORMS[form]
        self.weight, self.bias = weights(layer.weight.detach()), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self._inputs(x), self.weight, self.bias)


def stay(exact: np.ndarray, other: np.ndarray, k: int) -> np.ndarray:
    """f8[B]: share of the best k of each row of `exact` [B, K] that are among the best k of `other`'s."""
    first, second = (np.argpartition(-scores, k - 1, axis=1)[:, :k] for scores in (exact, other))
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(first, second, strict=True)])


def run(seed: int, quick: bool) -> None:
    report = Report("head_precision", seed, quick)
    data = open_dataset(ml_100k())
    fitted = fit(data, TrainOptions(seed=seed, epochs=2 if quick else 60))
    batches = fitted.batches(data)
    split = split_of(data)
    groups = batches.groups(split.test, split.end)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(groups))[: 50 if quick else REQUESTS])
    items = np.flatnonzero(data.items.added <= split.test)

    def scores() -> np.ndarray:
        parts = [groups.select(chosen[at : at + _TOGETHER]) for at in range(0, len(chosen), _TOGETHER)]
        return np.concatenate(
            [
                score_items(fitted.model, batches, part, np.broadcast_to(items, (len(part), len(items))))
                for part in parts
            ]
        )

    exact, layers = scores(), fitted.model.head
    assert isinstance(layers, nn.ModuleList)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    report.figure("requests", len(chosen), "")
    report.figure("candidates", len(items), "")
    report.figure("score_std", float(exact.std()), "logit")
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        fitted.model.head = nn.ModuleList(Narrow(layer, form) for layer in linear)
        narrow = scores()
        kept = stay(exact, narrow, BEST)
        rows.append(
            {
                "form": form,
                "max_error": float(np.abs(narrow - exact).max()),
                "rms_error": float(np.sqrt(np.mean((narrow - exact) ** 2))),
                "best_100_stay": float(kept.mean()),
                "least_of_a_request": float(kept.min()),
            }
        )
    report.table("forms", rows)
    for row in rows:
        name = row["form"].replace(" ", "_")
        report.figure(f"{name}_max_error", row["max_error"], "logit")
        report.figure(f"{name}_best_100_stay", row["best_100_stay"], "")
    report.finish(lambda canvas: _draw(canvas, rows))


def _draw(canvas: Any, rows: list[dict[str, Any]]) -> None:
    axes = canvas.subplots()
    axes.bar([row["form"] for row in rows], [100 * (1 - row["best_100_stay"]) for row in rows])
    axes.axhline(0.1, linestyle="--", color="grey")
    axes.set_ylabel("of the best 100 lost, %")
