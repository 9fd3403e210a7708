"""What the API counts and times. Made once per process, before its threads start: two threads must not register a
metric.
"""

from __future__ import annotations

from api.prerank import Answer
from api.schemas import Stages
from infra import telemetry

ROUTES = ("score", "recommend")
_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1.0)


class RequestMetrics:
    """Stage times and candidates of ranking requests."""

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

    def observe(self, route: str, answer: Answer) -> None:
        for stage, seconds in self._seconds[route].items():
            seconds.observe(getattr(answer.stages, stage) / 1e3)
        self._asked[route].inc(len(answer.candidates))
        self._missing[route].inc(len(answer.rows.missing))
