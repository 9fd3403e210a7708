"""The accounting of benchmark `cost`, and that its sequential systems answer what their models' forward passes say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoders.baselines import COLD, DSSM
from encoders.config import ModelConfig
from index.histories import HistoriesReader, HistoriesWriter, StoredBehaviour, StoredProfile
from infra.processes import Process
from tests.bench import cost, costs_online
from tests.bench.cost import Price, break_even
from tests.bench.costs_nearline import Nearline, cpu_us
from tests.bench.costs_online import CachedCold, FeatureStore, Sequential, SequentialCold, SequentialDssm
from tests.bench.scene import Scene
from tests.bench.world import as_of

SMALL = ModelConfig(width=16, dim=16, window=40, recent=10, head=(8,), heads=2, hidden=12, category_dim=4)
costs = st.floats(0.01, 100)


@given(costs, costs, costs, costs)
def test_both_cost_the_same_at_the_break_even(ours: float, theirs: float, update: float, other: float) -> None:
    one, two = Price(ours, update, 0.0, 0.0), Price(theirs, other, 0.0, 0.0)
    even = break_even(one, two)
    assert 0 <= even <= cost.NEVER
    if 0 < even < cost.NEVER:
        assert one.at(even) == pytest.approx(two.at(even))
        assert one.at(even / 2) < two.at(even / 2)
    elif even == 0:
        assert one.at(0) >= two.at(0)
    else:
        assert one.at(even / 2) <= two.at(even / 2)


def test_all_work_is_in_the_sum() -> None:
    price = Price(request=1.0, update=2.0, refresh=4.0, behaviour=8.0)
    assert price.at(3.0, 0.5) == 1.0 + 3 * 2.0 + 0.5 * 4.0 + cost.BEHAVIOURS * 8.0


def test_the_brokers_work_is_in_every_price_and_cancels_over_the_same_transport() -> None:
    """An update of 300 us in the jobs and 90 in the broker, a behaviour of 40 and 20; item sides of 60 and 25 us."""
    paced = {"ingest": [100.0], "encode": [120.0], "replicate": [80.0], "broker": [90.0]}
    nearline = Nearline(paced, paced, {"histories": 40.0, "broker": 20.0}, refresh=150.0, start=0.0, idle={})
    encode = {(name, size): [us] for name, us in (("aif", 60.0), ("cold_cached", 25.0)) for size in (16, 512)}
    cpu = {"aif": [6.0], "cold": [26.0], "cold_cached": [11.0]}
    prices = cost._prices(cpu, nearline, encode, paced, cost.PACED_BATCH)
    assert [price.update for price in prices.values()] == pytest.approx([0.39, 0.0, 0.39 - 0.035])
    assert [price.refresh for price in prices.values()] == pytest.approx([0.15, 0.0, 0.15 - 0.035])
    assert [price.behaviour for price in prices.values()] == pytest.approx([0.06] * 3)
    assert prices["aif"].at(1.0, 0.1) == pytest.approx(6.0 + 0.39 + 0.015 + 0.06)
    same = cost.carried(prices)
    assert (same.request, same.refresh) == (26.0, 0.0)  # features do not change with the model
    even = break_even(prices["aif"], same)
    assert even == pytest.approx((26.0 - 6.0 - 0.1 * 0.15) / 0.035)
    dear = {**paced, "broker": [900.0]}
    assert break_even(*(cost._prices(cpu, nearline, encode, dear, 16)[name] for name in ("aif", "cold_cached"))) == (
        pytest.approx(break_even(prices["aif"], prices["cold_cached"]))
    )
    assert break_even(prices["aif"], prices["cold"]) < even


def test_cpu_of_a_process_grows_with_its_work(tmp_path: Path) -> None:
    mine = Process("me", os.getpid(), "", tmp_path)
    before = cpu_us(mine)
    for number in range(3_000_000):
        before += 0 * number
    assert cpu_us(mine) > before


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.set_num_threads(1)
    return Scene(300, 30, SMALL)


@pytest.fixture
def histories(scene: Scene, tmp_path: Path) -> Iterator[HistoriesReader]:
    """The scene's user as u0."""
    writer = HistoriesWriter(tmp_path, 100, b"bench")
    names = ("", *scene.spec.actions)
    behaviours = [
        StoredBehaviour("u0", str(item), f"e{place}", names[action], time, time, 0, place)
        for place, (item, action, time) in enumerate(
            zip(scene.seen.tolist(), scene.actions.tolist(), scene.times.tolist(), strict=True)
        )
    ]
    profile = StoredProfile("u0", msgspec.json.encode(scene.profile), None, as_of(), 0, 0)
    writer.apply(behaviours, [profile], {})
    writer.close()
    reader = HistoriesReader(tmp_path)
    yield reader
    reader.close()


@pytest.mark.parametrize("system", [SequentialCold, CachedCold, SequentialDssm])
@torch.inference_mode()
def test_sequential_systems_answer_what_their_model_says(
    system: type[Sequential], scene: Scene, histories: HistoriesReader
) -> None:
    model = costs_online.untrained("dssm" if system is SequentialDssm else "cold", SMALL, scene)
    assert isinstance(model, (COLD, DSSM))
    ids = np.random.default_rng(0).permutation(300)[:200].astype(np.uint64)
    laps: list[str] = []
    found = system(model, scene, histories).stages("u0", ids, laps.append)
    scores = scene.forward(model, ids.astype(np.int64))
    place = {int(item): at for at, item in enumerate(ids)}
    assert len(set(found.tolist())) == costs_online.K
    worst = min(scores[place[int(item)]] for item in found)
    assert (scores > worst + 1e-5).sum() < costs_online.K
    assert laps[:3] == ["history", "user", "gather"]
    assert laps[-2:] == ["score", "top_k"]


def test_the_feature_store_gives_what_the_encoder_made(scene: Scene) -> None:
    places = np.array([7, 3, 299, 3])
    found, wanted = FeatureStore(scene.columns).take(places), scene.encoded(places).features
    for name in ("ids", "offsets", "numerics", "dense"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), equal_nan=True)
