from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from encoders import lsh

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


def test_tier_edges_part_a_broad_sample_evenly() -> None:
    sample = np.random.default_rng(0).integers(0, 129, 10_000).astype(np.int32)
    counts = lsh.tier_counts(sample[None, :], lsh.tier_edges(sample, 8, 128))[0]
    assert counts.min() > 1_000
    assert counts.max() < 1_500


def test_refusals() -> None:
    with pytest.raises(ValueError, match="whole bytes"):
        lsh.projection(4, 12, 0)
    with pytest.raises(ValueError, match="need more than"):
        lsh.tier_edges(np.zeros(3, np.int32), 40, 32)
