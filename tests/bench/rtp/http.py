"""Through HTTP: another process asks over one kept connection; `overhead` is the round trip where every answer is
ready.
"""

from __future__ import annotations

import httpx
import numpy as np
from numpy.typing import NDArray

from tests.bench import http_load
from tests.bench.peers.data import Data
from tests.bench.report import Report
from tests.bench.rtp import loop, nearline
from tests.bench.rtp.common import REQUESTS, USERS, K, interleaved, percentiles
from tests.bench.rtp.server import body, clients, server
from tests.host import Host


def measure(report: Report, host: Host, data: Data, rounds: int, quick: bool) -> None:
    asked, as_of = list(data.requests), data.as_of
    binary = [
        http_load.request(
            f"/v1/score?user_id=u{at % USERS}&as_of={as_of}&k={K}",
            ids.astype("<u8").tobytes(),
            "application/octet-stream",
        )
        for at, ids in enumerate(asked)
    ]
    texts = [
        http_load.request("/v1/score", body(f"u{at % USERS}", as_of, ids.tolist()), "application/json")
        for at, ids in enumerate(asked)
    ]
    names = [
        http_load.request(
            "/v1/score", body(f"u{at % USERS}", as_of, [str(number) for number in ids.tolist()]), "application/json"
        )
        for at, ids in enumerate(asked)
    ]
    with server(host, "api", "serve") as (port, pid), server(host, "tests.bench.stand_in", "ready") as (ready, _):
        served, there = http_load.Connection(port), http_load.Connection(ready)
        for connection in (served, there):  # with it the collections of the start are counted
            connection.ask(binary[0])
        before = _collections(port)
        spent = interleaved(
            rounds,
            {
                "http": lambda at: served.ask(binary[at % REQUESTS]),
                "http_json": lambda at: served.ask(texts[at % REQUESTS]),
                "http_json_strings": lambda at: served.ask(names[at % REQUESTS]),
                "http_overhead": lambda at: there.ask(binary[at % REQUESTS]),
                "http_json_overhead": lambda at: there.ask(texts[at % REQUESTS]),
            },
        )
        for name in ("http", "http_json", "http_json_strings"):
            percentiles(report, name, spent[name])
        for name in ("http_overhead", "http_json_overhead"):
            windows = [float(np.median(part)) for part in np.array_split(spent[name], 5)]
            report.figure(f"{name}_ms", windows, "ms", float(np.median(spent[name])))
        folder = host.settings.state / "asked"
        folder.mkdir()
        for at, one in enumerate(binary):
            (folder / f"{at:03}").write_bytes(one)
        nearline.measure(report, host, served, binary, rounds)
        rows = [
            clients(port, pid, count, folder, 3 if quick else 8)
            for count in ((1, 8) if quick else (1, 2, 4, 8, 16, 32))
        ]
        report.table("clients", rows)
        _pauses(report, _collections(port) - before)
        report.figure("requests_per_s_per_core", [float(row["per_core"]) for row in rows], "1/s")
    processes = []
    for count in (1, 2) if quick else (1, 2, 3, 4):
        with server(host, "api", "serve", processes=count) as (port, pid):
            row = clients(port, pid, 8, folder, 3 if quick else 8)
            own = http_load.private_mib(pid)
            processes.append(row | {"processes": count, "private_mib_each": max(own)})
    report.table("processes", processes)
    loop.measure(report, host, data, binary, texts, rounds)


def _pauses(report: Report, found: NDArray[np.float64]) -> None:
    """Of the garbage collector in both processes, while they answered all requests until now."""
    count, short, seconds = found.tolist()
    report.figure("gc_pauses", count, "")
    report.figure("gc_pauses_over_3ms", count - short, "")
    report.figure("gc_pause_mean_ms", seconds / max(1, count) * 1e3, "ms")


def _collections(port: int) -> NDArray[np.float64]:
    """[3]: all until now, those of 3 ms at most, and their seconds."""
    found = dict.fromkeys(("count", 'bucket{le="0.003"}', "sum"), 0.0)
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
        name, _, value = line.partition(" ")
        if (what := name.removeprefix("forerank_gc_pause_seconds_")) in found:
            found[what] = float(value)
    return np.array(list(found.values()))
