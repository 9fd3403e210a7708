"""Data set -> batches for the training form. Used by training and evaluation alike.

Examples of one user that lie close in time form a group, as the candidates of one request do: all of them are scored
with the history strictly before the first, at its time. So no example sees itself or anything later, and the user side
is computed once per group. Histories are slices of the data's columns, which are not copied: they may be memory maps.
Signatures and features are computed once, a part of the items at a time; embeddings stay where the data has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from encoders import lsh
from encoders.config import ModelConfig
from encoders.data.dataset import BehaviourLog, DataError, Dataset, Examples
from encoders.features import FeatureSpec, ItemColumns, ItemEncoder, ProfileEncoder
from encoders.inputs import Candidates, Features, Users
from encoders.ranker import Ranker

GROUP_SIZE = 32  # candidates of a group, at most
GROUP_SPAN = 3_600_000  # ms from the first to the last example of a group
PART = 16_384  # items that are encoded together
_EXAMPLES = 1 << 17  # of which groups are made together, and the rest of the last one's user
_CHUNK = 32  # batches among which groups are ordered by history length, so that padding stays small

I8 = npt.NDArray[np.int64]
F4 = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of examples: consecutive places in the data's examples, and the history that all of a group see."""

    user: I8  # [g]
    first: I8  # [g], place of the first example
    size: I8  # [g]
    history: I8  # [g], place in the log behind the last behaviour strictly before the first example

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
        self.embedding = data.items.embeddings
        bags, crosses = [], []
        for columns in _encoded(data, ItemEncoder(spec, config.embedding_dim, config.crosses)):
            bags.append(_Part.of(columns.features))
            crosses.append(columns.crosses)
        self._items, self._crosses = _Bags(bags, self.embedding), np.concatenate(crosses)
        try:
            profiles = ProfileEncoder(spec).features(list(data.profiles.features))
        except ValueError as error:
            raise DataError(f"a profile does not fit the bundle: {error}") from error
        self._profiles = _Bags([_Part.of(profiles)], profiles.dense.numpy())
        self.known = np.array([bool(features) for features in data.profiles.features], dtype=bool)  # [U], has a profile
        self.log, self.examples = data.log, data.examples
        self._codes = spec.action_codes(data.actions).astype(np.int64)
        self._begin = data.begins()
        self._signatures: npt.NDArray[np.uint8] | F4 = np.zeros((len(data.items.ids), config.bits // 8), np.uint8)

    def sign(self, signatures: npt.NDArray[np.uint8] | F4) -> None:
        """Take the items' signatures [M, b / 8], or the directions that stand for them where lsh = "cosine" [M, e]."""
        self._signatures = signatures

    def sign_by(self, model: Ranker) -> None:
        """Take the items' signatures as the model makes them."""
        self.sign(in_parts(model.signatures_or_directions, self.embedding))

    def signs(self, items: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Signatures of items [...] as -1 and +1 [..., b], or their directions [..., e]."""
        found = self._signatures[items]
        return lsh.signs(found) if found.dtype == np.uint8 else found

    def groups(self, since: int, until: int) -> Groups:
        """Groups of the examples with `since` <= time < `until` (ms)."""
        return groups_of(self.examples, self.log, self._begin, since, until)

    def plan(self, groups: Groups, size: int, random: np.random.Generator | None = None) -> list[I8]:
        """Which groups each batch of up to `size` holds; a random order where `random` is given. Groups of like history
        length stand together, so that padding stays small.
        """
        length = groups.history - self._begin[groups.user]
        order = np.argsort(length, kind="stable") if random is None else random.permutation(len(groups))
        if random is not None:
            parts = np.split(order, range(size * _CHUNK, len(order), size * _CHUNK))
            order = np.concatenate([part[np.argsort(length[part], kind="stable")] for part in parts])
        slices = [order[at : at + size] for at in range(0, len(order), size)]
        if random is not None:
            random.shuffle(slices)
        return slices

    def batches(
        self, groups: Groups, model: Ranker, size: int, random: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """The batches of `plan`. Item vectors are the model's at the time."""
        for part in self.plan(groups, size, random):
            yield self.batch(groups.select(part), model)

    def matches_sample(self, groups: Groups) -> npt.NDArray[np.float64]:
        """Equal bits of every group's first candidate with its window; what tier edges are measured on."""
        out = []
        for user, first, end in zip(groups.user, groups.first, groups.history, strict=True):
            begin = max(int(self._begin[user]), int(end) - self._config.window)
            candidate = self.signs(self.examples.item[first])
            out.append((self._config.bits + self.signs(self.log.item[begin:end]) @ candidate) / 2)
        return np.concatenate(out).astype(np.float64) if out else np.empty(0)

    def batch(self, groups: Groups, model: Ranker) -> Batch:
        """One batch of all the groups. Item vectors are the model's at the time."""
        K = int(groups.size.max())
        places = groups.first[:, None] + np.arange(K)  # [B, K]
        counted = np.arange(K) < groups.size[:, None]
        places = np.where(counted, places, groups.first[:, None])
        return Batch(
            users=self.users(groups, model),
            candidates=self.candidates(self.examples.item[places], model),
            clicked=torch.from_numpy(self.examples.clicked[places].astype(np.float32)),
            counted=torch.from_numpy(counted),
            groups=groups,
        )

    def candidates(self, items: npt.NDArray[np.integer], model: Ranker | None = None) -> Candidates:
        """Any items [B, K], not only those of examples, as candidates. Signatures that learn are the given model's."""
        distinct, index = np.unique(items, return_inverse=True)
        return Candidates(
            features=self._items.take(distinct),
            signatures=self._signs(distinct, model),
            crosses=self._slots(distinct),
            index=torch.from_numpy(index.reshape(items.shape)),
        )

    def profiles(self, users: I8) -> Features:
        """Profiles of users, as their towers take them."""
        return self._profiles.take(users)

    def users(self, groups: Groups, model: Ranker) -> Users:
        """The user side of a batch."""
        begin = np.maximum(self._begin[groups.user], groups.history - self._config.longest)
        L = int((groups.history - begin).max())
        places = groups.history[:, None] - L + np.arange(L)  # [B, L], padded on the left
        valid = places >= begin[:, None]
        places = np.where(valid, places, 0)
        item = self.log.item[places]
        distinct, where = np.unique(item, return_inverse=True)
        index = torch.from_numpy(where.reshape(item.shape))
        with torch.set_grad_enabled(model.history_gradient and torch.is_grad_enabled()):
            vectors = model.item_vectors(self._items.take(distinct))
        as_of = self.examples.time[groups.first]
        return Users(
            profile=self.profiles(groups.user),
            known=torch.from_numpy(self.known[groups.user]),
            vectors=vectors[index],
            signatures=self._signs(distinct, model)[index],
            crosses=self._slots(item),
            actions=torch.from_numpy(self._codes[self.log.action[places]]),
            ages=torch.from_numpy(np.where(valid, as_of[:, None] - self.log.time[places], 0)),
            valid=torch.from_numpy(valid),
        )

    def _slots(self, items: npt.NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(self._crosses[items].astype(np.int64))

    def _signs(self, items: I8, model: Ranker | None) -> torch.Tensor:
        """Signatures as `Users` and `Candidates` hold them, of items [m]; where they learn, the model's at the time."""
        if model is not None and model.config.lsh == "learned":
            return model.learning_signs(torch.from_numpy(self.embedding[items]))
        return torch.from_numpy(self.signs(items))


def in_parts(make: Callable[[F4], npt.NDArray[Any]], embeddings: F4) -> npt.NDArray[Any]:
    """What `make` gives for embeddings [M, e], which may be a memory map, a part at a time."""
    return np.concatenate([make(embeddings[at : at + PART]) for at in range(0, max(1, len(embeddings)), PART)])


def groups_of(examples: Examples, log: BehaviourLog, begin: I8, since: int, until: int) -> Groups:
    """As `Batches.groups`, of data that nobody has encoded. `begin` [U + 1]: where each user's behaviours begin.

    Some users at a time, so that beside the groups (32 bytes each) memory does not grow with the examples.
    """
    parts, at = [_grouped(examples, log, begin, slice(0, 0), since, until)], 0
    while at < len(examples):
        last = examples.user[min(at + _EXAMPLES, len(examples)) - 1]
        end = int(np.searchsorted(examples.user, last, side="right"))
        parts.append(_grouped(examples, log, begin, slice(at, end), since, until))
        at = end
    columns = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(Groups)]
    return Groups(*(np.concatenate(column) for column in columns))


def _grouped(examples: Examples, log: BehaviourLog, begin: I8, part: slice, since: int, until: int) -> Groups:
    """The groups of consecutive examples: all those of some users."""
    time = examples.time[part]
    inside = np.flatnonzero((time >= since) & (time < until))
    places, user, time = inside + part.start, examples.user[part][inside], time[inside]
    # Where the next group begins if one begins here: another user, a full group, or a later request.
    here = np.arange(len(places))
    end = np.minimum(np.searchsorted(user, user, side="right"), here + GROUP_SIZE)
    behind = _search(time, here, end, time + GROUP_SPAN + 1)
    starts, at = [], 0
    while at < len(places):
        starts.append(at)
        at = int(behind[at])
    start = np.array(starts, dtype=np.int64)
    whose = user[start].astype(np.int64)
    return Groups(
        user=whose,
        first=places[start],
        size=behind[start] - start,
        history=_search(log.time, begin[whose], begin[whose + 1], time[start]),
    )


def _search(values: npt.NDArray[np.int64], begin: I8, end: I8, wanted: I8) -> I8:
    """For each k the first place in begin[k]..end[k] whose value, ascending there, is >= wanted[k]; end[k] if none."""
    low, high = begin.astype(np.int64), end.astype(np.int64)
    while (open_ := low < high).any():
        middle = np.where(open_, (low + high) // 2, 0)
        below = open_ & (values[middle] < wanted)
        low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
    return low


def _encoded(data: Dataset, encoder: ItemEncoder) -> Iterator[ItemColumns]:
    items = data.items
    for at in range(0, max(1, len(items.ids)), PART):
        columns = encoder.columns(items.rows(at, at + PART))
        for item_id, error in zip(items.ids[at : at + PART], columns.errors, strict=True):
            if error is not None:
                raise DataError(f"item {item_id!r} does not fit the bundle: {error}")
        yield columns


@dataclasses.dataclass(frozen=True)
class _Part:
    """Encoded features without their dense column, in small types."""

    ids: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]  # of the bags, row after row
    numerics: torch.Tensor

    @classmethod
    def of(cls, features: Features) -> _Part:
        sizes = np.diff(features.offsets.numpy(), append=len(features.ids))
        return cls(features.ids.numpy().astype(np.int32), sizes.astype(np.int32), features.numerics)


class _Bags:
    """Encoded features from which any rows can be taken."""

    def __init__(self, parts: Sequence[_Part], dense: F4) -> None:
        """The parts' rows one after the other, and the dense column of all of them."""
        self._ids = np.concatenate([part.ids for part in parts])
        sizes = np.concatenate([part.sizes for part in parts])
        self._sizes = sizes.reshape(len(dense), -1 if len(dense) else 0)  # [rows, categories]
        self._ends = np.cumsum(sizes, dtype=np.int64).reshape(self._sizes.shape)
        self._numerics, self._dense = torch.cat([part.numerics for part in parts]), dense

    def take(self, rows: I8) -> Features:
        sizes = self._sizes[rows].ravel()
        ends, offsets = self._ends[rows].ravel(), np.cumsum(sizes) - sizes
        ids = self._ids[np.repeat(ends - sizes - offsets, sizes) + np.arange(sizes.sum())]
        return Features(
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(offsets),
            self._numerics[torch.from_numpy(rows)],
            torch.from_numpy(self._dense[rows]),
        )
