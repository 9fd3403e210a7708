"""Generations come and go under load and kills, and no answer mixes two: a minute of `make bench NAME=rollout`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.rollout import bundles
from tests.bench.stack import BenchStack
from tests.bench.switching import SETTINGS, TOLERANCE, switch_under_load
from tests.bench.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RATE = 50.0  # requests a second: leaves two slow cores time for jobs, which yield to requests and start again all along


@pytest.mark.timeout(900)
def test_switches_and_kills_under_load_mix_nothing_and_fail_nothing() -> None:
    world = World(20_000, seed=3)
    with BenchStack(**SETTINGS) as stack:
        loaded = bundles(stack.folder, 3)
        outcome = switch_under_load(
            stack, world, loaded, seconds=60.0, every_s=5.0, kill_every_s=10.0, rate=RATE, seed=3, one_of=20
        )
    answers = outcome.load.answers
    assert len(answers) >= RATE * 60 * 0.95
    assert [failure.why for failure in outcome.failures] == []
    assert {step.action for step in outcome.steps} == {"stage", "activate", "rollback"}
    assert any(name.startswith("api") for name in outcome.killed)
    assert any(not name.startswith("api") for name in outcome.killed)
    assert {answer.generation for answer in answers} >= {"r0", "r1"}
    assert not any(answer.lacks for answer in answers)
    checked = outcome.errors(world)
    assert {answer.generation for answer, _ in checked} >= {"r0", "r1"}
    assert outcome.apart(world, [answer for answer, _ in checked[::50]]) > 1_000 * TOLERANCE
    assert np.max([error for _, error in checked]) <= TOLERANCE
