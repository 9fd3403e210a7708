"""Answers, and what every kind of error becomes: always problem+json."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import ProblemError, invalid
from index.errors import StoreError

LOG = logging.getLogger(__name__)
JSON = "application/json"

Endpoint = Callable[[Request], Awaitable[Response]]


def reply(body: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type=JSON)


def preferred(request: Request, *offered: str) -> str:
    """Which of the `offered` media types the caller's Accept ranks highest by its q, the first of equals and where it
    names none."""
    ranks: dict[str, float] = {}
    for part in ",".join(request.headers.getlist("accept")).split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((one[2:] for one in parameters if one.startswith("q=")), "1")
        with contextlib.suppress(ValueError):
            ranks[media] = float(weight)
    named = [media for media in offered if ranks.get(media, 0) > 0]
    return max(named, key=lambda media: ranks[media], default=offered[0])


def error_handlers(app: FastAPI) -> None:
    """Every error that leaves a route becomes `response_to` it, below /v2 in that protocol's form."""

    async def handler(request: Request, error: Exception) -> Response:
        return response_to(error, plain=request.url.path.startswith("/v2"))

    for kind in (ProblemError, HTTPException, RequestValidationError, ClientDisconnect, StoreError, Exception):
        app.add_exception_handler(kind, handler)


def response_to(error: Exception, plain: bool = False) -> Response:
    """What the caller is told about an error; one of this program goes into the log too. `plain`: in the form of the
    Open Inference Protocol."""
    if isinstance(error, ProblemError):
        return error.response(plain)
    if isinstance(error, HTTPException):
        kind = {404: "no-such-route", 405: "method-not-allowed"}.get(error.status_code, "http")
        response = ProblemError(error.status_code, kind, str(error.detail)).response(plain)
        response.headers.update(error.headers or {})
        return response
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return invalid(str(first["loc"][-1]), str(first["msg"])).response(plain)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody hears it
    if isinstance(error, StoreError):
        LOG.error("a store of this host cannot be read", exc_info=error)
        return ProblemError(503, "store", str(error)).response(plain)
    LOG.error("request failed", exc_info=error)
    return ProblemError(500, "internal", "the request failed here; the log has the reason").response(plain)


class Shortcut:
    """In front of the application: POSTs to `endpoints` (path -> function of a request) go straight there, past the
    framework's middleware, dependencies and exit stacks, which took as long as all else around a request's work. The
    same functions are the framework's routes too, for the documentation and for everything that is not a POST.
    """

    def __init__(self, app: ASGIApp, endpoints: dict[str, Endpoint]) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope.get("path", "")) if scope.get("method") == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive))
        except Exception as error:
            response = response_to(error)
        await response(scope, receive, send)
