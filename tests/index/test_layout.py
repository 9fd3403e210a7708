from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.layout import LayoutError, RowLayout, aligned_empty

layouts = st.builds(
    RowLayout,
    width=st.integers(1, 300),
    bridges=st.integers(1, 40),
    bits=st.integers(1, 64).map(lambda eighth: 8 * eighth),
    dim=st.integers(1, 300),
    crosses=st.integers(1, 20),
    precision=st.sampled_from(["fp16", "fp32"]),
    attributes=st.lists(st.text(max_size=5), unique=True, max_size=5).map(tuple),
)


def test_the_default_hot_record_is_three_cache_lines() -> None:
    layout = RowLayout()
    assert layout.hot.itemsize == 192
    offsets = {name: (field[0].itemsize, field[1]) for name, field in layout.hot.fields.items()}  # type: ignore[union-attr]
    assert offsets == {
        "joint": (128, 0),
        "bridge": (32, 128),
        "signature": (16, 160),
        "slot_version": (4, 176),
        "crosses": (12, 180),
    }


@given(layouts)
def test_records_are_whole_lines_and_fields_aligned_and_apart(layout: RowLayout) -> None:
    for kind in (layout.hot, layout.cold):
        assert kind.itemsize % 64 == 0
        end = 0
        for field, offset, *_ in kind.fields.values():  # type: ignore[union-attr]
            assert offset >= end
            assert offset % field.base.itemsize == 0
            end = offset + field.itemsize
        assert end <= kind.itemsize < end + 64


@given(layouts, layouts)
def test_json_gives_the_same_layout_and_fingerprints_tell_layouts_apart(one: RowLayout, other: RowLayout) -> None:
    assert RowLayout.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert (one.fingerprint() == other.fingerprint()) == (one == other)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"bits": 12},
        {"bits": "128"},
        {"precision": "fp64"},
        {"attributes": ["a", "a"]},
        {"crosses": True},
        {"more": 1},
    ],
)
def test_what_makes_no_row_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        RowLayout.from_json({**RowLayout().to_json(), **change})


@given(st.integers(0, 1000))
def test_aligned_empty_is_aligned(count: int) -> None:
    array = aligned_empty(count, RowLayout().hot)
    assert array.shape == (count,)
    assert array.ctypes.data % 64 == 0 or count == 0
    assert array.dtype == RowLayout().hot
    assert isinstance(array, np.ndarray)


def test_the_layout_of_a_manifest(tmp_path: Path) -> None:
    path, layout = tmp_path / "manifest.json", RowLayout(width=32, attributes=("bid",))
    with pytest.raises(FileNotFoundError):
        RowLayout.of_manifest(path)
    path.write_text(json.dumps({"row": layout.to_json()}))
    assert RowLayout.of_manifest(path) == layout
    for wrong in ("{", "[]", "{}", '{"row": 5}', '{"row": {"width": 1}}', "\xff"):
        path.write_text(wrong, encoding="latin-1")
        with pytest.raises(LayoutError):
            RowLayout.of_manifest(path)
