"""The OpenAPI document: every route's bodies and answers, generated from the types that decode and encode them.

FastAPI knows the paths; msgspec knows the types. A route says what it takes and gives with `documented`, and
`add_schemas` puts both together. `/docs` shows the result without anything from another host.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.problems import ProblemBody

_REF = "#/components/schemas/{name}"
_ADMIN = "admin"
_BEARER = {"type": "http", "scheme": "bearer", "description": "FORERANK_ADMIN_TOKEN, or what <state>/admin_token holds"}
_MEANINGS = {
    200: "done",
    202: "accepted",
    204: "there is nothing any more, as asked",
    400: "the body is not what its content type says",
    401: "the token is missing, or another one",
    404: "there is no such thing",
    408: "the body did not come in time; the connection is closed",
    409: "it would be refused; `detail` says why, and nothing was published",
    413: "the body is too large",
    415: "another content type is needed",
    422: "a field is wrong; `field` names it",
    503: "not ready, or the broker is away; `detail` says why",
    504: "what was waited for has not come; `detail` says what is there",
}


def documented(
    *,
    takes: Any = None,
    gives: Any = None,
    status: int = 200,
    example: Any = None,
    also_takes: dict[str, str] | None = None,
    also_gives: dict[str, str] | None = None,
    parameters: dict[str, str] | None = None,
    optional_body: bool = False,
    errors: tuple[int, ...] = (),
    empty: tuple[int, ...] = (),
    admin: bool = False,
) -> dict[str, Any]:
    """`openapi_extra` of a route. `takes`, `gives`: msgspec types; `also_*`: media type -> what it holds; `parameters`:
    query ones; `empty`: further statuses, without a body; `admin`: it needs the token.
    """
    out: dict[str, Any] = {"responses": {}}
    if admin:
        out["security"], errors = [{_ADMIN: []}], (401, *errors)
    if takes is not None:
        errors = (408, *errors)
        content = {"application/json": {"schema": _schema(takes), "example": example}}
        content |= {media: {"schema": _binary(meaning)} for media, meaning in (also_takes or {}).items()}
        out["requestBody"] = {"required": not optional_body, "content": content}
    answer: dict[str, Any] = {"application/json": {"schema": _schema(gives)}} if gives is not None else {}
    answer |= {media: {"schema": _binary(meaning)} for media, meaning in (also_gives or {}).items()}
    out["responses"][str(status)] = {"description": "", "content": answer}
    out["responses"] |= {str(code): {"description": ""} for code in empty}
    for code in errors:
        problem = {"application/problem+json": {"schema": _schema(ProblemBody)}}
        out["responses"][str(code)] = {"description": _MEANINGS[code], "content": problem}
    if parameters:
        out["parameters"] = [
            {"name": name, "in": "query", "required": False, "schema": {"type": "string"}, "description": meaning}
            for name, meaning in parameters.items()
        ]
    return out


def add_schemas(app: FastAPI, types: list[Any]) -> None:
    """Makes `app.openapi()` the whole document: FastAPI's paths with the schemas of `types`."""
    _, components = msgspec.json.schema_components([*types, ProblemBody], ref_template=_REF)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            made["components"] = {"schemas": components, "securitySchemes": {_ADMIN: _BEARER}}
            for verbs in made["paths"].values():
                for operation in verbs.values():
                    _without_pydantic(operation)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _without_pydantic(operation: dict[str, Any]) -> None:
    """FastAPI adds its own 422 and an empty 200 to operations; ours say more."""
    answers = operation["responses"]
    if "#/components/schemas/HTTPValidationError" in str(answers.get("422", "")):
        problem = {"application/problem+json": {"schema": _schema(ProblemBody)}}
        answers["422"] = {"description": _MEANINGS[422], "content": problem}
    for code, answer in answers.items():
        answer["description"] = _MEANINGS[int(code)]


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


def _binary(meaning: str) -> dict[str, Any]:
    return {"type": "string", "format": "binary", "description": meaning}
