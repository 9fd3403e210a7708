"""What each term of the synthetic marketplace is worth to its oracle, and how much of the oracle can be known: the
figures of docs/experiments/marketplace.md. No model is trained: the terms were sized by these figures alone.

GAUC is of the test slice (the last tenth of the examples in time), expected over the labels where it says so: a pair of
a user's impressions counts as often as the first is clicked and the second is not, p (1 - q).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders.data import oracle, synthetic
from encoders.data.dataset import Dataset, Examples
from encoders.data.oracle import HISTORY_TERMS, TERMS, WEIGHTS, Hidden
from encoders.data.synthetic import World
from encoders.metrics import gauc
from tests.bench.report import Report

SEEDS, QUICK_SEEDS = 5, 2
_GAP = 3_600_000  # ms between requests of a user, at least
_BINS = 12

F4 = npt.NDArray[np.float32]
F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]


def expected_gauc(score: npt.NDArray[np.floating], probability: F4, user: npt.NDArray[np.integer]) -> float:
    """GAUC with the labels' noise averaged out. Scores [n], click probabilities [n], users [n]."""
    order = np.argsort(user, kind="stable")
    total = weight = 0.0
    for places in np.split(order, np.flatnonzero(np.diff(user[order])) + 1):
        if len(places) > 1:
            s, p = score[places], probability[places].astype(np.float64)
            pairs = p[:, None] * (1 - p)
            np.fill_diagonal(pairs, 0)
            right = (s[:, None] > s) + 0.5 * (s[:, None] == s)
            total += len(places) * float((pairs * right).sum() / pairs.sum())
            weight += len(places)
    return total / weight


def is_test(examples: Examples) -> npt.NDArray[np.bool_]:
    """The last tenth of the examples in time."""
    found: npt.NDArray[np.bool_] = examples.time >= np.sort(examples.time)[int(len(examples) * 0.9)]
    return found


def requests(data: Dataset, wanted: npt.NDArray[np.bool_]) -> Iterator[tuple[slice, npt.NDArray[np.int32]]]:
    """Each page with an example that is wanted [n], as places of examples, with the items of the user's behaviours
    strictly before its first one.
    """
    examples, log = data.examples, data.log
    first = np.flatnonzero((np.diff(examples.user, prepend=-1) != 0) | (np.diff(examples.time, prepend=0) > _GAP))
    pages = zip(first.tolist(), [*first[1:].tolist(), len(examples)], strict=True)
    begin = data.begins()
    for at, end in pages:
        if wanted[at:end].any():
            mine = slice(begin[examples.user[at]], begin[examples.user[at] + 1])
            past = int(np.searchsorted(log.time[mine], examples.time[at]))
            yield slice(at, end), log.item[mine][:past]


def recomputed(data: Dataset, hidden: Hidden, wanted: npt.NDArray[np.bool_]) -> F4:
    """The terms [n, 6] from the published behaviours, by what is known or guessed of the items; 0 where not wanted."""
    terms = np.zeros((len(data.examples), len(TERMS)), dtype=np.float32)
    for page, history in requests(data, wanted):
        user, item = data.examples.user[page.start : page.start + 1], data.examples.item[page]
        padded = history if len(history) else np.array([-1], dtype=np.int32)
        terms[page] = oracle.terms_of(hidden, user, item[None], padded[None])[0]
    return terms


def category_counts(data: Dataset, hidden: Hidden, wanted: npt.NDArray[np.bool_]) -> F8:
    """[n, 2]: how many of the user's behaviours were in the item's category, and what share of them all."""
    out = np.zeros((len(data.examples), 2))
    for page, history in requests(data, wanted):
        newest = hidden.category[history[-oracle.WINDOW :]]
        count = np.bincount(newest, minlength=len(hidden.affinity[0]))[hidden.category[data.examples.item[page]]]
        out[page] = np.stack([count, count / max(1, len(newest))], axis=1)
    return out


def by_counts(term: F4, counts: F8) -> F8:
    """What count and share tell of a term [n]: its mean in each cell of a table over both, in quantiles. Fitted on what
    it is asked for, which flatters it.
    """
    cell = np.zeros(len(term), dtype=np.int64)
    for column in counts.T:
        edges = np.unique(np.quantile(column, np.linspace(0, 1, _BINS + 1)[1:-1]))
        cell = cell * _BINS + np.searchsorted(edges, column, side="right")
    size = np.bincount(cell)
    means: F8 = np.bincount(cell, weights=term) / np.maximum(size, 1)
    return means[cell]


def explained(term: npt.NDArray[np.floating], guess: npt.NDArray[np.floating], user: npt.NDArray[np.integer]) -> float:
    """Share of the term's variance within users that a guess explains."""
    _, who = np.unique(user, return_inverse=True)
    size = np.bincount(who)

    def within(values: F8) -> float:
        return float(((values - (np.bincount(who, weights=values) / size)[who]) ** 2).sum())

    return 1 - within(np.asarray(term, dtype=np.float64) - guess) / within(np.asarray(term, dtype=np.float64))


def observable(world: World) -> Hidden:
    """What linear readings of published features give of the items: places from embeddings, quality from rating, sales
    and brand, level from the price against the category's; all fitted on the truth.
    """
    data, hidden = world.data, world.oracle.hidden
    rows = [data.items.features[k] for k in range(len(data.items.ids))]
    brands = np.array([int(row["brand"].split()[1]) for row in rows])
    of_brand = np.bincount(brands, weights=hidden.quality) / np.maximum(1, np.bincount(brands))
    signs = np.array([[row["rating"], np.log1p(row["sales"])] for row in rows])
    log_price = np.log([row["price"] for row in rows])
    usual = np.bincount(hidden.category, weights=log_price) / np.maximum(1, np.bincount(hidden.category))
    return dataclasses.replace(
        hidden,
        position=_fitted(data.items.embeddings, hidden.position),
        quality=_fitted(np.column_stack([signs, of_brand[brands]]), hidden.quality),
        level=_fitted((log_price - usual[hidden.category])[:, None], hidden.level),
    )


def _fitted(signs: npt.NDArray[np.floating], truth: F4) -> F4:
    """Linear least squares."""
    inputs = np.column_stack([signs, np.ones(len(signs))]).astype(np.float64)
    return (inputs @ np.linalg.lstsq(inputs, truth, rcond=None)[0]).astype(np.float32)


def measure(world: World) -> dict[str, Any]:
    """The figures of one seed."""
    data, terms = world.data, world.oracle.terms
    test = is_test(data.examples)
    user, clicked, probability = data.examples.user[test], data.examples.clicked[test], data.examples.probability
    assert probability is not None
    truth, now = probability[test], terms[test]

    def both(logits: F8) -> tuple[float, float]:
        return gauc(logits, clicked, user.astype(np.int64)), expected_gauc(logits, truth, user)

    sampled, expected = both(oracle.logits(now))
    found: dict[str, Any] = {
        "gauc": sampled,
        "expected_gauc": expected,
        "click_rate": float(clicked.mean()),
        "behaviours": len(data.log),
    }
    counts = category_counts(data, world.oracle.hidden, test)[test]
    guessed = now.astype(np.float64)
    for k, name in enumerate(TERMS):
        without = both(oracle.logits(now, (name,)))
        found[f"{name}_drop"], found[f"{name}_expected_drop"] = sampled - without[0], expected - without[1]
        if name in HISTORY_TERMS:
            guess = by_counts(now[:, k], counts)
            found[f"{name}_by_counts"] = explained(now[:, k], guess, user)
            guessed[:, k] = guess
    found["by_counts_drop"] = expected - both(oracle.BIAS + guessed @ WEIGHTS)[1]
    seen = recomputed(data, observable(world), test)[test]
    found["observable_gauc"] = both(oracle.logits(seen))[1]
    for k, name in enumerate(TERMS):
        found[f"{name}_observable"] = explained(now[:, k], seen[:, k], user)
    return found


def run(seed: int, quick: bool) -> None:
    report = Report("marketplace", seed, quick)
    sizes = synthetic.Marketplace() if quick else synthetic.EXPERIMENT
    rows = []
    for one in range(seed, seed + (QUICK_SEEDS if quick else SEEDS)):
        began = time.perf_counter()
        world = synthetic.with_oracle(sizes, one)
        took = time.perf_counter() - began
        rows.append({"seed": one, **measure(world), "seconds": took})
    for name in rows[0]:
        if name != "seed":
            unit = "s" if name == "seconds" else "GAUC" if name.endswith(("gauc", "drop")) else ""
            report.figure(name, [row[name] for row in rows], unit)
    report.table("seeds", rows)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        drops = [[row[f"{name}_drop"] for row in rows] for name in TERMS]
        axes.bar(TERMS, np.median(drops, axis=1), color="0.8")
        for place, values in enumerate(drops):
            axes.plot([place] * len(values), values, "k.")
        axes.axhline(0.015, color="C3", linewidth=1)
        axes.set_ylabel("GAUC that the oracle loses without the term")

    report.finish(draw)
