"""What one API process owns: threads and lanes, the watched generation, users, the Merger, the way to Kafka.

Made once; the application starts and stops it.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from api import items
from api.admission import Admission, overloaded
from api.bodies import Bodies
from api.crosses import crosses_of
from api.events import Feed
from api.generations import Generation, Generations
from api.lanes import Lanes, lanes_of
from api.metrics import RequestMetrics
from api.prerank import Merger
from api.recording import Recorder
from api.rights import Rights
from api.runtime.folder import Folder
from api.runtime.lane import Cpu
from api.runtime.runtime import Runtime
from api.runtime.watch import Watch
from api.schemas import InlineUser
from api.users import Users, moment
from api.waiting import Waiters
from index import kernels
from infra.admin import admin_token
from infra.settings import Settings

T = TypeVar("T")
_REQUEST_THREADS = 8
_WARM_BLOCKS = 200  # which a generation has before it is served: those that were used most


class Service:
    """What one API process owns, from start to stop."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where the file of the admin token holds none."""
        self.settings = settings
        self.rights = Rights(admin_token(settings))
        self.metrics = RequestMetrics()
        self.requests = ThreadPoolExecutor(_REQUEST_THREADS, "request")
        self._admission = Admission("requests", settings.requests_max)
        self.bodies = Bodies(settings)
        lanes = lanes_of(settings)
        self.watch = Watch(lanes, Path(settings.traces) if settings.traces else None)
        self.runtime = Runtime(lanes, observer=self.watch, device=Cpu(pinned=False))
        self.lanes = Lanes(self.runtime)
        for step, model in self.lanes.models.items():
            self.watch.name(model, step.name.lower())
        self.generations = Generations(settings, self._warm_up)
        crosses = crosses_of(settings)
        self.users = Users(settings, lambda: self.generations.histories, self.lanes, crosses)
        self.merger = Merger(settings, self.generations, self.users, self.lanes)
        self.recorder = Recorder(settings)
        self.feed = Feed(settings)
        self.inferring = Admission("inferences", settings.requests_max)
        self.models = Folder({}, {})
        self.waiters = Waiters(self.generations.answering)

    def start(self) -> None:
        torch.set_num_threads(1)
        self.metrics.start()
        self.recorder.start()
        self.runtime.start()
        if self.settings.models:
            self.models = Folder.read(Path(self.settings.models))
            for served in self.models.models.values():
                self.watch.name(served.model, served.name)
        self.generations.start()

    def stop(self) -> None:
        self.generations.close()
        self.requests.shutdown()
        self.runtime.close()
        self.recorder.stop()
        if self.users.crosses is not None:
            self.users.crosses.close()
        self.feed.close()
        self.metrics.stop()

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.requests, work, *arguments)

    async def rank(self, work: Callable[..., T], *arguments: Any) -> T:
        """`run` of what has a deadline. Raises ProblemError `overloaded` where too many wait for a thread already."""
        with overloaded("as many requests wait as may"):
            future = self._admission.admit(self.requests.submit, work, *arguments)
        return await asyncio.wrap_future(future)

    def _warm_up(self, generation: Generation) -> None:
        """Compiles kernels, runs one empty user through the model and infers the hottest users before the first request
        pays for it."""
        kernels.warm_up(generation.layout, generation.head_tables)
        nobody = self.users.inline(InlineUser(), moment(None, "as_of"))
        items.warm_up(generation, nobody)
        self.users.warm(generation, _WARM_BLOCKS)
        gc.collect()
        gc.freeze()  # what is here stays; without it a collection during a request looks at all of it
