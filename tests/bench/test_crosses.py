"""Benchmark `crosses` trains what its names say, and its bytes per user are those of the tables."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
import pytest

from encoders.config import CROSS_TABLES, ModelConfig
from encoders.data import synthetic
from encoders.data.dataset import Dataset
from encoders.data.fingerprint import fingerprint
from encoders.evaluate import split_of
from encoders.features import FeatureSpec, cross_slots
from tests.bench import crosses
from tests.bench.crosses import EXACT, ITEM_CROSSES, NONE, ROWS, TRAINED, more_crosses, variants_of
from tests.bench.experiment import Source

WORLD = synthetic.Marketplace(users=40, items=120, examples=900, categories=6, brands=9, past=30)
SOURCE = Source("small", world=WORLD, change=more_crosses)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return SOURCE.open()[0]


def table(kind: str, rows: int = 16) -> ModelConfig:
    return dataclasses.replace(TRAINED, cross_table=kind, cross_rows=rows)


@pytest.mark.parametrize("quick", [False, True])
def test_a_variant_differs_from_the_exact_table_in_what_its_name_says(quick: bool) -> None:
    first, *others = variants_of(quick)
    base = first.options.config
    assert (first.name, base.cross_table) == (EXACT, "exact")
    assert base == dataclasses.replace(TRAINED, cross_table="exact")
    seen = set()
    for variant in others:
        options, config = variant.options, variant.options.config
        assert dataclasses.replace(options, config=base) == first.options
        if variant.name == NONE:
            assert config == dataclasses.replace(base, without=("sim",))
            continue
        kind, _, rows = variant.name.rpartition(" ")
        seen.add((kind, int(rows)))
        assert config == dataclasses.replace(base, cross_table=kind, cross_rows=int(rows))
    sizes = ROWS[:1] if quick else ROWS
    assert seen == {(kind, rows) for kind in CROSS_TABLES if kind != "exact" for rows in sizes}
    assert len(others) == len(seen) + 1


def test_crosses_are_added_to_the_same_data(data: Dataset) -> None:
    """Four of each item, which follow from its features, behind its own; all of them are kept."""
    plain = dataclasses.replace(SOURCE, change=None).open()[0]
    own_crosses = dataclasses.replace(data.items, crosses=plain.items.crosses)
    assert fingerprint(dataclasses.replace(data, items=own_crosses)) == fingerprint(plain)
    added: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for own, both, features in zip(plain.items.crosses, data.items.crosses, plain.items.features, strict=True):
        assert both[: len(own)] == own
        assert len(both) == len(set(both)) == len(own) + 4 <= ITEM_CROSSES
        told = features["category"], features["brand"], features["price_band"], features["words"][0]
        assert added.setdefault(tuple(both[len(own) :]), told) == told
    names = [{name for row in items.crosses for name in row} for items in (plain.items, data.items)]
    assert len(names[1]) > 3 * len(names[0])


def test_crosses_met_are_those_of_the_newest_behaviours_before_the_test_slice(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crosses, "LENGTH", 12)
    before, wanted = data.log.time < split_of(data).test, []
    pooled = FeatureSpec(crosses=(), cross_slots=17)
    for user in np.unique(data.log.user[before]):
        newest = data.log.item[before & (data.log.user == user)][-12:]
        names = sorted({name for item in newest for name in data.items.crosses[item]})
        wanted.append((len(names), len(set(cross_slots(pooled, names).tolist()))))
    exact, hashed = (sorted(column) for column in zip(*wanted, strict=True))
    assert sorted(crosses._met(SOURCE, table("exact"))) == exact
    assert sorted(crosses._met(SOURCE, table("hashed"))) == hashed
    assert max(hashed) <= 16 < max(exact)
    few = sorted(crosses._met(SOURCE, dataclasses.replace(table("exact"), crosses=1)))
    assert max(few) < max(exact)  # an item's first cross alone


def test_bytes_per_user_are_the_tables() -> None:
    """A row of G for every cross kept and one for the others (h f4 each), and a slot (u2) for every one kept."""
    met, row = [3, 10, 40, 200], 4 * TRAINED.width

    def of(kept: int) -> int:
        return (1 + kept) * row + 2 * kept

    each = [of(count) for count in met]
    assert crosses._bytes(table("exact"), met) == (statistics.median(each), max(each), of(65_535))
    for kind in ("frequent", "recent"):
        assert crosses._bytes(table(kind), met) == (statistics.median([of(10), of(16)]), of(16), of(16))
    assert crosses._bytes(table("hashed"), [2, 9, 16, 16]) == (statistics.median([of(9), of(16)]), of(16), of(16))
    assert crosses._bytes(table("sketch"), met) == (17 * row,) * 3  # whatever was met
    assert crosses._bytes(dataclasses.replace(table("exact"), without=("sim",)), met) == (row,) * 3


def test_more_rows_never_take_fewer_bytes() -> None:
    met = list(range(0, 600, 7))
    for kind in CROSS_TABLES[1:]:
        sizes = [crosses._bytes(table(kind, rows), met) for rows in ROWS]
        assert sizes == sorted(sizes)
        assert all(p50 <= most <= bound for p50, most, bound in sizes)
        assert sizes[-1][2] <= crosses._bytes(table("exact"), met)[2]
