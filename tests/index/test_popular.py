"""HistoriesReader.popular against a counter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from index.histories import CHUNK, HistoriesWriter, StoredBehaviour
from index.keys import keys_of
from tests.index.rows import reader_of

KEY = b"k"


@pytest.mark.parametrize("newest", [1, CHUNK - 1, CHUNK, CHUNK + 1, 10_000])
def test_items_are_counted_over_the_newest_of_every_user(tmp_path: Path, newest: int) -> None:
    random, wanted, offset = np.random.default_rng(0), Counter[tuple[int, int]](), 0
    writer = HistoriesWriter(tmp_path, 1_000, KEY)
    assert [len(column) for column in reader_of(writer).popular()] == [0, 0]
    for user in range(6):
        items = [
            ("i" if random.random() < 0.5 else "") + str(random.integers(30)) for _ in range(random.integers(1, 450))
        ]
        for at in range(0, len(items), 37):
            part = [
                StoredBehaviour(f"u{user}", item, f"e{user}-{place}", "click", place, place, 0, offset + place)
                for place, item in enumerate(items[at : at + 37], at)
            ]
            writer.apply(part, [], {})
        offset += len(items)
        wanted.update(map(tuple, keys_of(items[-newest:], KEY).tolist()))
    keys, counts = reader_of(writer).popular(newest)
    assert dict(zip(map(tuple, keys.tolist()), counts.tolist(), strict=True)) == wanted
    writer.close()
