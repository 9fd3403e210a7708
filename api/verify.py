"""Verification: whether a complete generation may be served, found out beside the requests, before it is.

Between `fill` and `activate` of a generation (streams/rollout.py): the supervisor runs `python -m api verify` as a job
of its own, and acts upon the verdict, which appears whole in `<generation>/verify.json`. In this order, the cheap
before the dear; the first that is wrong is the reason:

    1  coverage  items drawn from the topic have their row, or are deleted, or cannot be encoded
    2  parity    these rows are what the bundle makes of the record that they name: `ItemFold` run directly
    3  numbers   drawn rows are finite, not all the same, and about as long as those of the active generation
    4  replay    recorded requests, scored by the active generation and by this one with the same `as_of`

Reads only; bounded by how much is drawn and by deadlines, whatever the catalogue's size. What cannot be looked at (no
active generation, no recorded requests) is said and is no reason. A killed run leaves nothing; the next begins anew.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from numpy.typing import NDArray

from api.generations import Generation, load
from api.lanes import Lanes
from api.recording import KEPT, newest
from api.replay import Comparison, score
from api.runtime.runtime import Runtime
from api.users import Users
from encoders.bundle import BundleError
from encoders.fold import EncodedItems, ItemFold
from index.errors import StoreError, StoreMissingError
from index.histories import HistoriesReader
from index.keys import keys_of
from index.layout import RowLayout
from index.row_codec import StoredRow
from infra.settings import Settings
from streams import events, rollout
from streams.events import EventError, Item
from streams.rollout import Verification

LOG = logging.getLogger(__name__)
DRAWN = 512  # items of the topic
_SPOTS, _AT_ONCE = 64, DRAWN // 64  # places of the topic that are read from, and records at each
NUMBERS = 100_000  # rows whose numbers are looked at
_CHUNK = 8_192  # of them at a time
LEAST = 64  # with fewer items, shares and differences say nothing
UNENCODABLE = 0.1  # share of the items that the active generation has and this one cannot encode
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}  # of a number in a row, as a share of the row's largest, at least of 1
_SIGNATURE_BITS = 1  # per row: a projection next to zero may fall on either side
_READ_S, _CHANGING_S, _FOLLOW_S, _REPLAY_S = 20.0, 30.0, 60.0, 60.0
_FETCH_BYTES = 64 << 10
_POLL_MS = 500


class NotVerifiedError(Exception):
    """The generation must not be served; the message is one sentence that says why."""


class NotYetError(Exception):
    """Something else stands in the way; trying again is right. The message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A record of `items`; `item` is None where it is a tombstone or cannot be read."""

    partition: int
    offset: int
    item_id: str
    item: Item | None

    @property
    def live(self) -> bool:
        return self.item is not None and not self.item.deleted


def verify(settings: Settings, generation: str) -> Verification:
    """Looks at all of it, and writes `verify.json`. Raises OSError, and Refused where `serving.json` cannot be read."""
    found = Verification(verdict="yes")
    try:
        _look(settings, generation, found)
    except (NotVerifiedError, BundleError, StoreMissingError, StoreError, NotYetError, KafkaError) as error:
        later = isinstance(error, NotYetError | StoreMissingError | KafkaError)
        found.verdict, found.reason = "again" if later else "no", f"not verified{' yet' if later else ''}: {error}"
    found.time = time.time_ns() // 1_000_000
    rollout.write_beside(settings.verification_file(generation), found)
    return found


def _look(settings: Settings, name: str, found: Verification) -> None:
    torch.set_num_threads(1)
    serving = rollout.read(settings.serving_file)
    known = serving.generations.get(name)
    if known is None:
        raise NotYetError(f"this host knows no generation {name}")
    new, live = load(settings, name, known.sha256), _live(settings, serving, name, found)
    random = np.random.default_rng()
    found.rows = int(new.arena.progress().count.sum())
    with _items(settings) as items:
        _Coverage(items, new, live, settings.hash_key.encode(), found).look(random)  # 1, 2
    _numbers(settings, new, live, found, random)  # 3
    if live is not None:
        _replay(settings, new, live, found)  # 4


def _live(settings: Settings, serving: rollout.Serving, name: str, found: Verification) -> Generation | None:
    """The active generation, to compare with. One that cannot be read must not keep its successor out."""
    if serving.active is None or serving.active == name:
        found.unsaid.append("no other generation is active")
        return None
    try:
        return load(settings, serving.active, serving.generations[serving.active].sha256)
    except (BundleError, StoreError, OSError) as error:
        found.unsaid.append(f"the active generation cannot be read: {error}")
        return None


# ---- 1 and 2: against the topic


class _Items:
    """The topic `items`, by partition and offset."""

    def __init__(self, settings: Settings, consumer: KafkaConsumer) -> None:
        self._topic, self._consumer = settings.topic("items"), consumer

    def bounds(self) -> list[tuple[int, int]]:
        """First offset and end of each partition."""
        places = [TopicPartition(self._topic, at) for at in sorted(self._consumer.partitions_for_topic(self._topic))]
        starts, ends = self._consumer.beginning_offsets(places), self._consumer.end_offsets(places)
        return [(starts[place], ends[place]) for place in places]

    def read(self, partition: int, start: int, end: int, most: int, limit_s: float = _READ_S) -> Iterator[Drawn]:
        """At most `most` records from `start` on, none from `end` on. Raises NotYetError where that takes too long."""
        place, deadline = TopicPartition(self._topic, partition), time.monotonic() + limit_s
        self._consumer.assign([place])
        self._consumer.seek(place, start)
        while most > 0 and self._consumer.position(place) < end:  # which passes what compaction has emptied
            for record in self._consumer.poll(timeout_ms=_POLL_MS, max_records=most).get(place, []):
                if record.offset >= end:
                    return
                most -= 1
                yield _drawn(record)
            if time.monotonic() > deadline:
                raise NotYetError(f"{self._topic}[{partition}] could not be read from offset {start} in time")

    def at(self, partition: int, offset: int) -> Drawn | None:
        """The record at a place; None where compaction has removed it."""
        return next(self.read(partition, offset, offset + 1, 1), None)


@contextmanager
def _items(settings: Settings) -> Iterator[_Items]:
    consumer = KafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap.split(","),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=_FETCH_BYTES,
        bootstrap_timeout_ms=int(_READ_S * 1000),
    )
    with closing(consumer):
        yield _Items(settings, consumer)


def _drawn(record: Any) -> Drawn:
    name = (record.key or b"").decode(errors="replace")
    try:
        item = None if record.value is None else events.item(record.value)
    except EventError:
        item = None
    return Drawn(record.partition, record.offset, name, item)


@dataclasses.dataclass(frozen=True)
class _Looked:
    """What the host has of some items now: their records [n], those without a row, those whose row agrees with its
    record, with the row's place, and those that change just now."""

    hot: NDArray[Any]
    cold: NDArray[Any]
    absent: dict[str, Drawn]
    rows: list[tuple[Drawn, int]]
    changing: dict[str, Drawn]


class _Coverage:
    """Items of the topic, and what this host has of each."""

    def __init__(
        self, items: _Items, new: Generation, live: Generation | None, hash_key: bytes, found: Verification
    ) -> None:
        self._items, self._new, self._live, self._hash_key, self._found = items, new, live, hash_key, found
        self._fold = ItemFold(new.bundle)

    def look(self, random: np.random.Generator) -> None:
        """Raises NotVerifiedError, NotYetError, KafkaError."""
        waiting = self._draw(self._new.arena.progress().covered.tolist(), random)
        self._found.drawn = len(waiting)
        without: dict[str, Drawn] = {}
        deadline = time.monotonic() + _CHANGING_S
        while waiting:
            looked = self._looked(waiting)
            self._compare(looked)
            without |= looked.absent
            waiting = looked.changing
            if waiting and time.monotonic() > deadline:
                raise NotYetError(f"RocksDB and the arena do not agree about item {next(iter(waiting))}")
            if waiting:
                time.sleep(0.1)
        self._judge(without)

    def _draw(self, covered: Sequence[int], random: np.random.Generator) -> dict[str, Drawn]:
        """Of some items their newest drawn record, of what the host has covered."""
        bounds = self._items.bounds()
        for partition, ((_, end), reached) in enumerate(zip(bounds, covered, strict=True)):
            if reached >= end:
                raise NotVerifiedError(f"it covers offset {reached} of partition {partition}, which ends at {end}")
        starts = [start for start, _ in bounds]
        sizes = np.array([max(0, reached + 1 - start) for start, reached in zip(starts, covered, strict=True)])
        found: dict[str, Drawn] = {}
        if sizes.sum() <= DRAWN:
            spots = [(partition, 0, int(size)) for partition, size in enumerate(sizes)]
        else:
            upto = np.cumsum(sizes)
            chosen = np.sort(random.choice(sizes.sum(), _SPOTS, replace=False))
            partitions = np.searchsorted(upto, chosen, side="right")
            within = chosen - (upto - sizes)[partitions]
            spots = [(int(p), int(at), _AT_ONCE) for p, at in zip(partitions, within, strict=True)]
        for partition, at, most in spots:
            if most:
                for drawn in self._items.read(partition, starts[partition] + at, covered[partition] + 1, most):
                    found[drawn.item_id] = drawn
        return found

    def _looked(self, waiting: Mapping[str, Drawn]) -> _Looked:
        names = list(waiting)
        hot, cold, there = self._new.arena.gather_both(keys_of(names, self._hash_key))
        looked = _Looked(hot, cold, {}, [], {})
        for at, (name, stored) in enumerate(zip(names, self._new.rows.get(names), strict=True)):
            drawn = waiting[name]
            if stored is None and not there[at]:
                looked.absent[name] = drawn
                continue
            if stored is None or not there[at] or not _agree(stored, cold[at]):
                looked.changing[name] = drawn
                continue
            if stored.partition == drawn.partition and stored.offset < drawn.offset:
                where = f"partition {drawn.partition}, offset {stored.offset}"
                raise NotVerifiedError(f"the row of item {name} is of {where}, and {drawn.offset} is newer")
            ours = (stored.partition, stored.offset) == (drawn.partition, drawn.offset)
            record = drawn if ours else self._items.at(stored.partition, stored.offset)
            if record is None:  # compacted away: a newer one is about to arrive here
                looked.changing[name] = drawn
            else:
                looked.rows.append((record, at))
        return looked

    def _compare(self, looked: _Looked) -> None:
        """Rows against the bundle run directly. Raises NotVerifiedError."""
        rows = looked.rows
        if not rows:
            return
        for record, _ in rows:
            if not record.live:
                raise NotVerifiedError(f"item {record.item_id} is deleted, and has a row")
        wanted = self._fold.encode([record.item for record, _ in rows if record.item is not None])
        places = [place for _, place in rows]
        for (record, _), error in zip(rows, wanted.errors, strict=True):
            if error is not None:
                raise NotVerifiedError(f"item {record.item_id} has a row, but the bundle cannot encode it: {error}")
        worst, column = deviations(looked.hot[places], looked.cold[places], wanted, self._new.layout)
        self._found.compared += len(rows)
        self._found.error = max(self._found.error, round(float(worst.max()), 6))
        if worst.max() > 1:
            at = int(worst.argmax())
            raise NotVerifiedError(
                f"the row of item {rows[at][0].item_id} is not what the bundle makes of its record (`{column[at]}`); "
                f"so it is with {np.count_nonzero(worst > 1)} of {len(rows)}"
            )

    def _judge(self, without: dict[str, Drawn]) -> None:
        """Items without a row: they must be deleted by now, or not be encodable. Raises NotVerifiedError."""
        unfit, unexplained = self._unfit([drawn for drawn in without.values() if drawn.live])
        if unexplained:
            try:
                more, missing = self._unfit(self._newest(unexplained))
            except NotYetError as error:  # a topic too long to follow what became of them
                self._found.unsaid.append(str(error))
                more, missing = [], []
            unfit += more
            absent = self._still_absent(missing) if missing else set()
            missing = [drawn for drawn in missing if drawn.item_id in absent]
            if missing:
                first, share = missing[0], f"{len(missing)} of {self._found.drawn} that were drawn"
                where = f"partition {first.partition}, offset {first.offset}"
                raise NotVerifiedError(f"item {first.item_id} ({where}) has no row; so it is with {share}")
        self._found.unencodable = len(unfit)
        self._judge_unfit(unfit)

    def _unfit(self, drawn: Sequence[Drawn]) -> tuple[list[Drawn], list[Drawn]]:
        """Those that the bundle cannot encode, and the others; without those that are deleted."""
        live = [one for one in drawn if one.live]
        if not live:
            return [], []
        errors = self._fold.encode([one.item for one in live if one.item is not None]).errors
        unfit = [one for one, error in zip(live, errors, strict=True) if error is not None]
        return unfit, [one for one, error in zip(live, errors, strict=True) if error is None]

    def _newest(self, drawn: Sequence[Drawn]) -> list[Drawn]:
        """The newest records of these items that the host has covered by now. Raises NotYetError."""
        covered, deadline = self._new.arena.progress().covered.tolist(), time.monotonic() + _FOLLOW_S
        found = {one.item_id: one for one in drawn}
        for partition in {one.partition for one in drawn}:
            start = min(one.offset for one in drawn if one.partition == partition)
            left = max(0.0, deadline - time.monotonic())
            for record in self._items.read(partition, start, covered[partition] + 1, 1 << 62, left):
                if record.item_id in found:
                    found[record.item_id] = record
        return list(found.values())

    def _still_absent(self, drawn: Sequence[Drawn]) -> set[str]:
        names = [one.item_id for one in drawn]
        there = self._new.arena.gather(keys_of(names, self._hash_key)).found
        return {name for name, has_row in zip(names, there.tolist(), strict=True) if not has_row}

    def _judge_unfit(self, unfit: Sequence[Drawn]) -> None:
        """What the active generation could encode and this one cannot: a few are a change of the model's, many are a
        wrong one."""
        if self._live is None or not unfit or self._found.drawn < LEAST:
            return
        had = self._live.arena.gather(keys_of([one.item_id for one in unfit], self._hash_key)).found.sum()
        if had > UNENCODABLE * self._found.drawn:
            raise NotVerifiedError(
                f"it cannot encode {had} of {self._found.drawn} items of which the active generation has rows"
            )


def _agree(stored: StoredRow, cold: Any) -> bool:
    return (stored.version, stored.encode_time) == (int(cold["version"]), int(cold["encode_time"]))


def deviations(
    hot: NDArray[Any], cold: NDArray[Any], wanted: EncodedItems, layout: RowLayout
) -> tuple[NDArray[np.float64], list[str]]:
    """How far each row [n] is from what it should be, as a share of what is allowed (inf: something that allows none),
    and the column that is farthest off.
    """
    allowed = TOLERANCE[layout.precision]
    out: dict[str, NDArray[np.float64]] = {}
    for name, rows in (("joint", hot), ("bridge", hot), ("vector", cold)):
        got, right = rows[name].astype(np.float64), getattr(wanted, name).astype(np.float64)
        scale = np.maximum(1.0, np.abs(right).max(axis=1, initial=0.0))
        out[name] = np.nan_to_num(np.abs(got - right).max(axis=1, initial=0.0), nan=np.inf) / (allowed * scale)
    bits = np.unpackbits(hot["signature"] ^ wanted.signature, axis=1).sum(axis=1)
    out["signature"] = np.where(bits > _SIGNATURE_BITS, np.inf, 0.0)
    out["crosses"] = np.where((hot["crosses"] != wanted.crosses).any(axis=1), np.inf, 0.0)
    same = (cold["attributes"] == wanted.attributes) | (np.isnan(cold["attributes"]) & np.isnan(wanted.attributes))
    out["attributes"] = np.where(same.all(axis=1), 0.0, np.inf)
    names, table = list(out), np.stack(list(out.values()))
    return table.max(axis=0), [names[at] for at in table.argmax(axis=0)]


# ---- 3: numbers


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Of m rows: their lengths f4[m], and the largest standard deviation of a number of `joint` over the rows."""

    vector: NDArray[np.float32]
    joint: NDArray[np.float32]
    deviation: float
    not_finite: int

    @classmethod
    def of(cls, generation: Generation, count: int, random: np.random.Generator) -> Numbers:
        keys = generation.arena.sample(count, random)
        lengths: dict[str, list[NDArray[np.float32]]] = {"vector": [], "joint": []}
        sums, bad = np.zeros((2, generation.layout.width)), 0
        for at in range(0, len(keys), _CHUNK):
            hot, cold, found = generation.arena.gather_both(keys[at : at + _CHUNK])
            columns = {"vector": cold["vector"][found], "joint": hot["joint"][found], "bridge": hot["bridge"][found]}
            finite = np.logical_and.reduce([np.isfinite(column).all(axis=1) for column in columns.values()])
            bad += int(np.count_nonzero(~finite))
            for name, parts in lengths.items():
                parts.append(np.linalg.norm(columns[name][finite].astype(np.float32), axis=1))
            exact = columns["joint"][finite].astype(np.float64)
            sums += exact.sum(axis=0), np.square(exact).sum(axis=0)
        vector, joint = (np.concatenate(parts) if parts else np.empty(0, np.float32) for parts in lengths.values())
        mean, square = sums / max(1, len(joint))
        return cls(vector, joint, float(np.sqrt(np.maximum(square - mean * mean, 0.0)).max()), bad)


def _numbers(
    settings: Settings, new: Generation, live: Generation | None, result: Verification, random: np.random.Generator
) -> None:
    """Raises NotVerifiedError."""
    found: Numbers = Numbers.of(new, NUMBERS, random)
    result.looked_at = len(found.joint) + found.not_finite
    if found.not_finite:
        raise NotVerifiedError(f"{found.not_finite} of {result.looked_at} rows hold numbers that are not finite")
    if len(found.joint) >= LEAST and found.deviation <= 1e-6 * float(np.median(found.joint)):
        raise NotVerifiedError(f"`joint` is the same in all {len(found.joint)} rows that were looked at")
    if live is None or not len(found.joint):
        return
    other = Numbers.of(live, DRAWN * 8, random)
    ratios = {name: _ratio(getattr(found, name), getattr(other, name)) for name in ("vector", "joint")}
    result.norm, name = max(((ratio, name) for name, ratio in ratios.items()), key=lambda one: abs(np.log(one[0])))
    if not 1 / settings.verify_norm <= result.norm <= settings.verify_norm:
        raise NotVerifiedError(
            f"the median length of `{name}` is {result.norm:.3g} times that of the active generation, and at most "
            f"{settings.verify_norm:g} times more or less is allowed"
        )


def _ratio(found: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of the medians; 1 where one of them is of nothing or zero."""
    if not len(found) or not len(other) or not np.median(found) or not np.median(other):
        return 1.0
    return float(np.median(found) / np.median(other))


# ---- 4: recorded requests


def _replay(settings: Settings, new: Generation, live: Generation, result: Verification) -> None:
    """Raises NotVerifiedError."""
    found, deadline = Comparison(), time.monotonic() + _REPLAY_S
    with users_of(settings) as users:
        for _, request in newest(settings.requests_dir, KEPT):
            scored = score(request, live, new, users.find)
            if scored is not None:
                found.add(scored)
            if time.monotonic() > deadline:
                break
    result.requests = found.requests
    if not found.requests:
        result.unsaid.append("no recorded request could be scored")
        return
    if found.not_finite:
        raise NotVerifiedError(f"{found.not_finite} scores of recorded requests are not finite")
    result.shift, result.spread, result.overlap = found.shift, found.spread, found.overlap
    _judge_scores(settings, found)


def _judge_scores(settings: Settings, found: Comparison) -> None:
    """Raises NotVerifiedError."""
    of = f"of {found.requests} recorded requests"
    if found.shift is not None and abs(found.shift) > settings.verify_shift:
        raise NotVerifiedError(
            f"the mean score {of} is {found.shift:.3g} standard deviations from the active generation's, and at most "
            f"{settings.verify_shift:g} are allowed"
        )
    if found.spread is not None and not 1 / settings.verify_spread <= found.spread <= settings.verify_spread:
        raise NotVerifiedError(
            f"the scores {of} spread {found.spread:.3g} times as far as the active generation's, and at most "
            f"{settings.verify_spread:g} times more or less is allowed"
        )
    if found.overlap is not None and found.overlap < settings.verify_overlap:
        raise NotVerifiedError(
            f"{found.overlap:.0%} of the best 100 {of} are those of the active generation, and at least "
            f"{settings.verify_overlap:.0%} must be"
        )


@contextmanager
def users_of(settings: Settings) -> Iterator[Users]:
    """Users of the host's histories, where it has some, for a process that serves nobody."""
    try:
        histories = HistoriesReader(settings.histories_dir)
    except StoreError:
        histories = None
    with Runtime(1) as runtime:
        try:
            yield Users(settings, lambda: histories, Lanes(runtime))
        finally:
            if histories is not None:
                histories.close()
