"""Requests at a fixed rate over switches of generations and kills, and the checker of what was answered.

Load     open loop: a request is due every 1/rate s, whatever became of the ones before
Switches the life of generations, one step after the other: stage, activate, rollback, activate again
Killer   SIGKILLs jobs, API processes and the supervisor at moments of its own, whatever step is being made, and knows
         which connections died with them
check    recomputes answers, from the bundle that they name and the row versions of their trace, with the training
         form; an answer that is another generation's, or a mixture of two, is far off
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
import numpy as np

from encoders.bundle import Bundle
from encoders.fold import Behaviours, ItemFold, reference_scores
from infra import processes
from infra.settings import Settings
from streams import fleet, rollout
from streams.publish import Publisher
from tests.bench.http_load import JSON, Connection, request
from tests.bench.stack import BenchStack, wait
from tests.bench.world import World, as_of, ms
from tests.host import api_workers

TOLERANCE = 1e-5  # of fp32 bundles
CLIENTS = 16
_ONCE = ("verify", "retrieval")  # killed once per generation: a stage waits for the end of what they began
SETTINGS = {"api_processes": 2, "prefetch_bytes": Settings.prefetch_bytes, "retrieval_interval_s": 10.0}
_STEP_S = 300.0  # jobs that the step needs are killed meanwhile, and start again up to 30 s later


@dataclasses.dataclass(frozen=True)
class Question:
    user: int
    candidates: tuple[int, ...]
    wire: bytes


@dataclasses.dataclass(frozen=True)
class Answer:
    due: float  # this and the next two: time.monotonic()
    sent: float
    ended: float
    question: int
    generation: str
    lacks: bool  # degraded, or without a row for a candidate
    raw: bytes  # the body where it is to be checked, else empty


@dataclasses.dataclass(frozen=True)
class Failure:
    sent: float
    ended: float
    port: int  # of the client's end of the connection
    why: str


def questions(world: World, users: int, candidates: int, count: int, seed: int) -> list[Question]:
    chosen = np.random.default_rng(seed)
    out = []
    for place in range(count):
        numbers = chosen.permutation(world.items)[:candidates].tolist()
        user = place % users
        body = {"user_id": f"u{user}", "as_of": as_of(), "candidates": numbers, "include": ["trace"]}
        out.append(Question(user, tuple(numbers), request("/v1/score", msgspec.json.encode(body), JSON)))
    return out


class Load:
    """Use in `with`. `check_soon()` keeps the bodies of the next half second's answers, beside every `one_of`th."""

    def __init__(self, port: int, asked: Sequence[Question], rate: float, one_of: int) -> None:
        self._port, self._asked, self._rate, self._one_of = port, asked, rate, one_of
        self.answers: list[Answer] = []
        self.failures: list[Failure] = []
        self._next, self._lock = 0, threading.Lock()
        self._all_until = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]

    def __enter__(self) -> Load:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check_soon(self) -> None:
        self._all_until = time.monotonic() + 0.5

    def _work(self) -> None:
        connection = None
        while not self._stop.is_set():
            with self._lock:
                place = self._next
                self._next += 1
            due = self._began + place / self._rate
            if self._stop.wait(max(0.0, due - time.monotonic())):
                break
            number = place % len(self._asked)
            sent = time.monotonic()
            port = 0
            try:
                connection = connection or Connection(self._port)
                port = connection.port
                _, body = connection.ask(self._asked[number].wire)
            except (OSError, RuntimeError) as error:
                self.failures.append(Failure(sent, time.monotonic(), port, f"{type(error).__name__}: {error}"))
                if connection is not None:
                    connection.close()
                connection = None
                continue
            ended = time.monotonic()
            head = msgspec.json.decode(body, type=_Head)
            kept = place % self._one_of == 0 or ended < self._all_until
            lacks = bool(head.degraded or head.missing)
            self.answers.append(Answer(due, sent, ended, number, head.generation, lacks, body if kept else b""))
        if connection is not None:
            connection.close()


class _Head(msgspec.Struct):
    generation: str
    degraded: list[str] = []
    missing: list[int] = []


class _Trace(msgspec.Struct):
    versions: list[int]


class _Body(msgspec.Struct):
    generation: str
    ids: list[int]
    scores: list[float]
    trace: _Trace


# ---- generations


@dataclasses.dataclass(frozen=True)
class Step:
    """What was done, from the event's publication to the switch on the host."""

    action: str  # as in a model event
    generation: str  # to be served from then on; of a stage event, the staged one
    published: float  # time.monotonic(), before the event is sent
    done: float  # when the supervisor had done it


class Switches:
    """stage X, activate X, rollback X, activate X, then the same with the next one; the one before the last is retired.

    `bundles` take turns, so that generations next to each other score differently. `first` is served already, by the
    first of them.
    """

    def __init__(
        self, settings: Settings, publisher: Publisher, bundles: Sequence[tuple[Path, Bundle]], first: str
    ) -> None:
        self._settings, self._publisher, self._bundles = settings, publisher, bundles
        self.bundle_of = {first: bundles[0][1]}
        self._served = [first]  # oldest first; the last one is active
        self.steps: list[Step] = []

    def step(self) -> Step:
        """The next one, until it is done. Raises TimeoutError."""
        turn, part = divmod(len(self.steps), 4)
        name = f"r{turn + 1}"
        before = self._served[-1]
        published = time.monotonic()
        if part == 0:
            path, bundle = self._bundles[(turn + 1) % len(self._bundles)]
            self.bundle_of[name] = bundle
            self._publish("stage", name, uri=path.resolve().as_uri(), sha256=bundle.sha256)
            index = self._settings.generation_dir(name) / "retrieval" / "current"
            wait(f"{name} is complete", lambda: self._state(name) == "complete" and index.exists(), _STEP_S)
            step = Step("stage", name, published, time.monotonic())
        elif part == 2:
            self._publish("rollback", name)
            self._served.pop()
            step = self._until("rollback", self._served[-1], published)
        else:
            self._publish("activate", name)
            self._served.append(name)
            step = self._until("activate", name, published)
            if part == 3 and len(self._served) > 2:
                self._publish("retire", self._served.pop(0))
        assert part == 0 or step.generation != before
        self.steps.append(step)
        return step

    def _until(self, action: str, name: str, published: float) -> Step:
        wait(
            f"{name} is served after {action}",
            lambda: rollout.read(self._settings.serving_file).active == name,
            _STEP_S,
            every_s=0.002,
        )
        return Step(action, name, published, time.monotonic())

    def _publish(self, action: str, name: str, **more: str) -> None:
        self._publisher.models([{"action": action, "generation": name, **more}])

    def _state(self, name: str) -> str:
        known = rollout.read(self._settings.serving_file).generations.get(name)
        assert known is None or known.state != "failed", known
        return "" if known is None else str(known.state)


# ---- kills


class Killer:
    """Use in `with`. Kills at random moments, `every_s` apart on average: in turn one of the nearline side's processes
    (any job, of whatever generation, or the supervisor, which is started again; of the kind whose last kill is longest
    ago) and one of the API's, where all of these serve. `kills` is called before each.
    """

    def __init__(
        self, stack: BenchStack, api: processes.Process, seed: int, every_s: float, kills: Callable[[], object]
    ) -> None:
        self._stack, self._settings, self._api = stack, stack.settings, api
        self._random, self._every_s, self._kills = random.Random(seed), every_s, kills
        self.killed: list[str] = []
        self.lost: set[int] = set()  # client ports of connections that died with an API process
        self._turn: dict[str, int] = {}  # kind -> how many were killed before its last
        self._stop, self._failed = threading.Event(), list[Exception]()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failed:
            raise self._failed[0]

    def _work(self) -> None:
        api_next = False
        try:
            while not self._stop.wait(self._random.expovariate(1 / self._every_s)):
                self._kills()
                name = (self._kill_api() if api_next else "") or self._kill_job()
                api_next = not api_next
                if name:
                    self.killed.append(name)
                print(f"killed {name or 'nothing'}", flush=True)
        except Exception as error:
            self._failed.append(error)

    def _kill_job(self) -> str:
        """Its name; empty where none runs."""
        running = processes.listing(self._settings.state / "logs")
        supervisor = self._stack.supervisor()
        jobs = [one for one in running if _kind(one) not in _ONCE or one.name not in self.killed]
        jobs += [supervisor] if supervisor else []
        if not jobs:
            return ""
        longest = min(self._turn.get(_kind(one), -1) for one in jobs)
        chosen = self._random.choice([one for one in jobs if self._turn.get(_kind(one), -1) == longest])
        self._turn[_kind(chosen)] = len(self.killed)
        os.kill(chosen.pid, signal.SIGKILL)
        if chosen == supervisor:
            wait("the supervisor has ended", lambda: not chosen.alive(), 10)
            self._stack.supervise()
        return chosen.name

    def _kill_api(self) -> str:
        """Only where another one serves: the last one would leave nobody to answer until it is replaced."""
        active = rollout.read(self._settings.serving_file).active
        serves = {report.pid for report in fleet.reports(self._settings) if active in report.warm}
        workers = [pid for pid in api_workers(self._api.pid) if pid in serves]
        if len(workers) < self._settings.api_processes:
            return ""
        pid = self._random.choice(workers)
        os.kill(pid, signal.SIGSTOP)  # it takes no connection between the look and the kill
        try:
            self.lost |= _clients_of(pid, self._settings.api_port)
        finally:
            os.kill(pid, signal.SIGKILL)
        return f"api {pid}"


def _kind(job: processes.Process) -> str:
    return job.name.partition("-")[0]


def _clients_of(pid: int, port: int) -> set[int]:
    """Client ports of the connections to `port` that a process holds."""
    held = set()
    for place in Path(f"/proc/{pid}/fd").iterdir():
        try:
            held.add(str(place.readlink()))
        except FileNotFoundError:
            continue
    out = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote, inode = fields[1], fields[2], fields[9]
        if int(local.rpartition(":")[2], 16) == port and f"socket:[{inode}]" in held:
            out.add(int(remote.rpartition(":")[2], 16))
    return out


# ---- what was answered


class Checker:
    """Scores of the training form, from the events of the world. History items must keep version 1."""

    def __init__(self, world: World, pasts: Sequence[list[dict[str, object]]]) -> None:
        self._world, self._pasts = world, pasts
        self._behaviours: dict[tuple[str, int], Behaviours] = {}

    def error(self, question: Question, raw: bytes, bundle: Bundle) -> float:
        """Largest difference to what the bundle should have answered."""
        body = msgspec.json.decode(raw, type=_Body)
        if len(body.ids) != len(question.candidates):
            return float("inf")
        items = [
            self._world.inputs(number, version) for number, version in zip(body.ids, body.trace.versions, strict=True)
        ]
        past = self._past(bundle, question.user)
        wanted = reference_scores(bundle, self._world.profile(question.user), past, items, as_of())
        return float(np.abs(np.array(body.scores) - wanted).max())

    def _past(self, bundle: Bundle, user: int) -> Behaviours:
        key = (bundle.sha256, user)
        if key not in self._behaviours:
            past = self._pasts[user]
            rows = ItemFold(bundle).encode([self._world.inputs(int(str(one["item_id"])), 1) for one in past])
            self._behaviours[key] = Behaviours(
                rows.vector,
                rows.signature,
                rows.crosses,
                bundle.manifest.features.action_codes([str(one["action"]) for one in past]),
                np.array([ms(str(one["event_time"])) for one in past], np.int64),
            )
        return self._behaviours[key]


# ---- all of it


@dataclasses.dataclass(frozen=True)
class Outcome:
    load: Load
    steps: list[Step]
    killed: list[str]
    lost: set[int]  # client ports of connections that died with an API process
    bundle_of: dict[str, Bundle]
    pasts: list[list[dict[str, object]]]
    asked: list[Question]

    @property
    def failures(self) -> list[Failure]:
        """Beyond those on a killed process's own connections."""
        return [failure for failure in self.load.failures if failure.port not in self.lost]

    @property
    def switched(self) -> list[Step]:
        """Steps after which another generation is served, and was seen to be."""
        seen = {answer.generation for answer in self.load.answers if answer.sent > self.steps[-1].published}
        steps = [step for step in self.steps if step.action != "stage"]
        return steps if not steps or steps[-1].generation in seen else steps[:-1]

    def errors(self, world: World) -> list[tuple[Answer, float]]:
        """Every answer that was kept, with its largest difference to what its generation should have answered."""
        checker = Checker(world, self.pasts)
        return [
            (answer, checker.error(self.asked[answer.question], answer.raw, self.bundle_of[answer.generation]))
            for answer in self.load.answers
            if answer.raw
        ]

    def apart(self, world: World, answers: Sequence[Answer]) -> float:
        """The least difference of these answers to what any other bundle would have answered."""
        checker = Checker(world, self.pasts)
        bundles = {bundle.sha256: bundle for bundle in self.bundle_of.values()}
        return min(
            checker.error(self.asked[answer.question], answer.raw, other)
            for answer in answers
            for sha256, other in bundles.items()
            if sha256 != self.bundle_of[answer.generation].sha256
        )

    def last_before(self, step: Step) -> float:
        """Seconds from the event until the last request was sent that the generation before answered."""
        after = next((later.published for later in self.steps if later.published > step.published), float("inf"))
        old = [
            answer.sent
            for answer in self.load.answers
            if step.published < answer.sent < after and answer.generation != step.generation
        ]
        return max(old, default=step.published) - step.published

    def spread(self, step: Step) -> float:
        """Seconds during which some requests were answered by the one generation, some by the other."""
        first = [
            answer.sent
            for answer in self.load.answers
            if answer.ended > step.published and answer.generation == step.generation
        ]
        return max(0.0, step.published + self.last_before(step) - min(first, default=float("inf")))


def switch_under_load(
    stack: BenchStack,
    world: World,
    bundles: Sequence[tuple[Path, Bundle]],
    *,
    seconds: float,
    every_s: float,
    kill_every_s: float,
    rate: float,
    seed: int,
    candidates: int = 500,
    users: int = 16,
    past: int = 200,
    one_of: int = 20,
) -> Outcome:
    """A step of roll-out every `every_s`, kills at random moments, 100 updates a second; each step is made at least
    once.
    """
    stable = World(world.items // 10, seed)  # histories name these alone, and nobody updates them
    pasts = [stable.history(user, past) for user in range(users)]
    stack.publisher.items(world.event(number, 1) for number in range(world.items))
    stack.publisher.users({"user_id": f"u{user}", "features": world.profile(user)} for user in range(users))
    stack.publisher.behaviours(one for own in pasts for one in own)
    stack.serve_generation("r0", bundles[0][0])
    asked = questions(world, users, candidates, 256, seed)
    with stack.api() as client:
        wait("the histories are there", lambda: _seen(client, users - 1) == past, 120, every_s=0.2)
        api = processes.find("api", stack.folder / "run")
        assert api is not None
        wait("all API processes serve", lambda: len(api_workers(api.pid)) == stack.settings.api_processes, 120)
        switches = Switches(stack.settings, stack.publisher, bundles, "r0")
        with (
            Load(stack.settings.api_port, asked, rate, one_of) as load,
            _updates(stack, world, stable.items),
            Killer(stack, api, seed, kill_every_s, load.check_soon) as killer,
        ):
            end = time.monotonic() + seconds
            while time.monotonic() < end or len(switches.steps) < 4:
                began = time.monotonic()
                load.check_soon()
                step = switches.step()
                load.check_soon()
                print(f"{step.action} {step.generation}: {step.done - step.published:.2f} s", flush=True)
                _until(began + every_s)
    return Outcome(load, switches.steps, killer.killed, killer.lost, switches.bundle_of, pasts, asked)


def _seen(client: httpx.Client, user: int) -> int:
    body = {"user_id": f"u{user}", "as_of": as_of(), "candidates": ["1"]}
    return int(client.post("/v1/score", json=body).json()["user"]["behaviours_used"])


@contextlib.contextmanager
def _updates(stack: BenchStack, world: World, first: int, rate: float = 100.0) -> Iterator[None]:
    """Updates of all items from `first` on, round after round."""
    stop = threading.Event()

    def rows() -> Iterator[bytes]:
        began, place = time.monotonic(), 0
        while not stop.wait(max(0.0, began + place / rate - time.monotonic())):
            turn, number = divmod(place, world.items - first)
            yield world.event(first + number, 2 + turn)
            place += 1

    failed: list[Exception] = []

    def publish() -> None:
        try:
            stack.publisher.items(rows())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def _until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
