"""ONE REQUEST, top to bottom (the Merger): pin a generation, infer the user while candidates are retrieved, join, rank,
answer.

Runs in a request thread, which waits; the heavy steps run on lanes (api/lanes.py), user inference on one while another
retrieves and gathers.
Guarantees: user block, rows and head come from the pinned generation; every candidate that is not in the answer is
named or counted there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from api import rtp
from api.generations import Generation, Generations
from api.lanes import Lanes, Rank, Step
from api.problems import ProblemError, invalid
from api.retrieval import NEWEST, RetrievalView
from api.schemas import HistoryTrace, Id, Query, Ranked, RecommendRequest, ScoreOptions, Stages, Trace, column
from api.users import Users, UserSide, UserSource
from index.keys import keys_of, keys_of_ints
from infra.settings import Settings

ATTRIBUTES_MAX = 1_000  # items whose full attributes one request may ask for: each is a read of RocksDB
CROSSES_SHARE = 0.4  # of a request's deadline: until when it waits for crosses that come from elsewhere
RETRIEVED = 2_000  # candidates of a recommendation that does not say how many
Names = list[Any] | NDArray[Any]
Ids = Sequence[Id] | NDArray[np.integer[Any]]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """n candidates: keys u8[n, 2] and their names as the answer shall show them."""

    keys: NDArray[np.uint64]
    names: Callable[[NDArray[np.int64]], Names]

    @classmethod
    def of_ids(cls, ids: Ids, hash_key: bytes) -> Candidates:
        if not isinstance(ids, np.ndarray):
            return cls(keys_of(ids, hash_key), lambda places: [ids[place] for place in places.tolist()])
        if ids.dtype.kind == "u" or not len(ids) or ids.min() >= 0:
            return cls.of_integers(ids)
        return cls(keys_of(ids.tolist(), hash_key), lambda places: ids[places])

    @classmethod
    def of_integers(cls, ids: NDArray[np.integer[Any]]) -> Candidates:
        """None of them is negative."""
        return cls(keys_of_ints(ids.astype(np.uint64, copy=False)), lambda places: ids[places])

    @classmethod
    def retrieved(cls, view: RetrievalView, positions: NDArray[np.int64]) -> Candidates:
        return cls(np.ascontiguousarray(view.keys[positions]), lambda places: view.ids(positions[places]))

    def __len__(self) -> int:
        return len(self.keys)

    def at(self, places: NDArray[np.int64]) -> Candidates:
        return Candidates(self.keys[places], lambda more: self.names(places[more]))


@dataclasses.dataclass(frozen=True)
class Rows:
    """The candidates that have a row and pass the filters, with their rows. `cold` only where the request needs it."""

    places: NDArray[np.int64]  # among the candidates
    missing: NDArray[np.int64]
    filtered: int
    hot: NDArray[Any]
    cold: NDArray[Any] | None


Retrieved = tuple[Candidates, list[str]]  # and what is degraded about them


@dataclasses.dataclass(frozen=True)
class Found:
    """Of the step before the user is needed."""

    candidates: Candidates
    rows: Rows
    degraded: list[str]
    retrieval_ms: float
    gather_ms: float


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of the step that joins user and rows; `order`: places among the rows."""

    side: UserSide
    scores: NDArray[np.float32]
    order: NDArray[np.int64]
    score_ms: float
    top_k_ms: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """A ranked request before it is encoded. `places`, `scores` and `versions` are parallel."""

    generation: Generation
    side: UserSide
    candidates: Candidates
    rows: Rows
    places: NDArray[np.int64]  # of the candidates, in the answer's order
    scores: NDArray[np.float32]
    versions: NDArray[np.uint64] | None
    degraded: list[str]
    stages: Stages


class Clock:
    """Stage timings: `lap()` is the milliseconds since the last lap."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._last = (now - self._last) * 1e3, now
        return took

    def at(self, ms: float) -> float:
        """The moment so long after the beginning, as `time.perf_counter` gives it."""
        return self._began + ms / 1e3

    def total(self) -> float:
        return (time.perf_counter() - self._began) * 1e3


class Merger:
    """Answers score and recommend requests. Thread safe."""

    def __init__(self, settings: Settings, generations: Generations, users: Users, lanes: Lanes) -> None:
        self._settings, self._generations, self._users, self._lanes = settings, generations, users, lanes
        self._hash_key = settings.hash_key.encode()

    def score(self, ids: Ids, options: ScoreOptions) -> Answer:
        """The caller's own candidates."""
        return self.prerank(
            options, options.k, len(ids), lambda *_: lambda: (Candidates.of_ids(ids, self._hash_key), [])
        )

    def recommend(self, request: RecommendRequest) -> Answer:
        """Candidates of the built-in retrieval."""
        if request.retrieve is not None:
            self._at_most(request.retrieve, "retrieve")
        count = request.retrieve or min(RETRIEVED, self._settings.candidates_max)
        return self.prerank(
            request,
            request.k,
            count,
            lambda pinned, source: lambda: self._retrieve(pinned, source, count, request.exclude_seen),
        )

    def prerank(
        self,
        query: Query,
        k: int | None,
        size: int,
        retrieve: Callable[[Generation, UserSource], Callable[[], Retrieved]],
    ) -> Answer:
        """One request of about `size` candidates. `retrieve` may wait for them; what it gives must not, and runs on a
        lane. Raises ProblemError.
        """
        clock = Clock()
        deadline_ms = query.deadline_ms or self._settings.deadline_ms
        until = clock.at(deadline_ms)
        generation = self._generations.pin(query.user_id)
        weight = rtp.order_attribute(generation, query.order)
        source = self._users.find(query)
        found_ms = clock.lap()
        user = self._users.begin(generation, query, source, until)  # runs beside the next two steps
        candidates = retrieve(generation, source)
        waited_ms = clock.lap()

        def find() -> tuple[Found, Scored | None]:
            found = _found(generation, candidates, query, cold=weight is not None or "trace" in query.include)
            side = user.at_once()
            return found, None if side is None else self._score(generation, side, found, weight, k)

        found, scored = self._lanes.run(Step.FIND, size, find, until=until)
        if scored is None:  # no lane may wait for the user
            side = user.result(until=clock.at(CROSSES_SHARE * deadline_ms))
            scored = self._lanes.run(
                Step.SCORE,
                len(found.rows.places),
                lambda: self._score(generation, side, found, weight, k),
                Rank.NEXT,
                until,
            )
        side, rows, order = scored.side, found.rows, scored.order
        return Answer(
            generation=generation,
            side=side,
            candidates=found.candidates,
            rows=rows,
            places=rows.places[order],
            scores=scored.scores[order],
            versions=rows.cold["version"][order] if rows.cold is not None else None,
            degraded=[*side.degraded, *found.degraded],
            stages=Stages(
                found_ms + side.ms,
                waited_ms + found.retrieval_ms,
                found.gather_ms,
                scored.score_ms,
                scored.top_k_ms,
                clock.total(),
            ),
        )

    def check(self, query: Query, candidates: int, k: int | None) -> None:
        """Raises ProblemError for what is wrong with a request whatever the stores hold."""
        self._users.check(query)
        self._at_most(candidates, "candidates")
        if k is not None:
            self._at_most(k, "k")
        for name, comparison in query.filters.items():
            if all(getattr(comparison, bound) is None for bound in comparison.__struct_fields__):
                raise invalid(f"filters.{name}", "expected at least one of eq, ne, lt, lte, gt, gte")

    def _at_most(self, count: int, field: str) -> None:
        if count > self._settings.candidates_max:
            raise invalid(field, f"{count} are more than the {self._settings.candidates_max} that one request may have")

    def _score(self, generation: Generation, side: UserSide, found: Found, weight: int | None, k: int | None) -> Scored:
        clock, rows = Clock(), found.rows
        scores = rtp.score(generation, side, rows.hot)
        score_ms = clock.lap()
        weights = None if weight is None or rows.cold is None else rows.cold["attributes"][:, weight]
        order = self._order(rtp.order_values(scores, weights), k, found.candidates.at(rows.places))
        return Scored(side, scores, order, score_ms, clock.lap())

    def _order(self, values: NDArray[np.float32], k: int | None, candidates: Candidates) -> NDArray[np.int64]:
        if k is None:
            return np.arange(len(values))
        return rtp.ranked(values, k, candidates.keys, candidates.names)

    def _retrieve(self, generation: Generation, source: UserSource, count: int, exclude_seen: bool) -> Retrieved:
        view = self._generations.retrieval_of(generation)
        if view is None:
            raise ProblemError(503, "not-ready", "the retrieval index of this generation is still being built")
        positions = view.retrieve(source.keys[-NEWEST:], count)
        candidates = Candidates.retrieved(view, positions)
        if exclude_seen and len(source.keys):
            seen = set(map(tuple, source.keys.tolist()))
            fresh = [at for at, key in enumerate(map(tuple, candidates.keys.tolist())) if key not in seen]
            candidates = candidates.at(np.array(fresh, np.int64))
        other = generation.name != view.generation
        return candidates, [f"candidates were retrieved by generation {view.generation}"] if other else []


def _found(generation: Generation, candidates: Callable[[], Retrieved], query: Query, cold: bool) -> Found:
    clock = Clock()
    there, degraded = candidates()
    retrieval_ms = clock.lap()
    return Found(there, gather(generation, there, query, cold), degraded, retrieval_ms, clock.lap())


def gather(generation: Generation, candidates: Candidates, query: Query, cold: bool) -> Rows:
    """The rows of the candidates. Where both records of a row are needed, both are of the same version."""
    keys = candidates.keys
    if not cold and not query.filters:
        gathered = generation.arena.gather(keys)
        there, missing = np.flatnonzero(gathered.found), np.flatnonzero(~gathered.found)
        return Rows(there, missing, 0, gathered.hot[there] if len(missing) else gathered.hot, None)
    hot, cold_rows, found = generation.arena.gather_both(keys)
    places = np.flatnonzero(found)
    keep = rtp.passing(generation, query.filters, cold_rows[places])
    kept = places[keep]
    return Rows(kept, np.flatnonzero(~found), len(places) - len(kept), hot[kept], cold_rows[kept])


def answer_of(answer: Answer, query: Query, columns: bool = True) -> Ranked:
    """The response's body, with or without its columns."""
    side = answer.side
    out = Ranked(
        generation=answer.generation.name,
        as_of=side.source.as_of,
        ids=column(answer.candidates.names(answer.places)) if columns else msgspec.UNSET,
        scores=column(answer.scores) if columns else msgspec.UNSET,
        missing=column(answer.candidates.names(answer.rows.missing)),
        filtered=answer.rows.filtered,
        candidates=len(answer.candidates),
        degraded=answer.degraded,
        user=side.seen(),
        stages_ms=answer.stages,
    )
    if "attributes" in query.include:
        out.attributes = _attributes(answer)
    if "trace" in query.include and answer.versions is not None:
        history = HistoryTrace(side.source.position, side.used, side.without_row)
        out.trace = Trace(side.source.as_of, history, column(answer.versions))
    return out


def _attributes(answer: Answer) -> list[dict[str, Any]]:
    """All attributes of the answer's items, from RocksDB; {} for one that has gone meanwhile."""
    if len(answer.places) > ATTRIBUTES_MAX:
        raise invalid("include", f"attributes are given for at most {ATTRIBUTES_MAX} items; set k")
    rows = answer.generation.rows.get([str(name) for name in answer.candidates.names(answer.places)])
    return [{} if row is None else row.attributes for row in rows]
