"""The supervisor: one per host. Runs the nearline jobs and carries each generation from its stage event to serving.

Beside the data path: it reads `models` from the start, reduces it (rollout.py), and each round makes the host a little
more like the result:

    stage     see that there is room, fetch and check the bundle, make `rows.<generation>`, take the ends of `items`
    fill      encode and replicate run; the arena reports how far this host is
    verify    all partitions reached those offsets with a proven fill; a job looks at the rows (api/verify.py), and its
              verdict is `complete` or `failed`; the retrieval index is built meanwhile
    activate  `serving.json` is replaced, atomically; API processes swap at their next look. An `activate` that comes
              earlier waits until the generation is complete here
    retire    everything of the generation is deleted, in the steps of retire.py

An activation has steps too, and after a kill goes on from the first:

    1  `serving.json` names the generation as `next`: API processes load and warm it
    2  every API process of the host that says anything has it warm (fleet.py)
    3  the switch: `serving.json` names it as `active`
    4  `hosts` is told

A rollback is 3 and 4 alone, because what was served before is kept loaded, and so is a host's first activation; one to
what was served earlier still fills that up first, and verifies it. A
canary is an activation whose switch sets `canary` instead; while its share is 0 a job scores what is asked for with it.

Jobs are child processes; one that ends or falls silent is started again, later each time. A generation that fails
takes nothing with it: the live one has its own jobs and files. What it decided is in `serving.json`, so a restart
repeats nothing. Bundles are copied and generations deleted beside the rounds (errands.py): no switch waits for that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from index import room
from index.arena import ArenaReader, Progress
from index.errors import StoreError
from index.room import Room, RoomError
from infra.kafka.broker import BrokerError, admin_of
from infra.kafka.topics import TopicError, ensure_rows_topic, ensure_topics
from infra.kafka.wipe import DERIVED
from infra.settings import Settings
from infra.telemetry import clear_metrics
from streams import bundles, events, fleet, retire, rollout
from streams.bundles import BundleFileError
from streams.errands import Errands
from streams.events import ModelEvent
from streams.groups import GroupError, group_admin
from streams.heartbeat import read_heartbeat
from streams.hosts import Hosts
from streams.jobs import Jobs
from streams.models import Models, ModelsError
from streams.retire import NotYetError
from streams.rollout import Canary, Refused, Serving
from streams.worker import DONE, NEEDS_REFILL, Record, dead_letter

LOG = logging.getLogger(__name__)
_ROUND_S = 0.2
_RETRIEVAL_S = 120.0  # a generation does not wait longer than this for its first retrieval index
_INDEXED = "its retrieval index is being built"
_STAGE_AGAIN_S = 2.0
_RETIRE_AGAIN_S = 1.0
_CLEAN_AGAIN_S = 5.0
_SEND_S = 5


class SupervisorError(RuntimeError):
    """The supervisor cannot work; the message is one sentence."""


def supervise(settings: Settings, *, retrieval: bool = True) -> int:
    """Runs until SIGTERM or SIGINT; gives the exit status. Without `retrieval` no retrieval index is built or
    awaited.
    """
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda found, _: stopping.append(found))
    try:
        _only_one(settings)
        with Supervisor(settings, retrieval) as supervisor:
            print("Nearline jobs are running; Ctrl-C or SIGTERM stops them.", flush=True)
            while not stopping:
                supervisor.round()
    except (SupervisorError, ModelsError, BrokerError, TopicError, Refused) as error:
        print(error, file=sys.stderr)
        return 1
    except KafkaError as error:  # while starting: a round outlives it
        print(f"The broker at {settings.kafka_bootstrap} refused to work: {error}.", file=sys.stderr)
        return 1
    print("Nearline jobs are stopped.", flush=True)
    return 0


class Supervisor:
    """`round()` again and again; leaving the `with` stops all jobs."""

    def __init__(
        self,
        settings: Settings,
        retrieval: bool,
        step: Callable[[int], object] = int,
        activation_step: Callable[[int], object] = int,
    ) -> None:
        """`step(number)` is called after each step of retire.py, `activation_step(number)` after each of an activation.
        Raises SupervisorError, ModelsError, BrokerError, TopicError, KafkaError or Refused where it cannot start.
        """
        self._settings, self._retrieval, self._step = settings, retrieval, step
        self._activation_step = activation_step
        ensure_topics(settings)
        _check_cluster(settings)
        clear_metrics(settings)
        self.serving = rollout.try_again(rollout.read(settings.serving_file))
        self._jobs = Jobs(settings)
        self._models = Models(settings)
        self._producer = KafkaProducer(
            bootstrap_servers=settings.kafka_bootstrap.split(","), acks="all", max_block_ms=_SEND_S * 1000
        )
        self._hosts = Hosts(settings, self._producer)
        self._arenas: dict[str, ArenaReader] = {}
        self._replaced: set[str] = set()  # generations whose index is another one than it was
        self._complete_since: dict[str, float] = {}
        self._stage_due: dict[str, float] = {}
        self._retire_due: dict[str, float] = {}
        self._errands = Errands()
        self._cleaning: list[str] = []  # retired generations that are being deleted from Kafka
        self._cleaned: set[str] = set()  # those of which nothing is left there
        self._clean_due = 0.0
        self._models.read_all()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self._errands.close()
        self._jobs.stop()
        self._models.close()
        self._producer.close(timeout=_SEND_S)

    def round(self) -> None:
        """New events, then each generation one step on, then the jobs that this makes necessary."""
        try:
            self._models.poll(_ROUND_S)
        except KafkaError as error:  # the jobs go on; so does this, when it can
            LOG.warning("models cannot be read now: %s", error)
            time.sleep(_ROUND_S)
        desired = rollout.reduce_models(self._models.events)
        self._put(
            msgspec.structs.replace(
                self.serving,
                decided=self._bury(),
                refused={str(offset): reason for offset, reason in desired.refused.items()},
            )
        )
        loading = self._activate(rollout.next_active(desired, self.serving))
        self._share(rollout.canary_of(desired, self.serving), loading)
        self._put(rollout.renew(desired, self.serving))
        for name in rollout.retiring(desired, self.serving):
            if time.monotonic() >= self._retire_due.get(name, 0.0):
                self._retire(name)
        waits = rollout.waiting(desired, self.serving)
        running = rollout.running(self.serving, waits)
        waiting = [name for name in running if self.serving.generations[name].state == "staged"]
        for name in [*waiting, *rollout.wanted(desired, self.serving)]:
            if time.monotonic() >= self._stage_due.get(name, 0.0):
                self._stage(name, desired.staged[name])
        running = rollout.running(self.serving, waits)
        self._put(rollout.rest(self.serving, running))
        for name in running:
            self._advance(name)
        self._keep_jobs(running)
        if self.serving.active in self._hosts.report(self.serving, running, self._progress):
            self._activation_step(4)
        self._clean_up()
        self._errands.forget()

    def _bury(self) -> int:
        """Sends what is no model event, and was not acted upon before, to `models.dlq`; gives the first offset still to
        be acted upon.
        """
        refused = self._models.refused
        while refused:
            found, error = refused[0]
            if found.offset >= self.serving.decided:
                place = (found.topic, found.partition, found.offset, found.timestamp)
                record = Record(*place, found.key, found.value, found.headers)
                letter = dead_letter(self._settings, record, error)
                try:
                    sent = self._producer.send(letter.topic, letter.value, letter.key, list(letter.headers), 0)
                    sent.get(_SEND_S)
                except KafkaError as failed:
                    LOG.warning("models offset %d is not in the dead-letter topic yet: %s", found.offset, failed)
                    return int(found.offset)
            refused.pop(0)
        return self._models.following

    def _stage(self, name: str, staged: rollout.Staged) -> None:
        event = staged.event
        self._put(rollout.stage(self.serving, staged.offset, event))  # so that what is copied can be retired
        serving = self.serving
        try:
            if not self._copying(name):
                self._check_room(name, event)
            if not self._fetched(name, event.uri or "", event.sha256 or ""):
                self._put(rollout.wait(serving, name, "its bundle is being copied"))
                return
            bundles.layout_of(self._settings.generation_dir(name) / "bundle")
            ensure_rows_topic(self._settings, name)
            with group_admin(self._settings) as groups:
                ends = groups.ends(self._settings.topic("items"))
            serving = rollout.fill(serving, name, ends)
            LOG.info("generation %s: staged", name)
        except (BundleFileError, RoomError, TopicError) as error:
            LOG.error("generation %s has failed: %s", name, error)
            serving = rollout.fail(serving, name, str(error))
        except (BrokerError, GroupError) as error:  # says nothing about the generation
            LOG.warning("generation %s: tried again in %.0f s: %s", name, _STAGE_AGAIN_S, error)
            serving = rollout.wait(serving, name, str(error))
            self._stage_due[name] = time.monotonic() + _STAGE_AGAIN_S
        self._put(serving)

    def _fetched(self, name: str, uri: str, sha256: str) -> bool:
        """Whether the bundle is here; where it is not, it is on its way. Raises BundleFileError."""
        folder = self._settings.generation_dir(name) / "bundle"
        if folder.exists() and not self._copying(name):
            bundles.fetch(uri, sha256, folder)  # looks whether it is the one
            return True
        ended = self._errands.ended(f"fetch {name}", lambda: bundles.fetch(uri, sha256, folder))
        if ended is not None:
            ended.result()
        return ended is not None

    def _copying(self, name: str) -> bool:
        return self._errands.under_way(f"fetch {name}")

    def _leaving(self, name: str) -> bool:
        return self._errands.under_way(f"leave {name}")

    def _check_room(self, name: str, event: ModelEvent) -> None:
        """Before anything is copied. Raises RoomError, and what `_stage` expects besides."""
        if (self._settings.generation_dir(name) / "n2o").exists():  # it has what it needs
            return
        layout, copied = bundles.ahead(event.uri or "", self._settings.generation_dir(name) / "bundle")
        live = self._progress(self.serving.active) if self.serving.active else None
        if live is not None:
            rows = int(live.count.sum())
        else:
            with group_admin(self._settings) as groups:  # at most so many: some are older states of the same items
                ends, starts = (found(self._settings.topic("items")) for found in (groups.ends, groups.starts))
            rows = sum(ends) - sum(starts)
        needed, others = room.need(layout, rows, copied), self._fills(name, rows)
        room.check(needed, room.free(self._settings.state), others)

    def _fills(self, but: str, rows: int) -> Iterator[Room]:
        """What the other fills under way on this host have yet to write, each of as many rows."""
        for name, known in self.serving.generations.items():
            if name != but and (known.state == "filling" or self._copying(name)):
                with suppress(BundleFileError):  # it will fail by itself
                    layout, copied = bundles.ahead(known.uri, self._settings.generation_dir(name) / "bundle")
                    yield room.remaining(room.need(layout, rows, copied), known.progress)

    def _advance(self, name: str) -> None:
        """Takes over how far the arena is, and why a job of the generation has given up."""
        names = [f"{job}-{name}" for job in ("encode", "replicate", "reconcile")]
        reason = "; ".join(filter(None, map(self._jobs.gave_up, names)))
        if reason and self.serving.generations[name].reason != reason:
            LOG.error("generation %s: %s", name, reason)
            self._put(rollout.fail(self.serving, name, reason))
        if self.serving.generations[name].state == "verifying":
            self._judge(name)
        known = self.serving.generations[name]
        if (known.state, known.reason) == ("complete", _INDEXED) and self._retrieval_ready(name):
            self._put(rollout.wait(self.serving, name, ""))
        if known.state in ("filling", "verifying") or known.reason == rollout.REMADE:
            self._restore_bundle(known)
        if self.serving.generations[name].state != "filling":
            if not reason and self.serving.generations[name].state not in ("staged", "failed"):
                self._watch(name)
            return
        progress = self._progress(name)
        if progress is None:
            return
        if progress.mismatch.any():
            wrong = ", ".join(map(str, progress.mismatch.nonzero()[0]))
            self._put(rollout.fail(self.serving, name, f"the rows of partition {wrong} are not those of the fill"))
            return
        self._replaced.discard(name)  # what it has to reach, it has to reach with this index
        serving = rollout.advance(self.serving, name, progress.covered.tolist(), progress.filled.tolist())
        if serving.generations[name].state == "verifying":
            LOG.info("generation %s: %d rows to be verified", name, progress.count.sum())
            self._settings.verification_file(name).unlink(missing_ok=True)  # of a fill before this one
        self._put(serving)

    def _restore_bundle(self, known: rollout.GenerationState) -> None:
        """Where the bundle has gone and its rows are still to be made; it fails where there is none to be had."""
        name = known.generation
        if not self._copying(name):
            if (self._settings.generation_dir(name) / "bundle").exists():
                return
            LOG.error("generation %s: its bundle has gone; it is fetched again", name)
        try:
            self._fetched(name, known.uri, known.sha256)
        except BundleFileError as error:
            LOG.error("generation %s has failed: %s", name, error)
            self._put(rollout.fail(self.serving, name, str(error)))

    def _judge(self, name: str) -> None:
        """Takes over the verdict, where there is one."""
        found = rollout.read_verification(self._settings.verification_file(name))
        if found is None:
            return
        self._put(rollout.verified(self.serving, name, found))
        if found.verdict == "yes":
            LOG.info("generation %s: complete", name)
            self._complete_since[name] = time.monotonic()
        elif found.verdict == "no":
            LOG.error("generation %s has failed: %s", name, found.reason)

    def _watch(self, name: str) -> None:
        """Sees whether rows that were proven are still there; where they are not, the jobs make them anew."""
        known, progress = self.serving.generations[name], self._progress(name)
        whole = progress is not None and rollout.whole(known, progress.covered.tolist(), progress.filled.tolist())
        if self._writer_of(name) == "reconcile":
            whole = False
        if name in self._replaced:  # another index, which has to come as far as the lost one may have been
            self._replaced.discard(name)
            whole = False
        if whole and known.reason == rollout.REMADE:
            LOG.info("generation %s: its rows are whole again", name)
            self._put(rollout.regain(self.serving, name))
        if not whole and known.reason != rollout.REMADE and time.monotonic() >= self._stage_due.get(name, 0.0):
            self._lose(known)

    def _lose(self, known: rollout.GenerationState) -> None:
        name, ends = known.generation, known.staged_ends
        try:
            # the bundle may be lost too; what is not served says first that it is not ready, lest a switch go to it
            if known.state == "active" and not self._fetched(name, known.uri, known.sha256):
                return
            with group_admin(self._settings) as groups:
                ends = groups.ends(self._settings.topic("items"))
        except BundleFileError as error:
            LOG.error("generation %s: tried again in %.0f s: %s", name, _STAGE_AGAIN_S, error)
            self._put(rollout.fail(self.serving, name, str(error)))
            self._stage_due[name] = time.monotonic() + _STAGE_AGAIN_S
            return
        except (BrokerError, GroupError) as error:
            LOG.warning("generation %s: it need not come further than before: %s", name, error)
        LOG.error("generation %s: %s", name, rollout.REMADE)
        self._put(rollout.lose(self.serving, name, ends))
        self._restore_bundle(self.serving.generations[name])

    def _activate(self, name: str | None) -> bool:
        """Whether API processes are loading it."""
        if name is None:
            return False
        back = name == self.serving.previous  # it was served before, with or without an index
        if not (back or self._retrieval_ready(name)):
            self._put(rollout.wait(self.serving, name, _INDEXED))
            return False
        try:
            if not back and self.serving.active is not None and not self._warm(name):
                return True
            self._put(rollout.activate(self.serving, name))
        except Refused as error:
            LOG.warning("activation refused: %s", error)
            return False
        LOG.info("generation %s: active", name)
        self._activation_step(3)
        return False

    def _share(self, canary: Canary | None, loading: bool) -> None:
        """Serves it, once it is warm; `loading`: API processes load another generation first."""
        held, ready = self.serving.canary, False
        if canary is not None:
            name = canary.generation
            known = held is not None and held.generation == name
            servable = known or name == self.serving.previous or self._retrieval_ready(name)
            ready = known or (servable and not loading and self._warm(name))
            loading = loading or (servable and not ready)
        serving = self.serving if loading else rollout.prepare(self.serving, None)
        self._put(msgspec.structs.replace(serving, canary=canary if ready else None))
        if self.serving.canary != held:
            LOG.info("canary: %s", self.serving.canary)

    def _warm(self, name: str) -> bool:
        """Whether all API processes could serve it at once; what it waits for is its reason. Raises Refused."""
        self._put(rollout.prepare(self.serving, name))
        self._activation_step(1)
        waits = fleet.waits_for(fleet.reports(self._settings), name, retire.now_ms())
        self._put(rollout.wait(self.serving, name, waits))
        if waits:
            return False
        self._activation_step(2)
        return True

    def _retire(self, name: str) -> None:
        if self.serving.generations[name].state != "retiring":
            self._put(rollout.retire(self.serving, name))
            LOG.info("generation %s: retiring", name)
        self._arenas.pop(name, None)  # deleted files that are mapped keep their space
        ended = self._errands.ended(f"leave {name}", lambda: retire.leave(self._settings, name, self._step))
        if ended is None:
            return
        try:
            ended.result()
        except NotYetError as error:
            LOG.warning("generation %s: not retired yet: %s", name, error)
            self._retire_due[name] = time.monotonic() + _RETIRE_AGAIN_S
            self._put(rollout.wait(self.serving, name, str(error)))
            return
        self._put(rollout.retired(self.serving, name))
        LOG.info("generation %s: retired", name)
        self._step(5)

    def _clean_up(self) -> None:
        """What all hosts share of retired generations, once none of them needs it."""
        if not self._cleaning and time.monotonic() >= self._clean_due:
            retired = [name for name, known in self.serving.generations.items() if known.state == "retired"]
            self._cleaning = [name for name in retired if name not in self._cleaned]
        if not (names := self._cleaning):
            return
        ended = self._errands.ended("clean up", lambda: retire.clean_up(self._settings, names, self._step))
        if ended is None:
            return
        self._cleaning, self._clean_due = [], time.monotonic() + _CLEAN_AGAIN_S
        try:
            waits = ended.result()
        except NotYetError as error:
            LOG.warning("retired generations are not deleted from Kafka yet: %s", error)
            waits = dict.fromkeys(names, str(error))
        self._cleaned.update(name for name in names if name not in waits)
        for name in names:
            self._put(rollout.wait(self.serving, name, waits.get(name, "")))

    def _retrieval_ready(self, name: str) -> bool:
        if not self._retrieval:
            return True
        waited = time.monotonic() - self._complete_since.setdefault(name, time.monotonic())
        return (self._settings.generation_dir(name) / "retrieval" / "current").exists() or waited > _RETRIEVAL_S

    def _keep_jobs(self, running: list[str]) -> None:
        needed = {"ingest": ["streams", "ingest"], "histories": ["streams", "histories"]}
        leaving = filter(self._leaving, self.serving.generations)
        held = {job for name in leaving for job in retire.jobs_of(name)}  # they are being stopped
        for name in running:
            state = self.serving.generations[name].state
            if state == "staged":
                continue
            encode = ["encode"] if self._settings.encoders == "local" else []
            for job in (*encode, self._writer_of(name)):
                needed[f"{job}-{name}"] = ["streams", job, "--generation", name]
            if self._retrieval and state != "filling" and self.serving.generations[name].reason != rollout.REMADE:
                needed[f"retrieval-{name}"] = ["api", "retrieval", "--generation", name]
            canary = self.serving.canary
            if canary is not None and (canary.generation, canary.share) == (name, 0.0):
                needed[f"shadow-{name}"] = ["api", "shadow", "--generation", name]
            if state == "verifying":
                needed[f"verify-{name}"] = ["api", "verify", "--generation", name]
            if self._copying(name):  # without it they would end for good
                held |= set(retire.jobs_of(name))
        self._jobs.keep(needed, held)

    def _writer_of(self, name: str) -> str:
        """The job that writes the index now: reconcile from when replicate has ended because rows are no longer in
        Kafka, until reconcile has ended well. It is in their heartbeats, so that it outlives a supervisor.
        """
        beats = [read_heartbeat(self._settings.heartbeat_dir, f"{job}-{name}") for job in ("replicate", "reconcile")]
        replicate, reconcile = beats
        if replicate is None or (replicate.state, replicate.status) != ("stopped", NEEDS_REFILL):
            return "replicate"
        done = reconcile is not None and (reconcile.state, reconcile.reason) == ("stopped", DONE)
        return "replicate" if done and reconcile is not None and reconcile.time > replicate.time else "reconcile"

    def _progress(self, name: str) -> Progress | None:
        """What the arena says; None while there is none, and when it is about to be deleted."""
        if self.serving.generations[name].state in rollout.GONE:
            return None
        folder = self._settings.generation_dir(name)
        try:
            if name in self._arenas and self._arenas[name].replaced():
                del self._arenas[name]
                self._replaced.add(name)
            if name not in self._arenas:
                self._arenas[name] = ArenaReader.open(folder / "n2o", bundles.layout_of(folder / "bundle"))
            return self._arenas[name].progress()
        except (StoreError, BundleFileError):
            self._arenas.pop(name, None)
            return None

    def _put(self, serving: Serving) -> None:
        if serving != self.serving:
            rollout.write(self._settings.serving_file, serving)
            self.serving = serving


def _only_one(settings: Settings) -> None:
    """Takes the state folder's lock, which the kernel gives back when the process ends, however it ends: not before
    that, because an errand may be under way. Raises SupervisorError.
    """
    settings.state.mkdir(parents=True, exist_ok=True)
    held = os.open(settings.state / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SupervisorError(f"Another supervisor already runs on {settings.state}.") from None


def _check_cluster(settings: Settings) -> None:
    """The state belongs to one cluster and prefix: offsets of another one mean nothing. Raises SupervisorError."""
    with admin_of(settings.kafka_bootstrap) as admin:
        cluster = str(admin.describe_cluster()["cluster_id"])
    mine = {"cluster": cluster, "prefix": settings.topic_prefix, "partitions": settings.partitions}
    path = settings.state / "cluster.json"
    if not path.exists():
        path.write_bytes(events.encode(mine))
    elif msgspec.json.decode(path.read_bytes()) != mine:
        raise SupervisorError(
            f"{settings.state} belongs to other topics (another cluster, prefix or partition count): "
            f"delete what was derived from them ({', '.join(DERIVED)}) there, or choose another folder with "
            "FORERANK_STATE."
        )
