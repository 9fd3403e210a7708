"""A small feature service in the form that `cross_source` speaks (`api.crosses.RemoteHistories`), as a process.

    python -m tests.remote_features PORT FILE     FILE: JSON, user id -> [[item id, action, event time in ms], ...]

PUT /delay?ms=N: every answer takes N ms from now on. PUT /fail?status=N: answers are N with an empty body; 0: as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.conftest import answered, free_ports, wait_until

Behaviour = tuple[str, str, int]  # item id, action, event time in ms


@contextlib.contextmanager
def feature_service(users: Mapping[str, Sequence[Behaviour]]) -> Iterator[httpx.Client]:
    """The service with these users' behaviours, as a process of its own; a client whose `base_url` is its address."""
    with tempfile.TemporaryDirectory(prefix="forerank-features-") as folder:
        data, port = Path(folder) / "users.json", free_ports(1)[0]
        data.write_text(json.dumps(users))
        arguments = [sys.executable, "-m", "tests.remote_features", str(port), str(data)]
        process = subprocess.Popen(arguments)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as client:
                wait_until(lambda: answered(lambda: client.get("/asked").is_success), "the feature service answers")
                yield client
        finally:
            process.terminate()
            process.wait(20)


class _Service:
    def __init__(self, users: Mapping[str, Sequence[Behaviour]]) -> None:
        self._users = users
        self._delay_s, self._status, self._asked = 0.0, 0, 0

    async def histories(self, request: Request) -> Response:
        self._asked += 1
        await asyncio.sleep(self._delay_s)
        if self._status:
            return Response(status_code=self._status)
        query = request.query_params
        if query["user_id"] not in self._users:
            return Response(status_code=404)
        known = [one for one in self._users[query["user_id"]] if one[2] <= int(query["as_of"])]
        newest = sorted(known, key=lambda one: one[2])[-int(query["limit"]) :]
        names = ("item_ids", "actions", "event_times")
        return JSONResponse({name: [one[place] for one in newest] for place, name in enumerate(names)})

    async def delay(self, request: Request) -> Response:
        self._delay_s = float(request.query_params["ms"]) / 1e3
        return Response(status_code=204)

    async def fail(self, request: Request) -> Response:
        self._status = int(request.query_params["status"])
        return Response(status_code=204)

    async def asked(self, _: Request) -> Response:
        """How many histories were asked for."""
        return JSONResponse(self._asked)


def main() -> None:
    port, data = sys.argv[1:]
    service = _Service(json.loads(Path(data).read_text()))
    routes = [
        Route("/v1/histories", service.histories),
        Route("/delay", service.delay, methods=["PUT"]),
        Route("/fail", service.fail, methods=["PUT"]),
        Route("/asked", service.asked),
    ]
    config = uvicorn.Config(Starlette(routes=routes), port=int(port), log_level="warning", access_log=False)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
