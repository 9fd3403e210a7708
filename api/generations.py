"""Which generation requests are served from: watches the supervisor's `serving.json` and swaps atomically.

Before the first step of every request: a request takes `Generations.pin()` and uses nothing else until its answer, so
user block, rows and head come from one generation whatever happens meanwhile. A generation that was swapped away lives
until the last request that pinned it has ended, or, as the one to roll back to, until the next switch. The next one is
loaded before the switch, which waits until all processes of the host have said that they could serve it. A generation
that cannot be loaded never replaces one that can. A retired one is deleted only when no process uses it any more.
A canary is pinned by the requests of its share of the users, wherever it is loaded, and by no others.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from api.problems import ProblemError
from api.retrieval import RetrievalError, RetrievalView
from api.schemas import Id
from encoders.bundle import Bundle, BundleError, BundleUnreadableError, load_bundle
from encoders.fold import Head, UserFold
from index.arena import ArenaReader
from index.errors import StoreError, StoreMissingError
from index.histories import HistoriesReader
from index.kernels import HeadTables, head_tables
from index.layout import RowLayout
from index.lock import UserLock
from index.n2o import N2OReader
from infra.settings import Settings
from streams import fleet, rollout

LOG = logging.getLogger(__name__)
_LOOK_S = 0.02  # a switch waits so long at most
_LOAD_S = 0.1
_TELL_S = 1.0  # between two words to the supervisor where nothing has changed
_AGAIN_S = 2.0  # until a generation whose stores could not be opened is tried again


@dataclasses.dataclass(frozen=True)
class Generation:
    """Everything one request needs of a generation. Immutable; retrieval is renewed apart (`Generations.retrieval`)."""

    name: str
    bundle: Bundle
    layout: RowLayout
    user_fold: UserFold
    head: Head
    head_tables: HeadTables
    arena: ArenaReader
    rows: N2OReader


class Generations:
    """The served generation, the one before it and the next one, loaded and warm: a switch moves a pointer.

    One thread follows `serving.json`, moves the pointer, and says what is loaded; another loads, so that a switch to
    what is loaded never waits for a load. `histories` is None until the host has some.
    """

    def __init__(self, settings: Settings, warm_up: Callable[[Generation], None] = lambda _: None) -> None:
        self._settings, self._warm_up = settings, warm_up
        self._active: Generation | None = None
        self._canary: tuple[Generation, float] | None = None  # and its share of the users
        self._reason = "no model event has activated a generation yet"
        self._retrieval: RetrievalView | None = None
        self._loaded: dict[str, Generation] = {}
        self._views: dict[str, RetrievalView] = {}  # of what is loaded
        # generation and sha256 of what did not load -> why, when to try again
        self._failed: dict[tuple[str, str], tuple[str, float]] = {}
        self._missing: dict[str, str] = {}  # generation -> why it is not loaded yet
        self._said: dict[str, str] = {}  # what was logged last about a part, so that it is logged once
        self.histories: HistoriesReader | None = None
        self.serving = rollout.Serving()
        self.last_change: int | None = None  # of the served rows, ms since the epoch; None: not since they are served
        self._seen: tuple[str, bytes] = ("", b"")
        self._file: tuple[int, int, int] | None = None  # the serving file that was read last
        self._told: tuple[list[str], dict[str, str]] | None = None  # to the supervisor: what is loaded, what fails
        self._tell_due = 0.0
        self._lock = threading.Lock()  # for the pointers and the two dicts behind them
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(work, every_s), name=name, daemon=True)
            for name, work, every_s in (("generations", self._look, _LOOK_S), ("loading", self._load_missing, _LOAD_S))
        ]

    def start(self) -> None:
        """Returns when what the host serves is loaded, or cannot be."""
        looking, loading = self._threads
        self._look()
        looking.start()  # first: whoever waits for this process hears of it while it loads
        self._load_missing()
        loading.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        fleet.leave(self._settings)

    def pin(self, user_id: Id | None = None) -> Generation:
        """The generation for one request of this user; of none, or one who is sent along: the one that serves most.
        Raises ProblemError 503 with the reason while there is none.
        """
        generation, canary = self._active, self._canary
        if generation is None:
            raise ProblemError(503, "not-ready", self._reason)
        if canary is None or user_id is None or rollout.bucket(canary[0].name, str(user_id)) >= canary[1]:
            return generation
        return canary[0]

    def answering(self) -> Sequence[Generation]:
        """All that requests are answered from, first the one that serves most. Raises as `pin`."""
        generation, canary = self.pin(), self._canary
        return (generation,) if canary is None or not canary[1] else (generation, canary[0])

    @property
    def active(self) -> Generation | None:
        return self._active

    def loaded(self, name: str) -> Generation | None:
        """The generation, if this process could serve it at once."""
        return self._loaded.get(name)

    @property
    def reason(self) -> str:
        """Why nothing is served, or what is wrong although something is; empty when all is well."""
        return self._reason

    @property
    def stale(self) -> str:
        """Why the rows of the served generation are no longer kept up to date; empty while they are."""
        state = self.serving.generations.get(self._active.name) if self._active is not None else None
        if state is None or not state.reason:
            return ""
        return f"generation {state.generation} is served, but its rows are not kept up to date: {state.reason}"

    @property
    def gone(self) -> set[str]:
        """What this host has retired, or is retiring."""
        return {name for name, known in self.serving.generations.items() if known.state in rollout.GONE}

    @property
    def retrieval(self) -> RetrievalView | None:
        """Of the active generation; right after a swap, until its own is built, of the one before."""
        return self._retrieval

    def retrieval_of(self, generation: Generation) -> RetrievalView | None:
        """Of a pinned generation, or, until it has its own, of the active one."""
        return self._views.get(generation.name, self._retrieval)

    def poll(self) -> None:
        """One look at the files of the host; what has changed is taken over, and loaded where that is needed."""
        self._look()
        self._load_missing()

    def _look(self) -> None:
        try:
            self.serving = self._read()
        except rollout.Refused as error:
            self._reason = str(error)
            return
        self._follow()
        self._tell()

    def _tell(self) -> None:
        """What is loaded and what cannot be, when that has changed and each second."""
        with self._lock:
            warm = sorted(self._loaded)
        wanted = [state.generation for state in _ready_for(self.serving)]
        failed = {name: self._missing[name] for name in wanted if name not in warm and name in self._missing}
        now = time.monotonic()
        if (warm, failed) != self._told or now > self._tell_due:
            self._told, self._tell_due = (warm, failed), now + _TELL_S
            try:
                fleet.tell(self._settings, warm, failed)
            except OSError as error:  # a disk that is full keeps nobody from being served
                self._say("report", f"the supervisor cannot be told what is loaded: {error}")

    def _read(self) -> rollout.Serving:
        """The serving file, decoded only where it was replaced. Raises Refused."""
        try:
            found = self._settings.serving_file.stat()
            file = (found.st_mtime_ns, found.st_ino, found.st_size)
        except FileNotFoundError:
            file = None
        if file is not None and file == self._file:
            return self.serving
        serving = rollout.read(self._settings.serving_file)
        self._file = file
        return serving

    def _follow(self) -> None:
        """Points at what is to be served, if it is loaded; otherwise what was served goes on."""
        with self._lock:
            self._point()
            canary = self.serving.canary
            held = self._loaded.get(canary.generation) if canary is not None else None
            self._canary = (held, canary.share) if canary is not None and held is not None else None

    def _point(self) -> None:
        serving = self.serving
        name = serving.active
        if name is None:
            gone = f"{self._settings.serving_file} has gone; what it named is still served"
            self._reason = _waiting_for(serving) if self._active is None else gone
            return
        generation = self._loaded.get(name)
        if generation is None:
            self._reason = self._missing.get(name, f"generation {name} is being loaded")
            return
        if generation is not self._active:
            # first: whoever sees the generation sees its index too, where it has one
            self._retrieval = self._views.get(name, self._retrieval)
            self._active = generation
            LOG.info("generation served", extra={"generation": name})
        self._reason = self.stale

    def _load_missing(self) -> None:
        """Loads what may have to be served, drops what may not, and takes over what is new about the rest."""
        if self.histories is None and self._settings.histories_dir.exists():
            self._open_histories()
        for generation in list(self._loaded.values()):  # first what is served: a load takes seconds
            self._renew_retrieval(generation)
        for state in _ready_for(self.serving):
            held = self._loaded.get(state.generation)
            if held is None or (not state.reason and _restored(self._settings, held)):
                self._load(state.generation, state.sha256)
                self._follow()
        self._drop()
        if self._active is not None:
            self._watch_rows(self._active)

    def _load(self, name: str, sha256: str) -> None:
        why, again = self._failed.get((name, sha256), ("", 0.0))
        if time.monotonic() < again:
            self._missing[name] = why
            return
        try:
            generation = load(self._settings, name, sha256)
            self._warm_up(generation)
        except StoreMissingError as error:
            self._missing[name] = f"generation {name}: {error}"  # the next poll tries again
            return
        except Exception as error:  # also what nobody has thought of: it is told, and what is served goes on
            why = f"generation {name} cannot be loaded: {error}"
            # content that is wrong stays so; files and stores may come right
            wrong = isinstance(error, BundleError) and not isinstance(error, BundleUnreadableError)
            self._failed[name, sha256] = why, math.inf if wrong else time.monotonic() + _AGAIN_S
            self._missing[name] = why
            self._say("generation", why)
            return
        self._renew_retrieval(generation)
        with self._lock:
            self._loaded[name] = generation
        self._missing.pop(name, None)

    def _drop(self) -> None:
        """Forgets what is neither served nor next to be; the last request that pinned it frees it."""
        with self._lock:
            keep = {state.generation for state in _ready_for(self.serving)}
            if self._active is None or not keep:
                return
            for name in self._loaded.keys() - keep - {self._active.name}:
                del self._loaded[name]
                self._views.pop(name, None)
            retrieval = self._retrieval.generation if self._retrieval is not None else self._active.name
            if retrieval in self.gone and retrieval != self._active.name:
                self._retrieval = self._views.get(self._active.name)

    def _renew_retrieval(self, generation: Generation) -> None:
        name = generation.name
        try:
            view = RetrievalView.newer(self._views.get(name), self._settings, name, generation.arena)
        except RetrievalError as error:  # the view before goes on
            self._say("retrieval", str(error))
            return
        if view is None:
            return
        with self._lock:
            self._views[name] = view
            if generation is self._active:
                self._retrieval = view

    def _open_histories(self) -> None:
        try:
            self.histories = HistoriesReader(self._settings.histories_dir)
        except StoreMissingError:
            pass  # being created; the next poll sees it
        except StoreError as error:
            self._say("histories", str(error))  # users are served as cold ones, and told so

    def _say(self, part: str, error: str) -> None:
        if self._said.get(part) != error:
            self._said[part] = error
            LOG.error("a part of the host cannot be used", extra={"part": part, "error": error})

    def _watch_rows(self, generation: Generation) -> None:
        seen = (generation.name, generation.arena.progress().covered.tobytes())
        if seen != self._seen:
            self.last_change = time.time_ns() // 1_000_000 if seen[0] == self._seen[0] else None
            self._seen = seen

    def _repeat(self, work: Callable[[], None], every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                work()
            except Exception:
                LOG.exception("watching the generations")


def load(settings: Settings, name: str, sha256: str) -> Generation:
    """Opens all of a generation. Raises BundleError, StoreError or OSError with the reason."""
    folder = settings.generation_dir(name)
    in_use = UserLock(folder)
    try:
        generation = _load(settings, name, sha256)
    except BaseException:
        in_use.release()
        raise
    weakref.finalize(generation, in_use.release)  # when the last request that pinned it has ended
    return generation


def _load(settings: Settings, name: str, sha256: str) -> Generation:
    folder = settings.generation_dir(name)
    bundle = load_bundle(folder / "bundle", sha256)
    layout = RowLayout.from_json(bundle.manifest.row)
    head = Head.of(bundle)
    tables = head_tables(head.T, head.edges, head.weights, head.biases)
    arena = ArenaReader.open(folder / "n2o", layout)
    rows = N2OReader(folder / "n2o")
    generation = Generation(name, bundle, layout, UserFold(bundle, name), head, tables, arena, rows)
    weakref.finalize(generation, rows.close)
    return generation


def _restored(settings: Settings, held: Generation) -> bool:
    """Whether the index, which was lost and is served from files that are still open, is there again and as far."""
    if not held.arena.replaced():
        return False
    try:
        found = ArenaReader.open(settings.generation_dir(held.name) / "n2o", held.layout).progress()
    except (StoreError, OSError):
        return False
    return bool((found.covered >= held.arena.progress().covered).all())


def _ready_for(serving: rollout.Serving) -> list[rollout.GenerationState]:
    """What a process holds: the active generation first, the canary, the next one, and the one before while a rollback
    to it is possible."""
    canary = serving.canary.generation if serving.canary is not None else None
    names = dict.fromkeys((serving.active, canary, serving.next, serving.previous))
    found = [serving.generations.get(name or "") for name in names]
    return [state for state in found if state is not None and state.state in ("active", "complete", "former")]


def _waiting_for(serving: rollout.Serving) -> str:
    filling = [state for state in serving.generations.values() if state.state in (*rollout.UNREADY, "complete")]
    if filling:
        newest = filling[-1]
        return f"generation {newest.generation} is {newest.state}: {100 * newest.progress:.0f} % of its index is there"
    failed = [state for state in serving.generations.values() if state.state == "failed"]
    if failed:
        return f"generation {failed[-1].generation} has failed: {failed[-1].reason}"
    return "no model event has activated a generation yet"
