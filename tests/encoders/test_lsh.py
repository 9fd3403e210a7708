"""Signatures: their algebra, their learning, and that every kind and width is served as it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from encoders import lsh
from encoders.bundle import SAMPLE_SPEC, Bundle, BundleError, load_bundle, load_model, new_model, save_bundle
from encoders.config import ModelConfig
from encoders.evaluate import split_of
from encoders.fold import Head, ItemFold, UserFold, join_scores, reference_scores
from encoders.model import AIF
from encoders.spec import material_of
from encoders.train import fit, silence
from index import kernels
from index.layout import RowLayout, aligned_empty
from tests.encoders.conftest import NOW, TINY, World, some_items
from tests.encoders.small import CONFIG, OPTIONS, small_data

bytes_of = hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.just(4)))


@given(a=bytes_of, b=bytes_of)
def test_matches_counts_equal_bits(a: np.ndarray, b: np.ndarray) -> None:
    found = lsh.matches(a, b)
    for i in range(len(a)):
        for j in range(len(b)):
            one, other = int.from_bytes(a[i].tobytes(), "little"), int.from_bytes(b[j].tobytes(), "little")
            assert found[i, j] == sum((one >> k & 1) == (other >> k & 1) for k in range(32))


@given(a=bytes_of, b=bytes_of)
def test_signs_give_the_matches_as_a_product(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal((32 + lsh.signs(a) @ lsh.signs(b).T) / 2, lsh.matches(a, b))


def test_bit_order_is_little() -> None:
    assert lsh.signs(np.array([[1, 0x80]], dtype=np.uint8))[0].tolist() == [1.0, *[-1.0] * 14, 1.0]
    embedding = np.array([[1.0, -1.0]], dtype=np.float32)
    projection = np.array([[1, -1, 0, 0, 0, 0, 0, -1], [0, 0, 1, -1, 1, 1, 1, 0]], dtype=np.float32)
    # projected: 1 -1 -1 1 -1 -1 -1 -1 -> bits 0 and 3
    assert lsh.signatures(embedding, np.zeros(2, np.float32), projection).tolist() == [[0b00001001]]


def test_centre_is_taken_off() -> None:
    projection = lsh.projection(6, 32, seed=1)
    embedding = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    centre = embedding.mean(axis=0)
    np.testing.assert_array_equal(
        lsh.signatures(embedding, centre, projection),
        lsh.signatures(embedding - centre, np.zeros(6, np.float32), projection),
    )


def test_similarity_follows_the_angle() -> None:
    """Share of equal bits = 1 - angle / pi, on average."""
    random = np.random.default_rng(3)
    a, b = random.standard_normal((200, 64)), random.standard_normal((200, 64))
    b = a + b * random.random((200, 1)) * 2
    bits = 2048
    packed = [
        lsh.signatures(x.astype(np.float32), np.zeros(64, np.float32), lsh.projection(64, bits, 0)) for x in (a, b)
    ]
    similarity = np.diag(lsh.matches(*packed)) / bits
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.abs(similarity - (1 - np.arccos(cosine) / np.pi)).max() < 0.06


@given(
    length=st.integers(0, 300),
    exact=st.integers(0, 40),
    most=st.integers(1, 100),
    size=st.sampled_from([1, 4, 8, 16]),
    kinds=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_a_thinned_window_counts_equal_signatures_to_within_one_weight(
    length: int, exact: int, most: int, size: int, kinds: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    window = random.integers(0, 256, (kinds, size), dtype=np.uint8)[random.integers(0, kinds, length)]
    found, weight = lsh.thinned(window, exact, most)
    older = max(0, length - exact)
    if older <= most:
        np.testing.assert_array_equal(found, window)
        assert weight == 1.0
        return
    np.testing.assert_array_equal(found[most:], window[older:])  # the newest are all there
    assert len(found) == most + exact
    assert weight * most == pytest.approx(older)
    if size <= 8:  # else their order is that of the first 64 bits
        for one in np.unique(window[:older], axis=0):
            there = (window[:older] == one).all(axis=1).sum()
            assert abs((found[:most] == one).all(axis=1).sum() * weight - there) <= weight + 1e-6


def test_a_long_window_is_served_by_a_sample(made: Callable[[ModelConfig], World]) -> None:
    w = made(config_of(64, window=6_000, length=6_000, short_window=16))
    behaviours = w.behaviours(np.random.default_rng(1), 6_000)
    block, head = UserFold(w.bundle).block({"age": 30}, behaviours, NOW), Head.of(w.bundle)
    assert block.lengths == (lsh.COUNTED + 16, 16)
    hot = aligned_empty(80, RowLayout.from_json(w.bundle.manifest.row).hot)
    for name in ("joint", "bridge", "signature", "crosses"):
        hot[name] = getattr(w.rows, name)
    tables = kernels.head_tables(head.T, head.edges, head.weights, head.biases)
    got, joined = (
        kernels.score(hot, kernels.user_tables(*block.arrays, narrow=False), tables),
        join_scores(block, head, w.rows),
    )
    np.testing.assert_allclose(got, joined, atol=2e-5)
    wanted = reference_scores(w.bundle, {"age": 30}, behaviours, w.items, NOW)
    assert 0 < np.abs(got - wanted).max() < 0.1 * wanted.std()
    for counts, window in zip(block.histograms(w.rows.signature, head.edges), (6_000, 16), strict=True):
        every = lsh.tier_counts(lsh.matches(w.rows.signature, behaviours.signatures[-window:]), head.edges)
        assert np.abs(counts.sum(axis=1) - window).max() <= len(head.edges)
        assert np.abs(counts - every).max() <= (0.03 * window if window > 16 else 0)


@given(
    sample=hnp.arrays(np.int32, st.tuples(st.integers(1, 3), st.integers(0, 9)), elements=st.integers(0, 32)),
    edges=st.lists(st.integers(1, 32), min_size=1, max_size=6, unique=True),
)
def test_tier_counts(sample: np.ndarray, edges: list[int]) -> None:
    edges.sort()
    wanted = np.zeros((len(sample), len(edges) + 1), dtype=np.int32)
    for row, values in enumerate(sample.tolist()):
        for value in values:
            wanted[row, sum(edge <= value for edge in edges)] += 1
    np.testing.assert_array_equal(lsh.tier_counts(sample, tuple(edges)), wanted)


@given(sample=hnp.arrays(np.int32, st.integers(0, 50), elements=st.integers(0, 32)), tiers=st.integers(2, 33))
def test_tier_edges_ascend_strictly_within_the_bits(sample: np.ndarray, tiers: int) -> None:
    edges = lsh.tier_edges(sample, tiers, bits=32)
    assert len(edges) == tiers - 1
    assert list(edges) == sorted(set(edges))
    assert edges[0] >= 1
    assert edges[-1] <= 32


def test_tier_edges_halve_a_broad_sample_again_and_again() -> None:
    sample = np.random.default_rng(0).integers(0, 513, 100_000).astype(np.int32)
    counts = lsh.tier_counts(sample[None, :], lsh.tier_edges(sample, 6, 512))[0]
    np.testing.assert_allclose(counts / len(sample), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125], rtol=0.1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="whole bytes"):
        lsh.projection(4, 12, 0)
    with pytest.raises(ValueError, match="need more than"):
        lsh.tier_edges(np.zeros(3, np.int32), 40, 32)


# Two bits per projection ----------------------------------------------------------------------------------------------

embeddings_of = hnp.arrays(np.float32, st.tuples(st.integers(2, 9), st.just(5)), elements=st.floats(-4, 4, width=16))


@given(embedding=embeddings_of, seed=st.integers(0, 5))
def test_unequal_bits_count_the_thresholds_between_two_items(embedding: np.ndarray, seed: int) -> None:
    centre, projection = embedding.mean(axis=0), lsh.projection(5, 32, seed, 2)
    assert projection.shape == (5, 16)
    limits = lsh.thresholds(embedding, centre, projection)
    packed = lsh.signatures(embedding, centre, projection, limits)
    level = ((embedding - centre) @ projection >= limits[:, None, :]).sum(axis=0)  # [n, 16]: thresholds reached
    apart = np.abs(level[:, None, :] - level[None, :, :]).sum(axis=2)
    np.testing.assert_array_equal(lsh.matches(packed, packed), 32 - apart)


def test_thresholds_part_the_items_into_thirds() -> None:
    embedding = np.random.default_rng(0).standard_normal((3_000, 8)).astype(np.float32) * 3 + 1
    centre, projection = embedding.mean(axis=0), lsh.projection(8, 16, 0, 2)
    limits = lsh.thresholds(embedding, centre, projection)
    share = lsh.signs(lsh.signatures(embedding, centre, projection, limits)).clip(0).mean(axis=0)
    np.testing.assert_allclose(share, np.repeat([2 / 3, 1 / 3], 8), atol=1e-3)


@given(embedding=embeddings_of, bits=st.sampled_from([16, 24, 1024]))
def test_products_of_directions_are_bits_times_the_cosine(embedding: np.ndarray, bits: int) -> None:
    centre = np.full(5, 0.3, dtype=np.float32)
    found = lsh.directions(embedding, centre, bits)
    length = np.linalg.norm(embedding - centre, axis=1)
    wanted = bits * ((embedding - centre) @ (embedding - centre).T) / (length[:, None] * length[None, :])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found @ found.T, wanted, atol=1e-4 * bits)
    assert np.isfinite(lsh.directions(centre[None, :], centre, bits)).all()


# Served and trained ---------------------------------------------------------------------------------------------------

WIDE = {16: (4, 8, 12), 64: (20, 32, 44), 256: (100, 128, 156), 512: (220, 256, 292)}  # tier edges by bits


def config_of(bits: int, **changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, bits=bits, tier_edges=WIDE[bits], **changes)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[ModelConfig], World]:
    """A bundle of random weights with its rows; two bits per projection get thresholds of the items' own."""

    def make(config: ModelConfig) -> World:
        model = new_model(config, SAMPLE_SPEC, 2)
        items = some_items(80, config.embedding_dim, 2)
        embedding = np.array([item.embedding for item in items], dtype=np.float32)
        random = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if name not in ("projection", "thresholds"):
                    weights.mul_(1.5).add_(torch.randn(weights.shape, generator=random), alpha=0.1)
            if model.thresholds is not None:
                limits = lsh.thresholds(embedding, model.centre.numpy(), model.projection.detach().numpy())
                model.thresholds.copy_(torch.from_numpy(limits))
        save_bundle(tmp_path / "bundle", model, config, SAMPLE_SPEC, "fp32")
        bundle = load_bundle(tmp_path / "bundle")
        return World(bundle, items, ItemFold(bundle).encode(items))

    return make


@pytest.mark.parametrize("lsh_kind", ["random", "learned"])
@pytest.mark.parametrize("bits_per_projection", [1, 2])
@pytest.mark.parametrize("bits", [16, 64, 256, 512])
def test_every_width_is_served_as_it_is_trained(
    made: Callable[[ModelConfig], World], bits: int, bits_per_projection: int, lsh_kind: str
) -> None:
    """Training form = NumPy join = compiled kernel, and a bit more or less changes the score."""
    w = made(config_of(bits, bits_per_projection=bits_per_projection, lsh=lsh_kind, dots=2))
    behaviours = w.behaviours(np.random.default_rng(bits), 40)
    block, head = UserFold(w.bundle).block({"age": 30}, behaviours, NOW), Head.of(w.bundle)
    wanted = reference_scores(w.bundle, {"age": 30}, behaviours, w.items, NOW)
    assert w.rows.signature.shape == (80, bits // 8)
    np.testing.assert_allclose(join_scores(block, head, w.rows), wanted, atol=1e-5)
    assert wanted.std() > 1e-2

    hot = aligned_empty(80, RowLayout.from_json(w.bundle.manifest.row).hot)
    for name in ("joint", "bridge", "signature", "crosses"):
        hot[name] = getattr(w.rows, name)
    user = kernels.user_tables(*block.arrays, narrow=False)
    tables = kernels.head_tables(head.T, head.edges, head.weights, head.biases)
    np.testing.assert_allclose(kernels.score(hot, user, tables), wanted, atol=2e-5)
    hot["signature"][:, -1] ^= 0x80
    assert np.abs(kernels.score(hot, user, tables) - wanted).min() > 1e-6


def test_signatures_that_learn_are_those_that_rows_get(made: Callable[[ModelConfig], World]) -> None:
    w = made(config_of(64, bits_per_projection=2, lsh="learned"))
    embedding = np.array([item.embedding for item in w.items], dtype=np.float32)
    signs = w.bundle.model.learning_signs(torch.from_numpy(embedding))
    np.testing.assert_array_equal(signs.numpy(), lsh.signs(w.rows.signature))


def test_projection_and_thresholds_learn_through_lsh_din() -> None:
    """The straight-through gradient draws items together whose bits should be equal, and none comes from SimTier."""
    config = config_of(64, lsh="learned", bits_per_projection=2)
    model = new_model(config, SAMPLE_SPEC, 0)
    assert isinstance(model.projection, torch.nn.Parameter)
    assert isinstance(model.thresholds, torch.nn.Parameter)
    random = torch.Generator().manual_seed(0)
    one, other = torch.randn(40, 12, generator=random), torch.randn(40, 12, generator=random)
    optimiser = torch.optim.SGD([model.projection, model.thresholds], lr=0.3)

    def equal_bits() -> torch.Tensor:
        return (model.learning_signs(one) * model.learning_signs(other)).sum(dim=1).mean()

    before = float(equal_bits().detach())
    for _ in range(20):
        optimiser.zero_grad()
        (-equal_bits()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert model.thresholds.grad is not None
    assert model.thresholds.grad.abs().sum() > 0
    assert float(equal_bits().detach()) > before + 5


@pytest.mark.parametrize("without", [(), ("lsh_din",), ("simtier",)])
def test_a_training_moves_the_projection_where_lsh_din_is_on(tmp_path: Path, without: tuple[str, ...]) -> None:
    """The trainer's kept weights hold a projection of their own, the bundle serves it, and evaluation uses it."""
    config = dataclasses.replace(CONFIG, lsh="learned", without=without, dots=0)
    options = dataclasses.replace(OPTIONS, config=config, epochs=1)
    data = small_data()
    fitted = fit(data, options, report=silence)
    start = lsh.projection(fitted.config.embedding_dim, config.bits, options.seed)
    moved = np.abs(fitted.model.projection.numpy() - start).max()
    assert moved > 1e-3 if "lsh_din" not in without else moved == 0
    save_bundle(tmp_path / "bundle", fitted.model, fitted.config, fitted.spec)
    bundle = load_bundle(tmp_path / "bundle")
    rows = ItemFold(bundle).encode(data.items.rows())
    np.testing.assert_array_equal(lsh.signs(rows.signature), fitted.batches(data).signs(np.arange(len(data.items.ids))))
    by_learning = bundle.model.learning_signs(torch.from_numpy(data.items.embeddings)).numpy()
    assert (by_learning != lsh.signs(rows.signature)).mean() < 1e-3  # torch and NumPy round at the very threshold


def test_measured_thresholds_and_their_edges_come_from_training() -> None:
    data = small_data()
    config = dataclasses.replace(CONFIG, bits_per_projection=2)
    material = material_of(data, split_of(data), config, seed=3)
    assert material.thresholds is not None
    model = fit(data, dataclasses.replace(OPTIONS, config=config, epochs=1), report=silence).model
    assert model.thresholds is not None
    np.testing.assert_array_equal(model.thresholds.numpy(), material.thresholds)
    projected = (data.items.embeddings[material.known] - material.centre) @ lsh.projection(128, 32, 3, 2)
    assert 0.6 < (projected >= material.thresholds[0]).mean() < 0.72


def test_exact_cosine_is_trained_and_evaluated_but_not_served(tmp_path: Path) -> None:
    data = small_data()
    config = dataclasses.replace(CONFIG, lsh="cosine", bits=512)
    fitted = fit(data, dataclasses.replace(OPTIONS, config=config, epochs=1), report=silence)
    batches, split = fitted.batches(data), split_of(data)
    batch = batches.batch(batches.groups(split.test, split.end).select(np.arange(3)), fitted.model)
    centred = data.items.embeddings - fitted.model.centre.numpy()
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    assert isinstance(fitted.model, AIF)
    meeting = fitted.model._meet(batch.users, batch.candidates)
    user, first, end = (int(column[0]) for column in (batch.groups.user, batch.groups.first, batch.groups.history))
    assert data.log.user[end - 1] == user
    cosine = float(unit[data.examples.item[first]] @ unit[data.log.item[end - 1]])
    assert float(meeting.matches[0, 0, -1]) == pytest.approx(512 * (1 + cosine) / 2, abs=0.05)

    save_bundle(tmp_path / "bundle", fitted.model, fitted.config, fitted.spec)
    assert load_model(tmp_path / "bundle").manifest.config.lsh == "cosine"
    with pytest.raises(BundleError, match="exact cosines cannot be served"):
        load_bundle(tmp_path / "bundle")
    loaded = load_model(tmp_path / "bundle")
    for fold in (ItemFold, UserFold):
        with pytest.raises(BundleError, match="cannot be served"):
            fold(Bundle(loaded.manifest, fitted.model, loaded.sha256))


def test_configs_that_do_not_fit_are_refused() -> None:
    for changes, message in (
        ({"lsh": "magic"}, "lsh must be one of"),
        ({"bits_per_projection": 3}, "1 or 2 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
