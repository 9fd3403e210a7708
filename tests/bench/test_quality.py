"""How benchmark `quality` chooses options, what it trains on, and how it holds models against each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from encoders.config import COMPONENTS, ModelConfig
from encoders.data import synthetic
from encoders.data.dataset import DataError
from encoders.evaluate import Sampling, split_of
from encoders.train import TrainOptions
from tests.bench import experiment, quality
from tests.bench.experiment import Source, Trial, Variant
from tests.bench.quality import ABLATIONS, GROUPS, NOISE, READERS, with_unrated

WORLD = synthetic.Marketplace(users=40, items=200, examples=600, categories=6, past=10)


def test_the_default_stays_unless_another_gains_more_than_noise() -> None:
    assert quality.pick({1.0: 0.7, 2.0: 0.7 + NOISE / 2}, default=1.0) == 1.0
    assert quality.pick({1.0: 0.7, 2.0: 0.7 + 2 * NOISE}, default=1.0) == 2.0
    assert quality.pick({2.0: 0.6, 3.0: 0.7}, default=1.0) == 3.0


def test_every_tuned_model_has_the_same_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainOptions] = []

    def found(_: Source, variants: list[Variant], seeds: list[int], sampling: Sampling) -> dict[str, list[Trial]]:
        assert (len(seeds), sampling.requests, sampling.shortlists) == (1, 0, 0)
        asked.extend(variant.options for variant in variants)
        best = {"learning_rate": 1e-3, "weight_decay": 2.0}  # of every model but DSSM, which keeps the defaults
        out = {}
        for variant in variants:
            hits = sum(getattr(variant.options, name) == value for name, value in best.items())
            gauc = 0.7 if variant.options.model == "dssm" else 0.7 + 0.01 * hits
            out[variant.name] = [Trial(None, gauc, 1, 1.0)]  # type: ignore[arg-type]
        return out

    monkeypatch.setattr(quality, "trials", found)
    options, table = quality._tuned(Source("here"), 7, quick=False)
    tried = {model: {own for own in asked if own.model == model} for model in quality.TUNED}
    assert {len(own) for own in tried.values()} == {len(quality.RATES) + len(quality.DECAYS) - 1}
    assert len(table) == sum(len(own) for own in tried.values())
    assert sorted(row["model"] for row in table if row["chosen"]) == sorted(quality.TUNED)  # type: ignore[type-var]
    assert (options["aif"].learning_rate, options["aif"].weight_decay) == (1e-3, 2.0)
    assert options["dssm"] == TrainOptions(config=quality.TRAINED, model="dssm")
    for name, of in quality.VARIED.items():
        assert options[name] == dataclasses.replace(options[of], model=name)


def test_every_ablation_takes_away_what_its_name_says() -> None:
    default = ModelConfig()
    configs = {name: dataclasses.replace(default, **changes) for name, changes in (ABLATIONS | GROUPS).items()}
    assert len(set(configs.values())) == len(configs)
    for component in COMPONENTS:
        assert configs[f"aif without {component}"].without == (component,)
    options = {name: TrainOptions(config=default, model=name) for name in ("aif", quality.BOUND)}
    more = {variant.name: variant.options for variant in quality._with_more(options, quick=False)}
    assert {name: own.config for name, own in more.items() if name in ABLATIONS} == {
        name: configs[name] for name in ("aif without bea", "aif without lsh_din", "aif without bea, lsh_din")
    }
    assert {name for name, own in more.items() if own == options.get(name)} == {"aif", quality.BOUND}
    for reader in READERS:
        alone = configs[f"aif with {reader} alone"]
        assert (set(READERS) - set(alone.without), alone.dots) == ({reader}, 0)
    assert configs["aif without dots"].dots == configs["aif with none of these"].dots == 0
    assert configs["aif with dots alone"].dots == default.dots


def test_unrated_items_stand_beside_the_examples() -> None:
    data = synthetic.generate(WORLD)
    more = with_unrated(data)
    before, after = data.examples, more.examples
    assert len(after) == (1 + quality.UNRATED) * len(before)
    assert after.clicked.sum() == before.clicked.sum()
    assert split_of(more) == split_of(data)
    key = after.user.astype(np.int64) << 45 | after.time - after.time.min()
    assert (np.diff(key) >= 0).all()
    met: dict[tuple[int, int], int] = {}
    for user, item, time in zip(data.log.user.tolist(), data.log.item.tolist(), data.log.time.tolist(), strict=True):
        met.setdefault((user, item), time)
    own = set(zip(before.user.tolist(), before.item.tolist(), before.time.tolist(), strict=True))
    added = 0
    for user, item, time in zip(after.user.tolist(), after.item.tolist(), after.time.tolist(), strict=True):
        assert data.items.added[item] <= time < data.items.removed[item]
        if (user, item, time) not in own:
            added += 1
            assert met.get((user, item), time + 1) > time
    assert added > 0.9 * len(before)  # the others happen to be shown at that time, too


def test_a_user_who_has_met_all_items_has_no_unrated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_DRAWS", 3)
    data = synthetic.generate(WORLD)
    none = np.full_like(data.items.added, data.examples.time.max() + 1)
    with pytest.raises(DataError, match="has met nearly all items"):
        with_unrated(dataclasses.replace(data, items=dataclasses.replace(data.items, added=none)))


def test_what_is_trained_on_is_not_what_is_measured(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_worker", [])
    sampling = Sampling(requests=5, shortlists=2, candidates=20)
    experiment._open(Source("here", world=WORLD, learnt=with_unrated), tmp_path, sampling, None)  # type: ignore[arg-type]
    (changed,) = experiment._worker
    assert len(changed.training.examples) > len(changed.data.examples)
    small = ModelConfig(width=8, dim=8, bridges=4, bits=16, window=10, recent=5, head=(4,), heads=2, hidden=8,
                        category_dim=4, tier_edges=(6, 8, 10))  # fmt: skip
    options = TrainOptions(config=small, epochs=1)
    found = experiment._trial("aif", options)
    experiment._open(Source("here", world=WORLD), tmp_path, sampling, None)  # type: ignore[arg-type]
    plain = experiment._trial("aif", options)
    assert isinstance(found, Trial)
    assert isinstance(plain, Trial)
    np.testing.assert_array_equal(found.evaluation.labels, plain.evaluation.labels)
    assert (found.evaluation.scores != plain.evaluation.scores).any()
    table = quality._table({"aif": [plain], "aif, unrated too": [found]}, {}, Source("here"))
    assert [line["gauc_p_holm"] is None for line in table if line["model"] != "aif"] == [False]
