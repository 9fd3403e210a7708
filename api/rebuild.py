"""`python -m api retrieval --generation G`: keeps the retrieval index of one generation up to date.

A process of its own beside the API, started by the supervisor for each generation that is complete. The first index is
built as soon as there are rows, another one when rows have changed, at most every `retrieval_interval_s` and during a
sixth of the time. It writes nothing but `<generation>/retrieval`.
"""

from __future__ import annotations

import logging
import time
from typing import NoReturn

from api.retrieval import Built, arena_of, build, due, rebuild
from index.errors import StoreError, StoreMissingError
from index.layout import LayoutError
from infra.settings import Settings

LOG = logging.getLogger(__name__)
_POLL_S = 0.5


def once(settings: Settings, generation: str) -> int:
    """Builds now; returns how many items. Raises as `build` does, and as `arena_of` where this host has no rows."""
    return build(settings, generation, arena_of(settings, generation))


def follow(settings: Settings, generation: str) -> NoReturn:
    """Builds whenever it is due, until a signal ends the process, which may be amid a build: what it leaves unnamed is
    removed by a later one.
    """
    arena, built = None, Built()
    while True:
        time.sleep(_POLL_S)
        try:
            arena = arena or arena_of(settings, generation)
            if due(arena, built, settings.retrieval_interval_s):
                rebuild(settings, generation, arena, built)
        except (StoreMissingError, FileNotFoundError):
            continue  # not there yet
        except (StoreError, LayoutError, OSError) as error:
            LOG.error("retrieval not built", extra={"generation": generation, "error": str(error)})
            built = Built(rows="failed", at=time.monotonic())  # again after the interval
