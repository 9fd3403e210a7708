"""The rivals that AIF is measured against, all under `model.Ranker`: the same items, tokens, histories and trainer.

Rankers of their own form: `DSSM`, `COLD`, `IntTower`. Rivals of BEA and LSH-DIN within AIF's frame (user tower,
SimTier, SIM, first layer, head): `DIN`, full target attention over all behaviours, which is the upper bound; rivals of
LSH-DIN alone: `ETA` and `SDIM`, the other hashes; AIF with one block more: `ItemDots`. They are trained and compared,
never served; `serving_flops` says what serving would cost.
Letters in the shape comments are those of encoders/model.py; a = first hidden layer of the attention's MLP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders import lsh
from encoders.config import ModelConfig, Sizes
from encoders.inputs import Candidates, Users
from encoders.model import AIF, Dots, Frame, Meeting, first_layer_block
from encoders.ranker import Ranker, noise

_TEMPERATURE = 0.1  # where DSSM's learned temperature starts
_CHUNK = 1 << 21  # numbers of an attention layer's output that are made at once: what fits a core's cache


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: inputs -> hidden ... -> outputs."""

    def __init__(self, *sizes: int) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])


class TwoSided(Ranker):
    """What the rankers outside AIF's frame share: a user is a profile and the mean of the recent tokens."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.no_history = nn.Parameter(noise(config.dim))

    def recent(self, users: Users) -> Tensor:
        """Mean of the recent tokens [B, d], a learned default where there is none."""
        R = self.config.recent
        count = users.valid[:, -R:].sum(dim=1)[:, None]
        mean = self.history(users)[:, -R:].sum(dim=1) / count.clamp(min=1)  # padded tokens are zero
        return torch.where(count > 0, mean, self.no_history)


class DSSM(TwoSided):
    """Two towers and the cosine of their outputs (Huang et al., CIKM 2013), with a learned temperature and bias."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        d = config.dim
        self.user_mlp = MLP(2 * d, config.hidden, d)
        self.item_mlp = MLP(d, config.hidden, d)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_TEMPERATURE)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        profile = self.profiles(users.profile, users.known)
        user = functional.normalize(self.user_mlp(torch.cat([profile, self.recent(users)], dim=1)), dim=1)
        item = functional.normalize(self.item_mlp(self.item_vectors(candidates.features)), dim=1)
        cosine = (item[candidates.index] @ user[:, :, None]).squeeze(2)
        return cosine * self.log_scale.exp() + self.bias

    def serving_flops(self, length: int, window: int) -> float:  # noqa: ARG002
        """One inner product; the temperature and the bias do not change an order."""
        return 2.0 * self.config.dim


class COLD(TwoSided):
    """Squeeze-and-excitation gates over feature groups, and an MLP over the gated groups (Wang et al., DLP-KDD 2020).

    A group's gate is sigmoid(W [all groups] + b), one number. Groups: profile, recent behaviours and each category of
    the profile; item vector and each category of the item.
    """

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        d, c = config.dim, config.category_dim
        self.user_groups = [d, d, *[c] * sizes.user[1]]
        self.item_groups = [d, *[c] * sizes.item[1]]
        groups = [*self.user_groups, *self.item_groups]
        self.register_buffer("group", torch.repeat_interleave(torch.tensor(groups)), persistent=False)
        self.gates = nn.Linear(sum(groups), len(groups))
        self.mlp = MLP(sum(groups), config.hidden, config.width, *config.head, 1)

    group: Tensor

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        profile = self.profiles(users.profile, users.known)
        bags = self.profile_tower.inputs(users.profile)[0].flatten(1) * users.known[:, None]
        user = torch.cat([profile, self.recent(users), bags], dim=1)
        item = torch.cat(
            [self.item_vectors(candidates.features), self.item_tower.inputs(candidates.features)[0].flatten(1)], dim=1
        )[candidates.index]  # [B, K, item groups]
        joined = torch.cat([user[:, None, :].expand(-1, item.shape[1], -1), item], dim=2)
        gates = torch.sigmoid(self.gates(joined))  # [B, K, groups]
        out: Tensor = self.mlp(joined * gates[:, :, self.group]).squeeze(2)
        return out

    def serving_flops(self, length: int, window: int) -> float:  # noqa: ARG002
        """Item half of the gates' layer, the gates, gated item groups through the first layer, the other layers.

        The user's halves are ready: of the gates' layer, and each user group through the first layer, which leaves one
        weighted sum of those.
        """
        groups, wide, hidden = len(self.gates.bias), sum(self.item_groups), self.config.hidden
        first = 2.0 * hidden * (wide + len(self.user_groups)) + wide
        rest = sum(2.0 * a * b for a, b in itertools.pairwise([hidden, self.config.width, *self.config.head, 1]))
        return 2.0 * groups * wide + groups + first + rest


class IntTower(TwoSided):
    """Two towers that meet in every layer of the user's (Li et al., CIKM 2022).

    Light-SE: groups x (1 + softmax(W mean of each group)). FE block: every layer of the user tower and the last of the
    item tower are parted into heads; the score is the sum over user layers and user heads of the largest inner product
    with an item head. CIR: clicked items are told from the batch's other items by InfoNCE on the towers' outputs.
    """

    layers: ClassVar[int] = 3
    contrast: ClassVar[float] = 0.05  # weight of CIR
    temperature: ClassVar[float] = 0.07  # of CIR

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        d, c = config.dim, config.category_dim
        self.user_groups = [d, d, *[c] * sizes.user[1]]
        self.item_groups = [d, *[c] * sizes.item[1]]
        self.user_gates = nn.Linear(len(self.user_groups), len(self.user_groups), bias=False)
        self.item_gates = nn.Linear(len(self.item_groups), len(self.item_groups), bias=False)
        inner = [config.hidden] * self.layers
        self.user_layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in itertools.pairwise([sum(self.user_groups), *inner])
        )
        self.item_mlp = nn.Sequential(MLP(sum(self.item_groups), *inner), nn.ReLU())
        self.user_heads = nn.ModuleList(nn.Linear(config.hidden, d) for _ in range(self.layers))
        self.item_heads = nn.Linear(config.hidden, d)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        return self._score(self._user(users), self._item(candidates), candidates)

    def training_forward(
        self, users: Users, candidates: Candidates, clicked: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ranker`; the penalty is CIR, zero in a batch without clicks."""
        layers, item = self._user(users), self._item(candidates)
        logits = self._score(layers, item, candidates)
        user, item = functional.normalize(layers[-1], dim=1), functional.normalize(item, dim=1)
        likelihood = torch.log_softmax(user @ item.T / self.temperature, dim=1)  # [B, M]
        positive = (clicked > 0.5) & counted
        chosen = likelihood.gather(1, candidates.index)[positive]
        return logits, -self.contrast * chosen.sum() / max(1, len(chosen))

    def serving_flops(self, length: int, window: int) -> float:  # noqa: ARG002
        """Inner products of every head of every user layer with every item head, their maxima, and the sum."""
        pairs = self.layers * self.config.heads**2
        return pairs * (2.0 * self.config.dim / self.config.heads + 1) + self.layers * self.config.heads

    def _user(self, users: Users) -> list[Tensor]:
        """Outputs of the user tower's layers, each [B, hidden]."""
        bags = self.profile_tower.inputs(users.profile)[0] * users.known[:, None, None]
        x = _light_se([self.profiles(users.profile, users.known), self.recent(users), *bags.unbind(1)], self.user_gates)
        outputs = []
        for layer in self.user_layers:
            x = functional.relu(layer(x))
            outputs.append(x)
        return outputs

    def _item(self, candidates: Candidates) -> Tensor:
        """Output of the item tower [M, hidden]."""
        groups = [
            self.item_vectors(candidates.features),
            *self.item_tower.inputs(candidates.features)[0].unbind(1),
        ]
        out: Tensor = self.item_mlp(_light_se(groups, self.item_gates))
        return out

    def _score(self, layers: list[Tensor], item: Tensor, candidates: Candidates) -> Tensor:
        B, K = candidates.index.shape
        heads, size = self.config.heads, self.config.dim // self.config.heads
        theirs = self.item_heads(item)[candidates.index].reshape(B, K * heads, size)
        logits = self.bias.expand(B, K)
        for layer, project in zip(layers, self.user_heads, strict=True):
            ours = project(layer).reshape(B, heads, size)
            products = (theirs @ ours.transpose(1, 2)).reshape(B, K, heads, heads)  # item heads, user heads
            logits = logits + products.amax(dim=2).sum(dim=2)
        return logits


class TargetAttention(nn.Module):
    """DIN's activation unit (Zhou et al., KDD 2018): an MLP on [e_j, x_i, e_j - x_i, e_j * x_i] weighs behaviour j.

    The first layer is linear, so an item makes one matrix of it, We + Wd + Wp diag(x_i), and one bias,
    (Wx - Wd) x_i + b; [B, K, L, 4d] is never made. Some users at a time, for the cache's sake.
    """

    def __init__(self, config: ModelConfig, *, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax
        self.activation: Callable[[Tensor], Tensor] = torch.sigmoid
        self.first = nn.Linear(4 * config.dim, config.attention[0])
        self.sizes = [config.dim, *config.attention, 1]
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(config.attention))
        self.rest.append(nn.Linear(config.attention[-1], 1, bias=not softmax))  # softmax takes no notice of a bias

    def forward(self, tokens: Tensor, valid: Tensor, items: Tensor) -> Tensor:
        """tokens [B, L, d], zero where not `valid` [B, L]; items [B, K, d] -> [B, K, d], zero for an empty history."""
        each = items.shape[1] * max(1, tokens.shape[1]) * len(self.first.bias)
        size = max(1, _CHUNK // each)
        parts = [slice(at, at + size) for at in range(0, len(items), size)]
        return torch.cat([self._attend(tokens[part], valid[part], items[part]) for part in parts])

    def flops(self) -> float:
        """Per behaviour and candidate, the item's matrix and bias being ready: the MLP, its sigmoids at one operation
        each, softmax (exponential, sum, division), and the weighted sum of tokens.
        """
        layers = sum(2.0 * a * b for a, b in itertools.pairwise(self.sizes))
        return layers + sum(self.sizes[1:-1]) + (3 if self.softmax else 0) + 2 * self.sizes[0]

    def _attend(self, tokens: Tensor, valid: Tensor, items: Tensor) -> Tensor:
        We, Wx, Wd, Wp = self.first.weight.chunk(4, dim=1)  # each [a, d]
        users, K, d = items.shape
        W = (items[:, :, None, :] * Wp + (We + Wd)).reshape(users, -1, d)  # [B, K * a, d]
        bias = (items @ (Wx - Wd).T + self.first.bias).reshape(users, 1, -1)  # [B, 1, K * a]
        z = torch.baddbmm(bias, tokens, W.transpose(1, 2)).reshape(users, -1, K, len(Wp))  # [B, L, K, a]
        for layer in self.rest:
            z = layer(self.activation(z))
        weight = z.squeeze(3).transpose(1, 2)  # [B, K, L]
        keep = valid[:, None, :]
        if self.softmax:
            weight = torch.softmax(weight.masked_fill(~keep, torch.finfo(weight.dtype).min), dim=2)
        return weight.masked_fill(~keep, 0.0) @ tokens


class DIN(Frame):
    """The upper bound: AIF's frame, SimTier and SIM included, with full target attention over all L behaviours.

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

    def serving_flops(self, length: int, window: int) -> float:
        """The folded frame, the attention over all behaviours, and its block of the first layer."""
        block = 2.0 * self.config.width * self.config.dim
        return super().serving_flops(length, window) + length * self.attention.flops() + block


class PlainDIN(DIN):
    """The upper bound with the weights as published: not normalised, so that their sum tells intensity."""

    softmax: ClassVar[bool] = False


class ETA(AIF):
    """LSH-DIN replaced by ETA (Chen et al., 2021): target attention over the `top` behaviours nearest by SimHash.

    The hash is of the learned item vectors, by a fixed random projection, and picks without a gradient.
    """

    history_gradient: ClassVar[bool] = True
    top: ClassVar[int] = 48
    hashes: Tensor

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.attention = TargetAttention(config, softmax=True).requires_grad_(config.has("lsh_din"))
        self.register_buffer("hashes", torch.randn(config.dim, config.bits))

    def long_interest(self, meeting: Meeting) -> Tensor:
        """Target attention over the nearest behaviours [B, K, d]."""
        valid, items = meeting.users.valid, meeting.x[meeting.index]
        with torch.no_grad():
            ours, theirs = _signs(meeting.users.vectors, self.hashes), _signs(items, self.hashes)
            equal = (theirs @ ours.transpose(1, 2)).masked_fill(~valid[:, None, :], -math.inf)  # [B, K, L]
            place = equal.topk(min(self.top, equal.shape[2]), dim=2).indices  # [B, K, top]
        rows = torch.arange(len(place), device=place.device)[:, None, None]
        near = meeting.tokens[rows, place].flatten(0, 1)  # [B * K, top, d]: each candidate has its own behaviours
        attended = self.attention(near, valid[rows, place].flatten(0, 1), items.flatten(0, 1)[:, None, :])
        attended = attended.reshape(items.shape)
        return torch.where(valid.any(dim=1)[:, None, None], attended, self.no_din)

    def long_flops(self, length: int) -> float:
        """Hamming distances to all behaviours and one comparison of each, the attention, and W1d."""
        distances = length * (3 * self.config.bits / 64 + 1)
        block = 2.0 * self.config.width * self.config.dim
        return distances + min(length, self.top) * self.attention.flops() + block


class SDIM(AIF):
    """LSH-DIN replaced by SDIM (Cao et al., CIKM 2022): behaviours in the candidate's bucket are summed, per round.

    A round's signature is `width` sign bits of a fixed random projection of the learned item vectors. The sums of all
    buckets are l2-normalised and the rounds averaged; an empty bucket is zero.
    """

    history_gradient: ClassVar[bool] = True
    rounds: ClassVar[int] = 16
    bits_per_round: ClassVar[int] = 3
    hashes: Tensor

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.register_buffer("hashes", torch.randn(config.dim, self.rounds * self.bits_per_round))

    def long_interest(self, meeting: Meeting) -> Tensor:
        """Mean over the rounds of the normalised sum of the candidate's bucket [B, K, d]."""
        valid, tokens = meeting.users.valid, meeting.tokens
        B, _, d = tokens.shape
        buckets = self.rounds * (1 << self.bits_per_round)
        with torch.no_grad():
            row = torch.arange(B, device=tokens.device)[:, None, None] * buckets
            ours, wanted = self._buckets(meeting.users.vectors) + row, self._buckets(meeting.x)[meeting.index] + row
        table = tokens.new_zeros(B * buckets, d)
        for which in ours.unbind(2):  # padded tokens are zero, whatever their bucket
            table = table.index_add(0, which.flatten(), tokens.flatten(0, 1))
        mean = functional.normalize(table, dim=1)[wanted].mean(dim=2)  # [B, K, d]
        return torch.where(valid.any(dim=1)[:, None, None], mean, self.no_din)

    def long_flops(self, length: int) -> float:  # noqa: ARG002  does not depend on it, as for LSH-DIN
        """A row of h per round and their sum: the user's table is ready, with W1d and the mean folded into it."""
        return float(self.rounds * self.config.width)

    def _buckets(self, vectors: Tensor) -> Tensor:
        """Bucket of each vector [..., d] in each round, numbered through i8 [..., rounds]."""
        bits = (vectors @ self.hashes > 0).reshape(*vectors.shape[:-1], self.rounds, self.bits_per_round)
        place = (bits << torch.arange(self.bits_per_round, device=bits.device)).sum(dim=-1)
        return place + torch.arange(self.rounds, device=bits.device) * (1 << self.bits_per_round)


class ItemDots(AIF):
    """AIF with dot products of the user with the item vector x_i as one more block of the first layer.

    Linear in x_i, so they fold into one matrix per user [h, d], at the price of x_i in the hot record and a product
    [h, d] x [d] per candidate.
    """

    count: ClassVar[int] = 8

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.item_dots = Dots(self.count, config.dim, config, config.dim**-0.5)

    def interest(self, meeting: Meeting) -> Tensor:
        """See `AIF`, and the dot products [B, K, h]."""
        dots: Tensor = self.item_dots(meeting.user, meeting.x[meeting.index])
        return super().interest(meeting) + dots

    def serving_flops(self, length: int, window: int) -> float:
        """Of AIF, and the matrix per user times x_i."""
        return super().serving_flops(length, window) + 2.0 * self.config.width * self.config.dim


MODELS: dict[str, type[Ranker]] = {
    "aif": AIF,
    "dssm": DSSM,
    "cold": COLD,
    "inttower": IntTower,
    "din": DIN,
    "din-plain": PlainDIN,
    "eta": ETA,
    "sdim": SDIM,
    "aif-dots": ItemDots,
}


def build(name: str, config: ModelConfig, sizes: Sizes, seed: int = 0) -> Ranker:
    """A model of MODELS with weights and LSH projection drawn from `seed`; the global random state stays as it is.

    Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not known; known are {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](config, sizes)
    projection = lsh.projection(config.embedding_dim, config.bits, seed, config.bits_per_projection)
    with torch.no_grad():  # it may be one that learns
        model.projection.copy_(torch.from_numpy(projection))
    return model


def _light_se(groups: list[Tensor], gates: nn.Linear) -> Tensor:
    """Light-SE of IntTower: groups, each [n, size], weighed and joined [n, sum of sizes]."""
    means = torch.stack([group.mean(dim=1) for group in groups], dim=1)
    weights = torch.softmax(gates(means), dim=1)  # [n, groups]
    return torch.cat([group * (1 + weights[:, [k]]) for k, group in enumerate(groups)], dim=1)


def _signs(vectors: Tensor, hashes: Tensor) -> Tensor:
    """SimHash signatures of vectors [..., d] as -1 and +1 [..., bits]."""
    return torch.where(vectors @ hashes > 0, 1.0, -1.0)
