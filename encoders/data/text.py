"""Deterministic text embeddings: hashed words with weights -> unit vectors.

They stand in for the multi-modal vectors that a real catalogue brings: equal words give near vectors, but nothing is
learned and no meaning is known. The same words give the same vector in every process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

DECIMALS = 5  # embeddings are rounded to these, so that published JSON and training data are the same numbers

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words of a text, in order."""
    return _WORD.findall(text.lower())


def embed(texts: Sequence[Mapping[str, float]], dim: int = 128) -> npt.NDArray[np.float32]:
    """Weighted words of each text -> [n, dim], L2-normalised; without words, the empty word's vector."""
    vectors: dict[str, npt.NDArray[np.float64]] = {}
    out = np.zeros((len(texts), dim))
    for row, text in enumerate(texts):
        for word, weight in (text or {"": 1.0}).items():
            if word not in vectors:
                vectors[word] = _vector(word, dim)
            out[row] += weight * vectors[word]
    return normalised(out)


def normalised(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Rows of length 1, rounded to DECIMALS."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    out: npt.NDArray[np.float32] = np.round(unit, DECIMALS).astype(np.float32)
    return out


def _vector(word: str, dim: int) -> npt.NDArray[np.float64]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(dim)
