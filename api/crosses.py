"""SIM cross features of stored users, where they come from elsewhere than the user block.

A `CrossSource` says what a user did. This host's own histories are one (`HostHistories`): their crosses are made in the
same call of the generated code as the block. A feature service is the other (`RemoteHistories`): its crosses are
fetched beside retrieval, made with the rows of the pinned generation, and kept apart from blocks (`CrossCache`).

Guarantees: a request waits for crosses until a moment that it names, and not at all where as many fetches run as may; a
fetch that nobody waits for goes on and serves those who come later. Crosses belong to one generation.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, Protocol

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from api.admission import Admission, FullError
from api.cache import CacheMetrics, FutureCache
from api.generations import Generation
from encoders.fold import Behaviours, Crosses
from index.histories import HistoriesReader
from index.kernels import cross_table
from index.keys import keys_of
from infra import telemetry
from infra.settings import Settings

LOG = logging.getLogger(__name__)
MISSING, OLD = "crosses", "old crosses"  # what an answer's `degraded` says
Key = tuple[str, str, int | str | None]  # user, generation, `as_of` as it was given
_REFRESH_AT = 0.375  # of the time crosses are kept, which is twice their TTL: three quarters of the TTL
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class SourceError(Exception):
    """A source cannot say what a user did; the message says why."""


@dataclasses.dataclass(frozen=True)
class Past:
    """A user's behaviours, oldest first. `position`: highest offset of `behaviours` that is in it; -1: not known."""

    keys: NDArray[np.uint64]  # [L, 2]
    actions: NDArray[np.uint8]  # [L], codes of `action_names`
    times: NDArray[np.int64]  # [L], ms since the epoch
    action_names: tuple[str, ...]
    position: int = -1

    @classmethod
    def nothing(cls) -> Past:
        return cls(np.zeros((0, 2), np.uint64), np.zeros(0, np.uint8), np.zeros(0, np.int64), ())


class CrossSource(Protocol):
    """Thread safe."""

    def past(self, user_id: str, as_of: int) -> Past:
        """The newest L of a user's behaviours that are not after `as_of` (ms); none of a user who is not known. Raises
        SourceError."""

    def close(self) -> None: ...


class HostHistories:
    """The histories of this host. Never older than what replicate-histories has written."""

    def __init__(self, histories: Callable[[], HistoriesReader | None]) -> None:
        self._histories = histories

    def past(self, user_id: str, as_of: int) -> Past:
        """Raises StoreError too."""
        histories = self._histories()
        if histories is None:
            raise SourceError("histories are not available yet")
        history = histories.history(user_id, as_of)
        return Past(history.keys, history.actions, history.times, histories.actions(), history.position)

    def close(self) -> None:
        """The histories are whose they are."""


_Moment = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]


class _Body(msgspec.Struct):
    """Columns of equal length, in any order."""

    item_ids: list[int | str]
    actions: list[str]
    event_times: list[_Moment]


class RemoteHistories:
    """A feature service: GET <url>/v1/histories?user_id=&as_of=<ms>&limit=<L> answers `{"item_ids": [...], "actions":
    [...], "event_times": [ms, ...]}`, columns of equal length, or 404 for a user whom it does not know."""

    def __init__(self, url: str, length: int, hash_key: bytes, timeout_s: float, connections: int) -> None:
        self._url, self._length, self._hash_key = url.rstrip("/") + "/v1/histories", length, hash_key
        self._timeout_s, self._bytes_max = timeout_s, (1 << 20) + 256 * length
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        headers = {"accept-encoding": "identity"}  # what is packed may be of any size
        self._client = httpx.Client(timeout=timeout_s, limits=limits, headers=headers, trust_env=False)
        self._decoder = msgspec.json.Decoder(_Body)

    def past(self, user_id: str, as_of: int) -> Past:
        query: dict[str, str | int] = {"user_id": user_id, "as_of": as_of, "limit": self._length}
        try:
            raw = self._get(query)
            return Past.nothing() if raw is None else self._past(self._decoder.decode(raw), as_of)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(f"the feature service does not answer: {error!r}") from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise SourceError(f"the feature service answers something else: {error}") from error

    def close(self) -> None:
        self._client.close()

    def _get(self, query: dict[str, str | int]) -> bytes | None:
        """The body, within the time limit; None for 404. Raises SourceError."""
        deadline = time.monotonic() + self._timeout_s
        parts, size = [], 0
        with self._client.stream("GET", self._url, params=query) as response:
            if response.status_code == httpx.codes.NOT_FOUND:
                return None
            if response.status_code != httpx.codes.OK:
                raise SourceError(f"the feature service answers {response.status_code}")
            for part in response.iter_raw():
                size += len(part)
                if size > self._bytes_max or time.monotonic() > deadline:
                    raise SourceError(f"the feature service sends more than {self._bytes_max} bytes, or too slowly")
                parts.append(part)
        return b"".join(parts)

    def _past(self, body: _Body, as_of: int) -> Past:
        """Raises ValueError."""
        times = np.array(body.event_times, np.int64)
        if not len(body.item_ids) == len(body.actions) == len(times):
            raise ValueError("columns of different lengths")
        order = np.argsort(times, kind="stable")
        order = order[: np.searchsorted(times[order], as_of, side="right")][-self._length :]
        names = tuple(sorted(set(body.actions)))
        if len(names) > 256:
            raise ValueError(f"{len(names)} different actions")
        code = {name: number for number, name in enumerate(names)}
        keys = keys_of(body.item_ids, self._hash_key) if body.item_ids else np.zeros((0, 2), np.uint64)
        actions = np.array([code[name] for name in body.actions], np.uint8)
        return Past(np.ascontiguousarray(keys[order]), actions[order], times[order], names)


def behaviours_of(
    generation: Generation,
    past: Past,
    hot: NDArray[Any],
    cold: NDArray[Any],
    there: NDArray[np.bool_],
) -> Behaviours:
    """A user's behaviours with the rows [L] of their items, as far as they are `there`."""
    actions, times = past.actions, past.times
    if not there.all():
        hot, cold, actions, times = hot[there], cold[there], actions[there], times[there]
    codes = generation.bundle.manifest.features.action_codes(past.action_names)
    return Behaviours(
        vectors=cold["vector"],
        signatures=hot["signature"],
        crosses=hot["crosses"],
        actions=codes[actions] if len(codes) else np.zeros(0, np.uint8),
        times=times,
    )


@dataclasses.dataclass(frozen=True)
class UserCrosses:
    """Crosses as a request joins them. `finished`: `time.perf_counter`."""

    crosses: Crosses
    table: NDArray[np.float32]  # G as the kernels take it
    finished: float

    @property
    def nbytes(self) -> int:
        """All arrays, and 1 KiB for the objects around them."""
        return 1024 + self.crosses.G.nbytes + self.crosses.slots.nbytes + self.table.nbytes


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request's crosses on their way; no future: as many fetches run as may."""

    future: Future[UserCrosses] | None
    ttl_s: float

    def done(self) -> bool:
        return self.future is None or self.future.done()

    def result(self, until: float | None) -> tuple[UserCrosses | None, tuple[str, ...]]:
        """The crosses, None where they are not there at `until` (`time.perf_counter`; None: when their fetch ends), and
        what is to be said of them."""
        if self.future is None:
            return None, (MISSING,)
        try:
            found = self.future.result(None if until is None else max(0.0, until - time.perf_counter()))
        except Exception:  # too late, or the fetch has failed, which was counted and logged where it ran
            return None, (MISSING,)
        return found, (OLD,) if time.perf_counter() - found.finished > self.ttl_s else ()


class CrossCache:
    """Crosses of a source, least recently used first out. Past three quarters of `cross_ttl_s` a use has them fetched
    anew, and the next one again where that failed; meanwhile they serve, until they are two `cross_ttl_s` old."""

    def __init__(self, settings: Settings, source: CrossSource) -> None:
        self._source, self._ttl_s = source, settings.cross_ttl_s
        self._pool = ThreadPoolExecutor(settings.cross_misses, "crosses")
        self._admission = Admission("crosses", settings.cross_misses)
        self.kept: FutureCache[Key, None, UserCrosses] = FutureCache(
            settings.cross_bytes,
            2 * settings.cross_ttl_s,
            lambda crosses: crosses.nbytes,
            lambda _, __: True,
            CacheMetrics("crosses"),
            refresh_at=_REFRESH_AT,
            refresh_hits=1,
        )
        fetches = telemetry.counter("forerank_cross_fetches", "Fetches of a user's crosses, by outcome", ("outcome",))
        self._fetches = {outcome: fetches.labels(outcome) for outcome in ("fetched", "failed")}
        self._seconds = telemetry.histogram("forerank_cross_fetch_seconds", "What a fetch takes", (), _BUCKETS)
        self._failing = ""  # what was logged last

    def begin(self, generation: Generation, key: Key, as_of: int) -> Wanted:
        """Starts a fetch unless the crosses are there or on their way. `as_of`: that of the key, ms."""

        def submit() -> Future[UserCrosses]:
            return self._admission.admit(self._pool.submit, self._fetch, generation, key[0], as_of)

        try:
            future, _ = self.kept.start(key, None, submit)
        except FullError:
            return Wanted(None, self._ttl_s)
        return Wanted(future, self._ttl_s)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._source.close()

    def _fetch(self, generation: Generation, user_id: str, as_of: int) -> UserCrosses:
        try:
            with self._seconds.time():
                past = self._source.past(user_id, as_of)
                behaviours = behaviours_of(generation, past, *generation.arena.gather_both(past.keys))
                crosses = generation.user_fold.crosses(behaviours, as_of)
        except Exception as error:
            self._fetches["failed"].inc()
            self._say(str(error))
            raise
        self._fetches["fetched"].inc()
        self._say("")
        return UserCrosses(crosses, cross_table(crosses.G), time.perf_counter())

    def _say(self, failing: str) -> None:
        """Once per change: a source that is away fails each request's fetch."""
        if failing != self._failing:
            self._failing = failing
            if failing:
                LOG.warning("crosses cannot be fetched", extra={"error": failing})
            else:
                LOG.info("crosses are fetched again")


def crosses_of(settings: Settings) -> CrossCache | None:
    """Of the source that `cross_source` names; None for this host's own histories, whose crosses blocks have."""
    if not settings.cross_source:
        return None
    source = RemoteHistories(
        settings.cross_source,
        settings.history_length,
        settings.hash_key.encode(),
        settings.cross_timeout_s,
        settings.cross_misses,
    )
    return CrossCache(settings, source)
