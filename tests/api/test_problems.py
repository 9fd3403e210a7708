"""Bodies that are wrong: the status and the field that problem+json names."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.problems import ProblemError, decode
from api.schemas import ScoreRequest

DECODER = msgspec.json.Decoder(ScoreRequest)


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b'{"user_id": "u", "candidates": [1}', 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"user_id": "\xff", "candidates": []}', 400, None),
        (b"[" * 100_000, 422, None),
        (b"[]", 422, None),
        (b'{"user_id": "u"}', 422, "candidates"),
        (b'{"user_id": "u", "candidates": 5}', 422, "candidates"),
        (b'{"user_id": "u", "candidates": [1, 2, 2.5]}', 422, "candidates[2]"),
        (b'{"user_id": "u", "candidates": [true]}', 422, "candidates[0]"),
        (b'{"user_id": "u", "candidates": [NaN]}', 422, "candidates"),
        (b'{"user_id": "u", "candidates": [], "filters": {"price": {"lte": NaN}}}', 422, "lte"),
        (b'{"user_id": "u", "candidates": [], "filters": {"price": {"lte": -Infinity}}}', 422, "lte"),
        (b'{"user_id": "u", "candidates": [], "filters": {"price": {"lte": 1e999}}}', 422, "filters[...].lte"),
        (b'{"user_id": "u", "candidates": [], "filters": {"price": {"below": 1}}}', 422, "filters[...].below"),
        (b'{"user_id": "u", "candidates": [], "k": 0}', 422, "k"),
        (b'{"user_id": "u", "candidates": [], "k": -1}', 422, "k"),
        (b'{"user_id": "u", "candidates": [], "k": "3"}', 422, "k"),
        (b'{"user_id": "u", "candidates": [], "include": ["all"]}', 422, "include[0]"),
        (b'{"user_id": "u", "candidates": [], "candidate": [1]}', 422, "candidate"),
        (b'{"user": {"behaviours": [{"item_id": 1}]}, "candidates": []}', 422, "user.behaviours[0].event_time"),
        (b'{"user": {"features": {"age": null}}, "candidates": []}', 422, "user.features[...]"),
    ],
)
def test_the_field_at_fault_is_named(body: bytes, status: int, field: str | None) -> None:
    with pytest.raises(ProblemError) as caught:
        decode(DECODER, body)
    assert (caught.value.body.status, caught.value.body.field) == (status, field)


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(alphabet='{}[]":,0123456789truefalsnNaI candidates_user', max_size=80).map(str.encode)
)
def test_no_body_is_anything_but_a_request_or_a_problem(body: bytes) -> None:
    with contextlib.suppress(ProblemError):  # anything else fails the test
        decode(DECODER, body)
