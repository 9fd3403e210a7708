from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.layout import RowLayout, aligned_empty
from index.row_codec import HEADER, RowCodecError, StoredRow, decode_records, decode_row, encode_rows

GOLDEN = Path(__file__).parent / "golden" / "row_v1.bin"
LAYOUT = RowLayout(width=3, bridges=2, bits=16, dim=5, crosses=2, attributes=("bid",))
I64 = st.integers(-(1 << 63), (1 << 63) - 1)


def golden_row() -> bytes:
    hot, cold = np.zeros(1, LAYOUT.hot), np.zeros(1, LAYOUT.cold)
    hot["joint"], hot["bridge"] = [0.5, -1.25, 3.0], [0.75, 0.25]
    hot["signature"], hot["slot_version"], hot["crosses"] = [0xA5, 0x01], 99, [7, 65535]
    cold["vector"], cold["attributes"] = [1, 2, 3, 4, -5], [1.5]
    cold["version"], cold["event_time"], cold["publish_time"] = 17, 1_000, 2_000
    cold["encode_time"], cold["visible_time"] = 3_000, 4_000
    (value,) = encode_rows(np.array([3]), np.array([123456789012]), hot, cold, [b'{"bid":1.5,"title":"T\xc3\xa9"}'])
    return value


def test_bytes_are_those_of_the_golden_file() -> None:
    assert golden_row() == GOLDEN.read_bytes()


def test_the_golden_file_is_read() -> None:
    value = GOLDEN.read_bytes()
    expected = StoredRow(17, 123456789012, 3, 1_000, 2_000, 3_000, 4_000, {"bid": 1.5, "title": "Té"})
    assert decode_row(value) == expected
    hot, cold = aligned_empty(1, LAYOUT.hot), aligned_empty(1, LAYOUT.cold)
    partitions, offsets = decode_records([value], hot, cold)
    assert (partitions.tolist(), offsets.tolist()) == ([3], [123456789012])
    assert hot["joint"].tolist() == [[0.5, -1.25, 3.0]]
    assert hot["signature"].tolist() == [[0xA5, 0x01]]
    assert hot["slot_version"].tolist() == [0]
    assert hot["crosses"].tolist() == [[7, 65535]]
    assert cold["vector"].tolist() == [[1, 2, 3, 4, -5]]
    assert cold["version"].tolist() == [17]


@given(
    st.lists(st.tuples(st.integers(0, 65535), I64, st.integers(0, (1 << 64) - 1), I64), min_size=1, max_size=5),
    st.integers(0, 1 << 32),
)
def test_what_goes_in_comes_out(rows: list[tuple[int, int, int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    hot, cold = aligned_empty(len(rows), LAYOUT.hot), aligned_empty(len(rows), LAYOUT.cold)
    hot.view(np.uint8)[:] = rng.integers(0, 256, hot.nbytes)
    cold.view(np.uint8)[:] = rng.integers(0, 256, cold.nbytes)
    partitions = np.array([row[0] for row in rows])
    offsets = np.array([row[1] for row in rows], np.int64)
    cold["version"] = np.array([row[2] for row in rows], np.uint64)
    cold["publish_time"] = np.array([row[3] for row in rows], np.int64)
    attributes = [json.dumps({"n": seed, "é": str(row[1])}).encode() for row in rows]
    values = encode_rows(partitions, offsets, hot, cold, attributes)
    for at, value in enumerate(values):
        row = decode_row(value)
        assert (row.partition, row.offset, row.version, row.publish_time) == rows[at]
        assert row.attributes == json.loads(attributes[at])
    got_hot, got_cold = aligned_empty(len(rows), LAYOUT.hot), aligned_empty(len(rows), LAYOUT.cold)
    got_partitions, got_offsets = decode_records(values, got_hot, got_cold)
    assert got_partitions.tolist() == partitions.tolist()
    assert got_offsets.tolist() == offsets.tolist()
    hot["slot_version"] = 0
    for name in LAYOUT.hot.names or ():
        assert got_hot[name].tobytes() == hot[name].tobytes()
    for name in LAYOUT.cold.names or ():
        assert got_cold[name].tobytes() == cold[name].tobytes()
    again = encode_rows(partitions, offsets, hot.copy(), cold.copy(), attributes)
    assert again == values  # whatever bytes lay between the fields


def test_other_bytes_are_refused() -> None:
    value = golden_row()
    hot, cold = aligned_empty(1, LAYOUT.hot), aligned_empty(1, LAYOUT.cold)
    newer = b"\x02" + value[1:]
    for wrong in (b"", value[: HEADER.itemsize - 1], newer):
        with pytest.raises(RowCodecError):
            decode_row(wrong)
    for wrong in (b"", newer, value[: HEADER.itemsize + 20]):
        with pytest.raises(RowCodecError):
            decode_records([wrong], hot, cold)
    other = RowLayout(width=99)
    with pytest.raises(RowCodecError):
        decode_records([value + b" " * 999], aligned_empty(1, other.hot), cold)
