"""Every setting of every process, read once from the environment into one frozen object.

Variables are named `FORERANK_<FIELD>`; three carry the names their users know: `KAFKA_BOOTSTRAP`, `API_PROCESSES`,
`API_PORT`. The paths below `state` have one owner each, named beside them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

_PLAIN_NAMES = {"kafka_bootstrap": "KAFKA_BOOTSTRAP", "api_processes": "API_PROCESSES", "api_port": "API_PORT"}
_LEVELS = ("debug", "info", "warning", "error")
_ENCODERS = ("local", "apart")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what a bearer token may be (RFC 6750)


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names the variable."""


@dataclasses.dataclass(frozen=True)
class Settings:
    kafka_bootstrap: str = (
        "127.0.0.1:19092"  # host:port, several separated by commas; unset: the local node on kafka_port
    )
    kafka_port: int = 19092  # of the local node, like the next three
    kafka_controller_port: int = 19093
    kafka_heap_mb: int = 256
    kafka_dir: Path = Path(".local/kafka")  # its downloaded jars, data and log
    topic_prefix: str = ""  # put before every topic and consumer group name
    partitions: int = 8  # of items, item-updates, behaviours, users and rows.<generation>; fixed once created
    replication: int = 1
    state: Path = Path(".local/state")  # everything this host stores
    host: str = socket.gethostname()  # names this host on `hosts` and in static member ids
    host_gone_s: float = 3600.0  # a host that was silent for so long keeps no retired generation's topic
    encoders: str = "local"  # "apart": not this host's supervisor but somebody else starts `encode` of a generation
    hash_key: str = "forerank"  # keys the 128-bit hash of ids; the same on all hosts of a deployment
    api_host: str = "127.0.0.1"
    api_port: int = 8080
    api_processes: int = 1
    lanes: int = 0  # of each: heavy steps of requests at once; 0: the cores, divided by the processes
    admin_token: str = dataclasses.field(default="", repr=False)  # "" = that of `admin_token_file`
    api_sockets: str = ""  # folder of one Unix socket per API process, <place>.sock, for a proxy; "" = none
    history_length: int = 10_000  # newest behaviours kept per user (L)
    tombstone_days: float = 7.0  # D: how long ingest remembers a deletion
    rows_retention_ms: int = 86_400_000  # of rows.<generation>
    checkpoint_uri: str = ""  # where copies of indexes lie for all hosts: a directory or what fsspec opens; "" = none
    checkpoint_interval_s: float = 3600.0  # between two of this host
    take_within_ms: float = 5.0  # how long a nearline job waits to fill a batch, or longer (streams/worker.py)
    take_max: int = 512  # messages per batch
    session_timeout_ms: int = 6_000  # after a kill a group waits this long before it is given away
    prefetch_ttl_s: float = 30.0  # how long a user block may be used, prefetched or not
    prefetch_bytes: int = 256 << 20  # memory for user blocks, per process
    user_misses: int = 32  # user inferences at once, per process; more are refused
    cross_source: str = ""  # URL of a feature service that SIM cross features come from; "" = this host's histories
    cross_ttl_s: float = 300.0  # how long a user's crosses of a feature service are good; after twice that they go
    cross_bytes: int = 64 << 20  # memory for them, per process
    cross_misses: int = 16  # fetches of them at once, per process; others are served without
    cross_timeout_s: float = 1.0  # of a fetch
    deadline_ms: float = 50.0  # of a request that names none; crosses are waited for during 0.4 of it
    candidates_max: int = 20_000  # per request
    requests_max: int = 512  # that score or wait to, per process; more are refused
    body_bytes: int = 256 << 20  # of request bodies, announced or there, per process; more are refused
    body_timeout_s: float = 10.0  # from a request's head to the end of its body
    retrieval_interval_s: float = 60.0  # least time between two builds of a retrieval index, or 5 times a build's own
    models: str = ""  # folder of .pt2 files, served through the Open Inference Protocol; "" = none
    traces: str = ""  # folder for timelines of their queries; "" = none
    trace_share: float = 0.0  # of queries that get one without asking for it
    record_per_s: float = 2.0  # requests that an API process keeps on disk, to be scored again by new generations
    verify_norm: float = (
        20.0  # a new generation's rows are at most so many times as long as the active one's, or as short
    )
    verify_shift: float = 10.0  # its scores' mean differs by at most so many standard deviations
    verify_spread: float = 10.0  # its scores' standard deviation differs by at most this factor
    verify_overlap: float = 0.0  # at least this share of the best 100 stays the same
    log_level: str = "info"
    log_json: bool = False

    def topic(self, name: str) -> str:
        return self.topic_prefix + name

    def generation_dir(self, generation: str) -> Path:
        """`bundle/` (supervisor), `n2o/` (replicate), `retrieval/` (retrieval builder), `verify.json` lie below."""
        return self.state / "generations" / generation

    def verification_file(self, generation: str) -> Path:
        """Whether the generation may be served, and why; written by its verification, atomically."""
        return self.generation_dir(generation) / "verify.json"

    def api_socket(self, place: int) -> Path:
        """Where the API process at a place listens, if `api_sockets` names a folder; made by the API's parent."""
        return Path(self.api_sockets).resolve() / f"{place}.sock"

    def shadow_file(self, generation: str) -> Path:
        """How far its scores are from the active generation's; written by its shadow, atomically."""
        return self.generation_dir(generation) / "shadow.json"

    @property
    def admin_token_file(self) -> Path:
        """Made by whoever needs it first, if the setting names no token (infra/admin.py)."""
        return self.state / "admin_token"

    @property
    def ingest_dir(self) -> Path:
        return self.state / "ingest"

    @property
    def histories_dir(self) -> Path:
        return self.state / "histories"

    @property
    def serving_file(self) -> Path:
        """Which generation this host serves; written by the supervisor alone, atomically."""
        return self.state / "serving.json"

    @property
    def api_dir(self) -> Path:
        """What each API process has loaded, in a file of its own (streams/fleet.py)."""
        return self.state / "api"

    @property
    def requests_dir(self) -> Path:
        """Some of the newest requests, written by the API processes."""
        return self.state / "requests"

    @property
    def heartbeat_dir(self) -> Path:
        return self.state / "heartbeats"

    @property
    def metrics_dir(self) -> Path:
        """Metrics files of all processes of the host; those of ended ones become archives, which the supervisor removes
        when it starts."""
        return self.state / "metrics"


def variable(field: str) -> str:
    """The environment variable that sets `field`."""
    return _PLAIN_NAMES.get(field, "FORERANK_" + field.upper())


def is_token(text: str) -> bool:
    """Whether it can be borne in an `Authorization` header."""
    return _TOKEN.fullmatch(text) is not None


def _parse(name: str, text: str, default: object) -> object:
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if isinstance(default, Path):
            return Path(text)
        return type(default)(text)  # type: ignore[call-arg]
    except (ValueError, KeyError) as error:
        raise SettingsError(f"{name}={text!r} is not a {type(default).__name__}") from error


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the environment. Raises SettingsError, naming the variable, on a value that does not parse."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(Settings):
        name = variable(field.name)
        if environ.get(name):
            values[field.name] = _parse(name, environ[name], field.default)
    if "kafka_bootstrap" not in values and "kafka_port" in values:
        values["kafka_bootstrap"] = f"127.0.0.1:{values['kafka_port']}"
    settings = Settings(**values)  # type: ignore[arg-type]
    for name, low in (
        ("partitions", 1),
        ("replication", 1),
        ("api_processes", 1),
        ("lanes", 0),
        ("history_length", 1),
        ("take_max", 1),
        ("requests_max", 1),
        ("body_bytes", 16 << 20),  # the largest one that is accepted
        ("user_misses", 1),
        ("cross_misses", 1),
    ):
        if getattr(settings, name) < low:
            raise SettingsError(f"{variable(name)}={getattr(settings, name)} must be at least {low}")
    for name in ("kafka_port", "kafka_controller_port", "api_port"):
        if not 1 <= getattr(settings, name) <= 65_535:
            raise SettingsError(f"{variable(name)}={getattr(settings, name)} is not a port (1 to 65535)")
    if settings.cross_source and not settings.cross_source.startswith(("http://", "https://")):
        raise SettingsError(f"{variable('cross_source')}={settings.cross_source!r} is not an http or https URL")
    if settings.admin_token and not is_token(settings.admin_token):  # which is not shown: it may be almost right
        raise SettingsError(f"{variable('admin_token')} is not made of letters, digits and -._~+/ alone")
    if settings.encoders not in _ENCODERS:
        raise SettingsError(f"{variable('encoders')}={settings.encoders!r} is none of {', '.join(_ENCODERS)}")
    if settings.log_level.lower() not in _LEVELS:
        raise SettingsError(f"{variable('log_level')}={settings.log_level!r} is none of {', '.join(_LEVELS)}")
    return settings


def environment(settings: Settings) -> dict[str, str]:
    """The variables that make `load` give these settings again; for child processes.

    The local node's address is left out: KAFKA_BOOTSTRAP in the environment means a broker that the user brought.
    """
    out = {}
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if field.name == "kafka_bootstrap" and value == f"127.0.0.1:{settings.kafka_port}":
            continue
        out[variable(field.name)] = str(int(value)) if isinstance(value, bool) else str(value)
    return out
