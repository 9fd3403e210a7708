"""The HTTP application: every route is a few lines around one call.

Bodies are joined, decoded and encoded in request threads; the event loop only moves bytes, so that no callback of it
takes longer than reading or writing a socket once. Guarantees: every error is problem+json, and nothing a caller sends
becomes a 500.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch  # noqa: F401 - before usearch, after which its C++ streams write no numbers, so schemas are cut short
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

from api import arrow, binary, inference, items, schemas, waiting
from api.bodies import Body
from api.events import KINDS, checked
from api.explain import explain
from api.generations import Generation
from api.openapi import add_schemas, documented
from api.prerank import Answer, Candidates, Ids, answer_of
from api.problems import ProblemError, decode, invalid
from api.replies import JSON, Endpoint, Shortcut, error_handlers, preferred, reply
from api.service import Service
from api.status import generations_of
from api.users import moment_text, user_id_of
from index.keys import keys_of
from infra import telemetry
from infra.settings import load
from streams.publish import Kind

__all__ = ["Service", "application", "create_app"]

_BINARY = "application/octet-stream"
_CONSOLE = Path(__file__).parent / "console"
_SCORE = msgspec.json.Decoder(schemas.ScoreRequest)
_RECOMMEND = msgspec.json.Decoder(schemas.RecommendRequest)
_PREFETCH = msgspec.json.Decoder(schemas.PrefetchRequest)
_ACTIONS: dict[str, tuple[str, type[msgspec.Struct], dict[str, Any]]] = {  # meaning, body, example of it
    "stage": (
        "make a generation of a bundle",
        schemas.StageRequest,
        {"uri": "file:///models/g1", "sha256": "0" * 64, "activate_when_complete": True},
    ),
    "activate": ("serve a generation, to all users or a share of them", schemas.ActivateRequest, {"share": 0.05}),
    "rollback": ("serve what was served before a generation", schemas.ActionRequest, {}),
    "retire": ("delete all of a generation", schemas.ActionRequest, {}),
}
_EXAMPLE_SCORE = {"user_id": "u1", "candidates": ["1", "2", "3"], "k": 2}
_EXAMPLES: dict[str, Any] = {
    "items": {"item_id": "1", "version": 1, "attributes": {"title": "a chair"}, "embedding": [0.1, 0.2]},
    "behaviours": {"event_id": "e1", "user_id": "u1", "item_id": "1", "action": "click"},
    "users": {"user_id": "u1", "features": {"age": 34}},
    "models": {"action": "activate", "generation": "g1"},
}


def application() -> ASGIApp:
    """What uvicorn's workers run; settings come from the environment."""
    settings = load()
    telemetry.start_metrics(settings)
    telemetry.configure_logging(settings, "api")
    sys.setswitchinterval(1e-4)  # a thread that holds the GIL gives it up within 0.1 ms, not 5
    service = Service(settings)
    # in a thread: the interrupted one may hold what forgetting needs
    signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=service.users.forget).start())
    return create_app(service)


def create_app(service: Service) -> ASGIApp:
    """The HTTP application around a service, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="Forerank",
        version="1",
        description="Pre-ranking: scores thousands of candidates for a user within milliseconds.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    hot = _ranking_routes(app, service)
    _lookup_routes(app, service)
    _event_routes(app, service)
    _operation_routes(app, service)
    types = _TYPES
    if service.settings.models:
        inference.routes(app, service)
        types = types + inference.TYPES
    error_handlers(app)
    add_schemas(app, types)
    return Shortcut(app, hot)


_TYPES: list[Any] = [
    schemas.ScoreRequest,
    schemas.RecommendRequest,
    schemas.PrefetchRequest,
    schemas.StageRequest,
    schemas.ActivateRequest,
    schemas.ActionRequest,
    schemas.Ranked,
    schemas.Prefetching,
    schemas.Explanation,
    schemas.ItemRow,
    schemas.Generations,
    schemas.Accepted,
    schemas.Health,
    *KINDS.values(),
]


# ---- ranking


def _ranking_routes(app: FastAPI, service: Service) -> dict[str, Endpoint]:
    """Adds them, and gives those which are asked most often."""

    @app.post(
        "/v1/score",
        summary="score a user's candidates",
        openapi_extra=documented(
            takes=schemas.ScoreRequest,
            gives=schemas.Ranked,
            example=_EXAMPLE_SCORE,
            also_takes={
                _BINARY: "item ids as little-endian u64; everything else in the query",
                arrow.MEDIA: arrow.TAKES,
            },
            also_gives={_BINARY: binary.ANSWER, arrow.MEDIA: arrow.GIVES},
            parameters=binary.PARAMETERS,
            errors=(400, 413, 415, 422, 503),
        ),
    )
    async def score(request: Request) -> Response:
        with await service.bodies.of(request, JSON, _BINARY, arrow.MEDIA) as body:
            if body.media == _BINARY:
                return await service.rank(_score_binary, service, body, request.query_params)
            gives = preferred(request, body.media, JSON, arrow.MEDIA)
            return await service.rank(_score, service, body, request.query_params, gives)

    @app.post(
        "/v1/recommend",
        summary="retrieve candidates for a user and score them",
        openapi_extra=documented(
            takes=schemas.RecommendRequest,
            gives=schemas.Ranked,
            also_gives={arrow.MEDIA: arrow.GIVES},
            example={"user_id": "u1", "k": 10, "include": ["attributes"]},
            errors=(400, 413, 415, 422, 503),
        ),
    )
    async def recommend(request: Request) -> Response:
        with await service.bodies.of(request, JSON) as body:
            return await service.rank(_recommend, service, body, preferred(request, JSON, arrow.MEDIA))

    @app.post(
        "/v1/users/{user_id:path}/prefetch",
        summary="start a user's inference before the candidates are known",
        status_code=202,
        openapi_extra=documented(
            takes=schemas.PrefetchRequest,
            gives=schemas.Prefetching,
            status=202,
            example={},
            optional_body=True,
            errors=(400, 415, 422, 503),
        ),
    )
    async def prefetch(user_id: str, request: Request) -> Response:
        with await service.bodies.of(request, JSON, empty=True) as body:
            return await service.rank(_prefetch, service, user_id, body)

    return {"/v1/score": score, "/v1/recommend": recommend}


def _score(service: Service, body: Body, parameters: Mapping[str, str], gives: str) -> Response:
    ids: Ids
    options: schemas.ScoreOptions
    if body.media == arrow.MEDIA:
        ids, options = arrow.request_of(body.take(), parameters)
    else:
        options = request = decode(_SCORE, body.take())
        ids = request.candidates
    service.merger.check(options, len(ids), options.k)
    answer = service.merger.score(ids, options)
    service.metrics.observe("score", answer)
    response = _ranked(answer, options, gives)
    service.recorder.offer(answer, options)
    return response


def _score_binary(service: Service, body: Body, parameters: Mapping[str, str]) -> Response:
    ids, options = binary.request_of(body.take(), parameters)
    service.merger.check(options, len(ids), options.k)
    answer = service.merger.score(ids, options)
    service.metrics.observe("score", answer)
    content, headers = binary.answer_of(answer, ids, ranked=options.k is not None)
    service.recorder.offer(answer, options)
    return Response(content, headers=headers, media_type=_BINARY)


def _recommend(service: Service, body: Body, gives: str) -> Response:
    request = decode(_RECOMMEND, body.take())
    service.merger.check(request, 0, request.k)
    answer = service.merger.recommend(request)
    service.metrics.observe("recommend", answer)
    response = _ranked(answer, request, gives)
    service.recorder.offer(answer, request)
    return response


def _ranked(answer: Answer, query: schemas.Query, gives: str) -> Response:
    if gives == arrow.MEDIA:
        return Response(arrow.answer_of(answer, query), media_type=gives)
    return reply(answer_of(answer, query))


def _prefetch(service: Service, user_id: str, body: Body) -> Response:
    request = decode(_PREFETCH, body.take() or b"{}")
    user_id = user_id_of(user_id)
    generation = service.generations.pin(user_id)
    state = service.users.prefetch(generation, user_id, request.as_of)
    return reply(schemas.Prefetching(generation.name, state, service.settings.prefetch_ttl_s), 202)


# ---- look-ups


def _lookup_routes(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/explain",
        summary="why an item has its score for a user",
        openapi_extra=documented(gives=schemas.Explanation, errors=(404, 422, 503)),
    )
    async def explain_score(user_id: str, item_id: str, as_of: str | None = None) -> Response:
        return await service.rank(_explain, service, user_id, item_id, as_of)

    @app.get(
        "/v1/items/{item_id:path}",
        summary="an item's row in the index",
        openapi_extra=documented(
            gives=schemas.ItemRow,
            parameters={"include": "`event`: also the item's record on `items`, read from Kafka"} | waiting.PARAMETERS,
            errors=(404, 422, 503, 504),
            empty=(204,),
        ),
    )
    async def item(item_id: str, request: Request) -> Response:
        include = request.query_params.get("include", "")
        if include not in ("", "event"):
            raise invalid("include", "expected `event` or nothing")
        wish = waiting.wish_of(request.query_params)
        generation = None if wish is None else await _waited_in(service, item_id, wish, request)
        row = await service.run(_item, service, item_id, generation, wish is not None and wish.deleted)
        if row is None:
            return Response(status_code=204)
        if include:
            row.event = await service.feed.item_event(row.partition, row.offset)
        return reply(row)

    @app.get(
        "/v1/generations",
        summary="the generations of this host",
        openapi_extra=documented(gives=schemas.Generations),
    )
    async def generations() -> Response:
        return await service.run(lambda: reply(generations_of(service.settings, service.generations)))


def _explain(service: Service, user_id: str, item_id: str, as_of: str | None) -> Response:
    query = schemas.Query(user_id=user_id_of(user_id), as_of=None if as_of is None else moment_text(as_of))
    generation = service.generations.pin(query.user_id)
    source = service.users.find(query)
    candidate = Candidates.of_ids([user_id_of(item_id, "item_id")], service.settings.hash_key.encode())
    hot, cold, found = generation.arena.gather_both(candidate.keys)
    if not found[0]:
        raise ProblemError(404, "no-such-item", "this generation has no row of the item", "item_id")
    side = service.users.begin(generation, query, source).result()
    return reply(explain(generation, side, item_id, hot, int(cold["version"][0])))


async def _waited_in(service: Service, item_id: str, wish: waiting.Wish, request: Request) -> Generation:
    """The generation in which the wish was granted."""
    key = keys_of([user_id_of(item_id, "item_id")], service.settings.hash_key.encode())
    return await service.waiters.granted(key, wish, request.receive)


def _item(service: Service, item_id: str, generation: Generation | None, may_lack: bool) -> schemas.ItemRow | None:
    """The row in `generation`, by default the one served now; None instead of 404 where it `may_lack`."""
    name = user_id_of(item_id, "item_id")
    try:
        return items.row_of(generation or service.generations.pin(), name, service.settings.hash_key.encode())
    except ProblemError as error:
        if may_lack and error.body.status == 404:
            return None
        raise


# ---- events


def _event_routes(app: FastAPI, service: Service) -> None:
    def route(kind: Kind, body_type: Any) -> None:
        @app.post(
            f"/v1/events/{kind}",
            summary=f"publish {kind} to Kafka",
            status_code=202,
            openapi_extra=documented(
                takes=body_type | list[body_type],
                gives=schemas.Accepted,
                status=202,
                example=_EXAMPLES[kind],
                also_takes={"application/x-ndjson": "one event a line"},
                errors=(400, 413, 415, 422, 503),
                admin=kind == "models",
            ),
            name=f"publish {kind}",
        )
        async def publish(request: Request) -> Response:
            if kind == "models":
                service.rights.check(request.headers.get("authorization"))
            with await service.bodies.of(request, JSON, "application/x-ndjson") as body:
                rows = await service.run(lambda: checked(kind, body.take(), body.media != JSON))
                return reply(await service.feed.publish(kind, rows), 202)

    def action_route(action: str, meaning: str, body_type: type[msgspec.Struct], example: dict[str, Any]) -> None:
        decoder = msgspec.json.Decoder(body_type)

        @app.post(
            f"/v1/generations/{{generation}}/{action}",
            summary=meaning,
            status_code=202,
            openapi_extra=documented(
                takes=body_type,
                gives=schemas.Accepted,
                status=202,
                example=example,
                optional_body=action != "stage",
                errors=(400, 409, 413, 415, 422, 503),
                admin=True,
            ),
            name=action,
        )
        async def publish(generation: str, request: Request) -> Response:
            service.rights.check(request.headers.get("authorization"))
            with await service.bodies.of(request, JSON, empty=True) as body:
                event = await service.run(_model_event, action, generation, decoder, body)
                return reply(await service.feed.roll_out(event), 202)

    for kind, body_type in KINDS.items():
        route(kind, body_type)
    for action, (meaning, options, example) in _ACTIONS.items():
        action_route(action, meaning, options, example)


def _model_event(action: str, generation: str, decoder: msgspec.json.Decoder[Any], body: Body) -> bytes:
    """What the same words in a command or on `models` would be. Raises ProblemError 400 or 422."""
    options = msgspec.to_builtins(decode(decoder, body.take() or b"{}"))
    (event,) = checked("models", msgspec.json.encode({"action": action, "generation": generation, **options}), False)
    return event


# ---- operation


def _operation_routes(app: FastAPI, service: Service) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="is the process alive", openapi_extra=documented(gives=schemas.Health))
    async def health() -> Response:
        return reply(schemas.Health("ok"))

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="can requests be served", openapi_extra=documented(gives=schemas.Health, errors=(503,)))
    async def ready() -> Response:
        generation = service.generations.pin()
        if stale := service.generations.stale:
            raise ProblemError(503, "stale", stale)
        return reply(schemas.Health("ready", service.generations.reason, generation.name))

    @app.get("/metrics", summary="Prometheus metrics of all processes of the host", response_class=Response)
    async def metrics() -> Response:
        text = await service.run(telemetry.render, service.settings, service.generations.gone)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def console() -> Response:
        return Response((_CONSOLE / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response((_CONSOLE / "docs.html").read_bytes(), media_type="text/html; charset=utf-8")
