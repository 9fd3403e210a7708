"""The policy and its simulation: who goes first, nobody starves, lanes are busy, deadlines are kept where they can."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.runtime.policy import Policy, Ready
from api.runtime.simulate import Arrival, simulate
from tests.api.runtime.graphs import chain, made

ONE = Ready(query=0, operator=0, priority=0, arrived=0.0, deadline=math.inf, left=1.0, path=1.0, lane=-1)


def first(*ready: Ready, now: float = 0.0, lane: int = 0) -> Ready:
    return ready[Policy().choose(ready, lane, now)]


def test_who_goes_first() -> None:
    other = dataclasses.replace(ONE, query=1)
    assert first(ONE, dataclasses.replace(other, left=0.5)).query == 1, "the least work left"
    assert first(dataclasses.replace(ONE, priority=1), dataclasses.replace(other, left=9.0)).query == 1, "classes"
    old = dataclasses.replace(other, left=9.0, arrived=-100.0)
    assert first(ONE, old).query == 1, "whoever has waited for long"
    urgent = dataclasses.replace(other, left=9.0, path=3.0, deadline=5.0)
    assert first(ONE, urgent).query == 1, "who would be late"
    longer = dataclasses.replace(ONE, operator=1, path=2.0)
    assert first(ONE, longer).operator == 1, "the longest path of one query"
    near = dataclasses.replace(ONE, operator=1, lane=3)
    assert first(ONE, near, lane=3).operator == 1, "where its input is"
    assert Policy(fifo=True).choose([dataclasses.replace(ONE, arrived=1.0), other], 0, 2.0) == 1


@st.composite
def loads(draw: st.DrawFn) -> list[Arrival]:
    costs = st.floats(0.01, 2.0)
    shapes = [
        lambda: chain(*draw(st.lists(costs, min_size=1, max_size=4))),
        lambda: made([draw(costs) for _ in range(4)], [[], [0], [0], [1, 2]], lambda k, values: k),
    ]
    times = sorted(draw(st.lists(st.floats(0, 5), min_size=1, max_size=12)))
    return [
        Arrival(at, shapes[draw(st.integers(0, 1))](), draw(st.integers(0, 1)), draw(st.sampled_from([math.inf, 3.0])))
        for at in times
    ]


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
            least = max(query.model.paths)
            assert query.at + least - 1e-9 <= ended <= query.at + query.within_s + 1e-9
    if all(query.within_s == math.inf for query in arrivals):
        assert found.busy == pytest.approx(work)
        assert max(found.ended) <= arrivals[-1].at + work + 1e-9
        if lanes == 1:
            end = 0.0
            for query in arrivals:  # of one lane the last end is the same in every order that never rests
                end = max(end, query.at) + sum(one.cost for one in query.model.graph.operators)
            assert max(found.ended) == pytest.approx(end)


def test_short_queries_pass_long_ones_and_long_ones_still_end() -> None:
    random = np.random.default_rng(0)
    short, long = chain(0.01, 0.01), chain(*[0.05] * 20)
    at = np.cumsum(random.exponential(0.065, 4_000))
    arrivals = [
        Arrival(float(time), long if one < 0.1 else short) for time, one in zip(at, random.random(4_000), strict=True)
    ]
    took = {}
    for name, policy in {"fifo": Policy(fifo=True), "ours": Policy(), "shortest": Policy(ageing=0.0)}.items():
        ended = np.array(simulate(arrivals, 2, policy).ended)
        took[name] = ended - at
    medians = {name: float(np.median(times)) for name, times in took.items()}
    slowest = {name: float(np.quantile(times, 0.99)) for name, times in took.items()}
    assert medians["ours"] < medians["fifo"] / 2
    assert slowest["ours"] < 2 * slowest["fifo"]
