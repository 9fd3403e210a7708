"""The event loop of an API process: what a request keeps it from doing for others."""

from __future__ import annotations

import contextlib
import io
import json
import time

import polars as pl

from api import arrow
from tests.bench import http_load
from tests.bench.peers.data import Data
from tests.bench.report import Report
from tests.bench.rtp.server import server
from tests.host import Host

_BODY = 16_000_000  # bytes, nearly as many as are taken
_WAITS = 1_000  # for a version that does not come


def measure(report: Report, host: Host, data: Data, binary: list[bytes], texts: list[bytes], rounds: int) -> None:
    """The longest callback of the event loop during one request: what others have to wait for. In CPU time
    (tests/bench/stand_in.py); ranges are over requests, the value is their median."""
    ids, as_of = data.requests[0], data.as_of
    stream = io.BytesIO()
    pl.DataFrame({"candidates": ids}).write_ipc_stream(stream)
    query, form = f"/v1/score?user_id=u0&as_of={as_of}", "application/octet-stream"
    traced = json.dumps({"user_id": "u0", "as_of": as_of, "include": ["trace"], "candidates": ids.tolist()}).encode()
    asked = {
        "binary": binary[0],
        "binary_all": http_load.request(query, ids.astype("<u8").tobytes(), form),
        "json": texts[0],
        "json_trace_all": http_load.request("/v1/score", traced, "application/json"),
        "arrow_all": http_load.request(query, stream.getvalue(), arrow.MEDIA),
        "body_16mb": http_load.request("/v1/score", b" " * (_BODY - len(traced)) + traced, "application/json"),
    }
    with server(host, "tests.bench.stand_in", "watched") as (port, _), contextlib.ExitStack() as held:
        connection = http_load.Connection(port)

        def longest() -> float:
            return float(connection.ask(http_load.get("/longest"))[1])

        for name, request in asked.items():
            found = []
            for _ in range(min(rounds, 60)):
                longest()
                connection.ask(request)
                found.append(longest())
            report.figure(f"loop_longest_{name}_ms", found[len(found) // 10 :], "ms")
        for count, more in ((1, 1), (_WAITS, _WAITS - 1)):
            for waiter in [http_load.Connection(port) for _ in range(more)]:
                held.callback(waiter.close)
                waiter.send(http_load.get("/v1/items/0?wait_for=99&timeout_ms=10000"))
            found = []
            for _ in range(20):
                time.sleep(0.05)  # some looks of the waits, 10 ms apart
                found.append(longest())
            report.figure(f"loop_longest_{count}_waits_ms", found[5:], "ms")
