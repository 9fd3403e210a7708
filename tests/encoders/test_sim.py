"""Tables of a user's crosses: what each kind keeps, that it is served as it is trained, and how many bytes it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encoders.bundle import SAMPLE_SPEC, Bundle, BundleError, load_bundle, new_model, save_bundle
from encoders.config import ModelConfig
from encoders.crosses import kept_crosses, sketched
from encoders.features import FeatureSpec, SpecError
from encoders.fold import Behaviours, Head, ItemFold, UserFold, cross_bytes, join_scores, reference_scores
from tests.encoders.conftest import NOW, TINY, SomeItem, World

ROWS = 5
CONFIG = dataclasses.replace(TINY, crosses=3, cross_rows=ROWS, length=300)
POOLED = dataclasses.replace(SAMPLE_SPEC, crosses=(), cross_slots=ROWS + 1)


def items_of(crosses: Sequence[Sequence[str]]) -> list[SomeItem]:
    random = np.random.default_rng(4)
    return [SomeItem({}, random.standard_normal(12).round(4).tolist(), list(names)) for names in crosses]


def world_of(path: Path, config: ModelConfig, spec: FeatureSpec, items: list[SomeItem]) -> World:
    """A bundle of random weights, the default of absent crosses too."""
    model = new_model(config, spec, 1)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1.5).add_(torch.randn(weights.shape, generator=random), alpha=0.1)
    save_bundle(path, model, config, spec, "fp32")
    bundle = load_bundle(path)
    return World(bundle, items, ItemFold(bundle).encode(items))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """80 items over 23 crosses, three of which nearly every item has; by kind of table."""
    random = np.random.default_rng(9)
    names = [f"category:{k}" for k in range(20)]
    crosses = [
        [*random.choice(names, k % 3, replace=False).tolist(), f"brand:{random.integers(0, 3)}"] for k in range(80)
    ]
    items = items_of([*crosses[:70], *[[]] * 10])
    made: dict[str, World] = {}

    def make(kind: str) -> World:
        if kind not in made:
            spec = POOLED if kind == "hashed" else SAMPLE_SPEC
            config = dataclasses.replace(CONFIG, cross_table=kind)
            made[kind] = world_of(tmp_path_factory.mktemp(kind) / "bundle", config, spec, items)
        return made[kind]

    return make


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["exact", "frequent", "recent", "hashed"]),
    length=st.sampled_from([0, 1, 2, 3, 8, 40, 200]),
    seed=st.integers(0, 3),
)
def test_every_table_is_served_as_it_is_trained(
    world: Callable[[str], World], kind: str, length: int, seed: int
) -> None:
    w = world(kind)
    behaviours = w.behaviours(np.random.default_rng([seed, length]), length, later=2)
    block = UserFold(w.bundle).block(None, behaviours, NOW)
    wanted = reference_scores(w.bundle, None, behaviours, w.items, NOW)
    np.testing.assert_allclose(join_scores(block, Head.of(w.bundle), w.rows), wanted, atol=1e-5)

    config, met = w.bundle.manifest.config, len({int(slot) for slot in behaviours.crosses[:length].ravel() if slot})
    assert block.G.nbytes + block.cross_slots.nbytes == cross_bytes(config, met)
    if kind != "exact":
        assert len(block.cross_slots) <= ROWS
    assert len(set(block.cross_slots.tolist())) == len(block.cross_slots)


def expected(past: Behaviours, kind: str) -> list[int]:
    """The rule, in words of Python."""
    flat = past.crosses.tolist()
    newest = {slot: place for place, slots in enumerate(flat) for slot in slots if slot}
    count = {slot: sum(slot in slots for slots in flat) for slot in newest}
    by = {
        "frequent": lambda slot: (-count[slot], -newest[slot], slot),
        "recent": lambda slot: (-newest[slot], -count[slot], slot),
    }[kind]
    return sorted(sorted(newest, key=by)[:ROWS])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["frequent", "recent"]), length=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_capped_table_keeps_what_its_rule_says(
    world: Callable[[str], World], kind: str, length: int, seed: int
) -> None:
    w = world(kind)
    behaviours = w.behaviours(np.random.default_rng(seed), length)
    assert sorted(UserFold(w.bundle).block(None, behaviours, NOW).cross_slots.tolist()) == expected(behaviours, kind)


def test_users_of_a_batch_are_capped_apart() -> None:
    """Each user keeps as many as alone, whatever the others met."""
    config = dataclasses.replace(CONFIG, cross_table="frequent", cross_rows=3)
    count = torch.tensor([1, 2, 1, 9, 5, 5, 5, 5, 1, 1])
    newest = torch.tensor([0, 1, 2, 0, 13, 12, 12, 11, 14, 20])
    user = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 3])
    kept = kept_crosses(user, count, newest, config)
    assert kept.tolist() == [False, True, True, True, True, True, True, False, False, True]
    kept = kept_crosses(user, count, newest, dataclasses.replace(config, cross_table="recent"))
    assert kept.tolist() == [False, True, True, True, True, True, False, False, True, True]
    assert kept_crosses(user, count, newest, dataclasses.replace(config, cross_table="exact")).all()


def test_a_cross_that_does_not_fit_counts_as_never_met(world: Callable[[str], World]) -> None:
    """Same weights: an item all of whose crosses are dropped scores as one whose crosses the user never met."""
    exact, capped = world("exact"), world("frequent")
    behaviours = capped.behaviours(np.random.default_rng(1), 200)
    dropped = set(behaviours.crosses.ravel().tolist()) - {0} - set(expected(behaviours, "frequent"))
    kept_all = join_scores(UserFold(exact.bundle).block(None, behaviours, NOW), Head.of(exact.bundle), exact.rows)
    some = join_scores(UserFold(capped.bundle).block(None, behaviours, NOW), Head.of(capped.bundle), capped.rows)
    hit = np.isin(capped.rows.crosses, list(dropped)).any(axis=1)
    assert hit.any()
    np.testing.assert_allclose(some[~hit], kept_all[~hit], atol=1e-5)
    assert np.abs(some[hit] - kept_all[hit]).min() > 1e-5

    block = UserFold(capped.bundle).block(None, behaviours, NOW)
    renamed = np.where(np.isin(capped.rows.crosses, list(dropped)), 60_000, capped.rows.crosses).astype(np.uint16)
    strangers = dataclasses.replace(capped.rows, crosses=renamed)
    np.testing.assert_array_equal(join_scores(block, Head.of(capped.bundle), strangers), some)


def test_pooled_crosses_share_a_row_and_its_summary(world: Callable[[str], World]) -> None:
    w = world("hashed")
    assert w.rows.crosses.max() <= ROWS
    for item, slots in zip(w.items, w.rows.crosses, strict=True):
        assert len(set(slots.tolist()) - {0}) <= len(item.crosses)
    used = w.rows.crosses[w.rows.crosses > 0]
    assert set(used.tolist()) == set(range(1, ROWS + 1))  # 23 crosses meet in five rows


# The count sketch, which is trained and compared only ----------------------------------------------------------------


def with_a_sketch(rows: int, items: list[SomeItem], tmp_path: Path) -> tuple[World, Bundle]:
    """An exact world, and its weights under a count sketch."""
    w = world_of(tmp_path / f"exact{rows}", dataclasses.replace(CONFIG, cross_table="exact"), SAMPLE_SPEC, items)
    config = dataclasses.replace(CONFIG, cross_table="sketch", cross_rows=rows)
    model = new_model(config, SAMPLE_SPEC, 0)
    model.load_state_dict(w.bundle.model.state_dict())
    manifest = dataclasses.replace(w.bundle.manifest, config=config)
    return w, Bundle(manifest, model.eval(), "")


def test_a_wide_sketch_is_the_exact_table(tmp_path: Path) -> None:
    items = items_of([[f"category:{k % 7}"] for k in range(30)])
    w, sketch = with_a_sketch(60_000, items, tmp_path)
    behaviours = w.behaviours(np.random.default_rng(2), 25)
    found = reference_scores(sketch, None, behaviours, w.items, NOW)
    np.testing.assert_allclose(found, reference_scores(w.bundle, None, behaviours, w.items, NOW), atol=1e-4)


def test_a_sketch_is_the_mean_over_its_tables_of_signed_buckets() -> None:
    """Against the definition, cross by cross, with tables so small that crosses collide."""
    random = torch.Generator().manual_seed(3)
    keys = torch.tensor([1, 2, 5, 70, (1 << 16) + 2, (1 << 16) + 9])
    summary = torch.randn(6, 10, generator=random)
    wanted = torch.tensor([[[1, 70, 8]], [[2, 9, 0]]])
    row = torch.arange(2)[:, None, None] << 16
    found = sketched(keys, summary, row, wanted, 9)

    def place(slot: int, factor: int) -> tuple[int, int]:
        mixed = slot * factor % 2**32
        return (mixed >> 17) * 3 >> 15, 1 - 2 * (mixed >> 16 & 1)

    for user in range(2):
        for c in range(3):
            slot, total = int(wanted[user, 0, c]), torch.zeros(10)
            for factor in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D):
                bucket, sign = place(slot, factor)
                for key, row_of in zip(keys.tolist(), summary, strict=True):
                    theirs, other = place(key & 0xFFFF, factor)
                    if key >> 16 == user and theirs == bucket:
                        total += sign * other * row_of / 3
            torch.testing.assert_close(found[user, 0, c], total)


def test_a_sketch_is_not_served(tmp_path: Path, world: Callable[[str], World]) -> None:
    config = dataclasses.replace(CONFIG, cross_table="sketch")
    save_bundle(tmp_path / "bundle", new_model(config, SAMPLE_SPEC, 0), config, SAMPLE_SPEC)
    with pytest.raises(BundleError, match="sketch of the crosses cannot be served"):
        load_bundle(tmp_path / "bundle")
    manifest = dataclasses.replace(world("exact").bundle.manifest, config=config)
    with pytest.raises(BundleError, match="cannot be served"):
        UserFold(dataclasses.replace(world("exact").bundle, manifest=manifest))


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_by_default_whatever_the_user_met() -> None:
    default = ModelConfig()
    most = cross_bytes(default, 65_535)
    assert most == cross_bytes(default, default.cross_rows) <= 256 * 1024
    assert cross_bytes(default, 3) == 4 * 64 * 4 + 6
    grown = dataclasses.replace(default, cross_table="exact")
    assert cross_bytes(grown, 65_535) > 16_000_000
    assert cross_bytes(dataclasses.replace(default, cross_table="sketch"), 3) == (1 + default.cross_rows) * 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"cross_table": "tree"}, "table of crosses must be"), ({"cross_rows": 2}, "3 to 65535"),
     ({"cross_rows": 65_536}, "3 to 65535")],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_specs_bound_their_slots() -> None:
    assert FeatureSpec.from_json(POOLED.to_json()) == POOLED
    without = {name: value for name, value in SAMPLE_SPEC.to_json().items() if name != "cross_slots"}
    assert FeatureSpec.from_json(without) == SAMPLE_SPEC  # manifests from before there was a bound
    for slots in (1, 65_537):
        with pytest.raises(SpecError, match="slots"):
            dataclasses.replace(POOLED, cross_slots=slots)
    with pytest.raises(SpecError, match="do not leave a slot"):
        dataclasses.replace(SAMPLE_SPEC, cross_slots=100)
