"""Layers as functions made for their sizes: any number of rows, and each row's bits whatever rows stand beside it."""

from __future__ import annotations

import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from api.runtime import product
from infra import codegen

_AROUND = 3  # rows before and behind those that may be written


def run(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    (rows, inner), columns = x.shape, len(weight)
    place = torch.full((rows + 2 * _AROUND, columns), 77.0)
    out, packed = place[_AROUND : _AROUND + rows], product.packed(weight)
    function = product.product(inner, columns, relu)
    function(x.data_ptr(), packed.data_ptr(), bias.data_ptr(), out.data_ptr(), rows)
    assert (place[:_AROUND] == 77).all()
    assert (place[-_AROUND:] == 77).all()
    return out


def layer(rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(columns)


def check(rows: int, inner: int, columns: int, relu: bool) -> None:
    x, weight, bias = layer(rows, inner, columns)
    found = run(x, weight, bias, relu)
    wanted = x.double() @ weight.double().t() + bias
    torch.testing.assert_close(found, (wanted.relu() if relu else wanted).float(), atol=1e-4, rtol=1e-4)
    at = rows // 2
    assert torch.equal(run(x[at : at + 1].contiguous(), weight, bias, relu)[0], found[at])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.sampled_from([16, 17, 255, 256, 257, 600]),
    st.sampled_from([8, 16, 24, 32, 40, 56, 96]),
    st.booleans(),
)
def test_any_number_of_rows(rows: int, inner: int, columns: int, relu: bool) -> None:
    assert product.fits(inner, columns)
    check(rows, inner, columns, relu)


def test_more_rows_than_the_second_cache_has_room_for() -> None:
    check(1_000, 600, 96, relu=False)


def test_what_is_not_a_number_stays_so() -> None:
    x, weight, bias = layer(5, 16, 16)
    x[3, 2] = float("nan")
    found = run(x, weight, bias, relu=True)
    assert found[3].isnan().all()
    assert not found[[0, 1, 2, 4]].isnan().any()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="made for x86-64")
def test_machines_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "host", lambda: ("x86-64-v3", ""))
    product.product.cache_clear()
    try:
        for rows in (1, 5, 6, 7, 40, 1_000):
            check(rows, 257, 24, relu=True)
    finally:
        product.product.cache_clear()
