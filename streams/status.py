"""`python -m streams status` or `model status`: what one host serves, whether what it needs answers, and its jobs.

Beside the data path: reads files of the state folder, the broker's and the API's answer, and changes nothing.
"""

from __future__ import annotations

import fcntl
import http.client
import time
from collections.abc import Iterable
from contextlib import suppress

from index.arena import ArenaReader
from index.errors import StoreError
from infra import processes
from infra.kafka.broker import BrokerError, admin_of
from infra.settings import Settings
from streams import bundles, rollout
from streams.bundles import BundleFileError
from streams.events import HostReport
from streams.heartbeat import read_heartbeat
from streams.hosts import HostsError, read_hosts
from streams.rollout import Shadow, Verification

_LATE_S = 5.0  # a job writes its heartbeat each second
_ANSWER_S = 3.0
_Held = dict[tuple[int, int], tuple[int, str]]  # partition and covered offset -> rows and digest up to there


def status(settings: Settings) -> int:
    """Prints it; 1 if no supervisor runs. Raises OSError, and Refused where `serving.json` is of another version."""
    supervised, serving = _supervised(settings), rollout.read(settings.serving_file)
    topics = f"topics {settings.topic_prefix}*" if settings.topic_prefix else "topics without prefix"
    print(f"stack: state {settings.state}, {topics}")
    if supervised:
        print("supervisor: running")
    else:
        print("No supervisor is running: start it with `make up`, or `python -m streams supervise`.")
    broker = _broker_answers(settings)
    print(f"Kafka: {settings.kafka_bootstrap} {'answers' if broker else 'does not answer'}")
    api = f"http://{settings.api_host}:{settings.api_port}"
    print(f"API: {api} {'answers' if _api_answers(settings) else 'does not answer'}")
    share = f", and {serving.canary.share:.2%} of the users {serving.canary.generation}" if serving.canary else ""
    print(f"serving: {serving.active or 'no generation'}{share}")
    for known in serving.generations.values():
        print(f"  {_generation(settings, known)}")
        for looked in (_verification(settings, known), _shadow(settings, serving, known)):
            if looked:
                print(f"    {looked}")
    for offset, reason in serving.refused.items():
        print(f"  refused (models offset {offset}): {reason}")
    for process in processes.listing(settings.state / "logs"):
        print(f"{process.name}: pid {process.pid}{_told(settings, process)}")
    if broker:
        _others(settings)
    return 0 if supervised else 1


def _generation(settings: Settings, known: rollout.GenerationState) -> str:
    """Its state, progress, rows where it has an index, and what it waits for or why it failed."""
    folder = settings.generation_dir(known.generation)
    rows = ""
    with suppress(StoreError, BundleFileError, OSError):
        progress = ArenaReader.open(folder / "n2o", bundles.layout_of(folder / "bundle")).progress()
        rows = f", {progress.count.sum()} rows"
    reason = f" ({known.reason})" if known.reason else ""
    fills = _fill(settings, known.generation) if known.state == "filling" else ""
    return f"{known.generation}: {known.state}, {known.progress:.0%}{rows}{fills}{reason}"


def _fill(settings: Settings, generation: str) -> str:
    """How fast its encoder reads, and how long at that rate; nothing before it does."""
    beat = read_heartbeat(settings.heartbeat_dir, f"encode-{generation}")
    if beat is None or beat.rate < 1:
        return ""
    return f", {beat.rate:.0f}/s, {beat.lag} waiting, {beat.lag / beat.rate:.0f} s to go"


def _others(settings: Settings) -> None:
    """What the other hosts have said last, and where one has other rows than this host up to the same offset, by all
    reports that are still on the topic.
    """
    try:
        reports = read_hosts(settings)
    except HostsError as error:
        print(f"The other hosts are unknown: {error}.")
        return
    newest, held = {(report.host, report.generation): report for report in reports}, _held(reports)
    heard = {host: max(one.time for one in newest.values() if one.host == host) for host, _ in newest}
    for host in sorted(heard.keys() - {settings.host}):
        said = [
            f"{name} {report.state}{_difference(held.get((settings.host, name), {}), held[host, name])}"
            + (f" ({report.reason})" if report.reason else "")
            for (of, name), report in newest.items()
            if of == host and name and report.state != "retired"
        ]
        ago = time.time() - heard[host] / 1000
        print(f"host {host}, heard of {ago:.0f} s ago: {'; '.join(said) or 'no generation'}")


def _held(reports: Iterable[HostReport]) -> dict[tuple[str, str], _Held]:
    """By host and generation. While rows are made anew they are not all that was covered, and after that not what they
    were before.
    """
    out: dict[tuple[str, str], _Held] = {}
    for report in reports:
        own = out.setdefault((report.host, report.generation), {})
        if report.state == "filling" or report.reason == rollout.REMADE:
            own.clear()
            continue
        figures = zip(report.covered, report.counts, report.digests, strict=True)
        own.update({(at, covered): (count, digest) for at, (covered, count, digest) in enumerate(figures)})
    return out


def _difference(mine: _Held, other: _Held) -> str:
    """That two hosts do not hold the same rows of a partition up to the last offset of which both have told."""
    last = dict(sorted(mine.keys() & other.keys()))  # partition -> its greatest offset
    wrong = [at for at, covered in last.items() if mine[at, covered] != other[at, covered]]
    return f", WITH OTHER ROWS THAN HERE in partition {', '.join(map(str, wrong))}" if wrong else ""


def _verification(settings: Settings, known: rollout.GenerationState) -> str:
    """The figures of its verification; empty while there are none."""
    found = rollout.read_verification(settings.verification_file(known.generation))
    if found is None or known.state == "filling":
        return ""
    parts = [
        f"{found.drawn} items drawn",
        f"{found.compared} rows compared, largest error {found.error:.2g} of what is allowed",
        f"numbers of {found.looked_at} rows" + (f", {found.norm:.2f} times as long" if found.norm is not None else ""),
    ]
    if found.unencodable:
        parts[0] += f", {found.unencodable} cannot be encoded"
    if found.requests:
        parts.append(_scores(found))
    return "verified: " * (found.verdict == "yes") + "; ".join([*parts, *found.unsaid])


def _shadow(settings: Settings, serving: rollout.Serving, known: rollout.GenerationState) -> str:
    """What was found of a shadow; empty where it is none, and while nothing was."""
    if serving.canary is None or (serving.canary.generation, serving.canary.share) != (known.generation, 0.0):
        return ""
    found = rollout.read_shadow(settings.shadow_file(known.generation))
    return f"shadow of {found.against}: {_scores(found)}" if found is not None else ""


def _scores(found: Verification | Shadow) -> str:
    figures = [
        ("mean score", found.shift, "+.2f", " deviations"),
        ("spread", found.spread, ".2f", " times"),
        ("best 100", found.overlap, ".0%", " the same"),
    ]
    said = [f"{name} {value:{form}}{unit}" for name, value, form, unit in figures if value is not None]
    return ", ".join([f"{found.requests} requests", *said])


def _told(settings: Settings, process: processes.Process) -> str:
    """What the job says of itself; those of the API's side say nothing."""
    if process.name.startswith(("retrieval-", "verify-", "shadow-")):
        return ""
    beat = read_heartbeat(settings.heartbeat_dir, process.name)
    if beat is None or beat.pid != process.pid:
        return ", starting"
    reason = f" ({beat.reason})" if beat.reason else ""
    silent = time.time() - beat.time / 1000
    if silent > _LATE_S:
        return f", silent for {silent:.0f} s, then {beat.state}{reason}"
    behind = f" for up to {beat.lag_s:.0f} s" if beat.lag and beat.lag_s >= 1 else ""
    dead = f", {beat.dead} dead letters" if beat.dead else ""
    rate = f" ({beat.rate:.0f}/s)" if beat.rate >= 1 else ""
    return f", {beat.state}, {beat.handled} records handled{rate}, {beat.lag} waiting{behind}{dead}{reason}"


def _supervised(settings: Settings) -> bool:
    """Whether somebody holds the supervisor's lock."""
    settings.state.mkdir(parents=True, exist_ok=True)
    with (settings.state / "supervisor.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _broker_answers(settings: Settings) -> bool:
    try:
        with admin_of(settings.kafka_bootstrap, _ANSWER_S):
            return True
    except BrokerError:
        return False


def _api_answers(settings: Settings) -> bool:
    connection = http.client.HTTPConnection(settings.api_host, settings.api_port, timeout=_ANSWER_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
