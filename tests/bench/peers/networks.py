"""The network of the peers: `encoders.model.AIF` cut where a user of PyTorch or ONNX Runtime would cut it.

`UserSide` runs once per request, `TrainingForm` and `FoldedForm` once per chunk of candidates. Sort and search, which
do not export, are done by `UserInputs` in NumPy: distinct crosses become the rows of a matrix that averages tokens.
All else is in the networks; their equations are those of AIF and of `encoders.fold`. Letters in the shape comments are
those of encoders/model.py, with c = crosses that the user met and K = candidates of a chunk.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoders import lsh
from encoders.crosses import sim_counts
from encoders.features import ProfileEncoder
from encoders.fold import Behaviours
from encoders.inputs import NO_CROSS
from encoders.model import AIF
from encoders.ranker import RECENCY_EDGES
from tests.bench.peers.data import Data

Arrays = dict[str, NDArray[Any]]
EqualBits = Callable[[Tensor, Tensor], Tensor]  # see `float_product`


@dataclasses.dataclass(frozen=True)
class User:
    """What the networks and the meeting take of a user."""

    inputs: Arrays  # of UserSide, by name
    places: NDArray[np.int64]  # row of G for each slot of a cross [65536]
    signatures: NDArray[np.uint8]  # of the history [L, b / 8]


class UserInputs:
    """Profile and behaviours -> what `UserSide` takes, as columns."""

    def __init__(self, data: Data) -> None:
        self._encoder = ProfileEncoder(data.bundle.manifest.features)
        self._as_of, model = data.as_of, data.bundle.model
        self._kinds, self._cap = model.cross_kinds.numpy(), model.config.cross_rows
        self._weights = np.eye(len(model.W1s), dtype=np.float32)

    def of(self, profile: Mapping[str, Any], past: Behaviours) -> User:
        features = self._encoder.features([profile])
        assert len(features.ids) == len(features.offsets), "profiles have one id per category"
        ages = self._as_of - past.times
        slots, means, counts = self._crosses(past, ages)
        kinds = self._kinds[np.where(slots < len(self._kinds), slots, 0)]
        places = np.zeros(1 << 16, np.int64)
        places[slots] = np.arange(1, len(slots) + 1)
        places[NO_CROSS] = len(slots) + 1  # a row of zeros
        inputs: Arrays = {
            "profile_ids": features.ids.numpy(),
            "profile_numerics": features.numerics.numpy(),
            "vectors": past.vectors.astype(np.float32),
            "actions": past.actions.astype(np.int64),
            "recencies": np.searchsorted(RECENCY_EDGES, ages, side="right"),
            "signatures": past.signatures,
            "means": means,
            "counts": counts,
            "kinds": self._weights[kinds],
        }
        return User(inputs, places, past.signatures)

    def _crosses(
        self, past: Behaviours, ages: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Slots [c], the matrix [c, L] that averages the tokens in each, and the first columns of SIM(u, c) [c, 2]."""
        behaviour, column = np.nonzero(past.crosses)
        slots, row, count = np.unique(past.crosses[behaviour, column], return_inverse=True, return_counts=True)
        assert len(slots) <= self._cap, "a capped table of crosses is not among the peers"
        means = np.zeros((len(slots), len(past)), np.float32)
        means[row, behaviour] = (1 / count)[row]
        newest = np.zeros(len(slots), np.int64)
        newest[row] = behaviour  # behaviours stand oldest first
        counts = sim_counts(torch.from_numpy(count.astype(np.float32)), torch.from_numpy(ages[newest]))
        return slots.astype(np.int64), means, counts.numpy()


class UserSide(nn.Module):
    """The user's part of the first layer, not folded: user [1, d], V [n, d], tokens [L, d], G [c + 2, h], whose first
    row is for absent crosses and whose last one is zero."""

    outputs = ("user", "V", "tokens", "G")

    def __init__(self, model: AIF) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        profile_ids: Tensor,  # i8 [categories]
        profile_numerics: Tensor,  # [1, numerics]
        vectors: Tensor,  # [L, d]
        actions: Tensor,  # i8 [L]
        recencies: Tensor,  # i8 [L]
        signatures: Tensor,  # u1 [L, b / 8], for FoldedSide
        means: Tensor,  # [c, L]
        counts: Tensor,  # [c, 2]
        kinds: Tensor,  # [c, kinds], 1 at the cross's own
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model, R = self.model, self.model.config.recent
        tower = model.profile_tower
        numerics = torch.where(torch.isnan(profile_numerics), tower.missing, profile_numerics)
        joined = torch.cat([tower.table[profile_ids].flatten()[None], numerics, torch.ones(1, 1)], dim=1)
        profile = tower.outer(functional.relu(tower.inner(joined)))  # [1, d]
        tokens = vectors + model.token_table()[actions * len(model.recency_table) + recencies]
        recent = tokens[-R:][None]
        valid = torch.ones(recent.shape[:2], dtype=torch.bool)
        user = model.user_tower(profile, recent, valid)
        V = model.bridge_values(profile, recent, valid)[0]
        summaries = torch.cat([counts, means @ tokens], dim=1)  # [c, d + 2]
        rows = ((summaries @ model.W1s.transpose(1, 2)) * kinds.T[:, :, None]).sum(dim=0)  # [c, h]
        G = torch.cat([model.absent_cross()[None], rows, torch.zeros(1, rows.shape[1])])
        return user, V, tokens, G


class FoldedSide(UserSide):
    """The same, folded as `encoders.fold` does: P [1, h], C [n, h], D [b, h] for bits of 0 and 1, G [c + 2, h]."""

    outputs = ("P", "C", "D", "G")

    def forward(
        self,
        profile_ids: Tensor,
        profile_numerics: Tensor,
        vectors: Tensor,
        actions: Tensor,
        recencies: Tensor,
        signatures: Tensor,
        means: Tensor,
        counts: Tensor,
        kinds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model, config = self.model, self.model.config
        user, V, tokens, G = super().forward(
            profile_ids, profile_numerics, vectors, actions, recencies, signatures, means, counts, kinds
        )
        signs = 2 * _bits(signatures) - 1  # [L, b]
        W1d = model.W1d.T * config.din_scale
        D = signs.T @ tokens / (2 * config.bits * len(tokens)) @ W1d
        if model.dots:
            D = D + model.dots.fold(user[0]).T
        P = user @ model.W1u.T + tokens.mean(dim=0, keepdim=True) @ W1d * (0.5 - config.din_shift)
        return P - D.sum(dim=0), V @ model.W1b.T, 2 * D, G


class TrainingForm(nn.Module):
    """AIF's forward pass of a chunk of candidates from their features, without what `UserSide` has done; scores [K].

    SimTier counts by cutting: of whole numbers m, min(max(m, e - 1), e) adds up to (e - 1) L + the number of m >= e.
    """

    inputs = ("ids", "numerics", "dense", "bits", "crosses", "user", "V", "tokens", "G", "history")

    def __init__(self, model: AIF, bags: tuple[int, ...], equal_bits: EqualBits) -> None:
        super().__init__()
        self.model, self._bags, self._equal_bits = model, bags, equal_bits

    def forward(
        self,
        ids: Tensor,  # i8 [K, all ids of an item]
        numerics: Tensor,  # [K, numerics]
        dense: Tensor,  # [K, e]
        bits: Tensor,  # u1 [K, b], 0 and 1
        crosses: Tensor,  # i8 [K, C], rows of G
        user: Tensor,
        V: Tensor,
        tokens: Tensor,
        G: Tensor,
        history: Tensor,  # signs of the behaviours' signatures [b, L], of the type that `equal_bits` takes
    ) -> Tensor:
        model = self.model
        x = self._item_vectors(ids, numerics, dense)
        matches = self._equal_bits(bits, history)  # [K, L], in -b .. b: twice the equal bits, less b
        z = user @ model.W1u.T + model.b1 + x @ model.W1x.T
        z = z + model.bridge_weights(x) @ V @ model.W1b.T
        z = z + self._long_interest(matches, tokens) @ model.W1d.T
        z = z + torch.log1p(self._tiers(matches)) @ model.tier_table @ model.W1t.T
        z = z + cross_mean(G, crosses)
        if model.dots:
            z = z + (2 * bits.float() - 1) @ model.dots.queries(user)[0].T @ model.dots.W1.T
        return head(model, z)

    def _item_vectors(self, ids: Tensor, numerics: Tensor, dense: Tensor) -> Tensor:
        tower = self.model.item_tower
        parts = torch.split(tower.table[ids], list(self._bags), dim=1)  # each [K, ids of the category, category_dim]
        bags = [part.squeeze(1) if part.shape[1] == 1 else part.mean(dim=1) for part in parts]
        known = torch.where(torch.isnan(numerics), tower.missing, numerics)
        out: Tensor = tower.outer(functional.relu(tower.inner(torch.cat([*bags, known, dense], dim=1))))
        return out

    def _long_interest(self, matches: Tensor, tokens: Tensor) -> Tensor:
        """DIN(u,i) [K, d]; what is equal for all pairs is multiplied and added behind the product."""
        config = self.model.config
        mean = matches @ tokens * (config.din_scale / (2 * config.bits))
        return (mean + config.din_scale * (0.5 - config.din_shift) * tokens.sum(dim=0)) / len(tokens)

    def _tiers(self, matches: Tensor) -> Tensor:
        """Behaviours in each tier of each window [K, tiers of all]."""
        config, out = self.model.config, []
        for window in config.windows:
            near = matches[:, -window:]
            L = near.shape[1]
            cuts = [(2.0 * (edge - 1) - config.bits, 2.0 * edge - config.bits) for edge in config.tier_edges]
            sums = [near.clamp(low, high).sum(dim=1, keepdim=True) * 0.5 - L * low / 2 for low, high in cuts]
            first, last = L - sums[0], sums[-1]
            out += [first, *(a - b for a, b in itertools.pairwise(sums)), last]
        return torch.cat(out, dim=1)


class FoldedForm(nn.Module):
    """The folded join and the head, of the columns of a chunk's records; scores [K]."""

    inputs = ("joint", "bridge", "bits", "crosses", "tiers", "P", "C", "D", "G")

    def __init__(self, model: AIF) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("T", (model.W1t @ model.tier_table.T).T.contiguous())

    T: Tensor

    def forward(
        self,
        joint: Tensor,  # f2 [K, h]
        bridge: Tensor,  # f2 [K, n]
        bits: Tensor,  # u1 [K, b], 0 and 1
        crosses: Tensor,  # i8 [K, C], rows of G
        tiers: Tensor,  # i4 [K, tiers of every window]
        P: Tensor,
        C: Tensor,
        D: Tensor,
        G: Tensor,
    ) -> Tensor:
        # One product of all that is multiplied: the user's and the model's matrices stand one below the other.
        columns = torch.cat([bridge.float(), bits.float(), torch.log(tiers.float() + 1)], dim=1)
        z = columns @ torch.cat([C, D, self.T]) + P + joint.float() + cross_mean(G, crosses)
        return head(self.model, z)


def cross_mean(G: Tensor, crosses: Tensor) -> Tensor:
    """Mean over an item's crosses of the user's rows [K, h]; the first row for an item without any."""
    used = (crosses != G.shape[0] - 1).float().sum(dim=1, keepdim=True)  # [K, 1]
    total = G[crosses[:, 0]]
    for column in range(1, crosses.shape[1]):
        total = total + G[crosses[:, column]]
    return torch.where(used > 0, total / used.clamp(min=1), G[:1])


def head(model: AIF, z: Tensor) -> Tensor:
    for layer in model.head:
        z = layer(functional.relu(z))
    return z[:, 0]


def _bits(packed: Tensor) -> Tensor:
    """Packed signatures u1 [L, b / 8] -> 0 and 1 [L, b]."""
    table = torch.from_numpy((lsh.signs(np.arange(256, dtype=np.uint8)[:, None]) + 1) / 2)  # [256, 8]
    return table[packed.long()].flatten(1)


def int8_product(bits: Tensor, history: Tensor) -> Tensor:
    """Products of signs [K, L], exact, in torch: history i1 [b, L]."""
    return torch._int_mm(2 * bits.to(torch.int8) - 1, history).float()


def onnx_int8_product(bits: Tensor, history: Tensor) -> Tensor:
    """The same as ONNX's integer product, which wants one side unsigned: bits twice, less a zero point of 1."""
    shape = (bits.shape[0], history.shape[1])
    doubled, one = bits * 2, torch.ones((), dtype=torch.uint8)
    out: Tensor = torch.onnx.ops.symbolic("MatMulInteger", (doubled, history, one), dtype=torch.int32, shape=shape)
    return out.float()
