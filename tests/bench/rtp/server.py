"""An API process of the benchmark's host, and clients of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from infra.settings import environment
from tests.bench import http_load
from tests.bench.rtp.common import K
from tests.conftest import free_ports
from tests.host import Host


@contextlib.contextmanager
def server(host: Host, *command: str, processes: int = 1, folder: Path | None = None) -> Iterator[tuple[int, int]]:
    """(port, process id) of an API over the host's state, of the code in `folder`."""
    port = free_ports(1)[0]
    environ = {**os.environ, **environment(host.settings), "API_PORT": str(port), "API_PROCESSES": str(processes)}
    log = (host.settings.state / f"{command[-1]}.log").open("ab")
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environ, stdout=log, stderr=log)
    log.close()
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").is_success:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not serve; its log is in {host.settings.state}")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


def clients(port: int, pid: int, clients: int, folder: Path, seconds: int) -> dict[str, Any]:
    """Closed-loop clients in a process of their own, for so long."""
    command = [sys.executable, "-m", "tests.bench.http_load", str(port), str(clients), str(seconds), str(folder)]
    subprocess.run([*command[:-2], "1", str(folder)], check=True, capture_output=True)  # warms every thread up
    before = http_load.cpu_seconds(pid)
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    used = http_load.cpu_seconds(pid) - before
    return {
        "clients": clients,
        "requests_per_s": found["count"] / found["seconds"],
        "per_core": found["count"] / used,
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
    }


def body(user: str, as_of: int, ids: list[Any]) -> bytes:
    return json.dumps({"user_id": user, "as_of": as_of, "k": K, "candidates": ids}).encode()
