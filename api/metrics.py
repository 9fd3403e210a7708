"""What the API counts and times. Made once per process, before its threads start: two threads must not register a
metric.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import deque
from typing import Any

from api.crosses import MISSING, OLD
from api.prerank import Answer
from api.schemas import Stages
from infra import telemetry

ROUTES = ("score", "recommend")
_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1.0)
_SCORES = (-8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # logits
_PAUSES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.1)


class RequestMetrics:
    """Stage times and candidates of ranking requests, and what the garbage collector takes from them."""

    def __init__(self) -> None:
        labels = ("route", "stage")
        seconds = telemetry.histogram("forerank_stage_seconds", "Wall time of a request's stages", labels, _BUCKETS)
        asked = telemetry.counter("forerank_candidates", "Candidates that requests asked for", ("route",))
        missing = telemetry.counter("forerank_candidates_missing", "Candidates without a row", ("route",))
        self._seconds = {
            route: {stage: seconds.labels(route, stage) for stage in Stages.__struct_fields__} for route in ROUTES
        }
        self._asked = {route: asked.labels(route) for route in ROUTES}
        self._missing = {route: missing.labels(route) for route in ROUTES}
        degraded = telemetry.counter("forerank_degraded", "Requests served with less, by what was less", ("what",))
        self._degraded = {what: degraded.labels(what) for what in (MISSING, OLD)}
        self._pauses = _Pauses()
        labels = ("route", "generation")
        meaning = "Wall time of requests, by the generation that served them"
        self._total = telemetry.histogram("forerank_generation_seconds", meaning, labels, _BUCKETS)
        meaning = "Best score of a request's candidates, by the generation that gave it"
        self._best = telemetry.histogram("forerank_generation_best_score", meaning, labels, _SCORES)
        meaning = "Candidates without a row, by the generation that lacks it"
        self._lacking = telemetry.counter("forerank_generation_missing", meaning, labels)

    def observe(self, route: str, answer: Answer) -> None:
        for stage, seconds in self._seconds[route].items():
            seconds.observe(getattr(answer.stages, stage) / 1e3)
        self._asked[route].inc(len(answer.candidates))
        self._missing[route].inc(len(answer.rows.missing))
        generation = answer.generation.name  # so that a canary can be held against what serves the others
        self._total.labels(route, generation).observe(answer.stages.total / 1e3)
        self._lacking.labels(route, generation).inc(len(answer.rows.missing))
        if len(answer.scores):
            self._best.labels(route, generation).observe(float(answer.scores.max()))
        for what in answer.degraded:
            if what in self._degraded:
                self._degraded[what].inc()
        self._pauses.observe()

    def start(self) -> None:
        gc.callbacks.append(self._pauses.note)

    def stop(self) -> None:
        gc.callbacks.remove(self._pauses.note)


class _Pauses:
    """How long the collector worked while it held the interpreter, in CPU time of its thread: a callback may have to
    wait for the interpreter before it can look at a clock. A collection may begin while a metric's lock is held, so
    what is noted then is counted later.
    """

    def __init__(self) -> None:
        self._seconds = telemetry.histogram(
            "forerank_gc_pause_seconds", "Garbage collections of the API's processes", (), _PAUSES
        )
        self._began: float | None = None  # none: not told of its start
        self._noted = deque[float](maxlen=1_000)

    def note(self, phase: str, _: dict[str, Any]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        elif self._began is not None:
            self._noted.append(time.thread_time() - self._began)
            self._began = None

    def observe(self) -> None:
        with contextlib.suppress(IndexError):  # until nothing is left; other threads take from it too
            while True:
                self._seconds.observe(self._noted.popleft())
