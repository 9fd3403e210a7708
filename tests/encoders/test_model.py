"""Training form: padding changes nothing, empty blocks take learned defaults, no NaN, no gradient into histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from encoders.bundle import new_model
from encoders.config import COMPONENTS, ModelConfig, Sizes
from encoders.features import ProfileEncoder
from encoders.inputs import Users
from encoders.model import AIF
from encoders.ranker import RECENCY_EDGES, recency_buckets

PROFILES = [{"age": 20, "segment": "s"}, None, {}, {"segment": "b"}]
SIZES = Sizes(item=(10, 2, 1), user=(5, 1, 1), actions=2)
CONFIG_OF_MANY_BITS = ModelConfig(
    width=16, dim=8, heads=2, hidden=10, bits=1_024, tier_edges=(400,), embedding_dim=12, crosses=2
)
relaxed = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def aif(w: Any, seed: int = 0, **changes: Any) -> AIF:
    """An untrained AIF of the world's config with changes."""
    config = dataclasses.replace(w.bundle.manifest.config, **changes)
    return new_model(config, w.bundle.manifest.features, seed)


def test_padding_changes_nothing(world: Callable[..., Any]) -> None:
    w = world("tiny", 1)
    lengths, profiles = [0, 1, 4, 9], [{"age": 20}, None, {"segment": "b"}, {}]
    users, candidates = w.batch(lengths, profiles)
    with torch.inference_mode():
        together = w.bundle.model(users, candidates)
        for row, length in enumerate(lengths):
            alone = Users(
                profile=ProfileEncoder(w.bundle.manifest.features).features([profiles[row]]),
                **{
                    field.name: getattr(users, field.name)[row : row + 1]
                    if field.name == "known"
                    else getattr(users, field.name)[row : row + 1, 9 - length :]
                    for field in dataclasses.fields(Users)
                    if field.name != "profile"
                },
            )
            own = dataclasses.replace(candidates, index=candidates.index[row : row + 1])
            torch.testing.assert_close(w.bundle.model(alone, own)[0], together[row], atol=1e-5, rtol=0)


def test_padded_places_are_never_read(world: Callable[..., Any]) -> None:
    w = world("tiny", 1)
    users, candidates = w.batch([0, 1, 4, 9], [None] * 4)
    with torch.inference_mode():
        wanted = w.bundle.model(users, candidates)
        rubbish = dataclasses.replace(
            users,
            vectors=torch.where(users.valid[:, :, None], users.vectors, 1e3),
            signatures=torch.where(users.valid[:, :, None], users.signatures, 1.0),
            crosses=torch.where(users.valid[:, :, None], users.crosses, 1),
            actions=torch.where(users.valid, users.actions, 1),
            ages=torch.where(users.valid, users.ages, 5),
        )
        torch.testing.assert_close(w.bundle.model(rubbish, candidates), wanted, atol=1e-5, rtol=0)


def test_empty_everything_is_finite_and_learned(world: Callable[..., Any]) -> None:
    """A user without anything: the score exists, and every default takes part in it, as its gradient shows."""
    w = world("tiny", 0)
    model = new_model(w.bundle.manifest.config, w.bundle.manifest.features, 3)
    model.load_state_dict(w.bundle.model.state_dict())
    users, candidates = w.batch([0], [None])
    logits = model(users, candidates)
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    for name in ("no_profile", "no_din", "no_window", "no_cross", "user_tower.null"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, name


def test_every_weight_learns_and_histories_get_no_gradient(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    model = aif(w, dots=2, bridge_dots=1)
    users, candidates = w.batch([9, 0, 3, 1], PROFILES)
    users = dataclasses.replace(users, vectors=users.vectors.requires_grad_())
    logits = model(users, candidates)
    functional.binary_cross_entropy_with_logits(logits, (torch.rand(logits.shape) > 0.5).float()).backward()
    assert users.vectors.grad is None
    for name, weights in model.named_parameters():
        assert weights.grad is not None, name
        assert torch.isfinite(weights.grad).all(), name
        assert weights.grad.abs().sum() > 0, name


def test_recency_buckets() -> None:
    ages = [0, RECENCY_EDGES[0] - 1, RECENCY_EDGES[0], RECENCY_EDGES[-1], 10**15]
    assert recency_buckets(torch.tensor(ages)).tolist() == [0, 0, 1, len(RECENCY_EDGES), len(RECENCY_EDGES)]
    assert list(RECENCY_EDGES) == sorted(set(RECENCY_EDGES))


@relaxed
@given(without=st.sets(st.sampled_from(COMPONENTS)))
def test_exactly_what_is_switched_off_learns_nothing_and_says_nothing(
    world: Callable[..., Any], without: set[str]
) -> None:
    w = world("tiny", 0)
    model = aif(w, without=tuple(sorted(without)))
    users, candidates = w.batch([9, 0, 3, 1], PROFILES)
    logits = model(users, candidates)
    functional.binary_cross_entropy_with_logits(logits, (torch.rand(logits.shape) > 0.5).float()).backward()
    still = {name for name, weights in model.named_parameters() if not weights.requires_grad}
    for name, weights in model.named_parameters():
        if name in still:
            assert weights.grad is None, name
        else:
            assert weights.grad is not None, name
            assert weights.grad.abs().sum() > 0, name
    layer = {"user_tower.qkv.weight", "user_tower.mix.bias", "user_tower.norm1.weight", "user_tower.ffn_in.weight"}
    own = {
        "bea": {"bridges", "W1b"},
        "lsh_din": {"no_din", "W1d"},
        "simtier": {"tier_table", "no_window", "W1t"},
        "sim": {"no_cross", "W1s"},
        "self_attention": layer,
        "profile_attention": {"user_tower.query.weight", "user_tower.query.bias"},
    }
    for component, names in own.items():
        assert (names <= still) == (component in without)
        assert not names & still or component in without
    with torch.no_grad():
        for name in still:
            model.get_parameter(name).add_(1.0)
    torch.testing.assert_close(model(users, candidates), logits, atol=0, rtol=0)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_has_a_say(world: Callable[..., Any], component: str) -> None:
    w = world("tiny", 0)
    whole, part = aif(w), aif(w, without=(component,))
    part.load_state_dict(whole.state_dict())
    users, candidates = w.batch([9, 0, 3, 1], PROFILES)
    with torch.inference_mode():
        assert (whole(users, candidates) - part(users, candidates)).abs().max() > 1e-4


def test_an_item_attends_to_its_best_bridges(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    x = torch.from_numpy(w.rows.vector)
    every, best = aif(w, bridges=8), aif(w, bridges=8, bridge_top=3)
    with torch.inference_mode():
        plain, top = every.bridge_weights(x), best.bridge_weights(x)
    assert ((top > 0).sum(dim=1) == 3).all()
    chosen = torch.where(top > 0, plain, 0.0)
    torch.testing.assert_close(top, chosen / chosen.sum(dim=1, keepdim=True))
    assert (chosen.sum(dim=1) >= plain.topk(3, dim=1).values.sum(dim=1) - 1e-6).all()


def test_temperature_sharpens(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    x = torch.from_numpy(w.rows.vector)
    with torch.inference_mode():
        logs = [aif(w, bridge_temperature=t).bridge_weights(x).log() for t in (1.0, 3.0)]
    torch.testing.assert_close(torch.log_softmax(3 * logs[0], dim=1), logs[1], atol=1e-4, rtol=1e-4)


def test_bridges_are_dropped_in_training_alone_and_never_all(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    model, x = aif(w, bridge_dropout=0.95), torch.from_numpy(w.rows.vector)
    torch.manual_seed(0)
    with torch.no_grad():
        used = torch.stack([(model.train().bridge_weights(x) > 0).all(dim=0) for _ in range(40)])
        assert (model.eval().bridge_weights(x) > 0).all()
    assert used.any(dim=1).all()
    assert used.any(dim=0).all()
    assert used.float().mean() < 0.6


def test_the_penalty_is_the_bridges_mean_squared_cosine(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    users, candidates = w.batch([4, 0], [None, {}])
    labels = torch.zeros(2, 7), torch.ones(2, 7, dtype=torch.bool)
    model = aif(w, bridge_diversity=0.5)
    logits, penalty = model.training_forward(users, candidates, *labels)
    b = model.bridges.detach().numpy().astype(np.float64)
    cosines = [b[i] @ b[j] / np.linalg.norm(b[i]) / np.linalg.norm(b[j]) for i in range(3) for j in range(3) if i != j]
    np.testing.assert_allclose(penalty.item(), 0.5 * np.mean(np.square(cosines)), rtol=1e-5)
    torch.testing.assert_close(logits, model(users, candidates))
    plain = aif(w).training_forward(users, candidates, *labels)[1]
    assert plain.item() == 0.0
    alone = aif(w, bridges=1, bridge_diversity=0.5).training_forward(users, candidates, *labels)[1]
    assert alone.item() == 0.0


def test_bridges_start_at_the_clusters_of_the_items(world: Callable[..., Any]) -> None:
    model = aif(world("tiny", 0))
    corners = torch.zeros(3, 8)
    corners[0, 0] = corners[1, 1] = corners[2, 2] = 1.0
    owner = torch.arange(90) % 3
    torch.manual_seed(1)
    vectors = 5.0 + corners[owner] + 0.01 * torch.randn(90, 8)
    model.start_bridges(vectors)
    torch.testing.assert_close(model.bridges.norm(dim=1), torch.full((3,), 8**0.5))
    preferred = model.bridge_weights(3 * vectors).argmax(dim=1)
    assert {(int(a), int(b)) for a, b in zip(owner, preferred, strict=True)} >= {
        (k, int(preferred[k])) for k in range(3)
    }
    assert len(set(preferred[:3].tolist())) == 3
    assert all((preferred[owner == k] == preferred[k]).all() for k in range(3))
    model.start_bridges(torch.ones(3, 8))  # no clusters at all
    assert torch.isfinite(model.bridges).all()
    with pytest.raises(ValueError, match="2 vectors are too few for 3 centres"):
        model.start_bridges(vectors[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ("bae",)}, "'bae' cannot be switched off; known are bea"),
        ({"dots": -1}, "dot products must not be negative"),
        ({"bridge_top": 17}, "bridge_top be above the number of bridges"),
        ({"bridge_dropout": 1.0}, "dropout in"),
        ({"bridge_temperature": 0.0}, "temperature must be > 0"),
        ({"bridge_diversity": -0.1}, "diversity >= 0"),
        ({"attention": (0,)}, "every size"),
        ({"short_window": -1}, "short window must not be negative"),
        ({"length": 900}, "nor a history shorter than its windows"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_serving_cost_of_the_folded_form_is_counted_by_hand() -> None:
    """joint + P, C w, D s, T log1p, crosses and their mean; the MLP; per behaviour XOR, popcount, add and edges."""
    config = ModelConfig(
        width=16, dim=8, heads=2, bridges=3, bits=64, crosses=2, tier_edges=(30, 34), head=(12, 8), window=100
    )
    join = 2 * 16 + 2 * 16 * 3 + 2 * 16 * 64 + 2 * (2 * 16 * 3) + 16 * (2 + 1)  # two histograms
    mlp = 2 * (16 * 12 + 12 * 8 + 8 * 1)
    pairs = 3 + 2 * 2
    assert AIF(config, SIZES).serving_flops(50, 100) == join + mlp + (50 + 16) * pairs
    assert AIF(config, SIZES).serving_flops(5_000, 100) == join + mlp + (100 + 16) * pairs
    free = dataclasses.replace(config, dots=4, bridge_dots=4)
    assert AIF(free, SIZES).serving_flops(50, 100) == join + mlp + (50 + 16) * pairs
    bare = dataclasses.replace(config, without=("bea", "lsh_din", "simtier", "sim"), dots=0)
    assert AIF(bare, SIZES).serving_flops(50, 100) == 2 * 16 + mlp


def test_matches_are_exact_under_autocast(world: Callable[..., Any]) -> None:
    w = world(CONFIG_OF_MANY_BITS, 0)
    users, candidates = w.batch([9, 4], [None, {}])
    model = w.bundle.model
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        matches = model._meet(users, candidates).matches
    assert matches.dtype == torch.float32
    theirs, ours = candidates.signatures[candidates.index].numpy(), users.signatures.numpy()
    equal = (theirs[:, :, None, :] == ours[:, None, :, :]).sum(axis=3)
    valid = users.valid.numpy()[:, None, :].repeat(7, axis=1)
    np.testing.assert_array_equal(matches.numpy()[valid], equal[valid])
