"""Retiring a generation: everything of it is deleted, on each host and then in Kafka.

The supervisor has written `retiring` to `serving.json` before: no jobs are started for the generation, and API
processes drop it. From there on, on each host:

    1  its jobs are stopped
    2  its folder is deleted (bundle, RocksDB, arena, retrieval index), once no request uses it any more
    3  what its jobs left is deleted: heartbeats, logs, working folders
    4  the consumer group of this host is deleted
    5  the supervisor writes `retired` and says so on `hosts`

and once every host has said so, on any of them:

    6  the consumer group of its encoders is deleted, once those that no host starts have ended, and its checkpoints are
    7  the topic `rows.<generation>` is deleted

Each step may be repeated, so after a kill all of them are, from the first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from index.errors import StoreLockedError
from index.lock import unused
from infra import processes
from infra.kafka.broker import BrokerError
from infra.kafka.topics import delete_rows_topic
from infra.processes import ProcessError
from infra.settings import Settings
from streams import checkpoints
from streams.checkpoints import CheckpointError
from streams.events import HostReport
from streams.groups import GroupError, group_admin
from streams.hosts import HostsError, read_hosts

Step = Callable[[int], object]
_JOBS = ("encode", "replicate", "reconcile", "retrieval", "verify", "shadow")
_BEATS = (".json", ".json.new")  # the second is what a process left that was killed while it wrote
_LOGS = (".json", ".json.tmp", ".log", ".log.1")
_STOP_S = 10.0


class NotYetError(Exception):
    """Something has to end first, or the broker is away: trying again is right. The message is one sentence."""


def jobs_of(generation: str) -> list[str]:
    return [f"{job}-{generation}" for job in _JOBS]


def leave(settings: Settings, generation: str, step: Step = int) -> None:
    """Steps 1 to 4 on this host; `step(number)` is called after each. Raises NotYetError."""
    jobs, logs, folder = jobs_of(generation), settings.state / "logs", settings.generation_dir(generation)
    try:
        found = (processes.find(name, logs) for name in jobs)
        processes.stop_all([process for process in found if process is not None], _STOP_S)  # 1
        step(1)
        with unused(folder):
            _delete(folder)  # 2
        step(2)
        for name in jobs:  # 3
            _delete(settings.state / "faust" / name)
            beats = (settings.heartbeat_dir / f"{name}{end}" for end in _BEATS)
            for path in (*beats, *(logs / f"{name}{end}" for end in _LOGS)):
                path.unlink(missing_ok=True)
        step(3)
        with group_admin(settings) as groups:
            groups.delete(settings.topic(f"replicate-{settings.host}-{generation}"))  # 4
        step(4)
    except StoreLockedError:
        raise NotYetError("a request, or an API process that could not load its successor, still uses it") from None
    except (ProcessError, BrokerError, GroupError) as error:
        raise NotYetError(str(error)) from error
    except OSError as error:
        raise NotYetError(f"{error.filename or folder} could not be deleted: {error.strerror}") from error


def clean_up(settings: Settings, generations: Collection[str], step: Step = int) -> dict[str, str]:
    """Steps 6 and 7 of those that no host keeps; gives why the others have to wait. Raises NotYetError.

    What was deleted is looked for once more: a request of a job that was killed may be handled after the deletion and
    make its group anew.
    """
    waits = {}
    try:
        reports, now = read_hosts(settings), now_ms()
        for generation in generations:
            if hosts := keepers(reports, generation, now, settings.host_gone_s):
                waits[generation] = f"its topic is kept until {', '.join(hosts)} has retired it"
                continue
            with group_admin(settings) as groups:
                encoders = settings.topic(f"encode-{generation}")
                if settings.encoders == "apart" and (members := groups.members(encoders)):
                    waits[generation] = f"its topic is kept until its encoder has ended ({', '.join(sorted(members))})"
                    continue
                own = groups.delete(settings.topic(f"replicate-{settings.host}-{generation}"))
                shared = groups.delete(encoders)  # 6
            if settings.checkpoint_uri:
                checkpoints.forget(settings, generation)
            step(6)
            topic = delete_rows_topic(settings, generation)  # 7
            step(7)
            if own or shared or topic:
                waits[generation] = "what it had in Kafka was deleted, and is looked for once more"
    except (BrokerError, GroupError, HostsError, CheckpointError) as error:
        raise NotYetError(str(error)) from error
    return waits


def keepers(reports: Iterable[HostReport], generation: str, now: int, gone_s: float) -> list[str]:
    """Hosts that have said something else of the generation than that they retired it, and were heard of since
    `gone_s`. Times in ms.
    """
    states: dict[str, str] = {}
    heard: dict[str, int] = {}
    for report in reports:
        heard[report.host] = max(report.time, heard.get(report.host, 0))
        if report.generation == generation:
            states[report.host] = report.state
    return sorted(host for host, state in states.items() if state != "retired" and now - heard[host] < 1000 * gone_s)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _delete(folder: Path) -> None:
    while folder.exists():
        with suppress(FileNotFoundError):  # of what a process was just removing itself
            shutil.rmtree(folder)
