"""The policy and its simulation: who goes first, nobody starves, lanes are busy, deadlines are kept where they can."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from api.runtime.backlog import Query
from api.runtime.model import Model
from api.runtime.policy import Policy, Ready
from api.runtime.simulate import Arrival, simulate
from tests.api.runtime.graphs import chain, made


@dataclasses.dataclass
class Waits:
    """A query as the policy sees it."""

    number: int = 0
    priority: int = 0
    arrived: float = 0.0
    deadline: float = math.inf
    left: float = 1.0
    path: float = 1.0


def first(*queries: Waits, policy: Policy | None = None, lanes: int = 2, spread: float = 1.0) -> int:
    return min(queries, key=lambda one: (policy or Policy()).urgency(one, 0.0, lanes, 1.0, spread)).number


def test_who_goes_first() -> None:
    assert first(Waits(0), Waits(1, left=0.5)) == 1, "the least work left"
    assert first(Waits(0, priority=1), Waits(1, left=9.0)) == 1, "classes"
    assert first(Waits(0), Waits(1, left=9.0, arrived=-100.0)) == 1, "whoever has waited for long"
    assert first(Waits(0), Waits(1, left=9.0, arrived=-10.0)) == 0
    assert first(Waits(0), Waits(1, left=9.0, arrived=-10.0), lanes=4) == 1, "which is longer on more lanes"
    assert first(Waits(0), Waits(1, left=9.0, path=3.0, deadline=5.0)) == 1, "who would be late"
    assert first(Waits(0, left=9.0), Waits(1), policy=Policy(fifo=True)) == 0, "who came first"
    assert first(Waits(0, left=1.2), Waits(1), spread=0.2) == 0, "where all are about alike, too"
    assert first(Waits(0, left=1.2), Waits(1), spread=0.2, policy=Policy(ageing=0.0)) == 1
    step = Policy().step
    assert step([Ready(0, 1.0, -1), Ready(1, 2.0, -1)], 0) == 1, "the longest path of one query"
    assert step([Ready(0, 1.0, -1), Ready(1, 1.0, 3)], 3) == 1, "where its input is"
    assert step([Ready(0, 1.0, 3), Ready(1, 2.0, 3)], 3) == 1


@st.composite
def loads(draw: st.DrawFn) -> list[Arrival]:
    costs = st.floats(0.01, 2.0)
    shapes = [
        lambda: chain(*draw(st.lists(costs, min_size=1, max_size=4))),
        lambda: made([draw(costs) for _ in range(4)], [[], [0], [0], [1, 2]], lambda k, values: k),
    ]
    times = sorted(draw(st.lists(st.floats(0, 5), min_size=1, max_size=12)))
    return [
        Arrival(
            at, shapes[draw(st.integers(0, 1))](), 1, draw(st.integers(0, 1)), draw(st.sampled_from([math.inf, 3.0]))
        )
        for at in times
    ]


def longest(model: Model) -> float:
    return Query(0, model.graph, model.costs(1), 1, 0, 0.0, math.inf, 1).path


@given(loads(), st.integers(1, 4), st.booleans())
def test_every_query_ends_or_is_late_and_no_lane_rests_without_cause(
    arrivals: list[Arrival], lanes: int, fifo: bool
) -> None:
    found = simulate(arrivals, lanes, Policy(fifo=fifo))
    work = sum(one.cost for query in arrivals for one in query.model.graph.operators)
    assert found.busy <= work + 1e-9
    for query, ended in zip(arrivals, found.ended, strict=True):
        if math.isnan(ended):
            assert query.within_s < math.inf, "only a deadline drops a query"
        else:
            least = longest(query.model)
            assert query.at + least - 1e-9 <= ended <= query.at + query.within_s + 1e-9
    if all(query.within_s == math.inf for query in arrivals):
        assert found.busy == pytest.approx(work)
        assert max(found.ended) <= arrivals[-1].at + work + 1e-9
        if lanes == 1:
            end = 0.0
            for query in arrivals:  # of one lane the last end is the same in every order that never rests
                end = max(end, query.at) + sum(one.cost for one in query.model.graph.operators)
            assert max(found.ended) == pytest.approx(end)


def took(long: Model, share: float, load: float, lanes: int) -> dict[str, NDArray[np.float64]]:
    """s that 4,000 queries take, of which a share is long, by who goes first."""
    random, short = np.random.default_rng(0), chain(0.01, 0.01)
    work = share * long.work(1) + (1 - share) * short.work(1)
    at = np.cumsum(random.exponential(work / load / lanes, 4_000))
    arrivals = [
        Arrival(float(time), long if one < share else short) for time, one in zip(at, random.random(4_000), strict=True)
    ]
    policies = {"fifo": Policy(fifo=True), "ours": Policy(), "shortest": Policy(ageing=0.0)}
    return {name: np.array(simulate(arrivals, lanes, policy).ended) - at for name, policy in policies.items()}


def test_short_queries_pass_long_ones_and_long_ones_still_end() -> None:
    found = took(chain(*[0.05] * 20), 0.1, 0.908, 2)
    assert np.median(found["ours"]) < np.median(found["fifo"]) / 2
    assert np.quantile(found["ours"], 0.99) < 1.1 * np.quantile(found["fifo"], 0.99)


@pytest.mark.parametrize("lanes", [2, 16])
def test_a_wait_counts_as_much_on_any_number_of_lanes(lanes: int) -> None:
    found = took(chain(*[0.05] * 6), 0.3, 0.93, lanes)
    medians, slowest = ({name: np.quantile(one, at) for name, one in found.items()} for at in (0.5, 0.99))
    assert medians["shortest"] < medians["ours"] < 0.7 * medians["fifo"]
    assert slowest["ours"] < 1.03 * slowest["fifo"]
    assert slowest["shortest"] > 1.05 * slowest["fifo"]


def test_what_cannot_end_in_time_is_refused_and_what_is_taken_ends_in_time() -> None:
    one = chain(0.1, 0.1)
    arrivals = [Arrival(0.01 * k, one, within_s=1.0) for k in range(100)]
    early, late = (simulate(arrivals, 2, Policy(), refuse=refuse) for refuse in (True, False))
    for found in (early, late):
        for query, ended in zip(arrivals, found.ended, strict=True):
            assert math.isnan(ended) or ended <= query.at + query.within_s + 1e-9
    kept, tried = ([not math.isnan(ended) for ended in found.ended] for found in (early, late))
    assert sum(kept) >= sum(tried) >= 1
    assert early.busy == pytest.approx(0.2 * sum(kept)), "no work is spent on what ends late"
    assert late.busy > 0.2 * sum(tried) + 0.1
