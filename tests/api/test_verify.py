"""What verification judges by, without a stack: deviations of rows, numbers, scores and their bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from api.generations import Generation
from api.replay import Comparison, Scored
from api.verify import NotVerifiedError, Numbers, _judge_scores, deviations
from encoders.bundle import seeded_bundle
from encoders.fold import EncodedItems, ItemFold
from index.arena import ArenaReader
from index.keys import keys_of
from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from infra.settings import Settings
from tests.host import CatalogueItem, catalogue
from tests.rows import batch_of


def rows_of(encoded: EncodedItems, layout: RowLayout) -> tuple[Any, Any]:
    count = len(encoded.joint)
    hot, cold = aligned_empty(count, layout.hot), aligned_empty(count, layout.cold)
    hot.view(np.uint8)[:], cold.view(np.uint8)[:] = 0, 0
    for name in ("joint", "bridge", "signature", "crosses"):
        hot[name] = getattr(encoded, name)
    for name in ("vector", "attributes"):
        cold[name] = getattr(encoded, name)
    return hot, cold


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rows_are_what_the_bundle_makes_whatever_else_is_in_the_batch_and_any_damage_shows(
    tmp_path: Path, precision: Any
) -> None:
    bundle = seeded_bundle(tmp_path / "b", precision=precision)
    layout, items, fold = RowLayout.from_json(bundle.manifest.row), catalogue(500), ItemFold(bundle)
    hot, cold = rows_of(fold.encode(items), layout)
    for size in (1, 7, 500):
        part: list[CatalogueItem] = items[:size]
        worst, _ = deviations(hot[:size], cold[:size], fold.encode(part), layout)
        assert worst.max() < 0.75, "of what is allowed"
    wanted = fold.encode(items)

    def damaged(column: str, change: Callable[[Any, Any], object]) -> tuple[Any, str]:
        one, other = hot.copy(), cold.copy()
        change(one, other)
        worst, column_of = deviations(one, other, wanted, layout)
        assert (np.delete(worst, 3) < 1).all()
        return worst[3], column_of[3]

    little = {"fp32": 1e-4, "fp16": 1e-2}[precision]
    for column, change in (
        ("joint", lambda one, _: one["joint"].__setitem__((3, 5), one["joint"][3, 5] + little * 5)),
        ("bridge", lambda one, _: one["bridge"].__setitem__((3, 0), np.nan)),
        ("vector", lambda _, other: other["vector"].__setitem__((3, 1), 1e4)),
        ("signature", lambda one, _: one["signature"].__setitem__((3, 0), one["signature"][3, 0] ^ 3)),
        ("crosses", lambda one, _: one["crosses"].__setitem__((3, 0), 77)),
        ("attributes", lambda _, other: other["attributes"].__setitem__((3, 0), 1e9)),
    ):
        worst, name = damaged(column, change)  # type: ignore[arg-type]
        assert (worst > 1, name) == (True, column)
    one_bit, _ = damaged("signature", lambda one, _: one["signature"].__setitem__((3, 0), one["signature"][3, 0] ^ 1))
    assert one_bit < 1


@pytest.mark.parametrize("count", [0, 1, 50, 3_000])
def test_a_sample_of_an_arena_is_of_live_rows_only_and_drawn_evenly(tmp_path: Path, count: int) -> None:
    bundle = seeded_bundle(tmp_path / "b")
    layout, items = RowLayout.from_json(bundle.manifest.row), catalogue(count + 10)
    hot, cold = rows_of(ItemFold(bundle).encode(items), layout)
    ids = [item.item_id for item in items]
    writer = N2OWriter(tmp_path / "n2o", layout, 1, b"key")
    try:
        writer.apply([(batch_of(ids, 0, hot, cold), 0)])
        gone = ids[:10]
        writer.apply([(batch_of(gone, len(ids), hot[:10], cold[:10], [9] * 10, deleted=10), 1)])
        arena, random = ArenaReader.open(tmp_path / "n2o", layout), np.random.default_rng(1)
        wanted = set(map(tuple, keys_of(ids[10:], b"key").tolist())) if count else set()
        assert set(map(tuple, arena.sample(100_000, random).tolist())) == wanted
        few = [set(map(tuple, arena.sample(200, random).tolist())) for _ in range(40)]
        assert all(len(one) == min(200, count) for one in few)
        assert all(one <= wanted for one in few)
        if count > 200:
            assert len(set.union(*few)) > 0.9 * count  # 1 - (1 - 200/3000)^40 = 0.94 of all
        generation = cast("Generation", SimpleNamespace(arena=arena, layout=layout))
        found = Numbers.of(generation, 100_000, random)
        assert (len(found.vector), len(found.joint), found.not_finite) == (count, count, 0)
        vector = np.linalg.norm(cold["vector"][10:].astype(np.float32), axis=1)
        np.testing.assert_allclose(np.sort(found.vector), np.sort(vector), rtol=1e-6)
        if count:
            deviation = hot["joint"][10:].astype(np.float64).std(axis=0).max()
            assert found.deviation == pytest.approx(deviation, rel=1e-6)
    finally:
        writer.close()


def test_scores_are_judged_by_the_bounds_of_the_settings() -> None:
    random = np.random.default_rng(1)
    drawn = random.normal(0, 1, 1_000)
    live = ((drawn - drawn.mean()) / drawn.std()).astype(np.float32)

    def judged(new: Any, **changes: float) -> str:
        found = Comparison()
        found.add(Scored(live, np.asarray(new, np.float32)))
        try:
            _judge_scores(dataclasses.replace(Settings(), **changes), found)  # type: ignore[arg-type]
        except NotVerifiedError as error:
            return str(error)
        return ""

    assert judged(live) == judged(-live) == judged(live + 9) == judged(live * 9) == judged(live / 9) == ""
    assert "11 standard deviations from" in judged(live + 11)
    assert "-11 standard deviations from" in judged(live - 11)
    assert judged(live + 11, verify_shift=12.0) == ""
    assert "spread 11 times as far" in judged(live * 11)
    assert "spread 0.0909 times as far" in judged(live / 11)
    assert "0% of the best 100" in judged(-live, verify_overlap=0.2)
    assert judged(live * 2, verify_overlap=1.0) == ""
