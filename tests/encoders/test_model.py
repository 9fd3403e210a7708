"""Training form: padding changes nothing, empty blocks take learned defaults, no NaN, no gradient into histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from encoders import lsh
from encoders.bundle import new_model
from encoders.features import ItemEncoder, ProfileEncoder
from encoders.model import AIF, RECENCY_EDGES, Candidates, Users, recency_buckets

NOW = 1_767_225_600_000


def inputs(w: Any, lengths: list[int], profiles: list[Any], seed: int = 0) -> tuple[Users, Candidates, list[Any]]:
    """Users with histories of these lengths in one padded batch; each sees other candidates."""
    config = w.bundle.manifest.config
    random = np.random.default_rng(seed)
    histories = [w.behaviours(random, length) for length in lengths]
    L = max(lengths)

    def padded(column: Callable[[Any], np.ndarray], shape: tuple[int, ...], kind: Any) -> torch.Tensor:
        out = np.zeros((len(lengths), L, *shape), dtype=kind)
        for row, history in enumerate(histories):
            if lengths[row]:
                out[row, L - lengths[row] :] = column(history)
        return torch.from_numpy(out)

    users = Users(
        profile=ProfileEncoder(w.bundle.manifest.features).features(profiles),
        known=torch.tensor([profile is not None for profile in profiles]),
        vectors=padded(lambda h: h.vectors, (config.dim,), np.float32),
        signatures=padded(lambda h: lsh.signs(h.signatures), (config.bits,), np.float32),
        crosses=padded(lambda h: h.crosses, (config.crosses,), np.int64),
        actions=padded(lambda h: np.minimum(h.actions, 2), (), np.int64),
        ages=padded(lambda h: NOW - h.times, (), np.int64),
        valid=padded(lambda h: np.ones(len(h), dtype=bool), (), bool),
    )
    columns = ItemEncoder(w.bundle.manifest.features, config.embedding_dim, config.crosses).columns(w.items)
    candidates = Candidates(
        features=columns.features,
        signatures=torch.from_numpy(lsh.signs(w.rows.signature)),
        crosses=torch.from_numpy(columns.crosses.astype(np.int64)),
        index=torch.from_numpy(random.integers(0, len(w.items), (len(lengths), 7))),
    )
    return users, candidates, histories


def test_padding_changes_nothing(world: Callable[..., Any]) -> None:
    w = world("tiny", 1)
    lengths, profiles = [0, 1, 4, 9], [{"age": 20}, None, {"segment": "b"}, {}]
    users, candidates, _ = inputs(w, lengths, profiles)
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
    users, candidates, _ = inputs(w, [0, 1, 4, 9], [None] * 4)
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
    users, candidates, _ = inputs(w, [0], [None])
    logits = model(users, candidates)
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    for name in ("no_profile", "no_din", "no_window", "no_cross", "user_tower.null"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, name


def test_every_weight_learns_and_histories_get_no_gradient(world: Callable[..., Any]) -> None:
    w = world("tiny", 0)
    config, spec = w.bundle.manifest.config, w.bundle.manifest.features
    model = AIF(config, spec.sizes)
    users, candidates, _ = inputs(w, [9, 0, 3, 1], [{"age": 20, "segment": "s"}, None, {}, {"segment": "b"}])
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
