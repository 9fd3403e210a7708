"""User inference: a user's stored or inline side becomes the user block of one generation.

Runs beside retrieval and must not wait for it. Reads the history and the profile, gathers the rows of the history's
items *from the pinned generation*, and folds. A user of whom nothing is known is a cold user and is served; behaviours
whose items have no row are left out and counted. The blocks of stored users are kept and shared by requests for the
same user, generation and `as_of`, while the user's profile, history and its items' rows are what they were made from.

Where crosses come from a feature service, blocks are made without them, and they are fetched at the same time
(api/crosses.py): a request that cannot wait for them is served without, and says so.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from api.admission import Admission, overloaded
from api.cache import CacheMetrics, Found, FutureCache
from api.crosses import CrossCache, HostHistories, Key, Past, SourceError, UserCrosses, Wanted, behaviours_of
from api.generations import Generation
from api.lanes import Lanes, Rank, Step
from api.problems import integer, invalid
from api.schemas import Id, InlineUser, Query, UserSeen
from encoders.features import FeatureError
from encoders.fold import UserBlock
from index.arena import ArenaReader, Publications
from index.histories import HistoriesReader
from index.kernels import UserTables, user_tables
from index.keys import keys_of
from infra.settings import Settings
from streams import events

LOG = logging.getLogger(__name__)
State = Literal["started", "in flight", "ready"]
Origin = Literal["store", "prefetched", "cached"]
_FULL = "as many users are being inferred as may be"
_WARM_S = 5.0  # for crosses of a generation that is about to be served
INLINE = -2  # history position of a user who was sent along; -1 is that of one without behaviours


@dataclasses.dataclass(frozen=True)
class UserSource:
    """What is known of a user before any generation is involved. Arrays are oldest first."""

    user_id: str | None
    profile: Mapping[str, Any] | None
    keys: NDArray[np.uint64]  # [L, 2]
    actions: NDArray[np.uint8]  # [L], codes of `action_names`
    times: NDArray[np.int64]  # [L], ms since the epoch
    action_names: tuple[str, ...]
    position: int
    as_of: int
    degraded: tuple[str, ...] = ()

    @property
    def past(self) -> Past:
        return Past(self.keys, self.actions, self.times, self.action_names, self.position)


@dataclasses.dataclass(frozen=True)
class UserSide:
    """A user block and what it was made from. `ms`: how long this request's inference, or its wait for one, took;
    `finished`: when it was ready (`time.perf_counter`)."""

    block: UserBlock
    tables: UserTables
    source: UserSource
    rows: Publications
    degraded: tuple[str, ...]
    used: int
    without_row: int
    ms: float
    finished: float
    origin: Origin = "store"

    @property
    def nbytes(self) -> int:
        """All arrays, the profile by the length of its JSON, and 4 KiB for the objects around them."""
        held = (self.block, self.source, self.rows)
        arrays = (value for one in held for value in vars(one).values() if isinstance(value, np.ndarray))
        profile = 8 * len(msgspec.json.encode(self.source.profile))
        return 4096 + profile + self.tables.nbytes + sum(array.nbytes for array in arrays)

    def current(self, arena: ArenaReader) -> bool:
        """Whether its behaviours' rows are what the arena has now."""
        return self.rows.same(arena.publications(self.source.keys))

    def shared(self, ms: float) -> UserSide:
        """This one for another request than the one it was inferred for, which it took `ms`."""
        return dataclasses.replace(self, origin="cached" if self.origin == "store" else self.origin, ms=ms)

    def with_crosses(self, found: UserCrosses | None, said: tuple[str, ...], ms: float) -> UserSide:
        """This one for a request whose crosses were made apart, within `ms`; without any where none were found."""
        degraded = (*self.degraded, *said)
        if found is None:
            return dataclasses.replace(self, degraded=degraded, ms=ms)
        tables = dataclasses.replace(self.tables, G=found.table, cross_slots=found.crosses.slots)
        block = self.block.with_crosses(found.crosses)
        return dataclasses.replace(self, block=block, tables=tables, degraded=degraded, ms=ms)

    def seen(self) -> UserSeen:
        source = self.source
        return UserSeen(
            cold=not source.profile and self.used == 0,
            profile=bool(source.profile),
            source="inline" if source.position == INLINE else self.origin,
            behaviours_used=self.used,
            behaviours_without_row=self.without_row,
        )


@dataclasses.dataclass(frozen=True)
class Inference:
    """A request's user side on its way. Whoever asks waits in his own thread: a wait in the pool could take the place
    that what it waits for needs."""

    future: Future[UserSide]
    found: Found
    began: float
    renewed: Callable[[UserSide], Inference | None] = lambda _: None  # another one, where the side is outdated by now
    crosses: Wanted | None = None  # None: the block has them
    help: Callable[[Future[UserSide]], None] = lambda _: None  # makes the side here, where nobody has begun to

    def at_once(self) -> UserSide | None:
        """`result` for a caller on a lane, which must not wait; None where it would."""
        if self.found == "joined" or not (self.crosses is None or self.crosses.done()):
            return None
        self.help(self.future)
        return self.result(until=0.0) if self.future.done() else None

    def result(self, until: float | None = None) -> UserSide:
        """Raises what the inference raised, also where another request began it. `until` (`time.perf_counter`): how
        long crosses are waited for that come from elsewhere; None: as long as their fetch takes."""
        side = self._side()
        if self.crosses is None:
            return side
        found, said = self.crosses.result(until)
        ready = time.perf_counter() if found is None else found.finished
        return side.with_crosses(found, said, max(side.ms, (ready - self.began) * 1e3))

    def _side(self) -> UserSide:
        side = self.future.result()
        if self.found in ("miss", "renewed"):
            return side
        # who joined did so when the rows may have been read already
        if self.found == "joined" and (other := self.renewed(side)) is not None:
            return other._side()
        return side.shared(max(0.0, side.finished - self.began) * 1e3)


def moment(value: int | str | None, field: str) -> int:
    """Milliseconds since the epoch of a request's time; now where there is none. Raises ProblemError naming `field`."""
    if value is None:
        return time.time_ns() // 1_000_000
    if isinstance(value, int):
        if not -(2**53) <= value <= 2**53:
            raise invalid(field, "milliseconds since the epoch out of range")
        return value
    try:
        return events.to_ms(msgspec.convert(value, events.Time))
    except msgspec.ValidationError as error:
        raise invalid(field, "expected milliseconds since the epoch or an RFC 3339 time with a zone") from error


def moment_text(text: str) -> int | str:
    """The time of a query parameter, as `moment` takes it: a number where it is one, else text for it to judge."""
    number = integer(text)
    return text if number is None else number


def user_id_of(value: Id, field: str = "user_id") -> str:
    try:
        events.check_id(str(value), field)
    except events.EventError as error:
        raise invalid(field, error.message) from error
    return str(value)


class Users:
    """User sides for requests, inferred on `lanes`."""

    def __init__(
        self,
        settings: Settings,
        histories: Callable[[], HistoriesReader | None],
        lanes: Lanes,
        crosses: CrossCache | None = None,
    ) -> None:
        """`crosses`: None for those of the histories, which the blocks have."""
        self._settings, self._histories, self._lanes = settings, histories, lanes
        self.crosses = crosses
        self._admission = Admission("users", settings.user_misses)
        self._hash_key = settings.hash_key.encode()
        self.blocks: FutureCache[Key, UserSource, UserSide] = FutureCache(
            settings.prefetch_bytes,
            settings.prefetch_ttl_s,
            lambda side: side.nbytes,
            _same_user,
            CacheMetrics("blocks"),
        )

    def check(self, query: Query) -> None:
        """Raises ProblemError where the request does not say which user, or says it wrongly. Needs no store."""
        if (query.user_id is None) == (query.user is None):
            raise invalid("user_id", "exactly one of `user_id` and `user` is needed")
        if query.user_id is not None:
            user_id_of(query.user_id)
        moment(query.as_of, "as_of")
        if query.user is not None:
            for at, behaviour in enumerate(query.user.behaviours):
                moment(behaviour.event_time, f"user.behaviours[{at}].event_time")

    def find(self, query: Query) -> UserSource:
        """What the stores or the request say about the user, as of the request's moment."""
        as_of = moment(query.as_of, "as_of")
        return self.inline(query.user, as_of) if query.user is not None else self.stored(str(query.user_id), as_of)

    def prefetch(self, generation: Generation, user_id: str, as_of: int | str | None) -> State:
        """Starts the inference unless a right one of this user, generation and `as_of` is there."""
        source = self.stored(user_id, moment(as_of, "as_of"))
        inference = self._begun(generation, (user_id, generation.name, as_of), source, "prefetched", Rank.AHEAD)
        return "started" if inference.found == "miss" else "ready" if inference.future.done() else "in flight"

    def begin(self, generation: Generation, query: Query, source: UserSource, until: float = math.inf) -> Inference:
        """The user's side, made on a lane, best before `until` (`time.perf_counter`); that of a stored user is shared
        with all who ask for the same. Raises ProblemError `overloaded` where it is not there and as many inferences run
        as may."""
        if query.user is not None:
            with overloaded(_FULL):
                future = self._submit(lambda: infer(generation, source), source, until=until)
            return Inference(future, "miss", time.perf_counter(), help=self._lanes.help)
        key = (str(query.user_id), generation.name, query.as_of)
        return self._begun(generation, key, source, "store", until=until)

    def forget(self) -> None:
        """All kept blocks and crosses."""
        self.blocks.clear()
        if self.crosses is not None:
            self.crosses.kept.clear()

    def warm(self, generation: Generation, count: int) -> None:
        """Infers the users of the `count` most used blocks for a generation that is about to be served, one after the
        other, and lets their crosses be fetched meanwhile. One who cannot be inferred now is left to the requests."""
        until = time.perf_counter() + _WARM_S
        asked = dict.fromkeys((user_id, as_of) for user_id, _, as_of in self.blocks.hottest(count))
        for user_id, as_of in asked:
            try:
                source = self.stored(user_id, moment(as_of, "as_of"))
                self._begun(generation, (user_id, generation.name, as_of), source, "store", Rank.AHEAD).result(until)
            except Exception:
                LOG.warning("a user is not warm", extra={"generation": generation.name}, exc_info=True)

    def _submit(
        self, work: Callable[[], UserSide], source: UserSource, rank: Rank = Rank.REQUEST, until: float = math.inf
    ) -> Future[UserSide]:
        """Raises FullError."""
        return self._admission.admit(self._lanes.submit, Step.INFER, len(source.keys), work, rank, until)

    def _begun(
        self,
        generation: Generation,
        key: Key,
        source: UserSource,
        origin: Origin,
        rank: Rank = Rank.REQUEST,
        until: float = math.inf,
    ) -> Inference:
        """Block and crosses. Raises ProblemError `overloaded`."""
        crosses = None if self.crosses is None else self.crosses.begin(generation, key, source.as_of)
        with overloaded(_FULL):
            return dataclasses.replace(self._shared(generation, key, source, origin, rank, until), crosses=crosses)

    def _shared(
        self,
        generation: Generation,
        key: Key,
        source: UserSource,
        origin: Origin,
        rank: Rank,
        until: float,
        instead_of: Future[UserSide] | None = None,
    ) -> Inference:
        began = time.perf_counter()

        def work() -> UserSide:
            return infer(generation, source, origin, self.crosses is None)

        def submit() -> Future[UserSide]:
            return self._submit(work, source, rank, until)

        def ahead() -> Future[UserSide]:
            return self._submit(work, source, Rank.AHEAD)

        def renewed(side: UserSide) -> Inference | None:
            if side.current(generation.arena):
                return None
            with overloaded(_FULL):
                return self._shared(generation, key, source, origin, rank, until, future)

        future, found = self.blocks.start(key, source, submit, instead_of, ahead)
        while found == "hit" and not future.result().current(generation.arena):
            future, found = self.blocks.start(key, source, submit, future, ahead)
        if found == "joined" and rank is not Rank.AHEAD:
            self._lanes.hurry(future)
        return Inference(future, found, began, renewed, help=self._lanes.help)

    def stored(self, user_id: str, as_of: int) -> UserSource:
        """Profile and history of the stores; empty ones for a user they do not know."""
        degraded: tuple[str, ...] = ()
        try:
            past = HostHistories(self._histories).past(user_id, as_of)
        except SourceError as error:
            past, degraded = Past.nothing(), (str(error),)
        histories = self._histories()
        profile = None if degraded or histories is None else histories.profile(user_id)
        return UserSource(
            user_id, profile, past.keys, past.actions, past.times, past.action_names, past.position, as_of, degraded
        )

    def inline(self, user: InlineUser, as_of: int) -> UserSource:
        """The user of a request's body: behaviours in order of time, the newest L, none after `as_of`."""
        timed = [(moment(b.event_time, "user.behaviours"), b) for b in user.behaviours]
        timed = sorted((one for one in timed if one[0] <= as_of), key=lambda one: one[0])[
            -self._settings.history_length :
        ]
        names = tuple(sorted({b.action for _, b in timed}))
        if len(names) > 256:
            raise invalid("user.behaviours", f"{len(names)} different actions; at most 256 are possible")
        code = {name: number for number, name in enumerate(names)}
        return UserSource(
            None,
            user.features or None,
            keys_of([b.item_id for _, b in timed], self._hash_key) if timed else np.zeros((0, 2), np.uint64),
            np.array([code[b.action] for _, b in timed], np.uint8),
            np.array([at for at, _ in timed], np.int64),
            names,
            INLINE,
            as_of,
        )


def infer(generation: Generation, source: UserSource, origin: Origin = "store", crosses: bool = True) -> UserSide:
    """Behaviours' rows -> user block, all of `generation`, with or without `crosses`. A stored profile that it cannot
    read counts as none."""
    began = time.perf_counter()
    rows = generation.arena.publications(source.keys)  # what changes before it is read is outdated, not overlooked
    hot, cold, there = generation.arena.gather_both(source.keys)
    behaviours = behaviours_of(generation, source.past, hot, cold, there)
    degraded = source.degraded
    try:
        block = generation.user_fold.block(source.profile, behaviours, source.as_of, crosses=crosses)
    except FeatureError as error:
        if source.position == INLINE:
            raise invalid("user.features", str(error)) from error
        block = generation.user_fold.block(None, behaviours, source.as_of, crosses=crosses)
        degraded = (*degraded, f"the profile cannot be read by this generation: {error}")
    narrow = generation.layout.precision == "fp16"
    tables = user_tables(*block.arrays, narrow=narrow)
    used = min(len(behaviours), generation.bundle.manifest.config.longest)
    without_row = int(np.count_nonzero(~there))
    now = time.perf_counter()
    ms = (now - began) * 1e3
    return UserSide(block, tables, source, rows, degraded, used, without_row, ms, now, origin)


def _same_user(then: UserSource, now: UserSource) -> bool:
    """Whether a block made `then` may stand for the user `now`. The position alone does not tell: an erasure leaves it,
    and a behaviour of the future comes of age without it."""
    return (
        then.position == now.position
        and then.profile == now.profile
        and then.degraded == now.degraded
        and np.array_equal(then.times, now.times)
        and np.array_equal(then.keys, now.keys)
        and np.array_equal(then.actions, now.actions)
    )
