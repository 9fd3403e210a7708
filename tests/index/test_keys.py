from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from index.keys import digest_of, keys_of, keys_of_ints, siphash64_words, siphash128

# From the reference implementation (vectors.h): SipHash-2-4-128 of 0, 1, ..., n-1 under the key 00 01 ... 0f.
REFERENCE_128 = {
    0: "a3817f04ba25a8e66df67214c7550293",
    1: "da87c1d86b99af44347659119b22fc45",
    2: "8177228da4a45dc7fca38bdef60affe4",
    15: "5493e99933b0a8117e08ec0f97cfc3d9",
    63: "5150d1772f50834a503e069a973fbd7c",
}
REFERENCE_64_OF_24 = 0xB8AD50C6F649AF94
K0, K1 = np.frombuffer(bytes(range(16)), "<u8")


@pytest.mark.parametrize("length", REFERENCE_128)
def test_siphash128_reference_vectors(length: int) -> None:
    data = np.arange(80, dtype=np.uint8)
    shifted = np.concatenate([np.zeros(5, np.uint8), data])
    for array, start in ((data, 0), (shifted, 5)):
        low, high = siphash128(array, start, start + length, K0, K1)
        assert np.array([low, high], "<u8").tobytes().hex() == REFERENCE_128[length]


def test_siphash64_reference_vector() -> None:
    words = np.frombuffer(bytes(range(24)), "<u8")
    assert int(siphash64_words(*words, K0, K1)) == REFERENCE_64_OF_24


def canonical(text: str) -> bool:
    return text.isascii() and text.isdigit() and str(int(text)) == text and int(text) < 1 << 64


@given(
    st.lists(st.one_of(st.text(max_size=40), st.integers(-(1 << 66), 1 << 66).map(str), st.just("007")), max_size=20)
)
@example(["0", "00", "", "18446744073709551615", "18446744073709551616", "99999999999999999999", "-1", "+1", " 1", "٣"])
def test_decimal_ids_are_numbers_and_all_others_are_hashed(ids: list[str]) -> None:
    keys = keys_of(ids, b"key")
    assert keys.shape == (len(ids), 2)
    assert keys.dtype == np.uint64
    for text, (high, low) in zip(ids, keys.tolist(), strict=True):
        if canonical(text):
            assert (high, low) == (0, int(text))
        else:
            assert high != 0
    assert len(set(map(tuple, keys.tolist()))) == len(set(ids))
    for text, key in zip(ids, keys.tolist(), strict=True):
        assert keys_of([text], b"key").tolist() == [key]  # what stands beside it does not matter


@given(st.lists(st.integers(-(1 << 66), 1 << 66), max_size=20))
def test_an_integer_is_its_decimal_string(ids: list[int]) -> None:
    assert np.array_equal(keys_of(ids, b"key"), keys_of([str(one) for one in ids], b"key"))
    small = [one % (1 << 64) for one in ids]
    assert np.array_equal(keys_of(small, b"key"), keys_of_ints(np.array(small, np.uint64)))
    mixed = [str(one) if at % 2 else one for at, one in enumerate(ids)]
    assert np.array_equal(keys_of(ids, b"key"), keys_of(mixed, b"key"))


def test_the_hash_key_matters_to_hashed_ids_alone() -> None:
    one, other = keys_of(["a", "1"], b"one"), keys_of(["a", "1"], b"other")
    assert one[0].tolist() != other[0].tolist()
    assert one[1].tolist() == other[1].tolist()


@pytest.mark.parametrize("wrong", [None, 1.5, b"1", True])
def test_other_ids_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError):
        keys_of(["a", wrong], b"key")  # type: ignore[list-item]


@given(st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 3), max_size=10))
def test_digests_differ_by_every_word(rows: list[tuple[int, int, int]]) -> None:
    array = np.array(rows, np.uint64).reshape(-1, 3)
    digests = digest_of(array[:, :2], array[:, 2]).tolist()
    assert len(set(digests)) == len(set(rows))
    for (high, low, version), digest in zip(rows, digests, strict=True):
        assert digest == int(siphash64_words(*map(np.uint64, (high, low, version)), K0, K1))


def test_ten_thousand_ids_take_little_of_a_request() -> None:
    texts = [f"item-{at}" for at in range(10_000)]
    numbers = list(range(10_000))
    keys_of(texts, b"key")

    def best(ids: list[str] | list[int]) -> float:
        taken = []
        for _ in range(20):
            started = time.perf_counter()
            keys_of(ids, b"key")
            taken.append(time.perf_counter() - started)
        return min(taken)

    assert best(texts) < 0.004
    assert best(numbers) < 0.001
