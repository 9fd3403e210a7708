"""`python -m api retrieval --generation G`: keeps the retrieval index of one generation up to date.

A process of its own beside the API, started by the supervisor for each generation that is complete. The first index is
built as soon as there are rows, another one at most every `retrieval_interval_s` when rows have changed. It writes
nothing but `<generation>/retrieval`.
"""

from __future__ import annotations

import json
import logging
import threading
import time

from api.retrieval import Built, build, due, rebuild
from index.arena import ArenaReader
from index.errors import StoreError, StoreMissingError
from index.layout import RowLayout
from infra.settings import Settings

LOG = logging.getLogger(__name__)
_POLL_S = 0.5


def once(settings: Settings, generation: str) -> int:
    """Builds now; returns how many items. Raises StoreError or OSError where this host has no rows of it."""
    return build(settings, generation, _arena(settings, generation))


def follow(settings: Settings, generation: str, stop: threading.Event) -> None:
    """Builds whenever it is due, until `stop`."""
    arena, built = None, Built()
    while not stop.wait(_POLL_S):
        try:
            arena = arena or _arena(settings, generation)
            if due(arena, built, settings.retrieval_interval_s):
                rebuild(settings, generation, arena, built)
        except (StoreMissingError, FileNotFoundError):
            continue  # not there yet
        except (StoreError, OSError) as error:
            LOG.error("retrieval not built", extra={"generation": generation, "error": str(error)})
            built = Built(rows="failed", at=time.monotonic())  # again after the interval


def _arena(settings: Settings, generation: str) -> ArenaReader:
    folder = settings.generation_dir(generation)
    row = json.loads((folder / "bundle" / "manifest.json").read_bytes())["row"]
    return ArenaReader.open(folder / "n2o", RowLayout.from_json(row))
