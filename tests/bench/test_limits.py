"""What a processor's features say about its popcounts."""

from __future__ import annotations

import pytest

from infra.codegen import host
from tests.bench.limits import Limits, popcount_bits


@pytest.mark.parametrize(
    ("features", "bits"),
    [
        ("+sse2,+popcnt,+avx2,+avx512f,+avx512bitalg,+avx512vpopcntdq", 512),
        ("+avx2,-avx512bitalg,+avx512vpopcntdq", 512),
        ("+avx2,+avx512f,-avx512bitalg,-avx512vpopcntdq", 128),
        ("+fp-armv8,+neon", 256),
        ("+popcnt,-avx2", 64),
        ("", 64),
    ],
)
def test_popcount_bits_are_those_of_the_widest_feature(features: str, bits: int) -> None:
    assert popcount_bits(features) == bits


def test_fewer_bits_a_cycle_are_a_higher_limit() -> None:
    wide, narrow = (Limits(10.0, 3.0, 50.0, bits).score_ms(10_000, 192, 1_000, 128, 2_000) for bits in (512, 128))
    assert narrow["popcounts"] == pytest.approx(4 * wide["popcounts"])
    assert {name: narrow[name] for name in ("records", "multiply-adds")} == {
        name: wide[name] for name in ("records", "multiply-adds")
    }
    assert popcount_bits(host()[1]) in (64, 128, 256, 512)
