"""Blocks: the round trip, the golden bytes, and that nothing but a block of this version and layout is read."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.layout import RowLayout
from index.n2o import FillProof, RowBatch
from streams import blocks
from streams.blocks import BlockError

LAYOUT = RowLayout(width=8, bridges=2, bits=16, dim=4, crosses=2, precision="fp16", attributes=("bid",))
GOLDEN = Path(__file__).parent / "golden"


def batch(n: int, *, layout: RowLayout = LAYOUT, fill: FillProof | None = None, seed: int = 0) -> RowBatch:
    random = np.random.default_rng(seed)
    hot, cold = np.zeros(n, layout.hot), np.zeros(n, layout.cold)
    hot["joint"] = random.normal(size=hot["joint"].shape)
    hot["signature"] = random.integers(0, 256, hot["signature"].shape)
    hot["crosses"] = random.integers(0, 65536, hot["crosses"].shape)
    cold["vector"] = random.normal(size=cold["vector"].shape)
    cold["version"] = np.arange(n)
    cold["event_time"] = 1_767_225_600_000
    return RowBatch(
        partition=3,
        covered=100 + n,
        ids=[f"ütem-{k}" for k in range(n)],
        versions=np.arange(n, dtype=np.uint64) + np.uint64(2**63),
        offsets=np.arange(n, dtype=np.int64) + 100,
        kinds=(np.arange(n) % 3).astype(np.uint8),
        hot=hot,
        cold=cold,
        attributes=[b"{}" if k % 2 else b'{"bid":1.5}' for k in range(n)],
        fill=fill,
    )


def assert_equal(left: RowBatch, right: RowBatch) -> None:
    for field in dataclasses.fields(RowBatch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**62),
            st.integers(0, 2),
            st.binary(max_size=30),
        ),
        max_size=20,
    ),
    st.none() | st.builds(FillProof, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    st.integers(-1, 2**62),
)
def test_round_trip(rows: list[tuple[str, int, int, int, bytes]], fill: FillProof | None, covered: int) -> None:
    columns = batch(len(rows), fill=fill)
    given_ = dataclasses.replace(
        columns,
        covered=covered,
        ids=[row[0] for row in rows],
        versions=np.array([row[1] for row in rows], np.uint64),
        offsets=np.array([row[2] for row in rows], np.int64),
        kinds=np.array([row[3] for row in rows], np.uint8),
        attributes=[row[4] for row in rows],
    )
    assert_equal(blocks.decode(blocks.encode(given_, LAYOUT), LAYOUT), given_)


def test_golden_bytes() -> None:
    """Written once by each version. If this fails, the format has changed: a new version and a new file, not a new
    golden.
    """
    given_ = batch(4, fill=FillProof(3, 0x1122334455667788))
    assert blocks.encode(given_, LAYOUT) == (GOLDEN / "block-2.bin").read_bytes()
    assert_equal(blocks.decode((GOLDEN / "block-2.bin").read_bytes(), LAYOUT), given_)
    older = blocks.decode((GOLDEN / "block-1.bin").read_bytes(), LAYOUT)
    assert_equal(older, dataclasses.replace(given_, kinds=np.array([0, 1, 0, 0], np.uint8)))
    patched = bytearray(blocks.encode(given_, LAYOUT))
    patched[4] = 1
    with pytest.raises(BlockError, match="kind"):
        blocks.decode(bytes(patched), LAYOUT)


def test_every_truncation_and_any_trailing_byte_is_refused() -> None:
    block = blocks.encode(batch(3, fill=FillProof(2, 1)), LAYOUT)
    for length in range(len(block)):
        with pytest.raises(BlockError):
            blocks.decode(block[:length], LAYOUT)
    with pytest.raises(BlockError, match="trailing"):
        blocks.decode(block + b"\0", LAYOUT)


@pytest.mark.parametrize(
    ("place", "bytes_", "reason"),
    [
        (0, b"FRBL", "not a block"),
        (4, struct.pack("<H", 3), "version 3"),
        (4, struct.pack("<H", 0), "version 0"),
        (6, struct.pack("<H", 2), "flags"),
        (6, struct.pack("<H", 0), "flags"),  # a proof without the flag that announces it
        (16, struct.pack("<i", -1), "out of range"),
        (20, struct.pack("<I", 2**32 - 1), "truncated"),
        (24, struct.pack("<q", -2), "out of range"),
    ],
)
def test_a_wrong_head_is_refused(place: int, bytes_: bytes, reason: str) -> None:
    block = bytearray(blocks.encode(batch(3, fill=FillProof(2, 1)), LAYOUT))
    block[place : place + len(bytes_)] = bytes_
    with pytest.raises(BlockError, match=reason):
        blocks.decode(bytes(block), LAYOUT)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_damage_is_refused_or_read_as_rows_but_never_crashes(place: int, damage: bytes) -> None:
    block = bytearray(blocks.encode(batch(3), LAYOUT))
    place %= len(block)
    block[place : place + len(damage)] = damage[: len(block) - place]
    try:
        found = blocks.decode(bytes(block), LAYOUT)
    except BlockError:
        return
    assert len(found.ids) == len(found.hot) == len(found.attributes)


def test_rows_of_another_layout_are_refused_both_ways() -> None:
    other = dataclasses.replace(LAYOUT, precision="fp32")
    with pytest.raises(BlockError, match="another layout"):
        blocks.decode(blocks.encode(batch(1), LAYOUT), other)
    with pytest.raises(BlockError, match="another layout"):
        blocks.encode(batch(1), other)
    renamed = dataclasses.replace(LAYOUT, attributes=("price",))  # same bytes per row, another meaning
    with pytest.raises(BlockError, match="another layout"):
        blocks.decode(blocks.encode(batch(1), LAYOUT), renamed)


@given(st.integers(0, 40), st.integers(1, 3000))
def test_pieces_make_the_whole_and_keep_to_the_size(n: int, max_bytes: int) -> None:
    whole = batch(n, fill=FillProof(1, 2))
    pieces = list(blocks.split(whole, LAYOUT, max_bytes))
    assert [text for piece in pieces for text in piece.ids] == whole.ids
    for name in ("versions", "offsets", "kinds", "hot", "cold"):
        assert b"".join(getattr(piece, name).tobytes() for piece in pieces) == getattr(whole, name).tobytes()
    for piece in pieces[:-1]:
        assert piece.covered == piece.offsets[-1]
        assert piece.fill is None
    assert (pieces[-1].covered, pieces[-1].fill) == (whole.covered, whole.fill)
    for piece in pieces:
        assert len(piece.ids) <= 1 or len(blocks.encode(piece, LAYOUT)) <= max_bytes


def test_the_largest_accepted_item_fits_into_one_message() -> None:
    layout = RowLayout(width=1024, bits=1024, dim=1024, precision="fp32")
    one = dataclasses.replace(batch(1, layout=layout), attributes=[b"x" * (512 << 10)])
    assert len(blocks.encode(one, layout)) < 1_000_000


def test_columns_of_different_length_are_a_defect() -> None:
    with pytest.raises(BlockError, match="differ in length"):
        blocks.encode(dataclasses.replace(batch(2), attributes=[b""]), LAYOUT)
