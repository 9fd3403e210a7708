"""A seeded marketplace with known click probabilities: what `encoders.data.oracle` says of the true history decides
about a click, and nothing else.

Users have a past when the examples begin. They come in visits: some behaviours of their own (search, links) about what
they are after that day, then a request, answered with a page of impressions; clicks and purchases are behaviours of
later requests. Requests of a user are more than an hour apart, and a page's impressions see the history before the
page. Items arrive and expire. Equal arguments give the same data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from encoders.data import oracle, text
from encoders.data.dataset import NEVER, BehaviourLog, Dataset, Examples, Items, UserProfiles, by_user
from encoders.data.oracle import F4, I4, Hidden, Oracle

ACTIONS = ("click", "buy")
START = 1_767_225_600_000  # 2026-01-01T00:00:00Z, ms: examples begin
_MINUTE, _DAY = 60_000, 86_400_000
_PAST = 60 * _DAY  # before START: the behaviours of the pre-history

_DIMENSIONS = 20  # of the hidden space
_CATEGORY, _CLUSTER, _FAMILY, _ITEM = 1.2, 1.0, 0.4, 0.15  # lengths of the parts of an item's position
_EMBEDDING_NOISE = 0.2  # length of the noise on an embedding, on the same scale
_SEGMENTS = 12
_FAVOURITES = 4  # categories of a user's long-term taste
_POINTS = 3  # interests in each of them, at most; at least 2
_PRICE_BANDS = ("low", "middle", "high", "luxury")
_BAND_LEVEL = np.array([-1.2, -0.35, 0.35, 1.2], dtype=np.float32)
_BAND_EDGES = np.array([-0.7, 0.0, 0.7])
_NOUNS = (
    "lamp", "chair", "jacket", "boots", "phone", "camera", "novel", "puzzle", "tent", "bicycle", "guitar", "kettle",
)  # fmt: skip
_STYLES = ("plain", "bright", "vintage", "compact", "classic", "light", "sturdy", "soft", "royal", "urban")

_SLOTS = 12  # a day's places for visits of a user: two hours each
_SLOT = _DAY // _SLOTS
_OPENS = 60 * _MINUTE  # from the slot's begin to the first requests
_OWN = (3, 9)  # a visit's behaviours before its request
_SWITCH = 0.7  # chance that a user is after something else than on the last visiting day
_BUYS = 0.08  # of the clicks
_SESSION = 12  # behaviours of a visit in the pre-history
_OFFERED = 4  # items among which a behaviour of the user's own chooses
_TOGETHER = 256  # requests whose terms are computed at once
_CHUNK = 1 << 18  # rows of large columns drawn at once

# Widths within which an item is drawn.
_IN_FAMILY, _IN_CLUSTER, _IN_CATEGORY, _ANYWHERE = range(4)

I8 = npt.NDArray[np.int64]
F8 = npt.NDArray[np.float64]
Random = np.random.Generator
T = TypeVar("T")
Drift = Callable[[I4, I8], F4]  # items [R, P] and times of their pages' first impressions [R, P], ms -> [R, P]


@dataclasses.dataclass(frozen=True)
class Marketplace:
    """Sizes of the world."""

    users: int = 2_000
    items: int = 4_000
    examples: int = 120_000
    days: int = 30
    categories: int = 24
    clusters: int = 8  # in a category
    families: int = 10  # in a cluster
    brands: int = 120
    past: int = 70  # behaviours of a user before the first day, on average
    history: int = 1_000  # of which a user has at most this many
    page: tuple[int, int] = (8, 16)  # impressions of a request, from and to
    embedding_dim: int = 128
    restocked: bool = False  # new items are shown from the next visits on, not from the next day on


EXPERIMENT = Marketplace(users=2_000, items=10_000, examples=120_000, past=150, page=(16, 32))
LARGE = Marketplace(users=2_000, items=1_000_000, examples=100_000, past=8_000, history=10_000)


@dataclasses.dataclass(frozen=True)
class World:
    data: Dataset
    oracle: Oracle


def generate(world: Marketplace | None = None, seed: int = 0) -> Dataset:
    """The data set of a world: `examples` impressions over `days` days. Raises ValueError where the users have no time
    for them.
    """
    return with_oracle(world, seed).data


def with_oracle(world: Marketplace | None = None, seed: int = 0, drift: Drift | None = None) -> World:
    """The data set, and what decided about its clicks. `drift`: what is added to the items' quality as time goes by;
    the oracle's terms have it in them, `Hidden` has not.
    """
    sizes = world or Marketplace()
    random = np.random.default_rng(seed)
    catalogue = _catalogue(sizes, random)
    people = _people(sizes, random)
    hidden = Hidden(
        position=catalogue.position,
        category=(catalogue.family // (sizes.families * sizes.clusters)).astype(np.int32),
        level=catalogue.level,
        quality=catalogue.quality,
        segment=people.segment,
        wallet=_BAND_LEVEL[people.wallet],
        affinity=random.standard_normal((_SEGMENTS, sizes.categories)).astype(np.float32),
    )
    visits = _visits(sizes, people, random)
    scene = _Scene(sizes, catalogue, people, hidden)
    log = _pre_history(scene, visits, random)
    examples, terms = _live(scene, visits, log, random, drift)
    data = Dataset(
        name=f"market-{seed}",
        items=_items(sizes, catalogue, hidden, random),
        profiles=UserProfiles(
            ids=[f"u{k}" for k in range(sizes.users)],
            features=[
                {"segment": f"segment {segment}", "age": age, "wallet": _PRICE_BANDS[wallet]}
                for segment, wallet, age in zip(
                    people.segment.tolist(),
                    people.wallet.tolist(),
                    random.integers(18, 80, sizes.users).tolist(),
                    strict=True,
                )
            ],
        ),
        log=log.columns(),
        examples=examples,
        actions=ACTIONS,
    )
    return World(data, Oracle(hidden, terms))


# ---- the items


@dataclasses.dataclass(frozen=True)
class _Catalogue:
    """Columns of the M items. A family's number also tells cluster and category: they are its first digits."""

    family: I4
    position: F4  # [M, D]
    brand: I4
    level: F4
    quality: F4
    added: I8
    removed: I8


def _catalogue(sizes: Marketplace, random: Random) -> _Catalogue:
    M, clusters = sizes.items, sizes.categories * sizes.clusters
    family = random.integers(0, clusters * sizes.families, M, dtype=np.int32)
    centre = _around(_CATEGORY, sizes.categories, random)
    centre = np.repeat(centre, sizes.clusters, axis=0) + _circles(sizes, random)
    centre = np.repeat(centre, sizes.families, axis=0) + _around(_FAMILY, clusters * sizes.families, random)
    position = centre[family]
    position += _around(_ITEM, M, random)
    brand = random.integers(0, sizes.brands, M, dtype=np.int32)
    of_brand = random.standard_normal(sizes.brands, dtype=np.float32)
    quality = 0.6 * of_brand[brand] + 0.8 * random.standard_normal(M, dtype=np.float32)
    level = random.standard_normal(M, dtype=np.float32)
    return _Catalogue(family, position, brand, level, quality, *_lifetimes(sizes, random))


def _around(length: float, count: int, random: Random) -> F4:
    """Points [count, D] about this far from the origin."""
    return random.standard_normal((count, _DIMENSIONS), dtype=np.float32) * np.float32(length / _DIMENSIONS**0.5)


def _circles(sizes: Marketplace, random: Random) -> F4:
    """The clusters' offsets [categories * clusters, D]: those of a category stand on a circle, in order, so that the
    mean of interests on all its sides is in the middle, where no cluster is.
    """
    plane = np.linalg.qr(random.standard_normal((sizes.categories, _DIMENSIONS, 2)))[0]
    angle = 2 * np.pi * np.arange(sizes.clusters) / sizes.clusters
    offsets = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ plane.transpose(0, 2, 1)
    out: F4 = (_CLUSTER * offsets).reshape(-1, _DIMENSIONS).astype(np.float32)
    return out


def _lifetimes(sizes: Marketplace, random: Random) -> tuple[I8, I8]:
    """When items are added and removed: 40 % come late, 15 % expire; some neither, so that no day is without items."""
    end = START + sizes.days * _DAY
    late = random.random(sizes.items) < 0.4
    late[: sizes.categories] = False
    added = np.where(late, START + (random.random(sizes.items) * sizes.days * _DAY).astype(np.int64), START - _PAST)
    expires = random.random(sizes.items) < 0.15
    expires[: sizes.categories] = False
    since = np.maximum(added, START)
    left = (random.random(sizes.items) * (end - since)).astype(np.int64)
    return added, np.where(expires, since + 1 + left, NEVER)


class _Shelf:
    """The items on offer over some time, to be drawn from by family, cluster or category."""

    def __init__(self, sizes: Marketplace, catalogue: _Catalogue, since: int, until: int) -> None:
        items = np.flatnonzero((catalogue.added <= since) & (catalogue.removed >= until))
        self._family = catalogue.family
        self._items = items[np.argsort(catalogue.family[items], kind="stable")].astype(np.int32)
        families = sizes.categories * sizes.clusters * sizes.families
        counts = np.bincount(catalogue.family[items], minlength=families)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._wide = np.array([1, sizes.families, sizes.families * sizes.clusters, families])  # families in each width
        self._sold = np.cumsum(np.exp(catalogue.quality[self._items].astype(np.float64)))

    def draw(self, family: I4, width: I8, times: int, random: Random) -> I4:
        """Items [n, times] from each family's surroundings of the given width; a wider one where nothing is there."""
        width, low, high = width.copy(), np.zeros(len(family), dtype=np.int64), np.zeros(len(family), dtype=np.int64)
        empty = np.arange(len(family))
        while len(empty):
            wide = self._wide[width[empty]]
            first = family[empty] // wide * wide
            low[empty], high[empty] = self._starts[first], self._starts[first + wide]
            width[empty] += 1
            empty = empty[low[empty] == high[empty]]
        places = low[:, None] + (random.random((len(family), times)) * (high - low)[:, None]).astype(np.int64)
        drawn: I4 = self._items[places]
        return drawn

    def family(self, items: I4) -> I4:
        """Families of items, on offer or not."""
        found: I4 = self._family[items]
        return found

    def popular(self, count: int, random: Random) -> I4:
        """Items drawn by their sales."""
        drawn: I4 = self._items[np.searchsorted(self._sold, random.random(count) * self._sold[-1], side="right")]
        return drawn


# ---- the users


@dataclasses.dataclass(frozen=True)
class _People:
    """Columns of the U users. Tastes make the behaviours that nobody showed; clicks on impressions do not know them."""

    segment: I4
    wallet: I8
    activity: F8
    points: I4  # [U, favourites, 6], families of 2 or 3 clusters in turn
    leaning: F8  # [U, favourites], running sum of the categories' shares
    level: F4  # [U, categories], the price level sought


def _people(sizes: Marketplace, random: Random) -> _People:
    U, favourites = sizes.users, min(_FAVOURITES, sizes.categories)
    wallet = random.integers(0, len(_PRICE_BANDS), U)
    category = np.argsort(random.random((U, sizes.categories)), axis=1)[:, :favourites]
    parts = random.integers(2, _POINTS + 1, (U, favourites, 1))  # of the category's circle: as many interests, apart
    turn = random.integers(0, sizes.clusters, (U, favourites, 1)) + np.arange(6) % parts * sizes.clusters // parts
    cluster = turn % sizes.clusters
    points = (category[:, :, None] * sizes.clusters + cluster) * sizes.families
    points += random.integers(0, sizes.families, points.shape)
    level = 0.3 * _BAND_LEVEL[wallet][:, None] + random.standard_normal((U, sizes.categories), dtype=np.float32)
    return _People(
        segment=random.integers(0, _SEGMENTS, U, dtype=np.int32),
        wallet=wallet,
        activity=random.lognormal(0, 1, U),
        points=points.astype(np.int32),
        leaning=np.cumsum(random.dirichlet(np.full(favourites, 1.0), U), axis=1),
        level=level,
    )


def _tastes(people: _People, user: I4, random: Random) -> I4:
    """A family of each user's long-term taste."""
    favourite = (random.random(len(user))[:, None] > people.leaning[user, :-1]).sum(axis=1)
    family: I4 = people.points[user, favourite, random.integers(0, people.points.shape[2], len(user))]
    return family


def _aims(sizes: Marketplace, people: _People, user: I4, random: Random) -> I4:
    """What each user is after next, as a family (it and its opposite): half of the time in a favourite category, else
    anywhere.
    """
    inside = sizes.clusters * sizes.families
    known = _tastes(people, user, random) // inside * inside + random.integers(0, inside, len(user))
    other = random.integers(0, sizes.categories * inside, len(user))
    return np.where(random.random(len(user)) < 0.5, known, other).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Scene:
    """All that stands before the first behaviour."""

    sizes: Marketplace
    catalogue: _Catalogue
    people: _People
    hidden: Hidden


def _opposite(sizes: Marketplace, family: I4) -> I4:
    """The like family on the other side of the category's circle."""
    inside = sizes.clusters * sizes.families
    place = family % inside
    across: I4 = family - place + (place + sizes.clusters // 2 * sizes.families) % inside
    return across


def _own(scene: _Scene, shelf: _Shelf, user: I4, aim: I4, focus: float, random: Random) -> I4:
    """Items of behaviours that no page led to: a share `focus` about the aim, a tenth about anything, the others about
    the long-term taste; among the offered, one of fitting price and good quality.
    """
    people, hidden, kind = scene.people, scene.hidden, random.random(len(user))
    either = np.where(random.random(len(user)) < 0.5, aim, _opposite(scene.sizes, aim))
    family = np.where(kind < focus, either, _tastes(people, user, random))
    width = np.where(random.random(len(user)) < 0.5, _IN_FAMILY, _IN_CLUSTER)
    width[kind > 0.9] = _ANYWHERE
    offered = shelf.draw(family, width, _OFFERED, random)
    misfit = np.abs(hidden.level[offered] - people.level[user[:, None], hidden.category[offered]])
    score = 0.5 * hidden.quality[offered] - 2.0 * misfit + random.gumbel(size=offered.shape)
    chosen: I4 = offered[np.arange(len(user)), score.argmax(axis=1)]
    return chosen


# ---- the histories


class _Log:
    """Every user's behaviours as they grow: columns with room for all that may come."""

    def __init__(self, room: I8) -> None:
        self._begin = np.cumsum(room) - room
        self._filled = np.zeros_like(room)
        total = int(room.sum())
        self._item = np.empty(total, dtype=np.int32)
        self._action = np.empty(total, dtype=np.uint8)
        self._time = np.empty(total, dtype=np.int64)

    def add(self, user: I4, item: I4, action: int, time: I8) -> None:
        """Behaviours with users in one run each, not older than what is there."""
        new = np.flatnonzero(np.diff(user, prepend=-1))
        count = np.diff(new, append=len(user))
        who = user[new]
        at = np.repeat(self._begin[who] + self._filled[who] - new, count) + np.arange(len(user))
        self._item[at], self._action[at], self._time[at] = item, action, time
        self._filled[who] += count

    def newest(self, user: I4) -> I4:
        """Items of the users' newest behaviours [R, W], -1 = padding on the left."""
        count = np.minimum(self._filled[user], oracle.WINDOW)
        end = self._begin[user] + self._filled[user]
        W = max(1, int(count.max()))
        back = np.arange(W, 0, -1)
        return np.where(back <= count[:, None], self._item[np.maximum(end[:, None] - back, 0)], np.int32(-1))

    def columns(self) -> BehaviourLog:
        used = np.repeat(self._begin, self._filled) + _within(self._filled)
        user = np.repeat(np.arange(len(self._filled), dtype=np.int32), self._filled)
        return BehaviourLog(user, self._item[used], self._action[used], self._time[used])


def _within(counts: I8) -> I8:
    """0 .. count - 1 for every count, one after the other."""
    places: I8 = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def _pre_history(scene: _Scene, visits: _Visits, random: Random) -> _Log:
    """A log with everybody's behaviours before START; the more active have more, a few have none."""
    sizes, people = scene.sizes, scene.people
    wanted = people.activity**0.5 * random.lognormal(0, 0.5, sizes.users)
    wanted *= sizes.past / max(1e-9, wanted.mean())
    count = np.minimum(wanted, sizes.history).astype(np.int64)
    count[random.random(sizes.users) < 0.02] = 0
    log = _Log(count + np.bincount(visits.user, _OWN[1] + 2 * visits.size, sizes.users).astype(np.int64))
    shelf = _Shelf(sizes, scene.catalogue, START - _PAST, START)
    cuts = np.searchsorted(np.cumsum(count), np.arange(_CHUNK, count.sum(), _CHUNK))
    for part in np.split(np.arange(sizes.users, dtype=np.int32), np.unique(cuts)):
        user, place = np.repeat(part, count[part]), _within(count[part])
        if not len(user):
            continue
        first = place % _SESSION == 0
        aim = _aims(sizes, people, user[first], random)[np.cumsum(first) - 1]
        time = START - _PAST + (_passed(first, place == 0, random) * _PAST).astype(np.int64)
        log.add(user, _own(scene, shelf, user, aim, 0.4, random), 0, time)
    return log


def _passed(session: npt.NDArray[np.bool_], new: npt.NDArray[np.bool_], random: Random) -> F8:
    """Times ascending within 0 .. 1 for each user: `new` marks the users' first behaviours, `session` the first of each
    session, before which there is more time.
    """
    gap = random.exponential(np.where(session, 2_000.0, 1.0))
    total, begin = np.cumsum(gap), np.flatnonzero(new)
    spans = np.diff(begin, append=len(gap))
    before = total[begin] - gap[begin]
    whole = total[begin + spans - 1] - before + 2_000.0
    out: F8 = (total - np.repeat(before, spans)) / np.repeat(whole, spans)
    return out


# ---- the days with examples


@dataclasses.dataclass(frozen=True)
class _Visits:
    """The requests, in the order of their slots; no user twice in one."""

    user: I4
    slot: I8  # number of two-hour slots since START
    size: I8  # impressions


def _visits(sizes: Marketplace, people: _People, random: Random) -> _Visits:
    lengths = random.integers(sizes.page[0], sizes.page[1] + 1, -(-sizes.examples // sizes.page[0]))
    behind = np.cumsum(lengths)
    count = int(np.searchsorted(behind, sizes.examples) + 1) if sizes.examples else 0
    lengths = lengths[:count]
    if count:
        lengths[-1] -= behind[count - 1] - sizes.examples
    slots = sizes.days * _SLOTS
    if count > sizes.users * slots // 2:
        raise ValueError(f"{sizes.users} users do not see {sizes.examples} impressions in {sizes.days} days")
    chance = np.minimum(people.activity, 20 * np.median(people.activity))  # else the most active never sleep
    chance /= chance.sum()
    keys = np.empty(0, dtype=np.int64)  # slot, then user
    while len(keys) < count:
        user = random.choice(sizes.users, count, p=chance)
        keys = np.union1d(keys, random.integers(0, slots, count) * sizes.users + user)
    slot, user = np.divmod(np.sort(random.choice(keys, count, replace=False)), max(1, sizes.users))
    return _Visits(user.astype(np.int32), slot, lengths)


def _live(scene: _Scene, visits: _Visits, log: _Log, random: Random, drift: Drift | None) -> tuple[Examples, F4]:
    """The examples with their terms; what happens is added to the log. Slot by slot: a user has one visit in each at
    most, so all visits of a slot are computed together, and each sees all that was before it.
    """
    sizes, people = scene.sizes, scene.people
    aim = _aims(sizes, people, np.arange(sizes.users, dtype=np.int32), random)
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    for day in range(sizes.days):
        begin, end = np.searchsorted(visits.slot, [day * _SLOTS, (day + 1) * _SLOTS])
        shelf = _Shelf(sizes, scene.catalogue, START + day * _DAY, START + (day + 1) * _DAY)
        here = np.unique(visits.user[begin:end])
        here = here[random.random(len(here)) < _SWITCH]
        aim[here] = _aims(sizes, people, here, random)
        for slot in np.unique(visits.slot[begin:end]):
            own, offered = shelf, shelf
            if sizes.restocked:
                since, until = START + slot * _SLOT, START + (slot + 1) * _SLOT
                own, offered = (_Shelf(sizes, scene.catalogue, at, until) for at in (since, since + _OPENS))
            low, high = np.searchsorted(visits.slot, [slot, slot + 1])
            for at in range(low, high, _TOGETHER):
                chosen = slice(at, min(high, at + _TOGETHER))
                user, size = visits.user[chosen], visits.size[chosen]
                opened = START + slot * _SLOT + random.integers(_OPENS, _OPENS + 20 * _MINUTE, len(user))
                _prepare(scene, own, user, aim, opened, log, random)
                parts.append(_answer(offered, scene.hidden, user, size, opened, sizes.page[1], log, random, drift))
    if not parts:
        none = np.empty(0, dtype=np.int32)
        empty = Examples(none, none, none.astype(bool), none.astype(np.int64), none.astype(np.float32))
        return empty, np.empty((0, len(oracle.TERMS)), dtype=np.float32)
    user, item, clicked, time, probability, terms = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = by_user(user, time)
    return Examples(user[order], item[order], clicked[order], time[order], probability[order]), terms[order]


def _prepare(scene: _Scene, shelf: _Shelf, user: I4, aim: I4, opened: I8, log: _Log, random: Random) -> None:
    """Behaviours of the users' own in the hour before their requests."""
    count = random.integers(_OWN[0], _OWN[1] + 1, len(user))
    who = np.repeat(user, count)
    time = np.repeat(opened, count) - (np.repeat(count, count) - _within(count)) * 5 * _MINUTE
    time -= random.integers(0, 4 * _MINUTE, len(who))
    log.add(who, _own(scene, shelf, who, aim[who], 0.75, random), 0, time)


def _answer(
    shelf: _Shelf,
    hidden: Hidden,
    user: I4,
    size: I8,
    opened: I8,
    most: int,
    log: _Log,
    random: Random,
    drift: Drift | None,
) -> tuple[npt.NDArray[Any], ...]:
    """The pages' impressions as columns: user, item, clicked, time, probability, terms. Clicks go into the log."""
    history = log.newest(user)
    candidates = _retrieved(shelf, history, most, random)
    terms = oracle.terms_of(hidden, user, candidates, history)
    luck = random.random(candidates.shape)
    time = opened[:, None] + np.cumsum(random.integers(2_000, 8_000, candidates.shape), axis=1)
    if drift is not None:
        terms[..., oracle.TERMS.index("quality")] += drift(candidates, np.broadcast_to(time[:, :1], time.shape))
    probability = oracle.sigmoid(oracle.logits(terms)).astype(np.float32)
    clicked = luck < probability
    shown = np.arange(candidates.shape[1]) < size[:, None]

    whose = np.broadcast_to(user[:, None], candidates.shape)
    log.add(whose[hit := shown & clicked], candidates[hit], 0, time[hit])
    buys = hit & (random.random(hit.shape) < _BUYS)
    after = np.cumsum(random.integers(10_000, 60_000, hit.shape), axis=1) + time[:, -1:]
    log.add(whose[buys], candidates[buys], 1, after[buys])
    return whose[shown], candidates[shown], clicked[shown], time[shown], probability[shown], terms[shown]


def _retrieved(shelf: _Shelf, history: I4, P: int, random: Random) -> I4:
    """Candidates [R, P] from around recent and older behaviours, from among the popular, and from anywhere; an item
    stands twice only where too few were found.
    """
    R, W = history.shape
    shape = (R, 2 * P)
    length = (history != -1).sum(axis=1)[:, None]
    kind = random.random(shape)
    reach = np.where(kind < 0.4, np.minimum(length, oracle.RECENT), length)
    like = np.take_along_axis(history, W - 1 - (random.random(shape) * reach).astype(np.int64), axis=1)
    width = random.choice([_IN_FAMILY, _IN_CLUSTER, _IN_CATEGORY], shape, p=[0.15, 0.4, 0.45])
    width[(kind > 0.96) | (like == -1)] = _ANYWHERE
    found = shelf.draw(shelf.family(like.ravel()), width.ravel(), 1, random).reshape(shape)
    popular = (kind > 0.92) & (kind < 0.96)
    found[popular] = shelf.popular(int(popular.sum()), random)
    order = np.argsort(found, axis=1, kind="stable")
    ascending = np.take_along_axis(found, order, axis=1)
    again = np.zeros(shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
    return np.take_along_axis(found, np.argsort(again, axis=1, kind="stable")[:, :P], axis=1)


# ---- what is published of the items


class _Rows(Sequence[T]):
    """M rows, each made when it is asked for: a million of them as objects would not fit."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._make(k) for k in range(*place.indices(self._count))]
        return self._make(range(self._count)[place])


@dataclasses.dataclass(frozen=True)
class _Published:
    """Columns of what the items' events say."""

    category: I4
    cluster: I4  # within the category
    brand: I4
    band: I8
    price: F4
    rating: npt.NDArray[np.floating]
    sales: I8

    def features(self, k: int) -> dict[str, Any]:
        return {
            **self._names(k),
            "words": [self._style(k), _noun(int(self.category[k]))[0]],
            "price": float(self.price[k]),
            "rating": float(self.rating[k]),
            "sales": int(self.sales[k]),
        }

    def crosses(self, k: int) -> list[str]:
        names = self._names(k)
        return [
            *(f"{name}:{value}" for name, value in names.items()),
            f"category_price:{names['category']}, {names['price_band']}",
        ]

    def attributes(self, k: int) -> dict[str, Any]:
        price = float(self.price[k])
        return {
            "title": f"{self._style(k)} {_noun(int(self.category[k]))[0]} {k} by brand {self.brand[k]}",
            "price": price,
            "bid": round(0.05 + 0.01 * price**0.5, 4),
            "in_stock": True,
        }

    def _names(self, k: int) -> dict[str, str]:
        noun, series = _noun(int(self.category[k]))
        return {
            "category": f"{noun} {series}",
            "brand": f"brand {self.brand[k]}",
            "price_band": _PRICE_BANDS[self.band[k]],
        }

    def _style(self, k: int) -> str:
        return _STYLES[self.cluster[k] % len(_STYLES)]


def _noun(category: int) -> tuple[str, int]:
    series, place = divmod(category, len(_NOUNS))
    return _NOUNS[place], series + 1


def _items(sizes: Marketplace, catalogue: _Catalogue, hidden: Hidden, random: Random) -> Items:
    """Rating, sales and brand tell the quality, but for noise; the price and its band the level exactly and roughly."""
    M, noise = sizes.items, random.standard_normal
    usual = np.exp(random.normal(3.5, 0.7, sizes.categories))  # price of a category
    published = _Published(
        category=hidden.category,
        cluster=catalogue.family // sizes.families % sizes.clusters,
        brand=catalogue.brand,
        band=np.searchsorted(_BAND_EDGES, hidden.level),
        price=np.round(usual[hidden.category] * np.exp(0.6 * hidden.level), 2),
        rating=np.round(np.clip(3.5 + 0.4 * (hidden.quality + 0.45 * noise(M)), 1, 5), 1),
        sales=np.exp(4 + hidden.quality + noise(M)).astype(np.int64),
    )
    return Items(
        ids=[f"i{k}" for k in range(M)],
        features=_Rows(M, published.features),
        crosses=_Rows(M, published.crosses),
        attributes=_Rows(M, published.attributes),
        embeddings=_embeddings(sizes, hidden.position, random),
        added=catalogue.added,
        removed=catalogue.removed,
    )


def _embeddings(sizes: Marketplace, position: F4, random: Random) -> F4:
    """A random linear view of the positions and noise [M, e], of length 1."""
    view = random.standard_normal((_DIMENSIONS, sizes.embedding_dim)) / sizes.embedding_dim**0.5
    out = np.empty((len(position), sizes.embedding_dim), dtype=np.float32)
    for at in range(0, len(out), _CHUNK):
        noise = random.standard_normal((len(out[at : at + _CHUNK]), sizes.embedding_dim))
        noise *= _EMBEDDING_NOISE / sizes.embedding_dim**0.5
        out[at : at + _CHUNK] = text.normalised(position[at : at + _CHUNK] @ view + noise)
    return out
