"""The API with a timed stand-in for a remote retrieval: 10 ms, then 10,000 distinct seeded ids. For `main_path`.

python -m tests.bench.stand_in ITEMS SEED
"""

from __future__ import annotations

import itertools
import sys
import time

import numpy as np
import uvicorn

from api.app import create_app
from api.generations import Generation
from api.prerank import Answer, Candidates, Merger
from api.schemas import RecommendRequest
from api.service import Service
from api.users import UserSource
from infra import settings as settings_module
from infra import telemetry

CANDIDATES = 10_000
RETRIEVAL_S = 0.010
DIFFERENT = 32  # answers, in turn


class StandInMerger(Merger):
    """Recommends out of ids that a remote service would have given."""

    def prepare(self, items: int, seed: int) -> StandInMerger:
        random = np.random.default_rng(seed)
        self._answers = itertools.cycle(
            [random.permutation(items)[:CANDIDATES].astype(np.uint64) for _ in range(DIFFERENT)]
        )
        return self

    def recommend(self, request: RecommendRequest) -> Answer:
        return self.prerank(request, request.k, self._remote)

    def _remote(self, _: Generation, __: UserSource) -> tuple[Candidates, list[str]]:
        ids = next(self._answers)
        time.sleep(RETRIEVAL_S)
        return Candidates.of_integers(ids), []


def main() -> None:
    settings = settings_module.load()
    telemetry.start_metrics(settings)
    telemetry.configure_logging(settings, "stand-in")
    sys.setswitchinterval(1e-4)
    service = Service(settings)
    service.merger = StandInMerger(settings, service.generations, service.users).prepare(
        int(sys.argv[1]), int(sys.argv[2])
    )
    uvicorn.run(
        create_app(service),
        host=settings.api_host,
        port=settings.api_port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_config=None,
    )


if __name__ == "__main__":
    main()
