"""Taobao Ad Display and Taobao UserBehavior in their published formats -> a prepared folder.

**Ad Display** (Tianchi data set 56; columns as in its description and as read by PaddleRec's `Ali_Display_Ad_Click`):

| file | columns |
|---|---|
| raw_sample.csv | user, time_stamp (s), adgroup_id, pid, nonclk, clk: the impressions of 8 days |
| ad_feature.csv | adgroup_id, cate_id, campaign_id, customer, brand, price; brand may be NULL |
| user_profile.csv | userid, cms_segid ... new_user_class_level (its header ends in a space); fields may be empty |
| behavior_log.csv | user, time_stamp, btag (pv, cart, fav, buy), cate, brand: 22 days, 700 million rows |

Every impression is an example, its label `clk`. The behaviour log names category and brand, no ad: each (category,
brand) becomes an item of its own, `c<cate>b<brand>`, which shares the crosses of the ads. Clicked impressions enter
histories too, as `click`. Rows of the log that are equal stay: they may be different goods of one brand.

**UserBehavior** (Tianchi data set 649): UserBehavior.csv without a header: user, item, category, type (pv, buy, cart,
fav), time in s, from 2017-11-25 to 2017-12-03 (Beijing); the file holds some rows of other years and some rows twice.
There are no impressions, so examples are sampled: each `pv`, a click on an item's page, is a positive, and beside it
stand up to `NEGATIVES` items drawn at random (seeded) from the clicks of the hour *before* its own. So an item is drawn
as often as it was clicked, popularity tells little, and nothing later is used. A draw that gives the positive itself is
dropped; a positive without a click in the hour before is no example (counted).

Neither has texts or pictures: embeddings are hashed words (category, brand, price band, the item itself), which stand
in for multi-modal vectors. Memory: 8 bytes per user and item for the maps of ids (16 per item of UserBehavior) and as
much again while they are merged; the tables of ads and profiles are held; logs are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.data.dataset import DataError
from encoders.data.files import Column, Part, csv_parts, found_one
from encoders.data.places import Collected, places
from encoders.data.sorting import Records, distinct, in_order, records
from encoders.data.store import Item, Profile, Store, price_band

AD_ACTIONS = ("pv", "cart", "fav", "buy", "click")
ACTIONS = ("pv", "buy", "cart", "fav")
NEGATIVES = 4  # sampled for each positive of UserBehavior, at most
AD_DAYS = (1_492_790_400, 1_494_691_200)  # 2017-04-22 .. 2017-05-13, Beijing, s
DAYS = (1_511_539_200, 1_512_316_800)  # 2017-11-25 .. 2017-12-03, Beijing, s

_SLOT = 3_600_000  # ms
_SLOT_ITEMS = 16_384  # remembered of a slot
_NONE: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
_OUTSIDE = "time outside the days that the data set covers"

_WHOLE, _TEXT, _SOME_TEXT = Column("whole"), Column("text"), Column("text", required=False)
_SAMPLE = {"user": _WHOLE, "time_stamp": _WHOLE, "adgroup_id": _WHOLE, "clk": _WHOLE}
_AD = {
    "adgroup_id": _WHOLE, "cate_id": _WHOLE, "campaign_id": _TEXT, "customer": _TEXT,
    "brand": Column("whole", required=False), "price": Column("number", required=False),
}  # fmt: skip
_PROFILE = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation",
    "new_user_class_level",
)  # fmt: skip
_BEHAVIOUR = {
    "user": _WHOLE, "time_stamp": _WHOLE, "btag": _TEXT, "cate": _WHOLE, "brand": Column("whole", required=False),
}  # fmt: skip
_BRANDS = 1 << 32  # (category, brand) as one number
_NO_BRAND = _BRANDS - 1

I8 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


# Ad Display -----------------------------------------------------------------------------------------------------------


def prepare_ads(folder: Path, store: Store) -> None:
    """Raises DataError; counts impressions of unknown ads, times outside the days and unknown actions as skipped."""
    sample, log = found_one(folder, "raw_sample.csv"), found_one(folder, "behavior_log.csv")
    ads = _collected_ads(found_one(folder, "ad_feature.csv"))
    profiles = found_one(folder, "user_profile.csv")
    users, pairs = Collected(), Collected()
    for part in csv_parts(profiles, {"userid": _WHOLE}):
        users.add(part.array("userid"))
    with_profile = len(users.result()[0])
    if with_profile != users.rows:
        raise DataError(f"{profiles.name}: {users.rows - with_profile} user ids stand twice")
    impressions = 0
    for part in csv_parts(sample, _SAMPLE):
        users.add(part.array("user"))
        impressions += len(part.frame)
    actions = 0
    for part in csv_parts(log, _BEHAVIOUR):
        users.add(part.array("user"))
        pairs.add(_pairs(part, "cate"))
        actions += len(part.frame)
    (user_ids,), (pair_ids,) = users.result(), pairs.result()
    store.note("users without a profile", len(user_ids) - with_profile)

    count = len(ads) + len(pair_ids)
    with (
        store.sorter("behaviours", len(user_ids), impressions + actions) as behaviours,
        store.sorter("examples", len(user_ids), impressions) as examples,
    ):
        for part in csv_parts(sample, _SAMPLE):
            rows = _impressions(part, user_ids, ads, store)
            examples.add(rows)
            clicks = rows[rows["code"] == 1]
            clicks["code"] = AD_ACTIONS.index("click")
            behaviours.add(clicks)
        for part in csv_parts(log, _BEHAVIOUR):
            behaviours.add(_shopping(part, user_ids, pair_ids, len(ads), store))
        store.behaviours(behaviours.parts(), count)
        store.examples(examples.parts(), count)
    store.users(_profiles(profiles, user_ids), dict.fromkeys(_PROFILE, pl.String))
    kinds = dict.fromkeys(("item", "category", "brand", "campaign", "customer", "price_band"), pl.String)
    store.items(
        (item for source in (_ads(folder), _pair_items(pair_ids)) for item in source),
        {**kinds, "price": pl.Float64},
        {"title": pl.String, "price": pl.Float64},
    )
    store.finish("taobao-ad", "taobao-ad", AD_ACTIONS)


def _collected_ads(path: Path) -> I8:
    """Ids of the ads, ascending."""
    ads = Collected()
    for part in csv_parts(path, _AD):
        ads.add(part.array("adgroup_id"))
        if (prices := part.frame["price"].fill_null(0) < 0).any():
            raise DataError(f"{part.where(int(prices.arg_max() or 0))}: price is negative")
    (ids,) = ads.result()
    if len(ids) != ads.rows:
        raise DataError(f"{path.name}: {_twice(path, 'adgroup_id')}")
    return ids


def _twice(path: Path, column: str) -> str:
    """Which id stands twice, and where."""
    seen: set[int] = set()
    for part in csv_parts(path, {column: _WHOLE}):
        for row, value in enumerate(part.frame[column].to_list()):
            if value in seen:
                return f"line {part.lines[row]}: the id {value} stands twice"
            seen.add(value)
    return "an id stands twice"


def _pairs(part: Part, category: str) -> I8:
    """(category, brand) as one number."""
    brand = part.frame["brand"].fill_null(_NO_BRAND).to_numpy()
    values = part.array(category)
    bad = (values < 0) | (values >= _BRANDS // 2) | (brand < 0) | (brand >= _BRANDS)
    if bad.any():
        raise DataError(f"{part.where(int(bad.argmax()))}: {category} or brand is out of range")
    pairs: I8 = values * _BRANDS + brand
    return pairs


def _impressions(part: Part, users: I8, ads: I8, store: Store) -> Records:
    clicked = part.array("clk")
    if ((clicked != 0) & (clicked != 1)).any():
        row = int(((clicked != 0) & (clicked != 1)).argmax())
        raise DataError(f"{part.where(row)}: clk {clicked[row]} is neither 0 nor 1")
    ad = places(ads, part.array("adgroup_id"))
    inside = _inside(part.array("time_stamp"), AD_DAYS)
    store.skip("impression of an ad without features", (ad < 0).sum())
    store.skip(f"impression: {_OUTSIDE}", ((ad >= 0) & ~inside).sum())
    rows = records(places(users, part.array("user")), ad, part.array("time_stamp") * 1000, clicked)
    return rows[(ad >= 0) & inside]


def _shopping(part: Part, users: I8, pairs: I8, first: int, store: Store) -> Records:
    action = _codes(part.frame["btag"], AD_ACTIONS[:4])
    inside = _inside(part.array("time_stamp"), AD_DAYS)
    store.skip("behaviour of an unknown type", (action < 0).sum())
    store.skip(f"behaviour: {_OUTSIDE}", ((action >= 0) & ~inside).sum())
    pair = places(pairs, _pairs(part, "cate")) + first
    rows = records(places(users, part.array("user")), pair, part.array("time_stamp") * 1000, np.maximum(action, 0))
    return rows[(action >= 0) & inside]


def _profiles(path: Path, users: I8) -> Iterator[Profile]:
    """All users in order; the file's rows come in any order, so its columns are held: about 200 bytes per profile."""
    columns = {"userid": _WHOLE, **dict.fromkeys(_PROFILE, _SOME_TEXT)}
    table = pl.concat(part.frame.cast(dict.fromkeys(_PROFILE, pl.Categorical)) for part in csv_parts(path, columns))
    order = np.full(len(users), -1)
    order[places(users, table["userid"].to_numpy())] = np.arange(len(table))
    for at in range(0, len(users), 8_192):
        rows = order[at : at + 8_192]
        features = iter(table[rows[rows >= 0]].select(pl.col(_PROFILE).cast(pl.String)).iter_rows(named=True))
        for user, row in zip(users[at : at + 8_192].tolist(), rows, strict=True):
            yield Profile(str(user), next(features) if row >= 0 else {})


def _ads(folder: Path) -> Iterator[Item]:
    """All ads by id; the file's columns are held: about 100 bytes per ad."""
    table = pl.concat(part.frame for part in csv_parts(found_one(folder, "ad_feature.csv"), _AD)).sort("adgroup_id")
    for row in table.iter_rows(named=True):
        features = {
            "item": str(row["adgroup_id"]),
            "category": str(row["cate_id"]),
            "campaign": row["campaign_id"],
            "customer": row["customer"],
        }
        words = {f"item {row['adgroup_id']}": 0.4, f"customer {row['customer']}": 0.3}
        yield _good(str(row["adgroup_id"]), row["cate_id"], row["brand"], row["price"], features, words)


def _pair_items(pairs: I8) -> Iterator[Item]:
    for pair in pairs:
        category, brand = divmod(int(pair), _BRANDS)
        known = None if brand == _NO_BRAND else brand
        yield _good(
            f"c{category}b{'' if known is None else known}", category, known, None, {"category": str(category)}, {}
        )


def _good(
    name: str, category: int, brand: int | None, price: float | None, features: dict[str, Any], words: dict[str, float]
) -> Item:
    """An ad, or the goods of one category and brand."""
    crosses, attributes = [f"category:{category}"], {"title": f"category {category}"}
    words = {f"category {category}": 1.0, **words}
    more: dict[str, Any] = {}
    if brand is not None:
        features["brand"] = str(brand)
        crosses += [f"brand:{brand}", f"category+brand:{category}/{brand}"]
        words[f"brand {brand}"] = 0.7
        attributes["title"] += f", brand {brand}"
    if price is not None:
        band = price_band(price)
        features |= {"price": price, "price_band": band}
        crosses += [f"price:{band}", f"category+price:{category}/{band}"]
        words[f"price {band}"] = 0.3
        more["price"] = price
    return Item(name, features, crosses, {**attributes, **more}, words)


# UserBehavior ---------------------------------------------------------------------------------------------------------

_NAMES = ("user", "item", "category", "type", "time")
_EVENT = {"user": _WHOLE, "item": _WHOLE, "category": _WHOLE, "type": _TEXT, "time": _WHOLE}


def prepare_behaviours(folder: Path, store: Store, seed: int = 0) -> None:
    """Raises DataError; counts times outside the days, unknown types and rows that stand twice as skipped."""
    path = found_one(folder, "UserBehavior.csv")
    users, items, shown = Collected(), Collected(1), _Shown(seed)
    for part in csv_parts(path, _EVENT, _NAMES):
        users.add(part.array("user"))
        items.add(part.array("item"), part.array("category"))
        good, action = _usable(part, store)
        clicks = good & (action == 0)
        shown.add(part.array("user")[clicks], part.array("item")[clicks], part.array("time")[clicks] * 1000)
    (user_ids,), (item_ids, categories) = users.result(), items.result()
    pools = shown.pools(item_ids)
    with store.sorter("behaviours", len(user_ids), users.rows) as rows:
        for part in csv_parts(path, _EVENT, _NAMES):
            good, action = _usable(part, None)
            item = places(item_ids, part.array("item"))
            store.note(
                "rows with another category than the item's first", (categories[item] != part.array("category")).sum()
            )
            found = records(
                places(user_ids, part.array("user")), item, part.array("time") * 1000, np.maximum(action, 0)
            )
            rows.add(found[good])

        def once(count: bool) -> Iterator[Records]:
            for ordered in rows.parts():
                kept = distinct(ordered)
                if count:
                    store.skip("row that stands twice", len(ordered) - len(kept))
                yield kept

        store.behaviours(once(count=True), len(item_ids))
        store.examples((_sampled(part, pools, seed, store) for part in once(count=False)), len(item_ids))
    store.users((Profile(str(user), {}) for user in user_ids.tolist()), {})
    store.items(_plain_items(item_ids, categories), {"item": pl.String, "category": pl.String}, {"title": pl.String})
    store.finish("taobao-user-behavior", "taobao-user-behavior", ACTIONS)


def _usable(part: Part, store: Store | None) -> tuple[Mask, I8]:
    """Which rows are kept, and every row's action; counts the others where a store is given."""
    action = _codes(part.frame["type"], ACTIONS)
    inside = _inside(part.array("time"), DAYS)
    if store is not None:
        store.skip("behaviour of an unknown type", (action < 0).sum())
        store.skip(f"behaviour: {_OUTSIDE}", ((action >= 0) & ~inside).sum())
    return (action >= 0) & inside, action


def _plain_items(ids: I8, categories: I8) -> Iterator[Item]:
    for item, category in zip(ids.tolist(), categories.tolist(), strict=True):
        yield Item(
            id=str(item),
            features={"item": str(item), "category": str(category)},
            crosses=[f"category:{category}"],
            attributes={"title": f"item {item} of category {category}"},
            words={f"category {category}": 1.0, f"item {item}": 0.5},
        )


class _Shown:
    """For each slot of time up to `_SLOT_ITEMS` of its clicks, those with the smallest hashes: a uniform sample, the
    same in whatever order and parts the rows come.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: dict[int, tuple[npt.NDArray[np.uint64], I8]] = {}

    def add(self, user: I8, item: I8, time: I8) -> None:
        chance = _hash(user, item, time, self._seed)
        slots = time // _SLOT
        for slot in np.unique(slots).tolist():
            which = slots == slot
            known = self._rows.get(slot, (np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)))
            chances, items = np.concatenate([known[0], chance[which]]), np.concatenate([known[1], item[which]])
            kept = np.argsort(chances, kind="stable")[:_SLOT_ITEMS]
            self._rows[slot] = chances[kept], items[kept]

    def pools(self, ids: I8) -> Pools:
        """What may be drawn in each slot: places of items clicked in the slot before it."""
        if not self._rows:
            return Pools(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), 0, np.zeros(0, dtype=np.int32))
        first, last = min(self._rows) + 1, max(self._rows) + 1
        found = [
            places(ids, self._rows[slot - 1][1]) if slot - 1 in self._rows else _NONE for slot in range(first, last + 1)
        ]
        size = np.array([len(pool) for pool in found])
        return Pools(np.cumsum(size) - size, size, first, np.concatenate(found))


@dataclasses.dataclass(frozen=True)
class Pools:
    """The items of all slots from `first` on, one slot after the other."""

    begin: I8  # [slots]
    size: I8  # [slots]
    first: int
    items: npt.NDArray[np.int32]

    def of(self, time: I8) -> tuple[I8, I8]:
        """Where the pool of each time (ms) begins, and its size; 0 where there is none."""
        slot = time // _SLOT - self.first
        inside = (slot >= 0) & (slot < len(self.size))
        slot = np.where(inside, slot, 0)
        return self.begin[slot], np.where(inside, self.size[slot], 0)


def _sampled(part: Records, pools: Pools, seed: int, store: Store) -> Records:
    """Examples of some users' behaviours, in order; equal times in random order, so that no place tells the label."""
    clicks = part[part["code"] == 0]
    begin, size = pools.of(clicks["time"])
    store.note("clicks without a click in the hour before, which are no examples", (size == 0).sum())
    clicks, begin, size = clicks[size > 0], begin[size > 0], size[size > 0]
    out = []
    for turn in range(1, NEGATIVES + 1):
        chance = _hash(clicks["user"], clicks["item"], clicks["time"], seed + turn)
        drawn = clicks.copy()
        drawn["item"] = pools.items[begin + (chance % size.astype(np.uint64)).astype(np.int64)]
        out.append(drawn[drawn["item"] != clicks["item"]])
        out[-1]["code"] = 0
    clicks["code"] = 1
    rows = np.concatenate([clicks, *out])
    return in_order(rows[np.argsort(_hash(rows["user"], rows["item"], rows["time"], seed), kind="stable")])


# Both -----------------------------------------------------------------------------------------------------------------


def _codes(values: pl.Series, names: tuple[str, ...]) -> I8:
    """Places of the values among `names`; -1 for another value."""
    codes: I8 = values.replace_strict(
        list(names), list(range(len(names))), default=-1, return_dtype=pl.Int64
    ).to_numpy()
    return codes


def _inside(seconds: I8, days: tuple[int, int]) -> Mask:
    inside: Mask = (seconds >= days[0]) & (seconds < days[1])
    return inside


def _hash(user: npt.NDArray[Any], item: npt.NDArray[Any], time: I8, seed: int) -> npt.NDArray[np.uint64]:
    """A random-looking number for each row (rounds of splitmix64), the same in every run."""
    value = np.full(len(time), np.uint64(seed % (1 << 32)), dtype=np.uint64)
    for column in (user, item, time):
        value = (value ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return value
