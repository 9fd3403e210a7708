"""Kernels against their oracles, over odd sizes."""

from __future__ import annotations

import itertools
import platform
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index import kernels, popcount_ir, score_ir
from index.layout import RowLayout, aligned_empty
from infra import codegen


def case(
    seed: int,
    layout: RowLayout,
    rows: int = 50,
    window: int = 100,
    crosses: int = 5,
    tiers: int = 8,
    hidden: tuple[int, ...] = (32,),
    windows: int = 2,
) -> tuple[NDArray[Any], tuple[Any, ...], tuple[Any, ...]]:
    """(hot, arguments of user_tables, arguments of head_tables)."""
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / 4).astype(np.float32)

    hot = aligned_empty(rows, layout.hot)
    hot.view(np.uint8)[:] = 0
    hot["joint"], hot["bridge"] = floats(rows, layout.width), floats(rows, layout.bridges)
    size = layout.bits // 8
    hot["signature"] = rng.integers(0, 256, (rows, size))
    hot["crosses"] = rng.choice([0, 0, 1, 2, 3, 4, 5, 6, 65535], (rows, layout.crosses))
    slots = rng.permutation(np.array([1, 2, 3, 65535, 4000, 40000, 9], np.uint16))[:crosses]
    width = layout.width
    block = (
        floats(width),
        floats(layout.bridges, width),
        floats(layout.bits, width),
        floats(crosses + 1, width),
        slots,
    )
    signatures = rng.integers(0, 256, (window, size), dtype=np.uint8)
    if window and rows:
        signatures[0] = hot["signature"][0]  # all bits equal
        signatures[-1] = ~hot["signature"][0]  # none
    middle = layout.bits // 2
    edges = np.sort(rng.choice(np.arange(-1, layout.bits + 2), tiers - 1, replace=tiers - 1 > layout.bits))
    edges = np.sort(np.where(rng.random(tiers - 1) < 0.7, rng.integers(middle - 4, middle + 5, tiers - 1), edges))
    sizes = [width, *hidden, 1]
    weights = [floats(o, i) for i, o in itertools.pairwise(sizes)]
    biases = [floats(o) for o in sizes[1:]]
    lengths = tuple(min(window, length) for length in (window, 16, 0)[:windows])
    return hot, (*block, signatures, lengths), (floats(width, tiers * windows), edges, weights, biases)


LAYOUTS = [
    RowLayout(),
    RowLayout(precision="fp32"),
    RowLayout(width=1, bridges=1, bits=8, crosses=1),
    RowLayout(width=33, bridges=7, bits=72, crosses=3),
    RowLayout(width=100, bridges=3, bits=256, crosses=9, precision="fp32"),
    RowLayout(width=17, bridges=16, bits=512),
    RowLayout(width=64, bridges=8, bits=248),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"h{layout.width}-b{layout.bits}-{layout.precision}")
@pytest.mark.parametrize(
    ("rows", "window", "crosses", "tiers", "hidden"),
    [
        (50, 100, 5, 8, (32,)),
        (0, 100, 5, 8, (32,)),
        (1, 0, 0, 8, (32,)),
        (65, 64, 7, 2, ()),
        (63, 65, 1, 1, (5, 3)),
        (7, 1, 0, 12, (200,)),
    ],
)
def test_score_is_the_oracles(
    layout: RowLayout, rows: int, window: int, crosses: int, tiers: int, hidden: tuple[int, ...]
) -> None:
    hot, block, head = case(rows + layout.bits, layout, rows, window, crosses, tiers, hidden)
    got = kernels.score(hot, kernels.user_tables(*block, narrow=False), kernels.head_tables(*head))
    assert got.dtype == np.float32
    assert got.shape == (rows,)
    np.testing.assert_allclose(got, kernels.score_oracle(hot, block, *head), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("windows", [1, 2, 3])
@pytest.mark.parametrize("weight", [1.0, 1.3, 4.8828125, 1_000.0])
def test_a_behaviour_may_stand_for_several(windows: int, weight: float) -> None:
    hot, block, head = case(8, RowLayout(), rows=70, window=90, windows=windows)
    user = kernels.user_tables(*block, weight, narrow=False)
    got, wanted = (
        kernels.score(hot, user, kernels.head_tables(*head)),
        kernels.score_oracle(hot, (*block, weight), *head),
    )
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"h{layout.width}-b{layout.bits}")
@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0])
def test_narrow_tables_err_as_their_steps_say(layout: RowLayout, size: float) -> None:
    hot, block, head = case(4, layout, rows=70)
    block = (block[0], block[1], np.float32(size) * block[2], *block[3:])
    tables = kernels.user_tables(*block, narrow=True)
    assert tables.D.dtype == np.int16
    weights, part = np.abs(block[2]).astype(np.float64), 8 * score_ir.together(layout.width, True)
    ranges = np.add.reduceat(weights, np.arange(0, layout.bits, part), axis=0)  # of what a part adds to z
    np.testing.assert_allclose(tables.steps, ranges / (32_767 - part // 4), rtol=1e-5)
    hot["joint"], hot["bridge"], hot["crosses"] = 0, 0, 0
    plain = (0 * block[0], 0 * block[1], block[2], 0 * block[3], *block[4:])
    width = layout.width
    eye = np.eye(width, dtype=np.float32)
    for lane in range(0, width, 7):  # a head that gives one number of z, lifted above ReLU
        lift = float(2 * weights.sum() + 1)
        block_ = (plain[0] + np.float32(lift), *plain[1:])
        one = ([eye[lane : lane + 1]], [np.zeros(1, np.float32)])
        flat = (0 * head[0], head[1], *one)
        got = kernels.score(hot, kernels.user_tables(*block_, narrow=True), kernels.head_tables(*flat))
        error = got - kernels.score_oracle(hot, block_, *flat)
        rounding = 2e-7 * lift
        steps = tables.steps[:, lane].astype(np.float64)
        tables_per_part = min(part, layout.bits) / 4
        assert np.sqrt((error**2).mean()) <= 0.4 * np.sqrt((tables_per_part * steps**2).sum()) + rounding
        assert np.abs(error).max() <= 0.51 * tables_per_part * steps.sum() + rounding


@pytest.fixture
def older_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code is made for a processor with AVX2 and no AVX-512."""
    if platform.machine() != "x86_64":
        pytest.skip("made for x86-64")
    made = (score_ir.score, score_ir.fours, popcount_ir.compiled)
    monkeypatch.setattr(codegen, "host", lambda: ("x86-64-v3", ""))
    for one in made:
        one.cache_clear()
    yield
    for one in made:
        one.cache_clear()


@pytest.mark.usefixtures("older_machine")
@pytest.mark.parametrize("narrow", [False, True])
def test_machines_without_avx512_score_the_same(narrow: bool) -> None:
    hot, block, head = case(6, RowLayout(), rows=77, window=130)
    tables = kernels.user_tables(*block, narrow=narrow)
    got, wanted = kernels.score(hot, tables, kernels.head_tables(*head)), kernels.score_oracle(hot, block, *head)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=0.2 if narrow else 2e-5)
    counts = kernels.simtier_counts(hot["signature"], block[5], head[1])
    assert counts.tolist() == kernels.simtier_counts_oracle(hot["signature"], block[5], head[1]).tolist()


def test_every_part_counts_and_nothing_is_left_from_the_call_before() -> None:
    layout = RowLayout(precision="fp32")
    hot, block, head = case(1, layout)
    tables = kernels.head_tables(*head)
    base = kernels.score(hot, kernels.user_tables(*block, narrow=False), tables)
    for at in range(6):
        changed = list(block)
        changed[at] = block[at][::-1].copy() if at == 4 else block[at] + 1
        other = kernels.score(hot, kernels.user_tables(*changed, narrow=False), tables)
        np.testing.assert_allclose(other, kernels.score_oracle(hot, tuple(changed), *head), rtol=2e-5, atol=2e-5)
        assert not np.allclose(other, base)
    again = kernels.score(hot, kernels.user_tables(*block, narrow=False), tables)
    assert again.tobytes() == base.tobytes()


def test_a_row_scores_the_same_alone_and_among_others() -> None:
    hot, block, head = case(2, RowLayout(), rows=40)
    user, tables = kernels.user_tables(*block, narrow=False), kernels.head_tables(*head)
    whole = kernels.score(hot, user, tables)
    for at in (0, 1, 17, 39):
        assert kernels.score(hot[at : at + 1], user, tables)[0] == whole[at]
    assert kernels.score(hot[::2], user, tables).tolist() == whole[::2].tolist()


def test_shapes_that_do_not_go_together_are_refused() -> None:
    hot, block, head = case(3, RowLayout())
    user, tables = kernels.user_tables(*block, narrow=False), kernels.head_tables(*head)
    other_hot, other_block, other_head = case(3, RowLayout(width=32, bits=64))
    with pytest.raises(kernels.KernelError):
        kernels.score(other_hot, user, tables)
    with pytest.raises(kernels.KernelError):
        kernels.score(hot, kernels.user_tables(*other_block, narrow=False), tables)
    with pytest.raises(kernels.KernelError):
        kernels.score(hot, user, kernels.head_tables(*other_head))
    with pytest.raises(kernels.KernelError):
        kernels.user_tables(*block[:5], other_block[5], block[6], narrow=False)
    for lengths in ((99, 16), (100, 16, 17), (101, 16)):
        with pytest.raises(kernels.KernelError, match="window"):
            kernels.user_tables(*block[:6], lengths, narrow=False)
    with pytest.raises(kernels.KernelError):
        kernels.head_tables(head[0][:, :3], *head[1:])


def test_threads_score_at_the_same_time() -> None:
    cases = [case(seed, RowLayout(), rows=300) for seed in range(4)]
    ready = [(hot, kernels.user_tables(*block, narrow=False), kernels.head_tables(*head)) for hot, block, head in cases]
    wanted = [kernels.score(*one) for one in ready]
    wrong: list[int] = []

    def work(at: int) -> None:
        hot, user, head = ready[at]
        if len(kernels.score(hot[:0], user, head)):  # a thread's first
            wrong.append(at)
        for _ in range(30):
            if kernels.score(*ready[at]).tobytes() != wanted[at].tobytes():
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20),
    window=st.integers(0, 200),
    size=st.sampled_from([1, 2, 9, 16, 31, 32, 64]),
    data=st.data(),
)
def test_simtier_counts_are_the_oracles(rows: int, window: int, size: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    tiers = data.draw(st.sampled_from([1, 2, 8]))
    edges = np.array(sorted(data.draw(st.integers(-3, 8 * size + 3)) for _ in range(tiers - 1)), np.int64)
    own = rng.integers(0, 256, (rows, size), dtype=np.uint8)
    others = rng.integers(0, 256, (window, size), dtype=np.uint8)
    if data.draw(st.booleans()) and rows and window:
        others[rng.integers(window)] = own[rng.integers(rows)]
        others[rng.integers(window)] = ~own[rng.integers(rows)]
    got = kernels.simtier_counts(own, others, edges)
    assert got.dtype == np.int32
    assert got.tolist() == kernels.simtier_counts_oracle(own, others, edges).tolist()
    assert (got.sum(axis=1) == window).all()


@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.5, -1.5, 2.0, 1e-40, float("inf"), -float("inf"), float("nan")]), max_size=40
    ),
    st.integers(-1, 50),
)
def test_best_are_the_oracles(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32)
    assert kernels.best(scores, k).tolist() == kernels.best_oracle(scores, k).tolist()


def test_warm_up_leaves_nothing_to_compile() -> None:
    layout = RowLayout(width=24, bits=40)
    hot, block, head = case(5, layout, tiers=5, hidden=(8, 8))
    tables = kernels.head_tables(*head)
    generators = (score_ir.score, score_ir.fours, popcount_ir.compiled)
    for one in generators:
        one.cache_clear()
    kernels.warm_up(layout, tables)
    made = [one.cache_info().misses for one in generators]
    assert made == [1, 1, 1]
    kernels.score(hot, kernels.user_tables(*block, narrow=True), tables)
    assert [one.cache_info().misses for one in generators] == made
