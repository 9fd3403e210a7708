"""Our attention and towers against well-kept implementations, with shared weights: deepctr-torch and torch-rechub."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from encoders.baselines import DSSM, TargetAttention, build
from encoders.config import ModelConfig

B, K, L, D = 5, 4, 7, 8
LENGTHS = [7, 3, 1, 6, 7]


@pytest.fixture
def deepctr_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes deepctr_torch's modules importable without its `__init__`, which asks a server for a newer version."""
    spec = importlib.util.find_spec("deepctr_torch")
    assert spec is not None
    package: Any = types.ModuleType("deepctr_torch")
    package.__path__ = spec.submodule_search_locations
    for name in [name for name in sys.modules if name.startswith("deepctr_torch.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepctr_torch", package)


def attention(hidden: tuple[int, ...], *, softmax: bool) -> TargetAttention:
    torch.manual_seed(3)
    return TargetAttention(ModelConfig(dim=D, heads=2, attention=hidden), softmax=softmax)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [B, L, D] padded on the left with zeros, which are valid, and items [B, K, D]."""
    random = torch.Generator().manual_seed(0)
    valid = torch.arange(L) >= L - torch.tensor(LENGTHS)[:, None]
    tokens = torch.randn(B, L, D, generator=random) * valid[:, :, None]
    return tokens, valid, torch.randn(B, K, D, generator=random)


def their_order(weight: torch.Tensor) -> torch.Tensor:
    """Ours is [e, x, e - x, e * x], theirs [x, e, x - e, x * e]."""
    We, Wx, Wd, Wp = weight.detach().chunk(4, dim=1)
    return torch.cat([Wx, We, -Wd, Wp], dim=1)


def copy(ours: nn.Linear, theirs: nn.Linear, *, first: bool = False) -> None:
    with torch.no_grad():
        theirs.weight.copy_(their_order(ours.weight) if first else ours.weight)
        theirs.bias.copy_(torch.zeros(ours.out_features) if ours.bias is None else ours.bias)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("hidden", [(6, 5), (9,)])
@pytest.mark.usefixtures("deepctr_layers")
def test_target_attention_is_deepctrs(softmax: bool, hidden: tuple[int, ...]) -> None:
    """AttentionSequencePoolingLayer with its mask, which takes histories padded on the right."""
    from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer

    ours = attention(hidden, softmax=softmax)
    theirs = AttentionSequencePoolingLayer(
        att_hidden_units=hidden, att_activation="sigmoid", weight_normalization=softmax, embedding_dim=D
    )
    copy(ours.first, theirs.local_att.dnn.linears[0], first=True)
    for mine, other in zip(ours.rest, [*theirs.local_att.dnn.linears[1:], theirs.local_att.dense], strict=True):
        copy(mine, other)
    tokens, valid, items = inputs()
    right = torch.stack([tokens[row].roll(length, dims=0) for row, length in enumerate(LENGTHS)])
    with torch.no_grad():
        found = ours(tokens, valid, items)
        for k in range(K):
            wanted = theirs(items[:, [k]], right, torch.tensor(LENGTHS)[:, None])
            torch.testing.assert_close(found[:, [k]], wanted, atol=1e-6, rtol=1e-5)
    assert found.std() > 0.05


@pytest.mark.parametrize("softmax", [True, False])
def test_target_attention_is_torch_rechubs(softmax: bool) -> None:
    """ActivationUnit knows no padding, so full histories; its batch norms are those of an untrained layer."""
    from torch_rechub.models.ranking.din import ActivationUnit

    ours = attention((6, 5), softmax=softmax)
    theirs = ActivationUnit(D, dims=[6, 5], activation="sigmoid", use_softmax=softmax).eval()
    layers = [layer for layer in theirs.attention.mlp if isinstance(layer, nn.Linear)]
    for norm in theirs.attention.mlp:
        if isinstance(norm, nn.BatchNorm1d):
            norm.eps = 0.0
    copy(ours.first, layers[0], first=True)
    for mine, other in zip(ours.rest, layers[1:], strict=True):
        copy(mine, other)
    _, _, items = inputs()
    tokens = torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ours(tokens, torch.ones(B, L, dtype=torch.bool), items)
        for k in range(K):
            torch.testing.assert_close(found[:, k], theirs(tokens, items[:, k]), atol=1e-6, rtol=1e-5)


def test_two_towers_are_torch_rechubs(world: Callable[..., Any]) -> None:
    """DSSM from the towers' inputs to the cosine; theirs has no temperature, and ends each layer in an activation."""
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.matching import dssm

    w = world("tiny", 0)
    config, spec = w.bundle.manifest.config, w.bundle.manifest.features
    ours = build("dssm", config, spec.sizes)
    assert isinstance(ours, DSSM)
    users, candidates = w.batch([4, 0, 9], [None, {}, {"age": 3}])
    d, tower = config.dim, {"dims": [config.hidden, config.dim], "activation": "prelu"}
    theirs = dssm.DSSM([DenseFeature("user", 2 * d)], [DenseFeature("item", d)], tower, tower).eval()
    for mine, other in ((ours.user_mlp, theirs.user_mlp), (ours.item_mlp, theirs.item_mlp)):
        linear, norms, slopes = (
            [layer for layer in other.mlp if isinstance(layer, kind)] for kind in (nn.Linear, nn.BatchNorm1d, nn.PReLU)
        )
        copy(mine[0], linear[0])
        copy(mine[2], linear[1])
        for norm, slope, value in zip(norms, slopes, (0.0, 1.0), strict=True):  # ReLU, then the identity
            norm.eps = 0.0
            nn.init.constant_(slope.weight, value)
    with torch.no_grad():
        ours.log_scale.zero_()
        ours.bias.fill_(0.25)
        user = torch.cat([ours.profiles(users.profile, users.known), ours.recent(users)], dim=1)
        item = ours.item_vectors(candidates.features)[candidates.index]
        wanted = theirs({"user": user.repeat_interleave(7, dim=0), "item": item.flatten(0, 1)}).logit().reshape(3, 7)
        torch.testing.assert_close(ours(users, candidates) - 0.25, wanted, atol=1e-5, rtol=1e-4)
    assert wanted.std() > 0.01
