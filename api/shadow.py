"""`python -m api shadow --generation G`: scores what users ask for with a generation that serves nobody.

A process of its own beside the API: it follows the recorded requests (api/recording.py), scores each with the active
generation and with this one, and says how far apart they are in `<generation>/shadow.json` and in `/metrics`. A reply
was made before its request is recorded, and no serving process scores anything twice, so it can delay nobody. When
another generation becomes active it begins anew, with what is recorded then.
"""

from __future__ import annotations

import logging
import threading
import time

import torch

from api.generations import Generation, load
from api.recording import KEPT, newest
from api.replay import Comparison, score
from api.users import Users
from api.verify import users_of
from encoders.bundle import BundleError
from index.errors import StoreError
from infra import telemetry
from infra.settings import Settings
from streams import rollout
from streams.rollout import Refused, Shadow

LOG = logging.getLogger(__name__)
_LOOK_S = 0.5
_AGAIN_S = 5.0


def follow(settings: Settings, generation: str, stop: threading.Event) -> None:
    """Until `stop`. What cannot be opened now is tried again."""
    torch.set_num_threads(1)
    said = ""
    while not stop.is_set():
        try:
            with users_of(settings) as users:
                _against_active(settings, generation, users, stop)
        except (BundleError, StoreError, OSError, Refused) as error:
            if said != str(error):
                said = str(error)
                LOG.error("nothing can be compared", extra={"generation": generation, "error": said})
            stop.wait(_AGAIN_S)


def _against_active(settings: Settings, name: str, users: Users, stop: threading.Event) -> None:
    """Until `stop`, or another generation is active."""
    serving = rollout.read(settings.serving_file)
    new = _loaded(settings, serving, name)
    live = None if serving.active in (None, name) else _loaded(settings, serving, str(serving.active))
    figures, last, found = _Figures(name), "", Comparison()
    while not stop.wait(_LOOK_S):
        if rollout.read(settings.serving_file).active != serving.active:
            return
        if new is None or live is None:
            continue
        before = found.requests
        for file, request in newest(settings.requests_dir, KEPT, last):
            last = file
            scored = score(request, live, new, users.find)
            if scored is not None:
                found.add(scored)
            if stop.is_set():
                return
        if found.requests > before:
            shadow = Shadow(
                against=live.name,
                time=time.time_ns() // 1_000_000,
                requests=found.requests,
                not_finite=found.not_finite,
                shift=found.shift,
                spread=found.spread,
                overlap=found.overlap,
            )
            rollout.write_beside(settings.shadow_file(name), shadow)
            figures.show(shadow)


def _loaded(settings: Settings, serving: rollout.Serving, name: str) -> Generation | None:
    known = serving.generations.get(name)
    return None if known is None else load(settings, name, known.sha256)


class _Figures:
    """What the last `shadow.json` says, in `/metrics`."""

    def __init__(self, generation: str) -> None:
        meaning = "Recorded requests scored by the active generation and by one that serves nobody"
        self._gauge, self._generation = (
            telemetry.gauge("forerank_shadow", meaning, ("generation", "figure")),
            generation,
        )

    def show(self, shadow: Shadow) -> None:
        for name in ("requests", "not_finite", "shift", "spread", "overlap"):
            value = getattr(shadow, name)
            if value is not None:
                self._gauge.labels(self._generation, name).set(value)
