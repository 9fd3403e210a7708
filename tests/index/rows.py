"""What tests of stores share: rows whose every byte follows from their key and version, so that a torn or foreign one
shows; a reader beside a writer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.histories import HistoriesReader, HistoriesWriter
from index.keys import digest_of
from index.layout import RowLayout, aligned_empty

LAYOUT = RowLayout()
SLOT_VERSION_WORD = 22  # of the default hot record, in 8-byte words; its upper half is crosses
COLD_WORDS = 16  # of the default cold record: the vector


def made(keys: NDArray[np.uint64], versions: NDArray[np.uint64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(hot, cold) of the default layout. Word 0 of a hot record is its version."""
    hot, cold = aligned_empty(len(keys), LAYOUT.hot), aligned_empty(len(keys), LAYOUT.cold)
    cold.view(np.uint8)[:] = 0
    digests = digest_of(keys, versions)
    hot_words = hot.view(np.uint64).reshape(len(keys), 24)
    hot_words[:] = digests[:, None] + np.arange(24, dtype=np.uint64)
    hot_words[:, 0] = versions
    cold.view(np.uint64).reshape(len(keys), 24)[:, :COLD_WORDS] = digests[:, None] - np.arange(16, dtype=np.uint64)
    cold["version"] = cold["event_time"] = versions
    return hot, cold


def hot_faults(keys: NDArray[np.uint64], hot: NDArray[Any]) -> int:
    """How many hot records are not exactly those of their key and of the version they name."""
    words = hot.view(np.uint64).reshape(len(hot), 24)
    wanted, _ = made(keys, np.ascontiguousarray(words[:, 0]))
    wanted_words = wanted.view(np.uint64).reshape(len(hot), 24).copy()
    got = words.copy()
    for array in (got, wanted_words):
        array[:, SLOT_VERSION_WORD] >>= np.uint64(32)
    return int((got != wanted_words).any(axis=1).sum())


def cold_faults(keys: NDArray[np.uint64], cold: NDArray[Any]) -> int:
    """The same for cold records, but for their visible time."""
    _, wanted = made(keys, np.ascontiguousarray(cold["version"]))
    different = cold["vector"].view(np.uint16) != wanted["vector"].view(np.uint16)
    return int(different.any(axis=1).sum())


def int_keys(ids: Any) -> NDArray[np.uint64]:
    """Keys of integer ids, spread so that neighbours do not follow each other."""
    keys = np.zeros((len(ids), 2), np.uint64)
    keys[:, 0] = 7
    keys[:, 1] = np.asarray(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return keys


def reader_of(writer: HistoriesWriter) -> HistoriesReader:
    """On the writer's own environment: LMDB allows one per process."""
    reader = HistoriesReader.__new__(HistoriesReader)
    reader._env, reader._tables = writer._env, writer._tables
    return reader
