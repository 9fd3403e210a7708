"""Tensor -> wire -> tensor, with every bit, for every datatype and shape."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from api import oip
from api.problems import ProblemError
from api.runtime.folder import DTYPES


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, so also NaN of all kinds, infinities and -0.0."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = math.prod(shape) * dtype.itemsize
    if dtype is torch.bool:
        raw = bytes(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    else:
        raw = draw(st.binary(min_size=size, max_size=size))
    return oip.of_bytes("x", shape, dtype, memoryview(raw))


def sent(tensor: Tensor, as_bytes: bool) -> tuple[oip.RequestInput, bytes]:
    """An output as another request's input."""
    made, part = oip.output_of("x", tensor, as_bytes)
    return msgspec.json.decode(msgspec.json.encode(made), type=oip.RequestInput), part


def same(one: Tensor, other: Tensor) -> bool:
    """Bits."""
    return one.shape == other.shape and one.dtype == other.dtype and oip.bytes_of(one) == oip.bytes_of(other)


@given(tensors())
def test_bytes_keep_every_bit(tensor: Tensor) -> None:
    one, part = sent(tensor, as_bytes=True)
    assert one.parameters == {"binary_data_size": len(part)}
    assert same(oip.of_bytes("x", one.shape, tensor.dtype, memoryview(part)), tensor)


@given(tensors(), st.booleans())
def test_numbers_keep_every_bit_that_json_has(tensor: Tensor, nested: bool) -> None:
    lost = tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    if lost or tensor.dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ProblemError, match="JSON has not"):
            oip.output_of("x", tensor, False)
        return
    one, part = sent(tensor, as_bytes=False)
    assert not part
    if nested and tensor.dim() and tensor.numel():
        one.data = msgspec.Raw(msgspec.json.encode(tensor.tolist()))
    assert same(oip.of_json(one, tensor.dtype), tensor)


def test_tensors_of_any_strides() -> None:
    base = torch.arange(6).reshape(2, 3)
    for tensor in (base.T, base[:, 1], base[:1, :1].expand(2, 2), torch.ones(1).as_strided([1], [0]), base[:0]):
        assert oip.bytes_of(tensor) == tensor.numpy().tobytes()


def read(data: str, dtype: torch.dtype, *shape: int) -> Any:
    return oip.of_json(oip.RequestInput("x", list(shape), "", {}, msgspec.Raw(data.encode())), dtype).tolist()


@pytest.mark.parametrize(
    ("data", "dtype", "shape", "why"),
    [
        ("[1, 2]", torch.int8, [3], "not those of its shape"),
        ("[[1, 2], [3]]", torch.int8, [2, 2], "not of one shape"),
        ("[[1, 2, 3], [4, 5, 6]]", torch.int8, [3, 2], "not those of its shape"),
        ("[[[1, 2]]]", torch.int8, [1, 2], "Expected"),
        ("[[1, 2], 3, 4]", torch.int8, [2, 2], "Expected"),
        ("[128]", torch.int8, [1], "beyond"),
        ("[-1]", torch.uint8, [1], "beyond"),
        ("[9223372036854775808]", torch.int64, [1], "beyond"),
        ("[1.5]", torch.int64, [1], "Expected `int`"),
        ("[true]", torch.int64, [1], "Expected `int`"),
        ("[1]", torch.bool, [1], "Expected `bool`"),
        ('["1"]', torch.float32, [1], "Expected `float`"),
        ("[null]", torch.float32, [1], "Expected `float`"),
        ("[1e39]", torch.float32, [1], "beyond"),
        ("[1e999]", torch.float64, [1], "out of range"),
        ("7", torch.int64, [1], "Expected `array`"),
        ("[1]", torch.float16, [1], "JSON has not"),
        ("[1]", torch.bfloat16, [1], "JSON has not"),
    ],
)
def test_numbers_that_are_not_the_tensors(data: str, dtype: torch.dtype, shape: list[int], why: str) -> None:
    with pytest.raises(ProblemError, match=why):
        read(data, dtype, *shape)


def test_both_forms_of_lists() -> None:
    assert read("[1, 2, 3, 4]", torch.int64, 2, 2) == [[1, 2], [3, 4]]
    assert read(" [ [1, 2], [3, 4]]", torch.int64, 2, 2) == [[1, 2], [3, 4]]
    assert read("[1, 2.5]", torch.float32, 2) == [1.0, 2.5]
    assert read("[[], []]", torch.float32, 2, 0) == [[], []]
    assert read("[]", torch.float32, 0, 3) == []
    assert read("[2]", torch.float64) == 2.0
