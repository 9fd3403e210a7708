"""A client that costs little beside what it measures: ready requests over kept connections."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BINARY, JSON = "application/octet-stream", "application/json"


def request(path: str, body: bytes, media: str) -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str) -> bytes:
    """A GET as it goes over the wire."""
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


class Connection:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = int(self._socket.getsockname()[1])  # this end's

    def ask(self, wanted: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer. Raises RuntimeError unless it is 200."""
        self.send(wanted)
        got = b""
        while b"\r\n\r\n" not in got:
            got += self._part()
        head, _, body = got.partition(b"\r\n\r\n")
        low = head.lower()
        start = low.index(b"content-length:") + 15
        size = int(low[start:].split(b"\r\n", 1)[0])
        parts, left = [body], size - len(body)
        while left > 0:
            parts.append(self._part())
            left -= len(parts[-1])
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{head.decode()}\n{b''.join(parts)[:500].decode(errors='replace')}")
        return head, b"".join(parts)

    def send(self, wanted: bytes) -> None:
        """Without waiting for the answer."""
        self._socket.sendall(wanted)

    def timed(self, wanted: bytes) -> float:
        """Milliseconds of one round trip."""
        began = time.perf_counter()
        self.ask(wanted)
        return (time.perf_counter() - began) * 1e3

    def close(self) -> None:
        self._socket.close()

    def _part(self) -> bytes:
        part = self._socket.recv(1 << 18)
        if not part:
            raise RuntimeError("the server has closed the connection")
        return part


def load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> NDArray[np.float64]:
    """Round trips, ms, of closed-loop clients, each a thread with a connection of its own. Raises what one raised."""
    trips: list[list[float]] = [[] for _ in range(clients)]
    failed: list[Exception] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        connection, place = Connection(port), number
        try:
            while time.monotonic() < end:
                trips[number].append(connection.timed(requests[place % len(requests)]))
                place += 1
        except (OSError, RuntimeError) as error:
            failed.append(error)
        connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return np.concatenate([np.array(own) for own in trips])


def cpu_seconds(pid: int) -> float:
    """Of a process and all below it."""
    total, ticks = 0.0, 100.0
    for place in _family(pid):
        fields = Path(f"/proc/{place}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def private_mib(pid: int) -> list[float]:
    """Memory that is a process's own, for it and all below it."""
    found = []
    for place in _family(pid):
        lines = Path(f"/proc/{place}/smaps_rollup").read_text().splitlines()
        sizes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
        found.append((sizes["Private_Clean:"] + sizes["Private_Dirty:"]) / 1024)
    return found


def _family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _family(int(child))
    return found


def main() -> None:
    """PORT CLIENTS SECONDS FOLDER: the requests are the files of FOLDER; prints what came of it as JSON."""
    port, clients, seconds, folder = sys.argv[1:]
    requests = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    began = time.perf_counter()
    trips = load(int(port), requests, int(clients), float(seconds))
    took = time.perf_counter() - began  # the last answers come after the end
    p50, p99 = np.percentile(trips, [50, 99])
    print(json.dumps({"count": len(trips), "seconds": took, "p50_ms": float(p50), "p99_ms": float(p99)}))


if __name__ == "__main__":
    main()
