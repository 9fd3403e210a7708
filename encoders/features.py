"""Items and profiles as they arrive -> columns for the network. First step of `ItemFold.encode` and `UserFold.block`.

A `FeatureSpec` stands in the bundle's manifest and says everything: which features exist, how strings become table rows
(CRC-32 modulo a number of buckets: the same in every process and version), how numbers are standardised, which crosses
own slots. Features that the spec does not name are ignored; features that an item lacks take a learned default.
Guarantee: `ItemEncoder.columns` never raises for what an item holds; an item that cannot be encoded gets a message and
harmless columns.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from encoders.config import Sizes
from encoders.inputs import NO_CROSS, Features

_SLOTS = 65_536  # crosses are stored as u2
_KINDS = 15  # of crosses that have weights of their own, at most
_MEMO_LIMIT = 1 << 20  # remembered strings per feature; beyond it the memory starts again
_NUMERIC_LIMIT = 8.0  # standardised numbers are clipped to this
MANY = 128  # items from which columns at a time are faster
_NUMBERS = {float, int, bool, NoneType}
_ABSENT = object()  # stands in the place of a string
_MISSING = (_ABSENT,)  # the bag of a feature without a value


class SpecError(ValueError):
    """A feature spec that cannot be used; the message says what is wrong."""


class FeatureError(ValueError):
    """An item or a profile that cannot be encoded; the message names the field."""


_REFUSED = (FeatureError, TypeError, AttributeError, OverflowError)  # what encoding an item may raise


class Item(Protocol):
    """What an item event carries; any object with these attributes can be encoded."""

    @property
    def features(self) -> Mapping[str, Any]: ...
    @property
    def embedding(self) -> Sequence[float] | npt.NDArray[np.float32] | bytes | None: ...  # bytes: f4, little-endian
    @property
    def crosses(self) -> Sequence[str]: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A string or a list of strings, hashed into `buckets` rows and mean-pooled."""

    name: str
    buckets: int


@dataclasses.dataclass(frozen=True)
class Numeric:
    """A number, standardised by the mean and the standard deviation of training."""

    name: str
    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Features of items and users, vocabulary of crosses and actions, numeric attributes of the row."""

    item_categories: tuple[Categorical, ...] = ()
    item_numerics: tuple[Numeric, ...] = ()
    user_categories: tuple[Categorical, ...] = ()
    user_numerics: tuple[Numeric, ...] = ()
    crosses: tuple[str, ...] = ()  # the k-th owns slot k + 1; others hash into the slots behind
    cross_slots: int = _SLOTS  # slots 1..cross_slots - 1 are in use
    actions: tuple[str, ...] = ()  # the k-th has code k + 1; 0 = unknown
    attributes: tuple[str, ...] = ()  # numeric attributes kept in the row

    def __post_init__(self) -> None:
        for names in (
            [*(c.name for c in self.item_categories), *(n.name for n in self.item_numerics)],
            [*(c.name for c in self.user_categories), *(n.name for n in self.user_numerics)],
            self.crosses,
            self.actions,
            self.attributes,
        ):
            if len(set(names)) != len(names):
                raise SpecError(f"names stand twice in the feature spec: {sorted(names)[:8]}")
        if not 2 <= self.cross_slots <= _SLOTS:
            raise SpecError(f"crosses have 2 to {_SLOTS} slots, not {self.cross_slots}")
        if len(self.crosses) >= self.cross_slots - 1:
            raise SpecError(f"{len(self.crosses)} crosses do not leave a slot for unknown ones")
        if len(self.actions) > 255:
            raise SpecError(f"{len(self.actions)} actions do not fit one byte")
        if any(c.buckets < 1 for c in (*self.item_categories, *self.user_categories)):
            raise SpecError("a categorical feature needs at least one bucket")
        if any(not n.std > 0 or not math.isfinite(n.mean) for n in (*self.item_numerics, *self.user_numerics)):
            raise SpecError("a numeric feature needs a finite mean and a positive standard deviation")

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            item=(_table_rows(self.item_categories), len(self.item_categories), len(self.item_numerics)),
            user=(_table_rows(self.user_categories), len(self.user_categories), len(self.user_numerics)),
            actions=len(self.actions),
            cross_kinds=self.cross_kinds,
        )

    @property
    def cross_kinds(self) -> tuple[int, ...]:
        """The kind of each cross of the vocabulary: the place, from 1, of what stands before the colon of its name
        among the most frequent such words; 0 = none of them.
        """
        words = [name.partition(":")[0] if ":" in name else "" for name in self.crosses]
        counted = Counter(word for word in words if word)
        kinds = {word: place for place, (word, _) in enumerate(counted.most_common(_KINDS), start=1)}
        return tuple(kinds.get(word, 0) for word in words)

    def action_codes(self, names: Sequence[str]) -> npt.NDArray[np.uint8]:
        """Codes of action names; index the result with another store's codes to translate a whole history."""
        known = {name: code for code, name in enumerate(self.actions, start=1)}
        return np.array([known.get(name, 0) for name in names], dtype=np.uint8)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FeatureSpec:
        """Raises SpecError where `fields` is not what `to_json` gave."""
        try:
            return cls(
                item_categories=tuple(Categorical(**feature) for feature in fields["item_categories"]),
                item_numerics=tuple(Numeric(**feature) for feature in fields["item_numerics"]),
                user_categories=tuple(Categorical(**feature) for feature in fields["user_categories"]),
                user_numerics=tuple(Numeric(**feature) for feature in fields["user_numerics"]),
                crosses=tuple(fields["crosses"]),
                cross_slots=int(fields.get("cross_slots", _SLOTS)),
                actions=tuple(fields["actions"]),
                attributes=tuple(fields["attributes"]),
            )
        except (KeyError, TypeError) as error:
            raise SpecError(f"the feature spec does not read: {error}") from error


@dataclasses.dataclass(frozen=True)
class ItemColumns:
    """A batch of items as columns; a row with an error holds defaults and a zero embedding."""

    features: Features
    embedding: npt.NDArray[np.float32]  # [n, e]
    crosses: npt.NDArray[np.uint16]  # [n, C]
    attributes: npt.NDArray[np.float32]  # [n, A], NaN = absent
    errors: list[str | None]


class ItemEncoder:
    """Items -> ItemColumns. Holds the memory of hashed strings; one per thread."""

    def __init__(self, spec: FeatureSpec, embedding_dim: int, crosses: int) -> None:
        self._bags = _Bags(spec.item_categories, spec.item_numerics)
        self._slots = _Slots(spec)
        self._attributes = spec.attributes
        self._crosses = crosses
        self._no_slots = [NO_CROSS] * crosses
        self._no_numbers = [math.nan] * len(spec.attributes)
        # packing checks every value's type, and is the fastest way for numbers
        self._numbers = struct.Struct(f"={embedding_dim}d")
        self._no_embedding = bytes(4 * embedding_dim)
        self._embedding_dim = embedding_dim

    def columns(self, items: Sequence[Item]) -> ItemColumns:
        errors: list[str | None] = [None] * len(items)
        try:
            found = self._by_column(items) if len(items) >= MANY else self._by_item(items, errors)
        except _REFUSED:
            found = self._by_item(items, errors)
        packed = np.frombuffer(b"".join(found.embeddings), np.float32).reshape(len(items), self._embedding_dim)
        narrow = _narrow(packed, np.isfinite, errors, "embedding holds a value that is not finite in 32 bits")
        return ItemColumns(
            features=self._bags.features(found.bags, narrow),
            embedding=narrow,
            crosses=found.crosses,
            attributes=_narrow_attributes(found.attributes, errors),
            errors=errors,
        )

    def attributes(self, items: Sequence[Item]) -> tuple[npt.NDArray[np.float32], list[str | None]]:
        """The column `attributes` alone, and why an item cannot be a row for their sake."""
        errors: list[str | None] = [None] * len(items)
        found = [self._numbers_of(item.attributes) for item in items]
        return _narrow_attributes(np.array(found).reshape(len(items), len(self._attributes)), errors), errors

    def _by_column(self, items: Sequence[Item]) -> _Found:
        """As `_by_item`, in 0.6 of its time. Raises one of _REFUSED where an item might not be encodable."""
        return _Found(
            self._bags.columns([item.features for item in items]),
            self._slots_by_column([item.crosses for item in items]),
            self._numbers_by_column([item.attributes for item in items]),
            [self._embedding_of(item.embedding) for item in items],
        )

    def _by_item(self, items: Sequence[Item], errors: list[str | None]) -> _Found:
        """Says in `errors` why an item cannot be encoded."""
        n = len(items)
        embeddings: list[bytes] = []
        crosses: list[int] = []
        attributes: list[float] = []
        batch = self._bags.batch()
        for row, item in enumerate(items):
            try:
                batch.add(item.features)
                slots = self._slots_of(item.crosses)
                values = self._numbers_of(item.attributes)
                embedding = self._embedding_of(item.embedding)
            except _REFUSED as error:
                errors[row] = str(error)
                batch.reset(row)
                batch.add({})
                slots, values, embedding = self._no_slots, self._no_numbers, self._no_embedding
            crosses += slots
            attributes += values
            embeddings.append(embedding)
        return _Found(
            batch.columns(n),
            np.array(crosses, dtype=np.uint16).reshape(n, self._crosses),
            np.array(attributes).reshape(n, len(self._attributes)),
            embeddings,
        )

    def _embedding_of(self, values: Any) -> bytes:
        """As 32-bit floats; infinite where a value does not fit them. Raises FeatureError."""
        if values is None:
            raise FeatureError("embedding is missing")
        if values.__class__ is bytes:
            if len(values) == len(self._no_embedding):
                return values
            if len(values) % 4:
                raise FeatureError(f"embedding has {len(values)} bytes, which are no 32-bit values")
            values = np.frombuffer(values, "<f4")
        if len(values) != self._embedding_dim:
            raise FeatureError(f"embedding has {len(values)} values, the bundle needs {self._embedding_dim}")
        if not isinstance(values, np.ndarray):
            try:
                values = np.frombuffer(self._numbers.pack(*values))
            except struct.error:
                raise FeatureError("embedding holds a value that is not a number") from None
        with np.errstate(over="ignore"):
            packed: bytes = values.astype(np.float32).tobytes()
        return packed

    def _slots_of(self, names: Sequence[str]) -> list[int]:
        """The item's first different slots, filled up to C with NO_CROSS."""
        if not names:
            return self._no_slots
        if isinstance(names, str):
            raise FeatureError("crosses are not a list of strings")
        slots = list(dict.fromkeys(map(self._slots.__getitem__, names)))[: self._crosses]
        return slots + self._no_slots[len(slots) :]

    def _slots_by_column(self, names: list[Sequence[str]]) -> npt.NDArray[np.uint16]:
        if not set(map(type, names)) <= {list, tuple}:
            raise FeatureError("crosses are not all lists")
        counts = np.fromiter(map(len, names), np.intp, len(names))
        slots = np.fromiter(
            map(self._slots.__getitem__, itertools.chain.from_iterable(names)), np.uint16, int(counts.sum())
        )
        out = np.full((len(names), self._crosses), NO_CROSS, np.uint16)
        within = _within(counts)
        kept = within < self._crosses
        out[np.repeat(np.arange(len(names)), counts)[kept], within[kept]] = slots[kept]
        ordered = np.sort(out, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_CROSS)
        for row in np.flatnonzero(twice.any(axis=1) | (counts > self._crosses)):
            out[row] = self._slots_of(names[row])
        return out

    def _numbers_by_column(self, values: list[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
        out = np.empty((len(values), len(self._attributes)))
        for place, found in enumerate(_columns([some or {} for some in values], self._attributes)):
            numbers = set(map(type, found)) <= _NUMBERS
            # None becomes NaN
            out[:, place] = found if numbers else [v if isinstance(v, (float, int)) else None for v in found]
        return out

    def _numbers_of(self, values: Mapping[str, Any]) -> list[float]:
        """The numeric attributes, NaN where absent or not a number; true and false are 1 and 0."""
        if not values:
            return self._no_numbers
        found = map(values.get, self._attributes)
        return [float(value) if isinstance(value, (float, int)) else math.nan for value in found]


class _Bagged(NamedTuple):
    """Features of n items or profiles, numbers not yet standardised."""

    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    numerics: npt.NDArray[np.float64]  # [n, numerics]


class _Found(NamedTuple):
    """Columns of n items, attributes and embeddings as they came."""

    bags: _Bagged
    crosses: npt.NDArray[np.uint16]  # [n, C]
    attributes: npt.NDArray[np.float64]  # [n, A]
    embeddings: list[bytes]


class ProfileEncoder:
    """Profiles -> Features of the profile tower; None becomes the defaults. Threads may share it: what it
    remembers follows from the string alone."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._bags = _Bags(spec.user_categories, spec.user_numerics)

    def features(self, profiles: Sequence[Mapping[str, Any] | None]) -> Features:
        """Raises FeatureError on a value of the wrong type."""
        batch = self._bags.batch()
        for profile in profiles:
            batch.add(profile or {})
        return self._bags.features(batch.columns(len(profiles)), np.ones((len(profiles), 1), dtype=np.float32))


class _Bags:
    """Shared part of items and profiles: categorical and numeric features in the order of the spec."""

    def __init__(self, categories: Sequence[Categorical], numerics: Sequence[Numeric]) -> None:
        base = 0
        self.memos: list[tuple[str, _Buckets]] = []
        for feature in categories:
            self.memos.append((feature.name, _Buckets(feature.name, base, feature.buckets)))
            base += feature.buckets + 1
        self.numerics = [feature.name for feature in numerics]
        self.mean = np.array([feature.mean for feature in numerics], dtype=np.float64)
        self.std = np.array([feature.std for feature in numerics], dtype=np.float64)

    def batch(self) -> _Batch:
        return _Batch(self)

    def columns(self, rows: list[Mapping[str, Any]]) -> _Bagged:
        """What a batch makes of these rows, a feature after the other. Raises one of _REFUSED where a row might be
        refused."""
        n, categories = len(rows), len(self.memos)
        found = _columns(rows, [*(name for name, _ in self.memos), *self.numerics])
        counts = np.ones((n, categories), np.int64)
        parts = []
        for place, ((_, buckets), values) in enumerate(zip(self.memos, found[:categories], strict=True)):
            strings: Iterable[Any] = values
            kinds = set(map(type, values))
            if kinds != {str}:
                if not kinds <= {str, list, tuple, NoneType}:
                    raise FeatureError("a feature is neither a string nor a list of strings")
                lists = [(value,) if value.__class__ is str else value or _MISSING for value in values]
                counts[:, place] = np.fromiter(map(len, lists), np.int64, n)
                strings = itertools.chain.from_iterable(lists)
            parts.append(np.fromiter(map(buckets.__getitem__, strings), np.int64, int(counts[:, place].sum())))
        offsets = counts.cumsum().reshape(n, categories) - counts
        ids = np.empty(int(counts.sum()), np.int64)
        for place, part in enumerate(parts):
            ids[np.repeat(offsets[:, place], counts[:, place]) + _within(counts[:, place])] = part
        numerics = np.empty((n, len(self.numerics)))
        for place, values in enumerate(found[categories:]):
            if not set(map(type, values)) <= {float, int, NoneType}:
                raise FeatureError("a feature is not a number")
            numerics[:, place] = values  # None becomes NaN
            if n - np.isfinite(numerics[:, place]).sum() != values.count(None):
                raise FeatureError("a feature is not finite")
        return _Bagged(ids, offsets.ravel(), numerics)

    def features(self, bags: _Bagged, dense: npt.NDArray[np.float32]) -> Features:
        with np.errstate(over="ignore"):
            scaled = np.clip((bags.numerics - self.mean) / self.std, -_NUMERIC_LIMIT, _NUMERIC_LIMIT)
        return Features(
            ids=torch.from_numpy(bags.ids),
            offsets=torch.from_numpy(bags.offsets),
            numerics=torch.from_numpy(scaled.astype(np.float32)),
            dense=torch.from_numpy(dense),
        )


class _Batch:
    """Columns under construction; `reset` undoes a row that failed half way."""

    def __init__(self, bags: _Bags) -> None:
        self._of = bags
        self._ids: list[int] = []
        self._offsets: list[int] = []
        self._numerics: list[float] = []

    def reset(self, rows: int) -> None:
        """Back to so many rows."""
        bags = rows * len(self._of.memos)
        del self._ids[self._offsets[bags] if bags < len(self._offsets) else len(self._ids) :]
        del self._offsets[bags:], self._numerics[rows * len(self._of.numerics) :]

    def add(self, features: Mapping[str, Any]) -> None:
        ids = self._ids
        get = features.get
        for name, buckets in self._of.memos:
            self._offsets.append(len(ids))
            value = get(name)
            if value.__class__ is str:
                ids.append(buckets[value])
            elif not value and (value is None or isinstance(value, (list, tuple))):
                ids.append(buckets.missing)
            elif isinstance(value, (list, tuple)):
                ids.extend(map(buckets.__getitem__, value))
            else:
                raise FeatureError(f"feature {name!r} is neither a string nor a list of strings")
        for name in self._of.numerics:
            value = get(name)
            if value is None:
                self._numerics.append(math.nan)
            elif value.__class__ is float or value.__class__ is int:
                number = float(value)
                if not math.isfinite(number):
                    raise FeatureError(f"feature {name!r} is not finite")
                self._numerics.append(number)
            else:
                raise FeatureError(f"feature {name!r} is not a number")

    def columns(self, rows: int) -> _Bagged:
        return _Bagged(
            np.array(self._ids, dtype=np.int64),
            np.array(self._offsets, dtype=np.int64),
            np.array(self._numerics, dtype=np.float64).reshape(rows, len(self._of.numerics)),
        )


class _Buckets(dict[str, int]):
    """String -> row of the category table, remembered; row `base` stands for a missing value."""

    def __init__(self, name: str, base: int, buckets: int) -> None:
        super().__init__()
        self.missing = base
        self._name, self._base, self._buckets = name, base, buckets

    def __missing__(self, value: str) -> int:
        if value is _ABSENT:
            return self.missing
        if value.__class__ is not str:
            raise FeatureError(f"feature {self._name!r} holds a value that is not a string")
        if len(self) >= _MEMO_LIMIT:
            self.clear()
        row = self[value] = self._base + 1 + _hash(value) % self._buckets
        return row


class _Slots(dict[str, int]):
    """Cross -> slot: the vocabulary's own, or one of the slots behind it by hash."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self._vocabulary = {name: slot for slot, name in enumerate(spec.crosses, start=1)}
        self._first = len(spec.crosses) + 1
        self._behind = spec.cross_slots - self._first

    def __missing__(self, name: str) -> int:
        if name.__class__ is not str:
            raise FeatureError("crosses hold a value that is not a string")
        if len(self) >= _MEMO_LIMIT:
            self.clear()
        slot = self[name] = self._vocabulary.get(name) or self._first + _hash(name) % self._behind
        return slot


def cross_slots(spec: FeatureSpec, names: Sequence[str]) -> npt.NDArray[np.uint16]:
    """Slots of cross names, for explaining a row."""
    slots = _Slots(spec)
    return np.array([slots[name] for name in names], dtype=np.uint16)


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _table_rows(categories: Sequence[Categorical]) -> int:
    return max(1, sum(feature.buckets + 1 for feature in categories))


def _columns(rows: list[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[Any, ...]]:
    """The rows' values by name, None where there is none."""
    return list(zip(*[[*map(row.get, names)] for row in rows], strict=True))


def _within(counts: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """0..count-1 for each of the counts, one after the other."""
    out: npt.NDArray[np.integer[Any]] = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return out


def _narrow_attributes(found: npt.NDArray[np.float64], errors: list[str | None]) -> npt.NDArray[np.float32]:
    return _narrow(found, lambda a: ~np.isinf(a), errors, "an attribute does not fit 32 bits")


def _narrow(
    values: npt.NDArray[np.floating[Any]], usable: Any, errors: list[str | None], message: str
) -> npt.NDArray[np.float32]:
    """To 32 bits; rows that are not `usable` there become zero and get `message`."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    bad = ~usable(narrow).all(axis=1)
    for row in np.flatnonzero(bad):
        errors[row] = errors[row] or message
        narrow[row] = 0
    return narrow
