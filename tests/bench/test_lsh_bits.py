"""Benchmark `lsh_bits` trains what its lines say: equal bits are equal bytes, and nothing else differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from encoders.baselines import build
from encoders.config import ModelConfig, Sizes
from index.layout import RowLayout
from tests.bench import lsh_bits
from tests.bench.lsh_bits import BITS, FINE, NEITHER, PARTS, TRAINED, Line, lines, sized

ALL = [*lines(quick=False), *lines(quick=True)]
SIZES = Sizes(item=(4, 1, 0), user=(4, 1, 0), actions=2)


def changes(config: ModelConfig, base: ModelConfig) -> dict[str, Any]:
    """Fields of the config that are not the base's."""
    pairs = dataclasses.asdict(config), dataclasses.asdict(base)
    return {name: value for name, value in pairs[0].items() if value != pairs[1][name]}


@pytest.mark.parametrize("line", ALL, ids=lambda line: line.name)
def test_a_line_differs_in_what_its_name_says(line: Line) -> None:
    differ = changes(line.config, sized(TRAINED, FINE if line.kind == "cosine" else line.bits))
    kinds: dict[str, dict[str, Any]] = {
        "random": {},
        "two bits": {"bits_per_projection": 2},
        "learned": {"lsh": "learned"},
        "cosine": {"lsh": "cosine"},
    }
    part = {"both": (), "LSH-DIN": ("simtier",), "SimTier": ("lsh_din",), NEITHER: ("lsh_din", "simtier")}[line.part]
    assert differ == {**kinds[line.kind], **({"without": part} if part else {})}
    assert line.name.startswith(line.kind) or line.part == NEITHER


@pytest.mark.parametrize("bits", [*BITS, FINE])
def test_a_size_changes_bits_and_edges_alone(bits: int) -> None:
    config = sized(TRAINED, bits)
    assert config.bits == bits
    assert config.tiers == TRAINED.tiers  # else another number of bits would be another SimTier
    assert set(changes(config, TRAINED)) == (set() if bits == TRAINED.bits else {"bits", "tier_edges"})


def test_the_frame_reads_signatures_nowhere_else() -> None:
    """Dot products would, and hide what the two parts make of a bit."""
    assert TRAINED.dots == TRAINED.bridge_dots == 0
    assert all(line.config.dots == 0 for line in ALL)


@pytest.mark.parametrize("quick", [False, True])
def test_no_line_is_trained_twice(quick: bool) -> None:
    found = lines(quick)
    assert len({line.name for line in found}) == len({line.config for line in found}) == len(found)


def test_every_line_has_the_cosine_it_is_held_against() -> None:
    """The table's gap is to the cosine of the same part."""
    found = lines(quick=False)
    cosines = {line.part for line in found if line.kind == "cosine"}
    assert cosines == {line.part for line in found if line.part != NEITHER} == set(PARTS)


@pytest.mark.parametrize("bits", sorted({line.bits for line in ALL if line.kind != "cosine"}))
def test_equal_bits_are_equal_bytes_whatever_the_kind(bits: int) -> None:
    kinds = {line.kind: line for line in ALL if line.bits == bits and line.kind != "cosine"}
    embeddings = np.random.default_rng(0).standard_normal((5, TRAINED.embedding_dim)).astype(np.float32)
    for kind, line in kinds.items():
        model = build("aif", line.config, SIZES)
        signatures = model.signatures(embeddings)
        assert signatures.shape == (5, bits // 8)
        assert signatures.dtype == np.uint8
        assert model.projection.shape[1] == (bits // 2 if kind == "two bits" else bits)
        assert RowLayout(bits=line.config.bits).hot["signature"].itemsize == bits // 8


def test_the_cosine_stands_on_a_scale_finer_than_any_signature() -> None:
    """Directions of length sqrt b, so that b (1 + cosine) / 2 takes the place of the equal bits."""
    line = Line("cosine", 0, "both")
    config = line.config
    assert config.bits == FINE > max(BITS)
    assert config.unservable
    embeddings = np.random.default_rng(0).standard_normal((6, config.embedding_dim)).astype(np.float32)
    directions = build("aif", config, SIZES).signatures_or_directions(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(directions @ directions.T, FINE * unit @ unit.T, atol=1e-2)


@pytest.mark.parametrize("bits", [16, 512])
def test_the_kernels_cases_have_the_rows_that_the_bits_make(bits: int) -> None:
    """One time per repetition; rows of that many bits, whose crosses are those of the user's table."""
    case = lsh_bits.Case(bits=bits, window=20, met=3)
    hot, _, _ = lsh_bits.arrays_of(case, 64, np.random.default_rng(0))
    assert hot.dtype == RowLayout(bits=bits).hot
    assert len(np.unique(hot["crosses"])) == case.met
    cases = {"SimTier": case, "none": dataclasses.replace(case, window=0)}
    found = lsh_bits.kernel_us(cases, repetitions=2, candidates=64)
    assert {name: len(samples) for name, samples in found.items()} == {"SimTier": 2, "none": 2}
