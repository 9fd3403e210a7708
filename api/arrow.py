"""The Arrow form of /v1/score and /v1/recommend: IPC streams, https://arrow.apache.org/docs/format/Columnar.html.

In: one column `candidates` of integers or text (utf8, large_utf8, utf8_view), in any number of record batches; what a
JSON body says beside its candidates stands in the schema's metadata under `forerank`, as the same JSON object, or, for
writers without such metadata (polars), in the query string as in the binary form. Out: columns `ids` (of an Arrow
request's type where that is an integer, else utf8) and `scores` (float32); what a JSON answer says beside them is a
JSON object under `forerank`.

A stream is messages and an end mark. A message is ff ff ff ff, i4 the length of its flatbuffer, the flatbuffer, and a
body; the end mark is a length of 0. A stream without its mark is refused, since it may have been cut between two
messages. Not taken: compressed buffers, dictionaries, big-endian streams. No Arrow library is needed, and none of those
at hand would do (DESIGN.md).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from api import binary, prerank, schemas
from api.bodies import BODY_MAX
from api.flatbuffer import Node, Table, encoded
from api.prerank import Answer, Ids
from api.problems import ProblemError, decode, invalid

MEDIA = "application/vnd.apache.arrow.stream"
KEY = "forerank"
TAKES = (
    "an Arrow IPC stream: one column `candidates`, integers or text; everything else as JSON in the schema's metadata "
    f"under `{KEY}`, or in the query"
)
GIVES = (
    "an Arrow IPC stream: columns `ids` and `scores` (float32); everything else of the JSON form in the schema's "
    f"metadata under `{KEY}`"
)

_CANDIDATES = "candidates"
_OPTIONS = msgspec.json.Decoder(schemas.ScoreOptions)
_MARK = b"\xff\xff\xff\xff"
_END = _MARK + bytes(4)
_V5 = struct.pack("<h", 4)  # of the metadata, since Arrow 1.0
_SCHEMA, _RECORD_BATCH = 1, 3  # kinds of messages
_INT, _FLOAT, _UTF8, _LARGE_UTF8, _UTF8_VIEW = 2, 3, 5, 20, 24  # types of columns
_SINGLE = struct.pack("<h", 1)  # precision of a float column
_OFFSETS = {_UTF8: "<i4", _LARGE_UTF8: "<i8"}
_INLINE = 12  # bytes that a view holds itself
_BATCHES_MAX = _BUFFERS_MAX = 10_000  # named buffers of a batch
_ROWS_MAX = 1_000_000  # no request may have so many candidates; beyond it they are not even read
_METADATA_MAX = 1_000  # entries: looking through millions would hold up other requests
Buffers = list[memoryview]
Column = tuple[int, Node, list[bytes]]  # type, its flatbuffer, and the buffers behind the validity bitmap


class Spans(NamedTuple):
    """Texts: where each begins and ends in `data`."""

    data: bytes
    start: NDArray[np.int64]
    stop: NDArray[np.int64]


# ---- requests


def request_of(body: bytes, parameters: Mapping[str, str]) -> tuple[Ids, schemas.ScoreOptions]:
    """Candidates and options. Raises ProblemError."""
    try:
        messages = _messages(body)
        kind, schema, _ = next(messages, (0, None, None))
        if kind != _SCHEMA or schema is None:
            raise ValueError("it does not begin with a schema")
        form = _form(schema)
        options = _options(schema, parameters)
        parts: list[Any] = []
        rows = 0
        for kind, header, content in messages:
            if kind != _RECORD_BATCH or header is None:
                raise ValueError("a message after the schema is no record batch")
            count, buffers = _batch(header, content, form, rows)
            parts.append(
                np.frombuffer(buffers[1], form, count) if isinstance(form, np.dtype) else _spans(form, count, buffers)
            )
            rows += count
            if len(parts) > _BATCHES_MAX:
                raise ValueError(f"it has more than {_BATCHES_MAX} record batches")
            if rows > _ROWS_MAX:
                raise invalid(_CANDIDATES, f"more than {_ROWS_MAX} ids")
        if isinstance(form, np.dtype):
            return np.concatenate([np.empty(0, form), *parts]), options
        if sum(int((part.stop - part.start).sum()) for part in parts) > BODY_MAX:  # views may share bytes
            raise ProblemError(413, "body-too-large", f"ids of {BODY_MAX} bytes in all are accepted", _CANDIDATES)
        return [text for part in parts for text in _texts(part)], options
    except ValueError as error:
        raise ProblemError(400, "malformed", f"the body is not an Arrow IPC stream: {error}") from error


def _messages(body: bytes) -> Iterator[tuple[int, Table | None, memoryview]]:
    """Kind, header and body of each message."""
    at = 0
    while body[at : at + 8] != _END:
        if at + 8 > len(body):
            raise ValueError("it has no end mark")
        mark, size = struct.unpack_from("<4si", body, at)
        if mark != _MARK or size < 0:
            raise ValueError(f"no message begins at byte {at}")
        begin = at + 8 + size
        message = Table.root(body[at + 8 : begin])
        length = message.number(3, "<q")
        if not 0 <= length <= len(body) - begin:
            raise ValueError(f"the message at byte {at} is cut")
        at = begin + length
        yield message.number(1, "B"), message.table(2), memoryview(body)[begin:at]
    if at + 8 != len(body):
        raise ValueError("bytes follow its end mark")


def _form(schema: Table) -> np.dtype[Any] | int:
    """What the ids are: the type of integers, or which of the types of text."""
    columns = schema.count(1)
    if columns != 1:
        names = [field.text(0) for field in itertools.islice(schema.tables(1), 2)]
        extra = next((name for name in names if name != _CANDIDATES), _CANDIDATES)
        raise invalid(extra[:128], f"{columns} columns; expected one, `{_CANDIDATES}`")
    (field,) = schema.tables(1)
    if field.text(0) != _CANDIDATES:
        raise invalid(_CANDIDATES, "the only column has another name")
    if schema.number(0, "<h"):
        raise invalid(_CANDIDATES, "expected little-endian numbers")
    if field.table(4) is not None:
        raise invalid(_CANDIDATES, "expected the ids themselves, not a dictionary and indices")
    kind, shape = field.number(2, "B"), field.table(3)
    if kind == _INT and shape is not None and (bits := shape.number(0, "<i")) in (8, 16, 32, 64):
        return np.dtype(f"<{'i' if shape.number(1, 'B') else 'u'}{bits // 8}")
    if kind not in (_UTF8, _LARGE_UTF8, _UTF8_VIEW):
        raise invalid(_CANDIDATES, "expected a column of integers or text (utf8, large_utf8 or utf8_view)")
    return kind


def _options(schema: Table, parameters: Mapping[str, str]) -> schemas.ScoreOptions:
    """From the metadata, as in the JSON form; without it from the query string, as in the binary form."""
    if schema.count(2) > _METADATA_MAX:
        raise invalid(KEY, f"at most {_METADATA_MAX} entries of metadata are read")
    found = next((pair.text(1) for pair in schema.tables(2) if pair.says(0, KEY.encode())), None)
    if found is None:
        return binary.options_of(parameters)
    if parameters:
        raise invalid(min(parameters), f"the schema's metadata has `{KEY}`, so the query must be empty")
    try:
        return decode(_OPTIONS, found.encode())
    except ProblemError as error:
        if error.body.status != 400:
            raise
        raise invalid(KEY, error.body.detail) from error


def _batch(header: Table, content: memoryview, form: np.dtype[Any] | int, before: int) -> tuple[int, Buffers]:
    """Rows and buffers of a record batch, the validity bitmap first. `before`: rows of earlier ones."""
    if header.table(3) is not None:
        raise invalid(_CANDIDATES, "expected buffers that are not compressed")
    nodes = header.integers(1, 2).tolist()
    if len(nodes) != 1 or not 0 <= nodes[0][0] == header.number(0, "<q"):
        raise ValueError("a record batch and its column differ in length")
    rows, nulls = nodes[0]
    if rows > 8 * len(content):
        raise ValueError("a record batch has more rows than bits")
    places = header.integers(2, 2)
    if len(places) > _BUFFERS_MAX:
        raise ValueError(f"a record batch names more than {_BUFFERS_MAX} buffers")
    if (places < 0).any() or (places > len(content)).any() or (places.sum(axis=1) > len(content)).any():
        raise ValueError("a buffer lies outside of its message")
    if places[:, 1].sum() > len(content):
        raise ValueError("buffers share bytes")  # joined they would be larger than what was sent
    buffers = [content[offset : offset + length] for offset, length in places.tolist()]
    if len(buffers) < (3 if form in _OFFSETS else 2):
        raise ValueError("a record batch lacks a buffer")
    if nulls:
        bits = np.unpackbits(np.frombuffer(buffers[0], np.uint8, (rows + 7) // 8), bitorder="little")[:rows]
        if bits.all():
            raise ValueError("a column counts nulls where its bitmap has none")
        raise invalid(f"{_CANDIDATES}[{before + int(bits.argmin())}]", "expected an id, not null")
    return rows, buffers


def _spans(kind: int, rows: int, buffers: Buffers) -> Spans:
    """Where the texts of a batch are."""
    if kind == _UTF8_VIEW:
        views = np.frombuffer(buffers[1], "<i4", 4 * rows).reshape(rows, 4).astype(np.int64)
        length, _, buffer, offset = views.T
        own = length <= _INLINE  # then the text stands in its view, behind the length
        pieces = [buffers[1][: 16 * rows], *buffers[2:]]
        sizes = np.array([len(piece) for piece in pieces])
        piece = np.where(own, 0, buffer + 1)
        if (~own & (buffer < 0)).any() or (piece >= len(pieces)).any():
            raise ValueError("a text names no buffer")
        start, size = np.where(own, 16 * np.arange(rows) + 4, offset), sizes[piece]
        found = Spans(b"".join(pieces), start, start + length)
        base = (np.cumsum(sizes) - sizes)[piece]
    else:
        offsets = np.frombuffer(buffers[1], _OFFSETS[kind], rows + 1 if rows else 0).astype(np.int64)
        found = Spans(bytes(buffers[2]), offsets[:-1], offsets[1:])
        size, base = np.full(rows, len(found.data)), np.zeros(rows, np.int64)
    if (found.start < 0).any() or (found.start > found.stop).any() or (found.stop > size).any():
        raise ValueError("a text lies outside of its buffer")
    return Spans(found.data, found.start + base, found.stop + base)


def _texts(spans: Spans) -> list[str]:
    places = zip(spans.start.tolist(), spans.stop.tolist(), strict=True)
    if spans.data.isascii():
        text = str(spans.data, "ascii")
        return [text[start:stop] for start, stop in places]
    return [str(spans.data[start:stop], "utf-8") for start, stop in places]


# ---- answers


def answer_of(answer: Answer, query: schemas.Query) -> bytes:
    rest = msgspec.json.encode(prerank.answer_of(answer, query, columns=False)).decode()
    return stream_of(answer.candidates.names(answer.places), answer.scores, rest)


def stream_of(ids: list[Any] | NDArray[Any], scores: NDArray[np.float32], metadata: str) -> bytes:
    """The stream of an answer, in one record batch. Integers in an array keep their type; other ids become text."""
    columns = {"ids": _ids(ids), "scores": (_FLOAT, {0: _SINGLE}, [scores.astype("<f4").tobytes()])}
    fields: list[Node] = [{0: name, 2: bytes([kind]), 3: shape, 5: []} for name, (kind, shape, _) in columns.items()]
    schema: Node = {1: fields, 2: [{0: KEY, 1: metadata}]}
    content, buffers = bytearray(), []
    for _, _, parts in columns.values():
        for part in (b"", *parts):  # no validity bitmap: nothing is null
            buffers.append((len(content), len(part)))
            content += part + bytes(-len(part) % 8)
    nodes = [(len(scores), 0)] * len(columns)  # rows, nulls
    batch: Node = {0: struct.pack("<q", len(scores)), 1: np.array(nodes, "<i8"), 2: np.array(buffers, "<i8")}
    return _message(_SCHEMA, schema, b"") + _message(_RECORD_BATCH, batch, bytes(content)) + _END


def _message(kind: int, header: Node, content: bytes) -> bytes:
    flat = encoded({0: _V5, 1: bytes([kind]), 2: header, 3: struct.pack("<q", len(content))})
    return _MARK + struct.pack("<i", len(flat)) + flat + content


def _ids(names: list[Any] | NDArray[Any]) -> Column:
    if isinstance(names, np.ndarray):
        shape: Node = {0: struct.pack("<i", 8 * names.itemsize), 1: bytes([names.dtype.kind == "i"])}
        return _INT, shape, [names.tobytes()]
    texts = [str(name).encode() for name in names]
    return _UTF8, {}, [np.cumsum([0, *map(len, texts)], dtype="<i4").tobytes(), b"".join(texts)]
