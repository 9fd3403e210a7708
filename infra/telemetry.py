"""Logs and metrics of every process. Logs go to stderr; metrics to files that all processes of the host share.

Prometheus' client decides when it is imported whether it shares: call `start_metrics` before anything imports it, and
make metrics only through `counter`, `gauge` and `histogram`, which import it late.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from infra.processes import identity_of
from infra.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
    from prometheus_client.registry import Collector

_SHARED = "PROMETHEUS_MULTIPROC_DIR"
_ARCHIVE = 0  # the pid in its files' names, which no process has
_TALKATIVE = ("kafka", "aiokafka", "faust", "mode", "numba", "httpx", "httpcore")  # quiet unless debugging


def configure_logging(settings: Settings, job: str) -> None:
    """Root logger to stderr: one line per record, or a JSON object with `log_json`; `job` names the process."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_json:
        from pythonjsonlogger.json import JsonFormatter

        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        fixed = {"job": job, "host": settings.host}
        handler.setFormatter(
            JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=names, static_fields=fixed)
        )
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {job} %(name)s: %(message)s"))
    level = settings.log_level.upper()
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(level if level == "DEBUG" else "WARNING")


def start_metrics(settings: Settings) -> None:
    """Share this process' metrics; those of ended ones are archived. Raises RuntimeError if prometheus_client was
    imported before.
    """
    shared = str(settings.metrics_dir.absolute())
    if "prometheus_client" in sys.modules and os.environ.get(_SHARED) != shared:
        raise RuntimeError("start_metrics must be called before prometheus_client is imported")
    settings.metrics_dir.mkdir(parents=True, exist_ok=True)
    os.environ[_SHARED] = shared
    with _locked(settings.metrics_dir):
        _archive_ended(settings.metrics_dir)


def clear_metrics(settings: Settings) -> None:
    """Forget the metrics of processes that ended; for the supervisor when it starts."""
    settings.metrics_dir.mkdir(parents=True, exist_ok=True)
    with _locked(settings.metrics_dir):
        for path in settings.metrics_dir.glob("*.db"):
            if identity_of(_pid_of(path)) is None:
                path.unlink(missing_ok=True)


@cache
def counter(name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
    """`labels` a tuple. The same name gives the same metric again, here and below."""
    from prometheus_client import Counter

    return Counter(name, meaning, labels)


@cache
def gauge(name: str, meaning: str, labels: Sequence[str] = (), total: bool = False) -> Gauge:
    """The newest value that any live process set; with `total`, the sum over the live processes."""
    from prometheus_client import Gauge

    return Gauge(name, meaning, labels, multiprocess_mode="livesum" if total else "livemostrecent")


@cache
def histogram(name: str, meaning: str, labels: Sequence[str] = (), buckets: Sequence[float] = ()) -> Histogram:
    """`buckets` a tuple of upper bounds in the metric's unit; empty: prometheus_client's."""
    from prometheus_client import Histogram

    return Histogram(name, meaning, labels, buckets=buckets or Histogram.DEFAULT_BUCKETS)


def render(settings: Settings, gone: Collection[str] = ()) -> bytes:
    """All processes' metrics in Prometheus' text form; gauges of processes that ended are left out, and so is what
    there is of generations that are `gone`: a process that lives cannot take a series back.

    A process that did not call `start_metrics` (a test) shows its own alone.
    """
    from prometheus_client import REGISTRY, generate_latest, multiprocess

    if not os.environ.get(_SHARED):
        return generate_latest(cast("CollectorRegistry", _Shown(REGISTRY, gone)))
    folder = settings.metrics_dir.absolute()
    with _locked(folder):
        _archive_ended(folder)
        every = multiprocess.MultiProcessCollector(None, path=str(folder))
        return generate_latest(cast("CollectorRegistry", _Shown(every, gone)))


class _Shown:
    """What a collector has, without the series of generations that are gone."""

    def __init__(self, every: Collector, gone: Collection[str]) -> None:
        self._every, self._gone = every, gone

    def collect(self) -> Iterator[Metric]:
        for metric in self._every.collect():
            metric.samples = [
                found
                for found in metric.samples
                if found.labels.get("generation") not in self._gone
                and found.labels.get("job", "").partition("-")[2] not in self._gone  # encode-<generation>
            ]
            yield metric


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Whoever reads or removes files of other processes: nobody then counts one twice, or misses it."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _archive_ended(folder: Path) -> None:
    """Adds the counters and histograms of processes that ended to one file per kind, `<kind>_0.db`; their gauges go."""
    from prometheus_client.mmap_dict import MmapedDict

    found = {path: _pid_of(path) for path in folder.glob("*.db")}
    live = {pid for pid in set(found.values()) if identity_of(pid) is not None}
    ended = [path for path, pid in found.items() if pid != _ARCHIVE and pid not in live]
    for kind in ("counter", "histogram"):
        # killed while it was made: an empty one
        if not (files := [path for path in ended if path.stem.startswith(f"{kind}_") and path.stat().st_size]):
            continue
        archive, fresh = folder / f"{kind}_{_ARCHIVE}.db", folder / f"{kind}.new"
        sums: dict[str, float] = {}
        for path in [archive] * archive.exists() + files:
            for key, value, _, _ in MmapedDict.read_all_values_from_file(path):
                sums[key] = sums.get(key, 0.0) + value
        fresh.unlink(missing_ok=True)
        written = MmapedDict(str(fresh))
        for key, value in sums.items():
            written.write_value(key, value, 0.0)
        written.close()
        fresh.replace(archive)
    for path in ended:
        path.unlink(missing_ok=True)


def _pid_of(path: Path) -> int:
    """Prometheus' client ends its files' names with the pid: `counter_123.db`."""
    return int(path.stem.rpartition("_")[2])
