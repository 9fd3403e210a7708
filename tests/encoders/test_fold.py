"""The served score equals the training form, and the training form equals the equations written out pair by pair."""

from __future__ import annotations

import dataclasses
import platform
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encoders import lsh, user_ir
from encoders.bundle import Bundle
from encoders.config import COMPONENTS
from encoders.features import FeatureError, ItemEncoder, ProfileEncoder
from encoders.fold import Behaviours, Head, ItemFold, UserFold, join_scores, reference_scores
from encoders.ranker import RECENCY_EDGES
from index import kernels
from index.layout import RowLayout, aligned_empty
from infra import codegen

NOW = 1_767_225_600_000
DAY = 86_400_000
PROFILES: list[Mapping[str, Any] | None] = [
    None,
    {},
    {"segment": "a", "age": 3},
    {"age": 1e30, "segment": ["x", "y"]},
]
LENGTHS = [0, 1, 2, 3, 4, 5, 6, 17, 51, 60, 1_000, 1_001, 1_300]  # around recent and window of both configs

relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(
    config=st.sampled_from(["tiny", "tiny", "variants", "default", "no hidden head"]),
    seed=st.integers(0, 3),
    length=st.sampled_from(LENGTHS),
    later=st.integers(0, 2),
    profile=st.sampled_from(PROFILES),
)
def test_folded_score_is_the_training_forms(
    world: Callable[..., Any], config: str, seed: int, length: int, later: int, profile: Mapping[str, Any] | None
) -> None:
    w = world(config, seed)
    behaviours = w.behaviours(np.random.default_rng([seed, length]), length, later)
    block = UserFold(w.bundle).block(profile, behaviours, NOW)
    served = join_scores(block, Head.of(w.bundle), w.rows)
    wanted = reference_scores(w.bundle, profile, behaviours, w.items, NOW)
    assert served.dtype == wanted.dtype == np.float32
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(served, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 1e-3  # the items do differ


@relaxed
@given(
    without=st.sets(st.sampled_from(COMPONENTS)),
    dots=st.sampled_from([0, 0, 1, 5]),
    bridge_dots=st.sampled_from([0, 0, 3]),
    length=st.sampled_from([0, 1, 5, 6, 17]),
    profile=st.sampled_from(PROFILES),
)
def test_folded_score_is_the_training_forms_whatever_is_switched_off(
    world: Callable[..., Any],
    without: set[str],
    dots: int,
    bridge_dots: int,
    length: int,
    profile: Mapping[str, Any] | None,
) -> None:
    config = dataclasses.replace(
        world("tiny").bundle.manifest.config, without=tuple(sorted(without)), dots=dots, bridge_dots=bridge_dots
    )
    w = world(config, 0)
    behaviours = w.behaviours(np.random.default_rng(length), length)
    block, head = UserFold(w.bundle).block(profile, behaviours, NOW), Head.of(w.bundle)
    served = join_scores(block, head, w.rows)
    np.testing.assert_allclose(served, reference_scores(w.bundle, profile, behaviours, w.items, NOW), rtol=0, atol=1e-5)
    # A folded block is zero where all that enters it is off, and not zero otherwise.
    assert block.C.any() == ("bea" not in without or bridge_dots > 0)
    assert block.D.any() == (("lsh_din" not in without and length > 0) or dots > 0)
    assert block.G.any() == ("sim" not in without)
    assert head.T.any() == ("simtier" not in without)
    sizes = tuple(0 if "simtier" in without else min(length, w) for w in (config.window, config.short_window))
    assert block.lengths == sizes
    assert len(block.window) == sizes[0]


@relaxed
@given(
    config=st.sampled_from(["tiny", "variants"]),
    seed=st.integers(0, 5),
    length=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 17]),
    profile=st.sampled_from(PROFILES),
)
def test_training_form_is_the_equations(
    world: Callable[..., Any], config: str, seed: int, length: int, profile: Mapping[str, Any] | None
) -> None:
    w = world(config, seed)
    behaviours = w.behaviours(np.random.default_rng([seed, length]), length)
    wanted = by_hand(w.bundle, profile, behaviours, w.items[:20], NOW)
    np.testing.assert_allclose(reference_scores(w.bundle, profile, behaviours, w.items[:20], NOW), wanted, atol=2e-5)


def by_hand(
    bundle: Bundle, profile: Mapping[str, Any] | None, past: Behaviours, items: list[Any], as_of: int
) -> np.ndarray:
    """DESIGN.md section 3 in float64, one pair at a time, without masks, padding or matrices of behaviours."""
    model, config = bundle.model, bundle.manifest.config
    past = past.until(as_of, config.length or config.window)
    p = {name: tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}
    columns = ItemEncoder(bundle.manifest.features, config.embedding_dim, config.crosses).columns(items)
    packed = lsh.signatures(columns.embedding, p["centre"].astype("f4"), p["projection"].astype("f4"))
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    past_bits = np.unpackbits(past.signatures, axis=1, bitorder="little")
    d, kinds = config.dim, bundle.manifest.features.cross_kinds

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    with torch.inference_mode():
        x = model.item_vectors(columns.features).numpy().astype(np.float64)
        known = ProfileEncoder(bundle.manifest.features).features([profile])
        prof = model.profile_tower(known)[0].numpy().astype(np.float64) if profile else p["no_profile"]
    tokens = []
    for vector, action, time in zip(past.vectors, past.actions.tolist(), past.times.tolist(), strict=True):
        bucket = sum(edge <= as_of - time for edge in RECENCY_EDGES)
        code = action if action < len(p["action_table"]) else 0
        tokens.append(vector + p["action_table"][code] + p["recency_table"][bucket])
    recent = tokens[-config.recent :]

    # User tower.
    seq = np.array([p["user_tower.null"], *recent])
    q, k, v = np.split(linear("user_tower.qkv", seq), 3, axis=1)
    heads = []
    for part in np.split(np.arange(d), config.heads):
        heads.append(softmax(q[:, part] @ k[:, part].T / np.sqrt(len(part))) @ v[:, part])
    h = norm("user_tower.norm1", seq + linear("user_tower.mix", np.concatenate(heads, axis=1)))
    h = norm("user_tower.norm2", h + linear("user_tower.ffn_out", np.maximum(linear("user_tower.ffn_in", h), 0)))
    focus = softmax(h @ linear("user_tower.query", prof) / np.sqrt(d)) @ h
    user = linear("user_tower.out", np.concatenate([prof, h.mean(axis=0), focus]))

    U = np.array([prof, *recent])
    V = softmax(config.bridge_temperature * p["bridges"] @ U.T / np.sqrt(d)) @ U
    scores = []
    for i in range(len(items)):
        equal = [int((bits[i] == other).sum()) for other in past_bits]
        affinity = config.bridge_temperature * p["bridges"] @ x[i] / np.sqrt(d)
        best = np.argsort(-affinity)[: config.bridge_top or config.bridges]
        w = np.zeros(config.bridges)
        w[best] = softmax(affinity[best])
        if tokens:
            din = sum(
                config.din_scale * (m / config.bits - config.din_shift) * e for m, e in zip(equal, tokens, strict=True)
            ) / len(tokens)
            counts = np.zeros(2 * config.tiers)
            for first, newest in ((0, equal[-config.window :]), (config.tiers, equal[-config.short_window :])):
                for m in newest:
                    counts[first + sum(edge <= m for edge in config.tier_edges)] += 1
            tier = sum(np.log1p(c) * e for c, e in zip(counts, p["tier_table"], strict=True))
        else:
            din, tier = p["no_din"], p["no_window"]
        rows = []
        for slot in columns.crosses[i][columns.crosses[i] != 0]:
            inside = [j for j in range(len(tokens)) if slot in past.crosses[j]]
            if inside:
                days = (as_of - past.times[inside[-1]]) / DAY
                mean = np.mean([tokens[j] for j in inside], axis=0)
                kind = kinds[slot - 1] if slot <= len(kinds) else 0
                rows.append(p["W1s"][kind] @ np.concatenate([[np.log1p(len(inside)), 1 / (1 + days)], mean]))
            else:
                rows.append(p["W1s"][0] @ p["no_cross"])
        z = p["b1"] + (np.mean(rows, axis=0) if rows else p["W1s"][0] @ p["no_cross"])
        for name, part in (("u", user), ("x", x[i]), ("b", w @ V), ("d", din), ("t", tier)):
            z += p[f"W1{name}"] @ part
        s = 2.0 * bits[i] - 1.0
        for name, item, scale in (("dots", s, config.bits**-0.5), ("bridge_dots", w, 1.0)):
            if getattr(config, name):
                Q = linear(f"{name}.query", user).reshape(getattr(config, name), len(item))
                z += p[f"{name}.W1"] @ (Q @ item) * scale
        for layer in range(len(config.head) + 1):
            z = linear(f"head.{layer}", np.maximum(z, 0))
        scores.append(z[0])
    return np.array(scores)


def test_half_precision_rows_stay_within_the_stated_bound(world: Callable[..., Any]) -> None:
    """As they are served: records of fp16, the history's rows as views of them, 16-bit look-up tables, the kernel."""
    worst_row = worst_all = 0.0
    for seed in range(4):
        w = world("default", seed)
        config, head = w.bundle.manifest.config, Head.of(w.bundle)
        layout = RowLayout(config.width, config.bridges, config.bits, config.dim, config.crosses, "fp16")
        hot = aligned_empty(len(w.items), layout.hot)
        for name in ("joint", "bridge", "signature", "crosses"):
            hot[name] = getattr(w.rows, name)
        tables = kernels.head_tables(head.T, head.edges, head.weights, head.biases)
        for length in (0, 1, 50, 1_000):
            exact = w.behaviours(np.random.default_rng([seed, length]), length)
            own, cold = np.zeros(length, layout.hot), np.zeros(length, layout.cold)
            own["signature"], own["crosses"], cold["vector"] = exact.signatures, exact.crosses, exact.vectors
            views = Behaviours(cold["vector"], own["signature"], own["crosses"], exact.actions, exact.times)
            block = UserFold(w.bundle).block({"age": 30}, views, NOW)
            served = kernels.score(hot, kernels.user_tables(*block.arrays, narrow=True), tables)
            rounded = dataclasses.replace(exact, vectors=exact.vectors.astype(np.float16).astype(np.float32))
            for behaviours, limit in ((rounded, 2e-3), (exact, 5e-3)):
                wanted = reference_scores(w.bundle, {"age": 30}, behaviours, w.items, NOW)
                error = float(np.abs(served - wanted).max())
                assert error < limit
                if behaviours is rounded:
                    worst_row = max(worst_row, error)
                else:
                    worst_all = max(worst_all, error)
    assert worst_row > 1e-5  # it is the fp16 error that is measured
    print(f"fp16 rows: {worst_row:.2e} against the same histories, {worst_all:.2e} against fp32 histories")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="made for x86-64")
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_machines_without_avx512_fold_the_same(
    world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: type[np.generic]
) -> None:
    """Code is made for a processor with AVX2."""
    w = world("default", 0)
    past = w.behaviours(np.random.default_rng(0), 1_000)
    past = dataclasses.replace(past, vectors=past.vectors.astype(kind))
    wanted = UserFold(w.bundle).block({"age": 30}, past, NOW)
    made = (user_ir.user, user_ir.crosses)
    monkeypatch.setattr(codegen, "host", lambda: ("x86-64-v3", ""))
    for one in made:
        one.cache_clear()
    try:
        found = UserFold(w.bundle).block({"age": 30}, past, NOW)
        assert [one.cache_info().misses for one in made] == [1, 1]
    finally:
        for one in made:
            one.cache_clear()
    np.testing.assert_array_equal(found.cross_slots, wanted.cross_slots)
    for name in ("P", "C", "D", "G"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"vectors": np.zeros((5, 3), np.float32)},
        {"signatures": np.zeros((5, 1), np.uint8)},
        {"crosses": np.zeros((5, 1), np.uint16)},
        {"actions": np.zeros(0, np.uint8)},
    ],
)
def test_columns_of_other_shapes_are_refused(world: Callable[..., Any], change: dict[str, Any]) -> None:
    w = world("default", 0)
    behaviours = dataclasses.replace(w.behaviours(np.random.default_rng(0), 5), **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        UserFold(w.bundle).block(None, behaviours, NOW)


def test_columns_of_other_types_are_converted(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    past = w.behaviours(np.random.default_rng(0), 7)
    other = dataclasses.replace(past, vectors=past.vectors.astype(np.float64), crosses=past.crosses.astype(np.int64))
    one, two = (UserFold(w.bundle).block(None, behaviours, NOW) for behaviours in (past, other))
    for name in ("P", "C", "D", "G", "cross_slots"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_what_the_generated_code_works_on_begins_at_cache_lines(world: Callable[..., Any]) -> None:
    fold = UserFold(world().bundle)
    assert {one.ctypes.data % 64 for one in (fold._weights, fold._room().scratch)} == {0}


def test_block_is_what_the_design_says(world: Callable[..., Any]) -> None:
    w = world("tiny", 1)
    behaviours = w.behaviours(np.random.default_rng(0), 9, later=2)
    block = UserFold(w.bundle, "g7").block(None, behaviours, NOW)
    config = w.bundle.manifest.config
    assert (block.generation, block.as_of) == ("g7", NOW)
    assert block.P.shape == (config.width,)
    assert block.C.shape == (config.bridges, config.width)
    assert block.D.shape == (config.bits, config.width)
    np.testing.assert_array_equal(block.window, behaviours.signatures[4:9])  # the newest 5 of the first 9
    assert block.lengths == (5, 2)
    slots = sorted({int(slot) for slot in behaviours.crosses[:9].ravel() if slot})
    assert sorted(block.cross_slots.tolist()) == slots
    assert block.G.shape == (len(slots) + 1, config.width)
    for array in (block.P, block.C, block.D, block.G, block.window, block.cross_slots):
        assert array.flags.c_contiguous
    assert UserFold(w.bundle).block(None, behaviours, NOW).generation == w.bundle.manifest.version


def test_behaviours_after_as_of_do_not_enter(world: Callable[..., Any]) -> None:
    w = world("tiny", 2)
    with_later = w.behaviours(np.random.default_rng(5), 7, later=3)
    fold = UserFold(w.bundle)
    one, other = fold.block(None, with_later, NOW), fold.block(None, with_later.until(NOW, 7), NOW)
    for name in ("P", "C", "D", "G", "window", "lengths"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert not np.array_equal(one.P, fold.block(None, with_later, NOW + 1).P)


def test_read_only_arrays_and_worker_threads(world: Callable[..., Any]) -> None:
    """The API passes views of mapped memory, from its worker threads; four threads share one UserFold."""
    w = world("default", 0)
    behaviours = w.behaviours(np.random.default_rng(1), 200)
    for field in dataclasses.fields(behaviours):
        getattr(behaviours, field.name).flags.writeable = False
    fold = UserFold(w.bundle)
    wanted = fold.block({"age": 20}, behaviours, NOW)
    found: list[Any] = []

    def work() -> None:
        found.extend(fold.block({"age": 20}, behaviours, NOW) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for block in found:
        np.testing.assert_array_equal(block.P, wanted.P)
        np.testing.assert_array_equal(block.D, wanted.D)


def test_one_bad_item_does_not_change_the_others(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    bad = dataclasses.replace(w.items[3], embedding=[1.0])
    encoded = ItemFold(w.bundle).encode([*w.items[:3], bad, *w.items[4:]])
    assert encoded.errors[3] == "embedding has 1 values, the bundle needs 12"
    assert [error for error in encoded.errors if error] == [encoded.errors[3]]
    others = np.arange(len(w.items)) != 3
    for name in ("joint", "bridge", "signature", "vector", "crosses"):
        np.testing.assert_allclose(getattr(encoded, name)[others], getattr(w.rows, name)[others], atol=1e-6)
        assert np.isfinite(getattr(encoded, name)).all()


def test_a_row_too_large_for_its_precision_is_an_error(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    huge = dataclasses.replace(w.items[0], embedding=[1e8] * 12)
    half = dataclasses.replace(w.bundle, manifest=dataclasses.replace(w.bundle.manifest, precision="fp16"))
    assert ItemFold(w.bundle).encode([huge]).errors == [None]
    assert ItemFold(half).encode([huge, w.items[0]]).errors == ["the encoded row does not fit fp16", None]
    infinite = dataclasses.replace(w.items[0], embedding=[3e38] * 128)
    assert ItemFold(world("default", 0).bundle).encode([infinite]).errors == ["the encoded row does not fit fp32"]


def test_empty_batch(world: Callable[..., Any]) -> None:
    encoded = ItemFold(world().bundle).encode([])
    assert encoded.joint.shape == (0, 16)
    assert encoded.errors == []
    assert reference_scores(world().bundle, None, world().behaviours(np.random.default_rng(0), 2), [], NOW).shape == (
        0,
    )


def test_a_profile_without_features_is_none(world: Callable[..., Any]) -> None:
    """As in a data set, whose users without features train the default (`Batches`)."""
    w = world("tiny", 0)
    past, fold = w.behaviours(np.random.default_rng(0), 4), UserFold(w.bundle)
    np.testing.assert_array_equal(fold.block({}, past, NOW).P, fold.block(None, past, NOW).P)
    assert not np.array_equal(fold.block({"age": 30}, past, NOW).P, fold.block(None, past, NOW).P)


def test_what_is_before_the_newest_length_behaviours_does_not_enter(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    past, fold, length = (
        w.behaviours(np.random.default_rng(0), 33),
        UserFold(w.bundle),
        w.bundle.manifest.config.longest,
    )
    whole, newest = fold.block(None, past, NOW), fold.block(None, past.until(NOW, length), NOW)
    for name in ("P", "C", "D", "G", "cross_slots"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(newest, name))
    assert not np.array_equal(whole.D, fold.block(None, past.until(NOW, length - 1), NOW).D)


def test_bad_profile_and_bad_item_are_feature_errors(world: Callable[..., Any]) -> None:
    w = world()
    nothing = w.behaviours(np.random.default_rng(0), 0)
    with pytest.raises(FeatureError, match="'age' is not a number"):
        UserFold(w.bundle).block({"age": "old"}, nothing, NOW)
    with pytest.raises(FeatureError, match="item 1: embedding is missing"):
        reference_scores(w.bundle, None, nothing, [w.items[0], dataclasses.replace(w.items[0], embedding=None)], NOW)
