"""The rivals that AIF is measured against, all under `model.Ranker`: the same items, tokens, histories and trainer.

Two-tower and concatenating rankers (`DSSM`), and rivals of BEA and LSH-DIN within AIF's own frame (`DIN`: full target
attention over the real embeddings, the upper bound). They are trained and compared, never served: `serving_flops` says
what serving would cost them. Letters in the shape comments are those of encoders/model.py.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders import lsh
from encoders.model import AIF, Candidates, Frame, Meeting, ModelConfig, Ranker, Sizes, Users, first_layer_block

_TEMPERATURE = 0.1  # where DSSM's learned temperature starts


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: inputs -> hidden ... -> outputs."""

    def __init__(self, sizes: list[int]) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])


class DSSM(Ranker):
    """Two towers and the cosine of their outputs (Huang et al., CIKM 2013), with a learned temperature and bias."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        d = config.dim
        self.no_history = nn.Parameter(torch.randn(d) * 0.1)
        self.user_mlp = MLP([2 * d, config.hidden, d])
        self.item_mlp = MLP([d, config.hidden, d])
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_TEMPERATURE)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        user = self.user_mlp(torch.cat([self.profiles(users.profile, users.known), self.recent(users)], dim=1))
        item = self.item_mlp(self.item_vectors(candidates.features))
        user, item = functional.normalize(user, dim=1), functional.normalize(item, dim=1)
        cosine = (item[candidates.index] @ user[:, :, None]).squeeze(2)
        return cosine * self.log_scale.exp() + self.bias

    def recent(self, users: Users) -> Tensor:
        """Mean of the recent tokens [B, d]."""
        R = self.config.recent
        return pooled(self.history(users)[:, -R:], users.valid[:, -R:], self.no_history)

    def serving_flops(self, length: int, window: int) -> float:  # noqa: ARG002  no history in real time
        """One inner product."""
        return 2.0 * self.config.dim


class TargetAttention(nn.Module):
    """DIN's activation unit (Zhou et al., KDD 2018): an MLP on [e_j, x_i, e_j - x_i, e_j * x_i] weighs behaviour j.

    The first layer is linear, so it is parted: (We + Wd) e_j once per behaviour, (Wx - Wd) x_i once per item, and
    e_j (diag(x_i) Wp) as a batched product; [B, K, L, 4d] is never made.
    """

    def __init__(self, config: ModelConfig, *, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax
        self.first = nn.Linear(4 * config.dim, config.attention[0])
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([*config.attention, 1]))

    def forward(self, tokens: Tensor, valid: Tensor, items: Tensor) -> Tensor:
        """tokens [B, L, d], zero where not `valid` [B, L]; items [B, K, d] -> [B, K, d], zero for an empty history."""
        We, Wx, Wd, Wp = self.first.weight.chunk(4, dim=1)  # each [a, d]
        scaled = items[:, :, None, :] * Wp  # [B, K, a, d]
        both = tokens @ scaled.flatten(1, 2).transpose(1, 2)  # [B, L, K * a]
        a = both.unflatten(2, (items.shape[1], -1)) + (tokens @ (We + Wd).T)[:, :, None, :]  # [B, L, K, a]
        a = a + (items @ (Wx - Wd).T + self.first.bias)[:, None, :, :]
        for layer in self.rest:
            a = layer(torch.sigmoid(a))
        weight = a.squeeze(3).transpose(1, 2)  # [B, K, L]
        keep = valid[:, None, :]
        if self.softmax:
            weight = torch.softmax(weight.masked_fill(~keep, torch.finfo(weight.dtype).min), dim=2)
        out: Tensor = weight.masked_fill(~keep, 0.0) @ tokens
        return out


class DIN(Frame):
    """The upper bound: AIF's frame (SimTier and SIM included) with full target attention over all L behaviours.

    Softmax over the behaviours; the item vectors of histories learn too.
    """

    history_gradient: ClassVar[bool] = True
    softmax: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.attention = TargetAttention(config, softmax=self.softmax)
        self.no_din = nn.Parameter(torch.zeros(config.dim))
        self.W1d = first_layer_block(config.width, config.dim)

    def interest(self, meeting: Meeting) -> Tensor:
        """Target attention through its block of the first layer [B, K, h]."""
        valid = meeting.users.valid
        attended = self.attention(meeting.tokens, valid, meeting.x[meeting.index])
        return torch.where(valid.any(dim=1)[:, None, None], attended, self.no_din) @ self.W1d.T


class PlainDIN(DIN):
    """The upper bound with the weights as published: not normalised, so that they tell intensity."""

    softmax: ClassVar[bool] = False


def pooled(tokens: Tensor, valid: Tensor, default: Tensor) -> Tensor:
    """Mean of the valid tokens [B, d], `default` [d] where there is none; tokens [B, R, d] are zero where not valid."""
    count = valid.sum(dim=1)[:, None]
    return torch.where(count > 0, tokens.sum(dim=1) / count.clamp(min=1), default)


MODELS: dict[str, type[Ranker]] = {"aif": AIF, "dssm": DSSM, "din": DIN, "din-plain": PlainDIN}


def build(name: str, config: ModelConfig, sizes: Sizes, seed: int = 0) -> Ranker:
    """A model of MODELS with weights and LSH projection drawn from `seed`; the global random state stays as it is.

    Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not known; known are {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](config, sizes)
    model.projection.copy_(torch.from_numpy(lsh.projection(config.embedding_dim, config.bits, seed)))
    return model
