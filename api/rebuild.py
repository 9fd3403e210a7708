"""`python -m api retrieval --generation G`: keeps the retrieval index of one generation up to date.

A process of its own beside the API, started by the supervisor for each generation that is complete. The first index is
built as soon as there are rows, another one at most every `retrieval_interval_s` when rows have changed. It writes
nothing but `<generation>/retrieval`.
"""

from __future__ import annotations

import logging
import threading
import time

from api.retrieval import Built, arena_of, build, due, rebuild
from index.errors import StoreError, StoreMissingError
from index.layout import LayoutError
from infra.settings import Settings

LOG = logging.getLogger(__name__)
_POLL_S = 0.5


def once(settings: Settings, generation: str) -> int:
    """Builds now; returns how many items. Raises as `arena_of` does where this host has no rows of it."""
    return build(settings, generation, arena_of(settings, generation))


def follow(settings: Settings, generation: str, stop: threading.Event) -> None:
    """Builds whenever it is due, until `stop`."""
    arena, built = None, Built()
    while not stop.wait(_POLL_S):
        try:
            arena = arena or arena_of(settings, generation)
            if due(arena, built, settings.retrieval_interval_s):
                rebuild(settings, generation, arena, built)
        except (StoreMissingError, FileNotFoundError):
            continue  # not there yet
        except (StoreError, LayoutError, OSError) as error:
            LOG.error("retrieval not built", extra={"generation": generation, "error": str(error)})
            built = Built(rows="failed", at=time.monotonic())  # again after the interval
