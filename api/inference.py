"""The routes of the Open Inference Protocol, version 2: models of a folder, on the lanes of the runtime.

A request's numbers are read and written in request threads, its operators run on the lanes, and the event loop only
waits. `priority` (the class, 0 the highest), `timeout` (microseconds from the request's arrival; 504 after that)
and `trace` (a timeline is written) are parameters of a request. Who goes away cancels what he asked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from concurrent.futures import CancelledError, Future
from typing import Any

import msgspec
import torch
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

from api import oip
from api.admission import overloaded
from api.bodies import Body
from api.openapi import documented
from api.problems import ProblemError, invalid
from api.replies import JSON, reply
from api.runtime.folder import Served
from api.runtime.runtime import LateError, RefusedError
from api.service import Service
from api.waiting import gone

LOG = logging.getLogger(__name__)
_BINARY = "application/octet-stream"
_SMALL = 2_048  # bytes that are read or written in less than 0.1 ms, for which a change of threads is not worth while
_EXTENSIONS = ["binary_tensor_data", "schedule_policy"]


class ServerMeta(msgspec.Struct):
    name: str
    version: str
    extensions: list[str]


class Live(msgspec.Struct):
    live: bool


class Ready(msgspec.Struct, omit_defaults=True):
    ready: bool
    name: str = ""


TYPES = [oip.InferRequest, oip.InferResponse, oip.ModelMeta, ServerMeta, Live, Ready]  # in the OpenAPI document
_EXAMPLE = {
    "inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}],
    "parameters": {"priority": 1, "timeout": 50_000},
}


def routes(app: FastAPI, service: Service) -> None:
    """What `/v2` answers."""

    @app.get("/v2", summary="this server", openapi_extra=documented(gives=ServerMeta))
    @app.get("/v2/", include_in_schema=False)
    async def server() -> Response:
        return reply(ServerMeta("forerank", app.version, _EXTENSIONS))

    @app.head("/v2/health/live", include_in_schema=False)
    @app.get("/v2/health/live", summary="whether it answers", openapi_extra=documented(gives=Live))
    async def live() -> Response:
        return reply(Live(True))

    @app.head("/v2/health/ready", include_in_schema=False)
    @app.get(
        "/v2/health/ready",
        summary="whether all models are served",
        openapi_extra=documented(gives=Ready, errors=(503,)),
    )
    async def ready() -> Response:
        if broken := service.models.broken:
            said = "; ".join(f"model {name} is not served: {why}" for name, why in broken.items())
            raise ProblemError(503, "broken-model", said)
        return reply(Ready(True))

    @app.get(
        "/v2/models/{name}",
        summary="a model's inputs and outputs",
        openapi_extra=documented(gives=oip.ModelMeta, errors=(404, 503)),
    )
    async def model(name: str) -> Response:
        return reply(oip.meta_of(_served(service, name)))

    @app.head("/v2/models/{name}/ready", include_in_schema=False)
    @app.get(
        "/v2/models/{name}/ready",
        summary="whether a model is served",
        openapi_extra=documented(gives=Ready, errors=(404, 503)),
    )
    async def model_ready(name: str) -> Response:
        return reply(Ready(True, _served(service, name).name))

    @app.post(
        "/v2/models/{name}/infer",
        summary="a model's outputs",
        openapi_extra=documented(
            takes=oip.InferRequest,
            gives=oip.InferResponse,
            example=_EXAMPLE,
            also_takes={_BINARY: f"the JSON, as long as {oip.HEADER} says, and then tensors' bytes"},
            also_gives={_BINARY: "the same, where an output was asked for as bytes"},
            errors=(400, 404, 413, 415, 422, 503, 504),
        ),
    )
    async def infer(name: str, request: Request) -> Response:
        came = time.monotonic()
        served = _served(service, name)
        full = overloaded("as many inferences run as may")
        with await service.bodies.of(request) as body, full, service.inferring.place():
            header = request.headers.get(oip.HEADER)
            if len(body) <= _SMALL:
                ask, answer = _asked(service, served, body, header, came)
            else:
                ask, answer = await service.run(_asked, service, served, body, header, came)
            try:
                found = await _found(answer, request, ask, came)
            finally:
                trace = await _traced(service, served, ask, answer)
            if sum(one.nbytes for one in found) <= _SMALL:
                return _reply(served, ask, found, trace)
            return await service.run(_reply, served, ask, found, trace)


def _served(service: Service, name: str) -> Served:
    """Raises ProblemError 404, and 503 where its file is broken."""
    if served := service.models.models.get(name):
        return served
    if why := service.models.broken.get(name):
        raise ProblemError(503, "broken-model", f"this model is not served: {why}")
    raise ProblemError(404, "no-such-model", "there is no such model")


def _asked(
    service: Service, served: Served, body: Body, header: str | None, came: float
) -> tuple[oip.Ask, Future[Any]]:
    """A request and the query that it has become. Raises ProblemError."""
    ask = oip.ask_of(served, body.take(), header)
    if ask.trace and not service.watch.traces:
        raise invalid("trace", "this server keeps no traces: FORERANK_TRACES names no folder")
    within_s = ask.timeout_s - (time.monotonic() - came)
    try:
        return ask, service.runtime.submit(served.model, *ask.inputs, priority=ask.priority, within_s=within_s)
    except LateError as error:
        raise _late(str(error)) from error
    except RefusedError as error:
        raise ProblemError(503, "overloaded", f"{error}; try again") from error
    except CancelledError as error:
        raise _ending() from error


async def _found(answer: Future[Any], request: Request, ask: oip.Ask, came: float) -> tuple[Tensor, ...]:
    """The model's outputs. Raises ProblemError, or ClientDisconnect where nobody waits for them any more."""
    left_s = None if ask.timeout_s == math.inf else max(0.0, ask.timeout_s - (time.monotonic() - came))
    leaves = asyncio.ensure_future(gone(request.receive))
    waits: list[asyncio.Future[Any]] = [asyncio.wrap_future(answer), leaves]
    try:
        await asyncio.wait(waits, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if waits[0].cancelled():
            raise _ending()
        if not waits[0].done():
            raise ClientDisconnect if leaves.done() else _late("the time is over")
        found = waits[0].result()
    except LateError as error:
        raise _late(str(error)) from error
    except (ProblemError, ClientDisconnect):
        raise
    except Exception as error:  # of an operator: values that the model cannot take, such as an id beyond its table
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ProblemError(400, "not-computable", f"the model cannot compute with these values: {said}") from error
    finally:
        for one in waits:
            one.cancel()  # and so the query, where it has not ended
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _late(why: str) -> ProblemError:
    return ProblemError(504, "late", f"there is no answer within `timeout`: {why}")


def _ending() -> ProblemError:
    return ProblemError(503, "ending", "this process ends; try again")


async def _traced(service: Service, served: Served, ask: oip.Ask, answer: Future[Any]) -> str | None:
    """The name of the query's timeline, if it has one."""
    share = service.settings.trace_share
    if not ask.trace and not (share and random.random() < share):  # noqa: S311  a sample, no secret
        return None
    try:
        return await service.run(service.watch.write, answer, served.name, ask.id)
    except OSError as error:  # a full disk costs timelines, not answers
        LOG.error("a timeline was not written: %s", error)
        return None


def _reply(served: Served, ask: oip.Ask, found: tuple[Tensor, ...], trace: str | None) -> Response:
    with torch.inference_mode():
        content, length = oip.answer_of(served, ask, found, {} if trace is None else {"trace": trace})
    if length is None:
        return Response(content, media_type=JSON)
    return Response(content, headers={oip.HEADER: str(length)}, media_type=_BINARY)
