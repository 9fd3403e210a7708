"""Bodies in and out, and what every kind of error becomes: always problem+json."""

from __future__ import annotations

import logging

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from api.problems import ProblemError, invalid
from index.errors import StoreError

LOG = logging.getLogger(__name__)
BODY_MAX = 16 << 20  # bytes
JSON = "application/json"


def reply(body: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type=JSON)


async def body_of(request: Request, *accepted: str, empty: bool = False) -> tuple[bytes, str]:
    """The body and its media type. Raises ProblemError 415 for another type, 413 beyond BODY_MAX."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_MAX:
            raise ProblemError(413, "body-too-large", f"at most {BODY_MAX} bytes are accepted")
        parts.append(part)
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in accepted and not (empty and size == 0):
        given = media or "no content type"
        raise ProblemError(415, "unsupported-media-type", f"{given} was sent; expected {' or '.join(accepted)}")
    return b"".join(parts), media


def error_handlers(app: FastAPI) -> None:
    async def problem(_: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return error.response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: "no-such-route", 405: "method-not-allowed"}.get(error.status_code, "http")
        response = ProblemError(error.status_code, kind, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return invalid(str(first["loc"][-1]), str(first["msg"])).response()

    async def store(_: Request, error: Exception) -> Response:
        LOG.error("a store of this host cannot be read", exc_info=error)
        return ProblemError(503, "store", str(error)).response()

    async def unexpected(_: Request, error: Exception) -> Response:
        LOG.error("request failed", exc_info=error)
        return ProblemError(500, "internal", "the request failed here; the log has the reason").response()

    app.add_exception_handler(ProblemError, problem)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(StoreError, store)
    app.add_exception_handler(Exception, unexpected)
