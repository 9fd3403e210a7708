"""Items that change: versions of a data set's items, and the data set as it is seen when updates come late.

`drifting` makes a marketplace whose items change together with what decides about clicks; `replayed` gives the items
of any data set running counters of their behaviours. `delayed` turns either into a plain `Dataset` in which every
version that somebody meets is an item row of its own, so that batches, training and evaluation need not know of
versions. Guarantee: a request as of t sees versions from strictly before `Lateness.seen`, and nothing else of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from encoders.batches import groups_of
from encoders.data import synthetic
from encoders.data.dataset import NEVER, BehaviourLog, Dataset, Examples, Items
from encoders.data.oracle import Oracle
from encoders.evaluate import split_of

ALWAYS = -1  # time of an item's first version
SWING = 0.7  # of quality, per standard deviation of demand and of the discount: docs/experiments/staleness.md
_TREND_NOISE = 0.3  # standard deviation of what is published of the demand
_DISCOUNT = 0.1  # standard deviation of the published price cut
_SPREAD = 2_654_435_769  # 2^32 / golden ratio: its multiples modulo 2^32 are spread evenly
_PRIOR = 5.0  # behaviours' worth of doubt in the share that liked an item

F4 = npt.NDArray[np.float32]
I4 = npt.NDArray[np.int32]
I8 = npt.NDArray[np.int64]
Ints = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class Lateness:
    """How late updates of items are seen. Times in ms."""

    delay: int = 0  # from an update to the index
    every: int = 0  # an item's updates become visible together, once in each such time; 0: each for itself

    def __post_init__(self) -> None:
        if self.delay < 0 or self.every < 0:
            raise ValueError("lateness must not be negative")

    def seen(self, item: Ints, time: I8) -> I8:
        """The time up to which updates of the items are seen at each time. Every item has a place of its own in the
        cycle, evenly spread over items, so that what is found does not hang on the hours at which requests come.
        """
        late = time - self.delay
        if not self.every:
            return late
        place = (item.astype(np.int64) * _SPREAD % (1 << 32) >> 8) * self.every >> 24
        found: I8 = (late - place) // self.every * self.every + place
        return found


@dataclasses.dataclass(frozen=True)
class Versions:
    """V versions of M items, ascending in (item, time); the first of each item at ALWAYS."""

    item: I4  # [V]
    time: I8  # [V], ms: when the item became so

    def __post_init__(self) -> None:
        """Raises ValueError where the order is another, or an item has no first version."""
        first = np.diff(self.item, prepend=-1) != 0
        if not np.array_equal(self.item[first], np.arange(first.sum())) or (self.time[first] != ALWAYS).any():
            raise ValueError("every item needs a version from the beginning, item by item")
        if (np.diff(self._keys) < 0).any():
            raise ValueError("the versions of an item do not ascend in time")

    def at(self, item: Ints, time: I8) -> I8:
        """The item's last version strictly before the time (>= 0), each."""
        wanted = item.astype(np.int64) * self._span + np.minimum(time, self._span - 2) + 1
        found: I8 = np.searchsorted(self._keys, wanted, side="left") - 1
        return found

    @functools.cached_property
    def _span(self) -> int:
        return int(self.time.max(initial=0)) + 3

    @functools.cached_property
    def _keys(self) -> I8:
        """Item and time as one number."""
        return self.item.astype(np.int64) * self._span + self.time + 1


@dataclasses.dataclass(frozen=True)
class Living:
    """A data set whose items change."""

    data: Dataset  # its items hold what never changes of them
    versions: Versions
    features: Mapping[str, F4]  # name -> [V], what a version's event says beside
    quality: F4  # [V], what a version adds to the oracle's quality; 0 where there is no oracle

    def drift(self, item: Ints, time: I8) -> F4:
        """What is added to the items' quality at the times, by the truth."""
        found: F4 = self.quality[self.versions.at(item, time)]
        return found


@dataclasses.dataclass(frozen=True)
class Delayed:
    """A data set as the index saw it. Items are versions; examples are those from `since` on."""

    data: Dataset
    version: I8  # [rows], place in `Versions`
    missing: npt.NDArray[np.bool_]  # [n], examples whose item had no row yet: they stand with its first one
    as_of: I8  # [n], time of each example's request


# Worlds ---------------------------------------------------------------------------------------------------------------


def drifting(sizes: synthetic.Marketplace, seed: int, every: int) -> tuple[Living, Oracle]:
    """A marketplace whose items change once in each `every` ms, at a random moment of it. A change draws the item's
    demand and discount anew; both enter the click probability. What is known of the demand is a noisy trend.
    """
    random = np.random.default_rng([seed, every])
    changes = -(-sizes.days * 86_400_000 // every)
    time = np.full((sizes.items, 1 + changes), ALWAYS, dtype=np.int64)
    time[:, 1:] = synthetic.START + np.arange(changes) * every + random.integers(0, every, (sizes.items, changes))
    versions = Versions(np.repeat(np.arange(sizes.items, dtype=np.int32), 1 + changes), time.ravel())
    demand, deal, noise = (random.standard_normal(time.size, dtype=np.float32) for _ in range(3))
    quality = np.float32(SWING) * (demand + deal)
    world = synthetic.with_oracle(sizes, seed, lambda item, time: quality[versions.at(item, time)])
    published = {"trend": demand + np.float32(_TREND_NOISE) * noise, "discount": np.float32(_DISCOUNT) * deal}
    return Living(world.data, versions, published, quality), world.oracle


def replayed(data: Dataset) -> Living:
    """Every behaviour is an update of its item: how many there were, and the share of clicks among them. The items are
    there from the beginning.
    """
    log, M = data.log, len(data.items.ids)
    order = np.lexsort((log.time, log.item))
    item = np.concatenate([np.arange(M, dtype=np.int32), log.item[order]])
    time = np.concatenate([np.full(M, ALWAYS), log.time[order]])
    clicked = np.concatenate([np.zeros(M), log.action[order] == data.actions.index("click")])
    order = np.lexsort((time, item))  # stable: the first versions, then the behaviours in their order
    versions = Versions(item[order], time[order])
    first = np.flatnonzero(versions.time == ALWAYS)
    size = np.diff(first, append=len(order))
    count = np.arange(len(order)) - np.repeat(first, size)
    clicks = np.cumsum(clicked[order])
    clicks -= np.repeat(clicks[first], size)
    liked = (clicks + _PRIOR / 2) / (count + _PRIOR)
    published = {"ratings": np.log1p(count).astype(np.float32), "liked": liked.astype(np.float32)}
    items = dataclasses.replace(data.items, added=np.zeros(M, dtype=np.int64))
    there = dataclasses.replace(data, items=items)
    return Living(there, versions, published, np.zeros(len(order), dtype=np.float32))


# What is seen of them -------------------------------------------------------------------------------------------------


def request_times(data: Dataset) -> I8:
    """Time of each example's request [n]: of its group's first example, grouped as training and evaluation do."""
    split, log, examples = split_of(data), data.log, data.examples
    begin = data.begins()
    times = np.empty(len(examples), dtype=np.int64)
    slices = (split.start, split.validation, split.test, split.end)
    for since, until in itertools.pairwise(slices):
        groups = groups_of(examples, log, begin, since, until)
        start = np.cumsum(groups.size) - groups.size
        places = np.repeat(groups.first - start, groups.size) + np.arange(int(groups.size.sum()))
        times[places] = np.repeat(examples.time[groups.first], groups.size)
    return times


def delayed(
    living: Living, lateness: Lateness, since: int = 0, also: tuple[Ints, I8] | None = None
) -> tuple[Delayed, I8]:
    """The examples from `since` on and all behaviours, with the items as they were seen at their time. A behaviour
    takes the item's first row where there was none yet.

    Beside it the rows of `also`, items and times of any shape, -1 where the item had none.
    """
    data = living.data
    here = data.examples.time >= since
    as_of = request_times(data)[here]
    extra_item, extra_time = (np.zeros(0, dtype=np.int64),) * 2 if also is None else also
    item = np.concatenate([data.examples.item[here], data.log.item, extra_item.ravel()]).astype(np.int32)
    time = np.concatenate([as_of, data.log.time, extra_time.ravel()])
    seen, added = lateness.seen(item, time), data.items.added[item]
    version, row = np.unique(living.versions.at(item, np.maximum(seen, added)), return_inverse=True)
    met = np.full(len(version), NEVER)
    np.minimum.at(met, row, time)
    missing = seen < added
    n, behind = len(as_of), len(as_of) + len(data.log)
    examples, log = row[:n].astype(np.int32), row[n:behind].astype(np.int32)
    seen_data = dataclasses.replace(
        data,
        items=_rows(living, version, met),
        log=BehaviourLog(data.log.user, log, data.log.action, data.log.time),
        examples=_examples(data.examples, here, examples),
    )
    others = np.where(missing[behind:], -1, row[behind:]).reshape(extra_item.shape)
    return Delayed(seen_data, version, missing[:n], as_of), others


def _examples(examples: Examples, here: npt.NDArray[np.bool_], item: I4) -> Examples:
    known = examples.probability
    return Examples(
        examples.user[here], item, examples.clicked[here], examples.time[here], None if known is None else known[here]
    )


def _rows(living: Living, version: I8, met: I8) -> Items:
    """Each version as an item of its own. It is added when somebody first meets it: what training measures on the items
    before the validation slice must not depend on who meets which later. So this is no catalogue to be ranked.
    """
    items, item = living.data.items, living.versions.item[version]
    place, which = np.unique(item, return_inverse=True)
    ids, fixed, crosses, attributes = (
        [column[k] for k in place] for column in (items.ids, items.features, items.crosses, items.attributes)
    )
    kinds, names = which.tolist(), list(living.features)
    numbers = zip(*(living.features[name][version].tolist() for name in names), strict=True)
    return Items(
        ids=[f"{ids[k]}@{number}" for k, number in zip(kinds, version.tolist(), strict=True)],
        features=[{**fixed[k], **dict(zip(names, row, strict=True))} for k, row in zip(kinds, numbers, strict=True)],
        crosses=[crosses[k] for k in kinds],
        attributes=[attributes[k] for k in kinds],
        embeddings=items.embeddings[item],
        added=met,
        removed=np.full(len(version), NEVER),
    )
