"""Every model under the one interface: shapes, masks, defaults, gradients, and each rival's own definition."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from encoders.baselines import ETA, MODELS, SDIM, IntTower, TargetAttention, build
from encoders.config import ModelConfig, Sizes
from encoders.inputs import Candidates, Features, Users
from encoders.model import Meeting
from encoders.ranker import RECENCY_EDGES, Ranker

PROFILES = [{"age": 20, "segment": "s"}, None, {}, {"segment": "b"}]
SIZES = Sizes(item=(10, 2, 1), user=(5, 1, 1), actions=2)
relaxed = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
every = pytest.mark.parametrize("name", MODELS)


def made(w: Any, name: str, seed: int = 0, **changes: Any) -> Ranker:
    """A model of the world's config, at weights of trained scale: no error hides in a zero."""
    config = dataclasses.replace(w.bundle.manifest.config, attention=(6, 5), **changes)
    model = build(name, config, w.bundle.manifest.features.sizes, seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1.5).add_(torch.randn(weights.shape, generator=random), alpha=0.1)
    return model


def history(users: Users, change: Callable[[torch.Tensor], torch.Tensor]) -> Users:
    """The users with every column of their histories changed alike."""
    columns = ("vectors", "signatures", "crosses", "actions", "ages", "valid")
    return dataclasses.replace(users, **{name: change(getattr(users, name)) for name in columns})


def logits(model: Ranker, *batch: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(*batch)
    return out


@every
@relaxed
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), more=st.integers(0, 5), seed=st.integers(0, 9))
def test_padding_never_changes_a_score(
    world: Callable[..., Any], name: str, lengths: list[int], more: int, seed: int
) -> None:
    """Neither what stands in padded places nor how many there are."""
    w = world("tiny", 0)
    model = made(w, name)
    users, candidates = w.batch(lengths, PROFILES[: len(lengths)], seed)
    wanted = logits(model, users, candidates)
    assert wanted.shape == (len(lengths), 7)
    assert torch.isfinite(wanted).all()
    wider = history(users, lambda x: torch.cat([torch.zeros_like(x[:, :1]).repeat_interleave(more, 1), x], dim=1))
    valid = wider.valid[:, :, None]
    rubbish = dataclasses.replace(
        wider,
        vectors=torch.where(valid, wider.vectors, 30.0),
        signatures=torch.where(valid, wider.signatures, 1.0),
        crosses=torch.where(valid, wider.crosses, 1),
        actions=torch.where(wider.valid, wider.actions, 1),
        ages=torch.where(wider.valid, wider.ages, 5),
    )
    torch.testing.assert_close(logits(model, rubbish, candidates), wanted, atol=2e-5, rtol=1e-5)


@every
def test_the_order_of_a_short_history_does_not_matter(world: Callable[..., Any], name: str) -> None:
    w = world("tiny", 0)
    model = made(w, name, recent=20, window=20, short_window=20)
    users, candidates = w.batch([12, 12], [None, {}])
    users = dataclasses.replace(users, ages=torch.full_like(users.ages, 10**6))  # else the newest would be another
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    wanted = logits(model, users, candidates)
    shuffled = history(users, lambda x: x[:, order])
    torch.testing.assert_close(logits(model, shuffled, candidates), wanted, atol=2e-5, rtol=0)
    other = dataclasses.replace(users, vectors=users.vectors[:, order], crosses=users.crosses.flip(1))
    changed = (logits(model, other, candidates) - wanted).abs().max() > 1e-4
    assert changed == (name not in ("dssm", "cold", "inttower"))  # which mean over tokens alone


@every
def test_a_user_without_anything_has_a_finite_score_and_gradient(world: Callable[..., Any], name: str) -> None:
    w = world("tiny", 0)
    model = made(w, name)
    users, candidates = w.batch([0], [None])
    out, penalty = model.training_forward(users, candidates, torch.ones(1, 7), torch.ones(1, 7, dtype=torch.bool))
    assert torch.isfinite(out).all()
    (out.sum() + penalty).backward()
    for parameter, weights in model.named_parameters():
        assert weights.grad is None or torch.isfinite(weights.grad).all(), parameter
    default = {"dssm": "no_history", "cold": "no_history", "inttower": "no_history"}.get(name, "no_din")
    for parameter in (default, "no_profile"):
        gradient = model.get_parameter(parameter).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, parameter


@every
def test_every_weight_learns(world: Callable[..., Any], name: str) -> None:
    """And the item vectors of histories do exactly where the model says so."""
    w = world("tiny", 0)
    model = made(w, name)
    users, candidates = w.batch([9, 0, 3, 1], PROFILES)
    users = dataclasses.replace(users, vectors=users.vectors.requires_grad_())
    clicked = (torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    out, penalty = model.training_forward(users, candidates, clicked, torch.ones(4, 7, dtype=torch.bool))
    (functional.binary_cross_entropy_with_logits(out, clicked) + penalty).backward()
    for parameter, weights in model.named_parameters():
        assert weights.grad is not None, parameter
        assert torch.isfinite(weights.grad).all(), parameter
        assert weights.grad.abs().sum() > 1e-9, parameter
    assert (users.vectors.grad is not None) == model.history_gradient
    assert model.history_gradient == (name in ("din", "din-plain", "eta", "sdim"))
    if users.vectors.grad is not None:
        assert (users.vectors.grad.abs().sum(dim=2) > 0).equal(users.valid)


@every
def test_equal_seeds_give_equal_models_and_the_random_state_stays(world: Callable[..., Any], name: str) -> None:
    w = world("tiny", 0)
    users, candidates = w.batch([9, 0], [None, {}])
    before = torch.get_rng_state()
    config, sizes = w.bundle.manifest.config, w.bundle.manifest.features.sizes
    one, same, other = (build(name, config, sizes, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(one, users, candidates), logits(same, users, candidates))
    assert not torch.equal(logits(one, users, candidates), logits(other, users, candidates))
    assert not torch.equal(one.projection, other.projection)


@every
def test_every_model_can_learn_a_small_set_by_heart(world: Callable[..., Any], name: str) -> None:
    w = world("tiny", 0)
    model = build(
        name, dataclasses.replace(w.bundle.manifest.config, dim=16, head=(16,)), w.bundle.manifest.features.sizes
    )
    users, candidates = w.batch([5, 0, 9, 2], PROFILES)
    users = dataclasses.replace(users, vectors=torch.cat([users.vectors, users.vectors], dim=2))
    clicked = (torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    counted = torch.ones(4, 7, dtype=torch.bool)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        out, penalty = model.training_forward(users, candidates, clicked, counted)
        loss = functional.binary_cross_entropy_with_logits(out, clicked)
        optimiser.zero_grad()
        (loss + penalty).backward()
        optimiser.step()
    assert loss.item() < 0.1


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model 'dnn' is not known; known are aif, dssm"):
        build("dnn", ModelConfig(), SIZES)


# Target attention -----------------------------------------------------------------------------------------------------


@relaxed
@given(softmax=st.booleans(), hidden=st.sampled_from([(3,), (6, 5), (4, 3, 2)]), length=st.integers(0, 9))
def test_target_attention_is_its_formula(softmax: bool, hidden: tuple[int, ...], length: int) -> None:
    """The concatenation written out, and valid behaviours taken one user at a time."""
    d = 8
    layer = TargetAttention(ModelConfig(dim=d, attention=hidden), softmax=softmax)
    tokens, items = torch.randn(3, length, d), torch.randn(3, 4, d)
    valid = torch.rand(3, length) > 0.4
    tokens = tokens * valid[:, :, None]
    with torch.no_grad():
        found = layer(tokens, valid, items)
        for user, k in itertools.product(range(3), range(4)):
            e = tokens[user, valid[user]]
            x = items[user, k].expand_as(e)
            z = layer.first(torch.cat([e, x, e - x, e * x], dim=1))
            for linear in layer.rest:
                z = linear(torch.sigmoid(z))
            weights = torch.softmax(z[:, 0], dim=0) if softmax else z[:, 0]
            torch.testing.assert_close(found[user, k], weights @ e, atol=1e-5, rtol=1e-5)


def test_users_attended_to_in_parts_are_attended_to_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = TargetAttention(ModelConfig(dim=8, attention=(6,)), softmax=True)
    tokens, items, valid = torch.randn(7, 5, 8), torch.randn(7, 3, 8), torch.ones(7, 5, dtype=torch.bool)
    with torch.no_grad():
        whole = layer(tokens, valid, items)
        monkeypatch.setattr("encoders.baselines._CHUNK", 2 * 5 * 3 * 6)
        with FlopCounterMode(display=False) as counter:
            parts = layer(tokens, valid, items)
    torch.testing.assert_close(parts, whole)
    assert counter.get_total_flops() > 0


def test_the_attentions_cost_is_what_torch_counts_for_a_behaviour() -> None:
    """torch counts the products; activations and softmax come on top."""
    config = ModelConfig(dim=8, attention=(6, 5))
    for softmax in (True, False):
        layer = TargetAttention(config, softmax=softmax)
        counts = []
        for length in (10, 30):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(torch.randn(2, length, 8), torch.ones(2, length, dtype=torch.bool), torch.randn(2, 4, 8))
            counts.append(counter.get_total_flops())
        assert layer.flops() == (counts[1] - counts[0]) / (20 * 2 * 4) + 6 + 5 + (3 if softmax else 0)


# The rival hashes -----------------------------------------------------------------------------------------------------


def test_eta_with_room_for_all_is_full_attention(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    model = made(w, "eta")
    assert isinstance(model, ETA)
    users, candidates = w.batch([9, 0, 3, 12], PROFILES)
    with torch.inference_mode():
        meeting = model._meet(users, candidates)
        full = model.attention(meeting.tokens, users.valid, meeting.x[meeting.index])
        full = torch.where(users.valid.any(dim=1)[:, None, None], full, model.no_din)
        torch.testing.assert_close(model.long_interest(meeting), full, atol=1e-5, rtol=1e-5)


def test_eta_takes_the_nearest_by_hamming_distance(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one, softmax gives it all the weight: the interest is the token of the nearest behaviour."""
    w = world("tiny", 0)
    model = made(w, "eta")
    assert isinstance(model, ETA)
    monkeypatch.setattr(ETA, "top", 1)
    users, candidates = w.batch([9, 4], [None, {}])
    with torch.inference_mode():
        users.vectors[1, :5] = model.item_vectors(candidates.features)[candidates.index[1, 0]]  # padding, at distance 0
        meeting = model._meet(users, candidates)
        found = model.long_interest(meeting)
        for user, k in itertools.product(range(2), range(7)):
            item = meeting.x[candidates.index[user, k]] @ model.hashes > 0
            distance = ((users.vectors[user] @ model.hashes > 0) != item).sum(dim=1)
            nearest = distance == distance[users.valid[user]].min()
            tokens = meeting.tokens[user, nearest & users.valid[user]]
            assert (tokens - found[user, k]).abs().amax(dim=1).min() < 1e-5


def test_sdim_with_one_bucket_is_the_normalised_sum(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    w = world("tiny", 0)
    monkeypatch.setattr(SDIM, "bits_per_round", 0)
    model = made(w, "sdim")
    assert isinstance(model, SDIM)
    users, candidates = w.batch([9, 4], [None, {}])
    with torch.inference_mode():
        meeting = model._meet(users, candidates)
        wanted = functional.normalize(meeting.tokens.sum(dim=1), dim=1)[:, None, :].expand(2, 7, -1)
        torch.testing.assert_close(model.long_interest(meeting), wanted)


def test_sdim_with_many_buckets_finds_the_candidate_itself(
    world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round of 18 bits over vectors at right angles: nothing but the very vector shares its bucket."""
    w = world("tiny", 0)
    monkeypatch.setattr(SDIM, "bits_per_round", 18)
    monkeypatch.setattr(SDIM, "rounds", 1)
    model = made(w, "sdim")
    assert isinstance(model, SDIM)
    users, candidates = w.batch([8], [None])
    with torch.inference_mode():
        meeting = model._meet(dataclasses.replace(users, vectors=torch.eye(8)[None]), candidates)
        x = torch.eye(8)[torch.arange(len(meeting.x)) % 8]
        found = model.long_interest(dataclasses.replace(meeting, x=x))
        same = candidates.index[0] % 8
        torch.testing.assert_close(found[0], functional.normalize(meeting.tokens[0, same], dim=1))


def test_sdim_is_its_formula(world: Callable[..., Any]) -> None:
    """Per round the l2-normalised sum of the behaviours with an equal signature, without tables."""
    w = world("tiny", 0)
    model = made(w, "sdim")
    assert isinstance(model, SDIM)
    users, candidates = w.batch([12, 5], [None, {}])
    with torch.inference_mode():
        meeting: Meeting = model._meet(users, candidates)
        found = model.long_interest(meeting)

        def rounds(x: torch.Tensor) -> torch.Tensor:
            return (x @ model.hashes > 0).reshape(*x.shape[:-1], model.rounds, model.bits_per_round)

        ours, theirs = rounds(users.vectors), rounds(meeting.x[candidates.index])
        for user, k in itertools.product(range(2), range(7)):
            same = (ours[user] == theirs[user, k]).all(dim=2) & users.valid[user][:, None]  # [L, rounds]
            sums = torch.stack([meeting.tokens[user, same[:, r]].sum(dim=0) for r in range(model.rounds)])
            torch.testing.assert_close(found[user, k], functional.normalize(sums, dim=1).mean(dim=0))


# The forms of the rankers without AIF's frame, written out ------------------------------------------------------------


class Written:
    """A two-sided ranker's weights as arrays, and its groups of features for one user and one candidate, one by one."""

    def __init__(self, model: Ranker, users: Users, candidates: Candidates) -> None:
        self.config, self.users, self.candidates = model.config, users, candidates
        self.weights = {name: tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """W x + b; b where there is one."""
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def user_groups(self, user: int) -> list[np.ndarray]:
        """Profile vector, mean of the recent tokens, and each category of the profile."""
        bags, vector = self._tower("profile_tower", self.users.profile, user)
        known = bool(self.users.known[user])
        tokens = [
            self.users.vectors[user, j].numpy()
            + self.weights["action_table"][int(self.users.actions[user, j])]
            + self.weights["recency_table"][sum(int(self.users.ages[user, j]) >= edge for edge in RECENCY_EDGES)]
            for j in range(self.users.valid.shape[1])[-self.config.recent :]
            if self.users.valid[user, j]
        ]
        profile = vector if known else self.weights["no_profile"]
        recent = sum(tokens) / len(tokens) if tokens else self.weights["no_history"]
        return [profile, recent, *(bag if known else np.zeros_like(bag) for bag in bags)]

    def item_groups(self, user: int, k: int) -> list[np.ndarray]:
        """Item vector, and each category of the item."""
        bags, vector = self._tower("item_tower", self.candidates.features, int(self.candidates.index[user, k]))
        return [vector, *bags]

    def _tower(self, name: str, features: Features, row: int) -> tuple[list[np.ndarray], np.ndarray]:
        """A row's category embeddings and its vector: W2 relu(W1 [categories; numerics; dense] + b1) + b2."""
        table, per_row = self.weights[f"{name}.table"], len(features.offsets) // len(features.dense)
        ends = [*features.offsets.tolist(), len(features.ids)]
        bags = [
            table[features.ids[ends[place] : ends[place + 1]].numpy()].mean(axis=0)
            for place in range(row * per_row, (row + 1) * per_row)
        ]
        numbers = features.numerics[row].numpy()
        numbers = np.where(np.isnan(numbers), self.weights[f"{name}.missing"], numbers)
        inner = np.maximum(
            self.linear(f"{name}.inner", np.concatenate([*bags, numbers, features.dense[row].numpy()])), 0
        )
        return bags, self.linear(f"{name}.outer", inner)


def test_cold_is_its_formula(world: Callable[..., Any]) -> None:
    """Gates sigmoid(W g + b) of all groups g, one number for each; an MLP with ReLU over the gated groups."""
    w = world("tiny", 0)
    model = made(w, "cold")
    users, candidates = w.batch([9, 4, 0], [PROFILES[0], None, {"segment": "b"}])
    found, plain = logits(model, users, candidates), Written(model, users, candidates)
    layers = [name.removesuffix(".weight") for name in plain.weights if name.startswith("mlp.") and "weight" in name]
    assert len(layers) == 3 + len(model.config.head)  # hidden, width, the head's, and the logit
    for user, k in itertools.product(range(3), range(7)):
        groups = [*plain.user_groups(user), *plain.item_groups(user, k)]
        gates = 1 / (1 + np.exp(-plain.linear("gates", np.concatenate(groups))))
        z = np.concatenate([gate * group for gate, group in zip(gates, groups, strict=True)])
        for layer in layers:
            z = plain.linear(layer, z if layer == layers[0] else np.maximum(z, 0))
        np.testing.assert_allclose(found[user, k], z[0], atol=2e-5, rtol=1e-5)


def test_inttower_is_its_formula(world: Callable[..., Any]) -> None:
    """Light-SE g (1 + softmax(W means)) on either side, the layers of both towers, and the FE block: of every user
    layer and user head, the largest inner product with an item head, summed.
    """
    w = world("tiny", 0)
    model = made(w, "inttower")
    assert isinstance(model, IntTower)
    users, candidates = w.batch([9, 4, 0], [PROFILES[0], None, {"segment": "b"}])
    found, plain = logits(model, users, candidates), Written(model, users, candidates)
    heads, size = model.config.heads, model.config.dim // model.config.heads
    assert heads > 1

    def light_se(gates: str, groups: list[np.ndarray]) -> np.ndarray:
        affinity = np.exp(plain.linear(gates, np.array([group.mean() for group in groups])))
        return np.concatenate(
            [g * (1 + a) for g, a in zip(groups, affinity / affinity.sum(), strict=True)]
        )  # fmt: skip

    for user, k in itertools.product(range(3), range(7)):
        item = light_se("item_gates", plain.item_groups(user, k))
        for layer in range(model.layers):
            item = np.maximum(plain.linear(f"item_mlp.0.{2 * layer}", item), 0)
        theirs = plain.linear("item_heads", item).reshape(heads, size)
        ours, score = light_se("user_gates", plain.user_groups(user)), float(plain.weights["bias"])
        for layer in range(model.layers):
            ours = np.maximum(plain.linear(f"user_layers.{layer}", ours), 0)
            for head in plain.linear(f"user_heads.{layer}", ours).reshape(heads, size):
                score += max(float(head @ other) for other in theirs)
        np.testing.assert_allclose(found[user, k], score, atol=2e-5, rtol=1e-5)


# IntTower's contrast and the costs ------------------------------------------------------------------------------------


def test_inttowers_contrast_is_its_formula(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    model = made(w, "inttower")
    assert isinstance(model, IntTower)
    users, candidates = w.batch([9, 4], [None, {}])
    clicked, counted = torch.zeros(2, 7), torch.ones(2, 7, dtype=torch.bool)
    clicked[0, 3] = clicked[1, 5] = clicked[1, 6] = 1.0
    counted[1, 6] = False
    with torch.inference_mode():
        out, penalty = model.training_forward(users, candidates, clicked, counted)
        torch.testing.assert_close(out, model(users, candidates))
        layers, items = model._user(users), model._item(candidates)
        contrast = []
        for user, k in ((0, 3), (1, 5)):
            cosine = torch.cosine_similarity(layers[-1][user][None], items) / model.temperature
            contrast.append(cosine.logsumexp(dim=0) - cosine[candidates.index[user, k]])
        torch.testing.assert_close(penalty, model.contrast * torch.stack(contrast).mean())
        assert model.training_forward(users, candidates, torch.zeros(2, 7), counted)[1] == 0


def test_costs_grow_with_the_history_where_the_model_reads_it() -> None:
    config = ModelConfig(window=100)
    costs = {name: [build(name, config, SIZES).serving_flops(L, 100) for L in (100, 1_000, 2_000)] for name in MODELS}
    for name in ("aif", "dssm", "cold", "inttower", "sdim"):
        assert len(set(costs[name])) == 1, name
    for name in ("din", "din-plain"):
        assert costs[name][2] - costs[name][1] == pytest.approx((costs[name][1] - costs[name][0]) / 900 * 1_000)
    assert costs["eta"][2] - costs["eta"][1] == 1_000 * (3 * 2 + 1)  # Hamming distances alone
    at = {name: cost[1] for name, cost in costs.items()}
    assert at["dssm"] < at["inttower"] < at["aif"] < at["sdim"] < at["cold"] < at["eta"] < at["din-plain"] < at["din"]
    assert at["dssm"] == 2 * 64
    assert at["inttower"] == 3 * 16 * (2 * 16 + 1) + 3 * 4
