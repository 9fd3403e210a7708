"""The API with a stand-in for a part of it, or with an eye on it, for benchmarks.

python -m tests.bench.stand_in retrieval ITEMS SEED    recommends out of a remote retrieval that takes 10 ms and gives
                                                       10,000 distinct seeded ids
python -m tests.bench.stand_in ready                   has every answer ready: what is left is HTTP and its bodies
python -m tests.bench.stand_in watched                 the whole API; GET /longest gives the longest callback of its
                                                       event loop since it was asked before, ms of CPU
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.app import create_app
from api.generations import Generation
from api.prerank import Answer, Candidates, Merger, Retrieved
from api.schemas import Query, RecommendRequest
from api.serve import config_of
from api.service import Service
from api.users import UserSource
from infra import settings as settings_module
from infra import telemetry

CANDIDATES = 10_000
RETRIEVAL_S = 0.010
DIFFERENT = 32  # answers, in turn


class RemoteRetrieval(Merger):
    """Recommends out of ids that a remote service would have given."""

    def prepare(self, items: int, seed: int) -> RemoteRetrieval:
        random = np.random.default_rng(seed)
        self._answers = itertools.cycle(
            [random.permutation(items)[:CANDIDATES].astype(np.uint64) for _ in range(DIFFERENT)]
        )
        return self

    def recommend(self, request: RecommendRequest) -> Answer:
        return self.prerank(request, request.k, CANDIDATES, self._remote)

    def _remote(self, _: Generation, __: UserSource) -> Callable[[], Retrieved]:
        ids = next(self._answers)
        time.sleep(RETRIEVAL_S)
        return lambda: (Candidates.of_integers(ids), [])


class Ready(Merger):
    """Gives the first answer to a question for k again and again."""

    _known: dict[int | None, Answer] | None = None

    def prerank(
        self,
        query: Query,
        k: int | None,
        size: int,
        retrieve: Callable[[Generation, UserSource], Callable[[], Retrieved]],
    ) -> Answer:
        if self._known is None:
            self._known = {}
        if k not in self._known:
            self._known[k] = super().prerank(query, k, size, retrieve)
        return self._known[k]


class Watched:
    """In front of the application: how long callbacks of the event loop take, in CPU time of its thread, so that
    neither other programs nor threads that hold the GIL count. uvloop does not let one look, asyncio's own loop does;
    its sockets are written in Python, so it takes rather longer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._longest = app, 0
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time_ns()
            run(handle)
            self._longest = max(self._longest, time.thread_time_ns() - began)

        asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/longest":
            await self._app(scope, receive, send)
            return
        longest, self._longest = self._longest, 0
        await PlainTextResponse(str(longest / 1e6))(scope, receive, send)


def main() -> None:
    settings = settings_module.load()
    telemetry.start_metrics(settings)
    telemetry.configure_logging(settings, "stand-in")
    sys.setswitchinterval(1e-4)
    service = Service(settings)
    if sys.argv[1] == "watched":
        config = config_of(Watched(create_app(service)), host=settings.api_host, port=settings.api_port)
        config.loop = "asyncio"
        uvicorn.Server(config).run()
        return
    if sys.argv[1] == "ready":
        service.merger = Ready(settings, service.generations, service.users, service.lanes)
    else:
        remote = RemoteRetrieval(settings, service.generations, service.users, service.lanes)
        service.merger = remote.prepare(int(sys.argv[2]), int(sys.argv[3]))
    uvicorn.Server(config_of(create_app(service), host=settings.api_host, port=settings.api_port)).run()


if __name__ == "__main__":
    main()
