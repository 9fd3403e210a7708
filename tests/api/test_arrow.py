"""The Arrow form of /v1/score and /v1/recommend answers what the JSON form does, to streams of polars and pyarrow."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.arrow import KEY, MEDIA, request_of, stream_of
from api.flatbuffer import Node, Table, encoded
from api.problems import ProblemError
from tests.api.conftest import USERS, behaviours_of
from tests.api.test_errors import problem
from tests.host import NOW, Host, catalogue

ITEMS = catalogue(200)
IDS = [item.item_id for item in ITEMS]
NUMBERS = [int(one) for one in IDS if one.isdigit()]
ARROW = {"content-type": MEDIA}
OLDEST = pl.CompatLevel.oldest()
PYARROW = (Path(__file__).parent / "golden" / "pyarrow.arrow").read_bytes()  # by pyarrow 26: utf8, three batches
INTEGERS = {0: struct.pack("<i", 64), 1: b"\1"}
END = b"\xff\xff\xff\xff" + bytes(4)


def stream(column: Any, dtype: Any = None, name: str = "candidates", **options: Any) -> bytes:
    """What polars writes: text as utf8_view, or as large_utf8 where it is to be compatible."""
    series = column if isinstance(column, pl.Series) else pl.Series(name, column, dtype)
    out = io.BytesIO()
    series.to_frame().write_ipc_stream(out, **options)
    return out.getvalue()


def message(kind: int, header: Node, content: bytes = b"") -> bytes:
    flat = encoded({0: b"\4", 1: bytes([kind]), 2: header, 3: struct.pack("<q", len(content))})
    return b"\xff\xff\xff\xff" + struct.pack("<i", len(flat)) + flat + content


def schema(metadata: str | None, kind: int = 2, shape: Node = INTEGERS, **more: Any) -> bytes:
    pairs: Node = [] if metadata is None else [{0: KEY, 1: metadata}]
    return message(1, {1: [{0: "candidates", 2: bytes([kind]), 3: shape, 5: []}], 2: pairs} | more.get("root", {}))


def batches(of: bytes) -> bytes:
    """A stream without its first message, the schema, which has no body."""
    return of[8 + struct.unpack_from("<i", of, 4)[0] :]


def described(of: bytes, text: bool, **options: Any) -> bytes:
    """The stream with metadata, which polars does not write."""
    return schema(json.dumps(options), 24 if text else 2, {} if text else INTEGERS) + batches(of)


def read(content: bytes) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Columns, and the metadata."""
    (pair,) = Table.root(content[8 : 8 + struct.unpack_from("<i", content, 4)[0]]).table(2).tables(2)  # type: ignore[union-attr]
    assert pair.text(0) == KEY
    return pl.read_ipc_stream(content), json.loads(pair.text(1))


def answered(host: Host, body: bytes, **parameters: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    response = host.client.post("/v1/score", content=body, headers=ARROW, params=parameters)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == MEDIA
    return read(response.content)


def same(found: tuple[pl.DataFrame, dict[str, Any]], wanted: dict[str, Any]) -> None:
    """All of the JSON form's answer, but how long it took and whether the user was inferred for it."""
    columns, rest = found
    assert columns["ids"].to_list() == wanted["ids"]
    assert columns["scores"].dtype == pl.Float32
    assert columns["scores"].to_list() == np.array(wanted["scores"], np.float32).tolist()
    assert set(rest.pop("stages_ms")) == set(wanted["stages_ms"])
    for answer in (rest, wanted):
        assert answer["user"].pop("source") in ("store", "cached", "inline")
    assert rest == {name: value for name, value in wanted.items() if name not in ("ids", "scores", "stages_ms")}


def scored(host: Host, **body: Any) -> dict[str, Any]:
    response = host.client.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


OPTIONS: list[dict[str, Any]] = [
    {},
    {"k": 7},
    {"k": 1_000, "order": "score*bid", "include": ["trace", "attributes"]},
    {"filters": {"in_stock": {"eq": True}, "bid": {"lte": 1.5}}, "include": ["trace"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("column", [[*NUMBERS, 10**15, -1], [*IDS, "no", "", "ü" * 200, "007"]], ids=["ints", "texts"])
def test_an_answer_is_that_of_the_json_form(host: Host, column: list[Any], options: dict[str, Any]) -> None:
    asked = {"user_id": "anna", "as_of": NOW, **options}
    body = described(stream(column), isinstance(column[0], str), **asked)
    same(answered(host, body), scored(host, candidates=column, **asked))


@pytest.mark.parametrize("dtype", [pl.UInt64, pl.Int64, pl.UInt32, pl.Int16], ids=str)
def test_integers_keep_their_type(host: Host, dtype: Any) -> None:
    asked = {"user_id": "anna", "as_of": NOW}
    columns, _ = found = answered(host, stream(NUMBERS, dtype), **asked)
    same(found, scored(host, candidates=NUMBERS, **asked))
    assert columns["ids"].dtype == dtype


def test_the_largest_integers_are_not_the_negative_ones(host: Host) -> None:
    _, rest = answered(host, stream([2**64 - 1, 2**63], pl.UInt64), user_id="anna")
    assert rest["missing"] == [2**64 - 1, 2**63]
    _, rest = answered(host, stream([-1, -(2**63), 1], pl.Int64), user_id="anna")
    assert rest["missing"] == [-1, -(2**63)]


@pytest.mark.parametrize("level", [None, OLDEST], ids=["utf8_view", "large_utf8"])
def test_options_may_stand_in_the_query(host: Host, level: Any) -> None:
    filters = {"in_stock": {"eq": 1}}
    body = stream(IDS, compat_level=level)
    found = answered(host, body, user_id="anna", as_of=NOW, k=5, order="score*bid", filters=json.dumps(filters))
    asked = {"user_id": "anna", "as_of": NOW, "k": 5, "order": "score*bid", "filters": filters}
    same(found, scored(host, candidates=IDS, **asked))


def test_what_pyarrow_wrote(host: Host) -> None:
    ids, options = request_of(PYARROW, {})
    assert list(ids) == ["1", "sku-0-ß", "no", "4", "sku-33-ß", "7"]
    assert (options.user_id, options.k) == ("anna", 3)
    filters = {"in_stock": {"eq": True}}
    same(answered(host, PYARROW), scored(host, user_id="anna", as_of=NOW, k=3, filters=filters, candidates=list(ids)))


def test_an_inline_user(host: Host) -> None:
    past = [one for one in behaviours_of(ITEMS) if one.user_id == "anna"]
    behaviours = [{"item_id": one.item_id, "action": one.action, "event_time": one.time} for one in past]
    asked = {"user": {"features": USERS["anna"], "behaviours": behaviours}, "as_of": NOW}
    same(answered(host, described(stream(NUMBERS), False, **asked)), scored(host, candidates=NUMBERS, **asked))


@pytest.mark.parametrize("body", [stream([], pl.UInt64), stream([], pl.String), schema(None) + END])
def test_no_candidates(host: Host, body: bytes) -> None:
    columns, rest = answered(host, body, user_id="anna", k=3)
    assert (columns.height, columns.columns, rest["candidates"], rest["missing"]) == (0, ["ids", "scores"], 0, [])


def test_accept_chooses_the_answers_form(host: Host) -> None:
    asked: dict[str, Any] = {"user_id": "anna", "as_of": NOW, "candidates": [*NUMBERS, *IDS]}
    wanted = scored(host, **asked)
    accept = {"accept": f"text/html, {MEDIA}; q=0.9, */*"}
    columns, rest = read(host.client.post("/v1/score", json=asked, headers=accept).content)
    same((columns, rest), wanted | {"ids": [str(one) for one in wanted["ids"]]})
    as_json = host.client.post("/v1/score", content=PYARROW, headers=ARROW | {"accept": "application/json"})
    assert as_json.json()["ids"] == answered(host, PYARROW)[0]["ids"].to_list()
    both = host.client.post("/v1/score", content=PYARROW, headers=ARROW | {"accept": f"application/json, {MEDIA}"})
    assert both.headers["content-type"] == MEDIA
    ranked = host.client.post("/v1/score", json=asked, headers={"accept": f"application/json;q=0.5, {MEDIA}"})
    assert ranked.headers["content-type"] == MEDIA
    refused = host.client.post("/v1/score", json=asked, headers={"accept": f"{MEDIA};q=0"})
    assert refused.headers["content-type"] == "application/json"
    integers = host.client.post(
        "/v1/score", content=stream(NUMBERS), headers=ARROW | {"accept": "application/json"}, params={"user_id": "7"}
    )
    assert integers.json()["ids"] == NUMBERS


def test_recommendations(host: Host) -> None:
    asked = {"user_id": "anna", "as_of": NOW, "k": 10, "include": ["trace", "attributes"]}
    wanted = host.client.post("/v1/recommend", json=asked)
    response = host.client.post("/v1/recommend", json=asked, headers={"accept": MEDIA})
    assert response.headers["content-type"] == MEDIA
    same(read(response.content), wanted.json())
    problem(host.client.post("/v1/recommend", content=PYARROW, headers=ARROW), 415, None)


# ---- round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PARTS = st.one_of(
    st.lists(st.lists(TEXT, max_size=9), min_size=1, max_size=6).map(lambda parts: (parts, pl.String)),
    st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=9), min_size=1, max_size=6).map(
        lambda parts: (parts, pl.UInt64)
    ),
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), min_size=1, max_size=6).map(
        lambda parts: (parts, pl.Int64)
    ),
)


@given(PARTS, st.sampled_from([None, OLDEST]))
@settings(max_examples=150, deadline=None)
def test_any_batches_are_read_in_order(case: tuple[list[list[Any]], Any], level: Any) -> None:
    parts, dtype = case
    written = [stream(part, dtype, compat_level=level) for part in parts]
    head = written[0][: len(written[0]) - len(batches(written[0]))]
    body = head + b"".join(batches(one)[:-8] for one in written) + END
    ids, _ = request_of(body, {"user_id": "u"})
    assert list(ids) == [one for part in parts for one in part]


@given(st.lists(TEXT, max_size=40), st.sampled_from(["text", "u8", "i8", "u4"]), st.text(st.characters(codec="utf-8")))
@settings(max_examples=150, deadline=None)
def test_polars_reads_what_is_written(texts: list[str], kind: str, metadata: str) -> None:
    ids: Any = texts if kind == "text" else np.arange(len(texts)).astype(kind)
    scores = np.arange(len(texts), dtype=np.float32) / 3
    content = stream_of(ids, scores, json.dumps(metadata))
    columns, rest = read(content)
    assert columns["ids"].to_list() == list(ids)
    assert columns["scores"].to_list() == scores.tolist()
    assert rest == metadata
    assert len(content) % 8 == 0


# ---- what is wrong

SOUND = [PYARROW, stream(NUMBERS), stream([*IDS, "x" * 30]), stream(IDS, compat_level=OLDEST)]


@pytest.mark.parametrize("body", SOUND, ids=["pyarrow", "ints", "utf8_view", "large_utf8"])
def test_a_stream_that_is_cut_anywhere_is_refused(body: bytes) -> None:
    for length in range(len(body)):
        with pytest.raises(ProblemError) as error:
            request_of(body[:length], {"user_id": "anna"} if body is not PYARROW else {})
        assert (error.value.body.status, error.value.body.field) == (400, None)


@given(st.sampled_from(SOUND), st.lists(st.tuples(st.integers(0, 1_500), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=1_500, deadline=None)
def test_changed_bytes_are_read_or_refused(body: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(body)
    for at, value in changes:
        changed[at % len(body)] = value
    statuses: list[int] = []
    try:
        request_of(bytes(changed), {"user_id": "anna"})
    except ProblemError as error:
        statuses.append(error.body.status)
    assert set(statuses) <= {400, 413, 422}


def batch(rows: int, *buffers: bytes, **more: Any) -> bytes:
    """A record batch of one column, of which each buffer is as long as a multiple of 8."""
    places = np.array([(sum(map(len, buffers[:at])), len(one)) for at, one in enumerate(buffers)], np.int64)
    root = {0: struct.pack("<q", rows), 1: np.array([(rows, 0)]), 2: places.reshape(-1, 2)}
    return message(3, root | more.get("root", {}), b"".join(buffers)) + END


def views(*rows: tuple[int, int, int, int]) -> bytes:
    return np.array(rows, "<i4").tobytes()


TWO = io.BytesIO()
pl.DataFrame({"candidates": [1], "price": [2.0]}).write_ipc_stream(TWO)
ANNA = '{"user_id": "anna"}'
EIGHT = bytes(8)
WRONG: dict[str, tuple[bytes, int, str | None]] = {
    "nothing": (b"", 400, None),
    "no Arrow": (b"PK\3\4" * 9, 400, None),
    "JSON": (b'{"user_id": "anna", "candidates": [1]}', 400, None),
    "an end alone": (END, 400, None),
    "no schema": (batches(stream([1])), 400, None),
    "two schemas": (schema(ANNA) * 2 + END, 400, None),
    "no end": (stream([1])[:-8], 400, None),
    "more behind the end": (schema(ANNA) + END + EIGHT, 400, None),
    "a dictionary batch": (schema(ANNA) + message(2, {}) + END, 400, None),
    "a huge length": (b"\xff\xff\xff\xff\xff\xff\xff\x7f", 400, None),
    "fewer values than rows": (schema(ANNA) + batch(2, b"", EIGHT), 400, None),
    "more rows than any": (schema(ANNA) + batch(2**62, b"", EIGHT), 400, None),
    "fewer rows than none": (schema(ANNA) + batch(-1, b"", EIGHT), 400, None),
    "no buffers": (schema(ANNA) + batch(1), 400, None),
    "a buffer outside": (schema(ANNA) + batch(1, b"", EIGHT, root={2: np.array([(0, 0), (8, 8)])}), 400, None),
    "a buffer before": (schema(ANNA) + batch(1, b"", EIGHT, root={2: np.array([(0, 0), (-8, 8)])}), 400, None),
    "falling offsets": (schema(ANNA, 5, {}) + batch(1, b"", struct.pack("<2i", 4, 2), EIGHT), 400, None),
    "offsets outside": (schema(ANNA, 5, {}) + batch(1, b"", struct.pack("<2i", 0, 9), EIGHT), 400, None),
    "offsets before": (schema(ANNA, 20, {}) + batch(1, b"", struct.pack("<2q", -(2**63), 0), EIGHT), 400, None),
    "no UTF-8": (schema(ANNA, 5, {}) + batch(1, b"", struct.pack("<2i", 0, 1), b"\xff" * 8), 400, None),
    "a view of no buffer": (schema(ANNA, 24, {}) + batch(1, b"", views((13, 0, 0, 0))), 400, None),
    "a view outside": (schema(ANNA, 24, {}) + batch(1, b"", views((13, 0, 0, 4)), EIGHT + EIGHT), 400, None),
    "a view before": (schema(ANNA, 24, {}) + batch(1, b"", views((13, 0, 0, -4)), EIGHT + EIGHT), 400, None),
    "a view of the views": (
        schema(ANNA, 24, {}) + batch(2, b"", views((13, 0, -1, 19), (12, 2**30, 2**30, 2**30)), EIGHT),
        400,
        None,
    ),
    "more views than any": (schema(ANNA, 24, {}) + batch(2**62, b"", EIGHT), 400, None),
    "more texts than any": (schema(ANNA, 5, {}) + batch(2**63 - 1, b"", EIGHT, EIGHT), 400, None),
    "buffers that share bytes": (
        schema(ANNA, 24, {})
        + batch(1, b"", views((3, 0, 0, 0)), bytes(8_000), root={2: np.array([(0, 0), (0, 16), *[(16, 8_000)] * 200])}),
        400,
        None,
    ),
    "a flood of buffers": (
        schema(ANNA) + batch(1, b"", EIGHT, root={2: np.array([(0, 0), (0, 8), *[(0, 0)] * 10_000])}),
        400,
        None,
    ),
    "a flood of batches": (schema(ANNA) + batch(1, b"", EIGHT)[: -len(END)] * 10_001 + END, 400, None),
    "a view shorter than nothing": (schema(ANNA, 24, {}) + batch(1, b"", views((-3, 0, 0, 0)), EIGHT), 400, None),
    "views that share bytes": (
        schema(ANNA, 24, {}) + batch(900, b"", views(*[(20_000, 0, 0, 0)] * 900), bytes(20_000)),
        413,
        "candidates",
    ),
    "big-endian": (schema(ANNA, root={0: b"\1"}) + END, 422, "candidates"),
    "no column": (schema(ANNA, root={1: []}) + END, 422, "candidates"),
    "another column": (stream([1], name="ids"), 422, "candidates"),
    "two columns": (TWO.getvalue(), 422, "price"),
    "floats": (stream([1.5]), 422, "candidates"),
    "booleans": (stream([True]), 422, "candidates"),
    "lists": (stream([[1]]), 422, "candidates"),
    "nulls alone": (stream([None, None]), 422, "candidates"),
    "a dictionary": (stream(["a", "b"], pl.Categorical), 422, "candidates"),
    "nulls that are none": (
        schema(ANNA) + batch(1, b"\xff" * 8, EIGHT, root={1: np.array([(1, 1)])}),
        400,
        None,
    ),
    "a null": (stream([*range(77), None, 5]), 422, "candidates[77]"),
    "a null text": (stream(["a", None]), 422, "candidates[1]"),
    "lz4": (stream(NUMBERS, compression="lz4"), 422, "candidates"),
    "zstd": (stream(IDS, compression="zstd"), 422, "candidates"),
    "too many": (stream(range(1_001)), 422, "candidates"),
    "no JSON": (schema("user_id=anna") + END, 422, KEY),
    "no object": (schema("[]") + END, 422, None),
    "too many entries": (schema(None, root={2: [{0: "a", 1: "b"}] * 1_001}) + END, 422, KEY),
    "no user": (schema("{}") + END, 422, "user_id"),
    "candidates twice": (schema('{"user_id": "anna", "candidates": [1]}') + END, 422, "candidates"),
    "k": (schema('{"user_id": "anna", "k": 0}') + END, 422, "k"),
    "a filter": (
        schema('{"user_id": "anna", "filters": {"height": {"eq": 1}}}') + batch(1, b"", EIGHT),
        422,
        "filters.height",
    ),
    "NaN": (schema('{"user_id": "anna", "filters": {"bid": {"eq": NaN}}}') + END, 422, "eq"),
    "a body beyond the limit": (bytes(17 << 20), 413, None),
}


@pytest.mark.parametrize(("body", "status", "field"), WRONG.values(), ids=WRONG)
def test_wrong_streams(host: Host, body: bytes, status: int, field: str | None) -> None:
    described = KEY.encode() in body or status != 422
    parameters = {} if described else {"user_id": "anna"}
    problem(host.client.post("/v1/score", content=body, headers=ARROW, params=parameters), status, field)


@pytest.mark.parametrize(
    ("body", "parameters", "field"),
    [
        (stream([1]), {}, "user_id"),
        (stream([1]), {"user_id": "anna", "k": "x"}, "k"),
        (stream([1]), {"user_id": "anna", "colour": "red"}, "colour"),
        (PYARROW, {"k": "3"}, "k"),
    ],
)
def test_wrong_queries(host: Host, body: bytes, parameters: dict[str, str], field: str) -> None:
    problem(host.client.post("/v1/score", content=body, headers=ARROW, params=parameters), 422, field)


def test_the_document_names_the_form(host: Host) -> None:
    paths = host.client.get("/openapi.json").json()["paths"]
    assert MEDIA in paths["/v1/score"]["post"]["requestBody"]["content"]
    for path in ("/v1/score", "/v1/recommend"):
        assert MEDIA in paths[path]["post"]["responses"]["200"]["content"]
    assert MEDIA not in paths["/v1/recommend"]["post"]["requestBody"]["content"]


def test_the_process_lives_and_logged_no_error(host: Host) -> None:
    assert host.client.get("/readyz").status_code == 200
    assert "Traceback" not in host.log
