"""Ids become 128-bit keys here, for items in every store and on every request.

The key of the canonical decimal form of an integer k < 2^64 ("0", or digits without a leading zero) is (0, k) and costs
no hash; any other id gets SipHash-2-4-128 of its UTF-8 under the deployment's hash key, with a non-zero high word. So
the two kinds never meet, and nobody without the hash key can make two ids share a key.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

DIGEST_KEY = (0x0706050403020100, 0x0F0E0D0C0B0A0908)  # of row digests: fixed, all processes must agree on them


def keys_of(ids: Sequence[str | int], hash_key: bytes) -> NDArray[np.uint64]:
    """u8[n, 2] (high, low) of the ids; an int is the id of its decimal string. Raises TypeError on anything else."""
    kinds = set(map(type, ids))
    if not kinds <= {str, int}:
        raise TypeError(f"an id is a str or an int, not {sorted(kind.__name__ for kind in kinds - {str, int})}")
    if kinds == {int}:
        try:
            return keys_of_ints(np.frombuffer(array.array("Q", cast("Sequence[int]", ids)), np.uint64))
        except OverflowError:  # negative or above 64 bits: an id as any other string
            pass
    texts: Sequence[Any] = ids if kinds <= {str} else [str(one) for one in ids]
    data, offsets = _concatenated(texts)
    out = np.empty((len(ids), 2), np.uint64)
    low, high = _sip_key(hash_key)
    _keys(data, offsets, low, high, out)
    return out


def keys_of_ints(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """u8[n, 2] of integer ids u8[n]."""
    out = np.zeros((len(ids), 2), np.uint64)
    out[:, 1] = ids
    return out


def digest_of(keys: NDArray[np.uint64], versions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """u8[n]: siphash64(key.high, key.low, version) of each row; a partition's digest is their sum modulo 2^64."""
    out = np.empty(len(keys), np.uint64)
    _digests(np.ascontiguousarray(keys), np.ascontiguousarray(versions, np.uint64), out)
    return out


def _concatenated(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All texts' UTF-8 in one array, and where each begins (n + 1 offsets)."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    joined = "".join(texts)
    data = joined.encode()
    ascii_only = len(data) == len(joined)  # then characters are bytes
    lengths = map(len, texts) if ascii_only else map(len, map(str.encode, texts))
    np.cumsum(np.fromiter(lengths, np.int64, len(texts)), out=offsets[1:])
    return np.frombuffer(data, np.uint8), offsets


def _sip_key(hash_key: bytes) -> tuple[np.uint64, np.uint64]:
    """The two words of a SipHash key from a hash key of any length."""
    raw = hashlib.blake2b(hash_key, digest_size=16).digest()
    low, high = np.frombuffer(raw, "<u8")
    return low, high


@njit(cache=True, nogil=True, inline="always")
def _rotate(x: Any, bits: Any) -> Any:
    return (x << uint64(bits)) | (x >> uint64(64 - bits))


@njit(cache=True, nogil=True, inline="always")
def _round(v0: Any, v1: Any, v2: Any, v3: Any) -> Any:
    v0 += v1
    v1 = _rotate(v1, 13) ^ v0
    v0 = _rotate(v0, 32)
    v2 += v3
    v3 = _rotate(v3, 16) ^ v2
    v0 += v3
    v3 = _rotate(v3, 21) ^ v0
    v2 += v1
    v1 = _rotate(v1, 17) ^ v2
    v2 = _rotate(v2, 32)
    return v0, v1, v2, v3


@njit(cache=True, nogil=True)
def siphash128(data: Any, start: int, end: int, k0: Any, k1: Any) -> Any:
    """SipHash-2-4-128 of data[start:end]; returns (low, high) = the first and the last 8 bytes, little-endian."""
    v0 = uint64(0x736F6D6570736575) ^ k0
    v1 = uint64(0x646F72616E646F6D) ^ k1 ^ uint64(0xEE)
    v2 = uint64(0x6C7967656E657261) ^ k0
    v3 = uint64(0x7465646279746573) ^ k1
    length = end - start
    for at in range(start, end - 7, 8):
        word = uint64(0)
        for byte in range(8):
            word |= uint64(data[at + byte]) << uint64(8 * byte)
        v3 ^= word
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0 ^= word
    word = uint64(length & 0xFF) << uint64(56)
    tail = end - length % 8
    for byte in range(length % 8):
        word |= uint64(data[tail + byte]) << uint64(8 * byte)
    v3 ^= word
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0 ^= word
    v2 ^= uint64(0xEE)
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    low = v0 ^ v1 ^ v2 ^ v3
    v1 ^= uint64(0xDD)
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return low, v0 ^ v1 ^ v2 ^ v3


@njit(cache=True, nogil=True)
def siphash64_words(a: Any, b: Any, c: Any, k0: Any, k1: Any) -> Any:
    """SipHash-2-4 with 64 bits of output over the 24 bytes of three little-endian words."""
    v0 = uint64(0x736F6D6570736575) ^ k0
    v1 = uint64(0x646F72616E646F6D) ^ k1
    v2 = uint64(0x6C7967656E657261) ^ k0
    v3 = uint64(0x7465646279746573) ^ k1
    for word in (a, b, c, uint64(24) << uint64(56)):
        v3 ^= word
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0 ^= word
    v2 ^= uint64(0xFF)
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


@njit(cache=True, nogil=True)
def _decimal(data: Any, start: int, end: int) -> Any:
    """(True, k) when the bytes are the canonical decimal form of k < 2^64, else (False, 0)."""
    length = end - start
    if length == 0 or length > 20 or (length > 1 and data[start] == 48):
        return False, uint64(0)
    k = uint64(0)
    for at in range(start, end):
        if data[at] < 48 or data[at] > 57:
            return False, uint64(0)
        digit = uint64(data[at] - 48)
        if k > uint64(1844674407370955161) or (k == uint64(1844674407370955161) and digit > uint64(5)):
            return False, uint64(0)
        k = k * uint64(10) + digit
    return True, k


@njit(cache=True, nogil=True)
def _keys(data: Any, offsets: Any, k0: Any, k1: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        decimal, k = _decimal(data, offsets[i], offsets[i + 1])
        if decimal:
            out[i, 0] = uint64(0)
            out[i, 1] = k
        else:
            low, high = siphash128(data, offsets[i], offsets[i + 1], k0, k1)
            out[i, 0] = high if high != uint64(0) else uint64(1)
            out[i, 1] = low


@njit(cache=True, nogil=True)
def _digests(keys: Any, versions: Any, out: Any) -> None:
    k0, k1 = uint64(DIGEST_KEY[0]), uint64(DIGEST_KEY[1])
    for i in range(out.shape[0]):
        out[i] = siphash64_words(keys[i, 0], keys[i, 1], versions[i], k0, k1)
