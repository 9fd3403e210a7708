"""What a caller did wrong or has to wait for, as RFC 9457 problem+json: every error of the API leaves through here.

Guarantees: no input is echoed back beyond ids and field names, and a body that cannot be read never becomes a 500.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from starlette.responses import Response

T = TypeVar("T")

_TITLES = {
    400: "Bad request",
    401: "Not allowed without the token",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "Refused",
    413: "Body too large",
    415: "Unsupported media type",
    422: "Invalid request",
    500: "Internal error",
    503: "Not available now",
    504: "Not in time",
}
_HEADERS = {
    401: {"www-authenticate": 'Bearer realm="forerank"'},
    408: {"connection": "close"},
    503: {"retry-after": "1"},
}
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_FIELD_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_FIELD_NAMED = re.compile(r"(?:missing required|contains unknown) field `(?P<name>[^`]+)`")
_BYTE = re.compile(r"\(byte (\d+)\)")
_NOT_JSON_NUMBERS = (b"NaN", b"Infinity", b"-Infinity")


class ProblemBody(msgspec.Struct, omit_defaults=True):
    """RFC 9457. `field` is the path of the value at fault, as in `filters.price.lte` or `candidates[3]`."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None


class ProblemError(Exception):
    """Ends a request with `status`; `kind` is a stable word a program can test for."""

    def __init__(self, status: int, kind: str, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.body = ProblemBody(f"urn:forerank:problem:{kind}", _TITLES.get(status, "Error"), status, detail, field)

    def response(self, plain: bool = False) -> Response:
        """`plain`: as the Open Inference Protocol has it, to which a wrong field is a bad request."""
        headers = _HEADERS.get(self.body.status)
        if plain:
            status = 400 if self.body.status == 422 else self.body.status
            return Response(msgspec.json.encode({"error": self.body.detail}), status, headers, "application/json")
        return Response(msgspec.json.encode(self.body), self.body.status, headers, "application/problem+json")


def invalid(field: str, detail: str) -> ProblemError:
    return ProblemError(422, "invalid-field", detail, field)


def integer(text: str) -> int | None:
    """The integer that a query parameter spells; None where it spells none, or one beyond all limits."""
    return int(text) if _INTEGER.fullmatch(text) else None


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The request of `body`. Raises ProblemError: 400 where it is not JSON, 422 where it is of another form."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        raise ProblemError(422, "invalid-field", _FIELD_AT.sub("", message), _field_of(message)) from error
    except msgspec.DecodeError as error:
        raise _malformed(str(error), body) from error
    except UnicodeDecodeError as error:
        raise ProblemError(400, "malformed", f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ProblemError(400, "malformed", "the body is nested too deeply") from error


def _field_of(message: str) -> str | None:
    """`Object missing required field `x` - at `$.a[3]`` -> `a[3].x`."""
    at, named = _FIELD_AT.search(message), _FIELD_NAMED.search(message)
    parts = [at["path"] if at else "", named["name"] if named else ""]
    return ".".join(part for part in parts if part) or None


def _malformed(message: str, body: bytes) -> ProblemError:
    """A NaN is the one malformed body that says which field is at fault: the last name before it."""
    found = _BYTE.search(message)
    at = int(found[1]) if found else -1
    if at >= 0 and any(body.startswith(word, at) for word in _NOT_JSON_NUMBERS):
        names = re.findall(rb'"([^"\\]{1,64})"\s*:', body[max(0, at - 4096) : at])
        field = names[-1].decode("utf-8", "replace") if names else None
        return ProblemError(
            422, "not-a-number", f"JSON has no NaN or Infinity (byte {at}); send null or leave it out", field
        )
    return ProblemError(400, "malformed", f"the body is not JSON: {message}")
