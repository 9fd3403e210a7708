"""What happens on the lanes: figures for Prometheus, and timelines of single queries for Perfetto.

The runtime calls an `Observer` at every operator, under its own lock, so that no two calls meet. `Watch` counts, and
with a folder for traces it remembers the newest operators of all queries: the timeline of one query shows what ran
meanwhile, so also what it waited for.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from infra import telemetry

DONE, LATE, CANCELLED, FAILED = "done", "late", "cancelled", "failed"  # how a query ends
REFUSED = "refused"  # it never began: no schedule could keep its deadline
TRACES_KEPT = 128  # files of a folder, the newest
_REMEMBERED = 8_192  # steps; a timeline has no more, about 1 MB
_END = ".trace.json"
_WAITS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Observer:
    """Hears what the runtime does, and makes nothing of it."""

    def arrived(self, query: int, model: object, priority: int, answer: Future[Any]) -> None:
        """A query is there."""

    def refused(self) -> None:
        """A query was not taken."""

    def begin(self, query: int, operator: int, lane: int) -> None:
        """A lane runs an operator, or blocks of it, when those that it has begun before have ended."""

    def end(self, lane: int, newest: bool, blocks: int) -> None:
        """The first of them has ended, well or not, after so many blocks, if it runs in blocks; or the `newest`, which
        could not begin."""

    def left(self, query: int, how: str) -> None:
        """A query will begin nothing more; its running steps may end later."""


@dataclasses.dataclass(slots=True)
class _Stay:
    """A query that is there; times in s of `time.monotonic`."""

    model: str
    priority: int
    arrived: float
    idle: float  # since when none of its steps runs
    waited: float = 0.0
    running: int = 0


@dataclasses.dataclass(slots=True)
class _Ran:
    """An operator on a lane; while it runs, `end` is its begin."""

    query: int
    model: str
    operator: int
    lane: int
    begin: float
    end: float
    blocks: int = 0  # that it has run, of an operator that runs in blocks


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    query: int
    priority: int
    arrived: float


class Watch(Observer):
    """Of one process; `traces` None: no timelines."""

    def __init__(self, lanes: int, traces: Path | None = None) -> None:
        busy = telemetry.counter("forerank_lane_busy_seconds", "Time in which steps ran, by lane", ("lane",))
        self._busy_seconds = [busy.labels(str(lane)) for lane in range(lanes)]
        meaning = "Queries of which no step runs, when one last came or left"
        self._queue = telemetry.gauge("forerank_query_queue", meaning, total=True)
        meaning = "Time of a query in which none of its steps ran, by its class"
        self._wait_seconds = telemetry.histogram("forerank_query_wait_seconds", meaning, ("priority",), _WAITS)
        meaning = "Queries without an answer, by why"
        dropped = telemetry.counter("forerank_queries_dropped", meaning, ("reason",))
        self._dropped = {reason: dropped.labels(reason) for reason in (REFUSED, LATE, CANCELLED, FAILED)}
        self._traces = traces
        self._stays: dict[int, _Stay] = {}
        self._waiting = 0  # of these: no step runs
        self._running = [deque[_Ran]() for _ in range(lanes)]  # the first one runs, others have begun behind it
        self._busy = [0.0] * lanes  # s not yet counted
        self._names: dict[int, str] = {}  # id of a model -> its name
        self._ran = deque[_Ran](maxlen=_REMEMBERED)
        self._seen: WeakKeyDictionary[Future[Any], _Seen] = WeakKeyDictionary()

    @property
    def traces(self) -> bool:
        """Whether there are timelines."""
        return self._traces is not None

    def name(self, model: object, name: str) -> None:
        """What a model that lives as long as the process is called in timelines."""
        self._names[id(model)] = name

    def arrived(self, query: int, model: object, priority: int, answer: Future[Any]) -> None:
        now = time.monotonic()
        self._stays[query] = _Stay(self._names.get(id(model), "?"), priority, now, now)
        self._waiting += 1
        self._queue.set(self._waiting)
        if self._traces is not None:
            self._seen[answer] = _Seen(query, priority, now)

    def refused(self) -> None:
        self._dropped[REFUSED].inc()

    def begin(self, query: int, operator: int, lane: int) -> None:
        now, stay = time.monotonic(), self._stays[query]
        if not stay.running:
            stay.waited += now - stay.idle
            self._waiting -= 1
        stay.running += 1
        self._running[lane].append(_Ran(query, stay.model, operator, lane, now, now))

    def end(self, lane: int, newest: bool, blocks: int) -> None:
        now, running = time.monotonic(), self._running[lane]
        ran = running.pop() if newest else running.popleft()
        if not newest and running:
            running[0].begin = now
        self._busy[lane] += now - ran.begin
        stay = self._stays.get(ran.query)
        if stay is not None:
            stay.running -= 1
            if not stay.running:
                stay.idle = now
                self._waiting += 1
        if self._traces is not None:
            ran.end, ran.blocks = now, blocks
            self._ran.append(ran)

    def left(self, query: int, how: str) -> None:
        stay = self._stays.pop(query, None)
        if stay is None:
            return
        if how in self._dropped:
            self._dropped[how].inc()
        if not stay.running:
            stay.waited += time.monotonic() - stay.idle
            self._waiting -= 1
        self._wait_seconds.labels(str(stay.priority)).observe(stay.waited)
        self._queue.set(self._waiting)
        for lane, seconds in enumerate(self._busy):  # counted here, not at each step: a counter takes 2 us
            if seconds:
                self._busy_seconds[lane].inc(seconds)
                self._busy[lane] = 0.0

    def write(self, answer: Future[Any], model: str, id: str = "") -> str | None:
        """The timeline of a query up to now, as Chrome's trace events; gives the file's name. None: there are no
        timelines, or the query never came. Raises OSError.
        """
        seen = self._seen.get(answer)
        if self._traces is None or seen is None:
            return None
        now = time.monotonic()
        running = [dataclasses.replace(one, end=now) for own in self._running for one in list(own)[:1]]
        ran = [one for one in [*self._ran.copy(), *running] if one.end >= seen.arrived]
        end = max((one.end for one in ran if one.query == seen.query), default=now)
        name = f"{time.time_ns()}-{model}-{os.getpid()}-{seen.query}{_END}"
        self._traces.mkdir(parents=True, exist_ok=True)
        new = self._traces / f"{name}.new"
        new.write_bytes(msgspec.json.encode(_events(seen, [one for one in ran if one.begin <= end], end, model, id)))
        new.rename(self._traces / name)
        for path in sorted(self._traces.glob(f"*{_END}"))[:-TRACES_KEPT]:
            path.unlink(missing_ok=True)
        return name


def _events(seen: _Seen, ran: list[_Ran], end: float, model: str, id: str) -> dict[str, Any]:
    """Chrome's trace events in their JSON object form: a track per lane, and one for the query as a whole."""
    pid, lanes = os.getpid(), sorted({one.lane for one in ran})
    tracks = {0: "query", **{1 + lane: f"lane {lane}" for lane in lanes}}
    made: list[dict[str, Any]] = [
        {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in tracks.items()
    ]
    whole = {"query": seen.query, "priority": seen.priority, "id": id[:100]}
    made.append({"name": model, "cat": "query", **_span(pid, 0, seen.arrived, end), "args": whole})
    made += [
        {
            "name": f"{one.model} {one.operator}",
            "cat": "this" if one.query == seen.query else "other",
            **_span(pid, 1 + one.lane, one.begin, one.end),
            "args": {"query": one.query, "operator": one.operator, "blocks": one.blocks},
        }
        for one in ran
    ]
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def _span(pid: int, tid: int, begin: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "pid": pid, "tid": tid, "ts": round(begin * 1e6, 3), "dur": round((end - begin) * 1e6, 3)}
