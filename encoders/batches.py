"""Data set -> batches for the training form. Used by training and evaluation alike.

Examples of one user that lie close in time form a group, as the candidates of one request do: all of them are scored
with the history strictly before the first, at its time. So no example sees itself or anything later, and the user side
is computed once per group. Histories are slices of arrays sorted by (user, time); signatures and features are computed
once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from encoders import lsh
from encoders.data.dataset import DataError, Dataset
from encoders.features import FeatureSpec, ItemEncoder, ProfileEncoder
from encoders.model import AIF, Candidates, Features, ModelConfig, Users

GROUP_SIZE = 16  # candidates of a group, at most
GROUP_SPAN = 3_600_000  # ms from the first to the last example of a group
_CHUNK = 32  # batches among which groups are ordered by history length, so that padding stays small

I8 = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of examples; a group's examples are places in the log sorted by (user, time)."""

    user: I8  # [g]
    first: I8  # [g], place of the first example
    size: I8  # [g]
    history: I8  # [g], place behind the last behaviour strictly before the first example

    def __len__(self) -> int:
        return len(self.user)

    def select(self, which: npt.NDArray[np.bool_] | I8) -> Groups:
        return Groups(self.user[which], self.first[which], self.size[which], self.history[which])


@dataclasses.dataclass(frozen=True)
class Batch:
    users: Users
    candidates: Candidates
    clicked: torch.Tensor  # f4 [B, K]
    counted: torch.Tensor  # bool [B, K], False = padding
    groups: Groups  # of length B


class Batches:
    """A data set encoded for one model's spec and config."""

    def __init__(self, data: Dataset, spec: FeatureSpec, config: ModelConfig) -> None:
        """Raises DataError where the spec cannot encode an item or a profile of the data."""
        self._config = config
        columns = ItemEncoder(spec, config.embedding_dim, config.crosses).columns(data.items.rows())
        for item_id, error in zip(data.items.ids, columns.errors, strict=True):
            if error is not None:
                raise DataError(f"item {item_id!r} does not fit the bundle: {error}")
        self.embedding = columns.embedding
        self._items = _Bags(columns.features)
        self._crosses = columns.crosses.astype(np.int64)
        try:
            self._profiles = _Bags(ProfileEncoder(spec).features(list(data.profiles.features)))
        except ValueError as error:
            raise DataError(f"a profile does not fit the bundle: {error}") from error
        self._known = np.array([bool(features) for features in data.profiles.features], dtype=bool)
        order = np.argsort(data.log.user, kind="stable")
        self.user = data.log.user[order].astype(np.int64)
        self.item = data.log.item[order].astype(np.int64)
        self.time = data.log.time[order]
        self.clicked = data.log.clicked[order]
        self._action = spec.action_codes(data.actions)[data.log.action[order]].astype(np.int64)
        self._begin = np.searchsorted(self.user, np.arange(len(data.profiles.ids)))  # first behaviour of each user
        self._signs = np.zeros((len(data.items.ids), config.bits), dtype=np.float32)

    def sign(self, signatures: npt.NDArray[np.uint8]) -> None:
        """Take the items' signatures [M, b / 8]."""
        self._signs = lsh.signs(signatures)

    def groups(self, since: int, until: int) -> Groups:
        """Groups of the examples with `since` <= time < `until` (ms)."""
        places = np.flatnonzero((self.time >= since) & (self.time < until))
        first: list[int] = []
        size: list[int] = []
        user, time = self.user[places].tolist(), self.time[places].tolist()
        for at, place in enumerate(places.tolist()):
            begin = at - size[-1] if size else at
            same = size and user[begin] == user[at] and time[at] - time[begin] <= GROUP_SPAN and size[-1] < GROUP_SIZE
            if same:
                size[-1] += 1
            else:
                first.append(place)
                size.append(1)
        start = np.array(first, dtype=np.int64)
        return Groups(
            user=self.user[start],
            first=start,
            size=np.array(size, dtype=np.int64),
            history=self._before(start),
        )

    def batches(
        self, groups: Groups, model: AIF, size: int, random: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """Batches of up to `size` groups; in random order where `random` is given. Item vectors are the model's at the
        time.
        """
        length = groups.history - self._begin[groups.user]
        order = np.argsort(length, kind="stable") if random is None else random.permutation(len(groups))
        if random is not None:
            parts = np.split(order, range(size * _CHUNK, len(order), size * _CHUNK))
            order = np.concatenate([part[np.argsort(length[part], kind="stable")] for part in parts])
        slices = [order[at : at + size] for at in range(0, len(order), size)]
        if random is not None:
            random.shuffle(slices)
        for part in slices:
            yield self._batch(groups.select(part), model)

    def matches_sample(self, groups: Groups, signatures: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        """Equal bits of every group's first candidate with its window; what tier edges are measured on."""
        out = []
        for user, first, end in zip(groups.user, groups.first, groups.history, strict=True):
            begin = max(int(self._begin[user]), int(end) - self._config.window)
            candidate = signatures[self.item[first]][None, :]
            out.append(lsh.matches(candidate, signatures[self.item[begin:end]])[0])
        return np.concatenate(out) if out else np.empty(0, dtype=np.int32)

    def _before(self, first: I8) -> I8:
        """Place behind the last behaviour of the same user with an earlier time."""
        tied = np.flatnonzero((np.diff(self.user, prepend=-1) != 0) | (np.diff(self.time, prepend=-1) != 0))
        out: I8 = tied[np.searchsorted(tied, first, side="right") - 1]
        return out

    def _batch(self, groups: Groups, model: AIF) -> Batch:
        K = int(groups.size.max())
        places = groups.first[:, None] + np.arange(K)  # [B, K]
        counted = np.arange(K) < groups.size[:, None]
        places = np.where(counted, places, groups.first[:, None])
        distinct, index = np.unique(self.item[places], return_inverse=True)
        return Batch(
            users=self._users(groups, model),
            candidates=Candidates(
                features=self._items.take(distinct),
                signatures=torch.from_numpy(self._signs[distinct]),
                crosses=torch.from_numpy(self._crosses[distinct]),
                index=torch.from_numpy(index.reshape(places.shape)),
            ),
            clicked=torch.from_numpy(self.clicked[places].astype(np.float32)),
            counted=torch.from_numpy(counted),
            groups=groups,
        )

    def _users(self, groups: Groups, model: AIF) -> Users:
        begin = np.maximum(self._begin[groups.user], groups.history - self._config.window)
        L = int((groups.history - begin).max())
        places = groups.history[:, None] - L + np.arange(L)  # [B, L], padded on the left
        valid = places >= begin[:, None]
        places = np.where(valid, places, 0)
        item = self.item[places]
        distinct, index = np.unique(item, return_inverse=True)
        with torch.no_grad():
            vectors = model.item_vectors(self._items.take(distinct))
        as_of = self.time[groups.first]
        return Users(
            profile=self._profiles.take(groups.user),
            known=torch.from_numpy(self._known[groups.user]),
            vectors=vectors[torch.from_numpy(index.reshape(item.shape))],
            signatures=torch.from_numpy(self._signs[item]),
            crosses=torch.from_numpy(self._crosses[item]),
            actions=torch.from_numpy(self._action[places]),
            ages=torch.from_numpy(np.where(valid, as_of[:, None] - self.time[places], 0)),
            valid=torch.from_numpy(valid),
        )


class _Bags:
    """Encoded features from which any rows can be taken."""

    def __init__(self, features: Features) -> None:
        self._ids = features.ids.numpy()
        rows, bags = len(features.dense), len(features.offsets)
        starts = features.offsets.numpy()
        self._starts = starts.reshape(rows, bags // max(1, rows))  # [rows, categories]
        self._sizes = np.diff(starts, append=len(self._ids)).reshape(self._starts.shape)
        self._numerics, self._dense = features.numerics, features.dense

    def take(self, rows: I8) -> Features:
        starts, sizes = self._starts[rows].ravel(), self._sizes[rows].ravel()
        offsets = np.cumsum(sizes) - sizes
        ids = self._ids[np.repeat(starts - offsets, sizes) + np.arange(sizes.sum())]
        where = torch.from_numpy(rows)
        return Features(torch.from_numpy(ids), torch.from_numpy(offsets), self._numerics[where], self._dense[where])
