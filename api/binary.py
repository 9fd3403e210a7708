"""The binary form of /v1/score: large candidate lists without JSON. All numbers are little-endian.

In: item ids u64[n]; the rest in the query string. Out, without k: scores f4[n] in the request's order, NaN where a
candidate has no row or was filtered out. Out, with k: ids u64[count], then the ids without a row u64[missing], then
scores f4[count], best first; the two counts stand in headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from api.prerank import Answer
from api.problems import ProblemError, decode, integer, invalid
from api.schemas import DEADLINE_MAX_MS, Comparison, ScoreOptions
from api.users import moment_text

ANSWER = (
    "without k: scores f4[n], NaN = no row or filtered out; with k: ids u64[forerank-count], "
    "missing ids u64[forerank-missing], scores f4[forerank-count]; little-endian"
)
PARAMETERS = {
    "user_id": "binary form, or Arrow without metadata, as are all of these",
    "k": "the best k instead of all",
    "as_of": "milliseconds since the epoch, or RFC 3339",
    "order": "as in the JSON form",
    "filters": "as in the JSON form, as JSON",
    "deadline_ms": "as in the JSON form",
}
_FILTERS = msgspec.json.Decoder(dict[str, Comparison])


def request_of(body: bytes, parameters: Mapping[str, str]) -> tuple[NDArray[np.uint64], ScoreOptions]:
    """Ids and options. Raises ProblemError."""
    if len(body) % 8:
        raise ProblemError(400, "malformed", f"{len(body)} bytes are not a list of u64")
    return np.frombuffer(body, "<u8"), options_of(parameters)


def options_of(parameters: Mapping[str, str]) -> ScoreOptions:
    """Of a query string. Raises ProblemError."""
    unknown = sorted(parameters.keys() - PARAMETERS.keys())
    if unknown:
        raise invalid(unknown[0], f"unknown parameter; there are {', '.join(PARAMETERS)}")
    options = ScoreOptions(
        user_id=parameters.get("user_id"), order=parameters.get("order", "score"), k=_count(parameters.get("k"))
    )
    if (as_of := parameters.get("as_of")) is not None:
        options.as_of = moment_text(as_of)
    if (deadline := parameters.get("deadline_ms")) is not None:
        options.deadline_ms = _deadline(deadline)
    if "filters" in parameters:
        try:
            options.filters = decode(_FILTERS, parameters["filters"].encode())
        except ProblemError as error:
            raise invalid("filters", error.body.detail) from error
    return options


def answer_of(answer: Answer, ids: NDArray[np.uint64], ranked: bool) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    stages = answer.stages
    timing = ", ".join(f"{name};dur={getattr(stages, name):.3f}" for name in stages.__struct_fields__)
    headers = {
        "forerank-generation": answer.generation.name,
        "forerank-as-of": str(answer.side.source.as_of),
        "forerank-count": str(len(answer.places)),
        "forerank-missing": str(len(answer.rows.missing)),
        "forerank-filtered": str(answer.rows.filtered),
        "forerank-cold-user": "true" if answer.side.seen().cold else "false",
        "server-timing": timing,
    }
    if answer.degraded:
        headers["forerank-degraded"] = "; ".join(answer.degraded).encode("ascii", "replace").decode()
    scores = answer.scores.astype("<f4")
    if ranked:
        return b"".join(column.tobytes() for column in (ids[answer.places], ids[answer.rows.missing], scores)), headers
    out: NDArray[Any] = np.full(len(ids), np.nan, "<f4")
    out[answer.places] = scores
    return out.tobytes(), headers


def _deadline(text: str) -> float:
    try:
        deadline = float(text)
    except ValueError:
        deadline = 0.0
    if not 0 < deadline <= DEADLINE_MAX_MS:
        raise invalid("deadline_ms", f"expected milliseconds above 0 and up to {DEADLINE_MAX_MS}")
    return deadline


def _count(text: str | None) -> int | None:
    if text is None:
        return None
    count = integer(text)
    if count is None or count < 1:
        raise invalid("k", "expected a whole number of at least 1, within the limit of a request")
    return count
