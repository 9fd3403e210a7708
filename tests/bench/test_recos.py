"""Every way of the bench recos answers what the module gives, whatever runs beside it; its load is seeded."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from api.runtime.policy import Policy
from api.runtime.simulate import simulate
from tests.bench.recos import load, simulated
from tests.bench.recos.runners import RUNNERS, Kernels
from tests.bench.recos.worker import costs as seen

SEED = 3
KINDS = ("eager", "ours", "repeated")


@pytest.fixture(scope="module")
def queries() -> list[load.Query]:
    random = torch.Generator().manual_seed(SEED)
    return [load.query(name, rows, random) for rows in (3, 70, 130) for name in load.MODELS]


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[str, Kernels]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: Kernels(name, SEED) for name in KINDS}
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name, (kind, _) in RUNNERS.items() if kind in KINDS])
def test_every_way_gives_the_modules_scores(name: str, queries: list[load.Query], kernels: dict[str, Kernels]) -> None:
    kind, made = RUNNERS[name]
    own, runner = load.modules(SEED), made(kernels[kind])
    try:
        given = load.repeated if kind == "repeated" else lambda one: one
        asked = [(one, runner.submit(given(one), 0, math.inf)) for one in queries * 2]
        for one, answer in asked:
            with torch.inference_mode():
                expected = own[one.model](*one.inputs)
            torch.testing.assert_close(answer.result(60), expected, atol=1e-5, rtol=1e-4)
    finally:
        runner.close()


@pytest.mark.parametrize("shape", load.SHAPES)
def test_arrivals_are_seeded_in_order_and_at_most_at_the_peak(shape: str) -> None:
    moments = load.arrivals(shape, 500.0, 4.0, SEED)
    assert moments == load.arrivals(shape, 500.0, 4.0, SEED) == sorted(moments)
    assert moments != load.arrivals(shape, 500.0, 4.0, SEED + 1)
    expected = 500.0 * 4.0 * sum(load.SHAPES[shape](at / 1000) for at in range(1000)) / 1000
    assert abs(len(moments) - expected) < 5 * math.sqrt(expected)
    assert load.chosen("mix", 50, SEED) == load.chosen("mix", 50, SEED)
    assert {name for name, _ in load.chosen("mix", 200, SEED)} == set(load.MODELS)


def test_simulated_lanes_are_as_fast_as_measured(kernels: dict[str, Kernels]) -> None:
    costs = seen(kernels["ours"], load.pool(SEED))
    arrivals = simulated.arrivals(costs, 4_000.0, 1.0, SEED)
    arrivals = simulated.arrivals(costs, 4_000.0, 1.0, SEED, simulated.slowness(arrivals, 1_000.0))
    ended = simulate(arrivals, 2, Policy(fifo=True), simulated.STEP_S).ended  # a sixth of it for steps
    assert len(arrivals) / max(ended) == pytest.approx(1_000.0, rel=0.05)
    assert [one.at for one in arrivals] == load.arrivals("steady", 4_000.0, 1.0, SEED)
