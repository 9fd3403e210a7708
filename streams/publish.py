"""Publishing: items, users, behaviours and model events, validated before they are sent. Library and the command's
work.

The way into the system for everybody who has no Kafka client of their own: the API, the demo, the command, tests. An
event that ingest would refuse is refused here, with its place and field; what was counted as sent, the broker has.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError
from tqdm import tqdm

from infra.kafka.broker import BrokerError, admin_of
from infra.settings import Settings
from streams import events
from streams.events import EventError

Kind = Literal["items", "users", "behaviours", "models"]
Row = bytes | Mapping[str, Any]  # JSON, or an object that JSON can hold
TOPICS: Mapping[Kind, str] = {"items": "item-updates", "users": "users", "behaviours": "behaviours", "models": "models"}
REPORTED = 100  # rejected rows that are kept with their reason
_UNREACHABLE_MS = 10_000
_PACK_LEAST = 8  # events of a partition from which on they go in one message
_PACK_BYTES = 64 << 10  # ingest keeps up to 8,192 messages in memory
_IN_FLIGHT = 10_000  # events that may wait for the broker: the client's buffer has no bound of its own


class PublishError(RuntimeError):
    """The broker cannot be reached or did not take an event; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that was not sent. `place`: its number, from 1 (a line of a file); `field`: "" = all of it."""

    place: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"row {self.place}{f', {self.field}' if self.field else ''}: {self.message}"


@dataclasses.dataclass
class Published:
    """What became of the rows; `errors` holds the first of them."""

    sent: int = 0
    rejected: int = 0
    errors: list[Rejected] = dataclasses.field(default_factory=list)

    def reject(self, place: int, error: EventError) -> None:
        self.rejected += 1
        if len(self.errors) < REPORTED:
            self.errors.append(Rejected(place, error.field, error.message))


class _Checked(NamedTuple):
    key: str
    event_id: str
    value: bytes


def check(kind: Kind, row: Row) -> _Checked:
    """Key, CloudEvents id and bytes of a row. Raises EventError where it would be refused later."""
    value = row if isinstance(row, bytes) else _json(row)
    if kind == "items":
        item = events.item_update(value, None, 0)
        return _Checked(item.item_id, f"{item.item_id}/{item.version}", value)
    if kind == "behaviours":
        behaviour = events.behaviour(value, None, 0)
        return _Checked(behaviour.user_id, behaviour.event_id, value)
    if kind == "users":
        return _Checked(events.user(value, None, time.time_ns() // 1_000_000).user_id, events.new_event_id(), value)
    return _Checked(events.model(value).generation, events.new_event_id(), value)


class Publisher:
    """A producer with acks of all replicas. Threads may share it. Close it, or use it in `with`."""

    def __init__(self, settings: Settings, patience_s: float = 60.0) -> None:
        """Raises PublishError if the broker cannot be reached. `patience_s`: how long it may take an event's ack."""
        self._settings, self._patience_s = settings, patience_s
        patience_ms = int(patience_s * 1000)
        blocked_ms = min(_UNREACHABLE_MS, patience_ms)
        self._source = f"/forerank/{settings.host}"
        try:
            with admin_of(settings.kafka_bootstrap):  # quick and clear when nobody listens
                pass
            self._producer = KafkaProducer(
                bootstrap_servers=settings.kafka_bootstrap.split(","),
                acks="all",
                linger_ms=2,
                batch_size=256 << 10,
                max_block_ms=blocked_ms,
                bootstrap_timeout_ms=blocked_ms,
                request_timeout_ms=min(30_000, patience_ms // 2),
                delivery_timeout_ms=patience_ms,
                reconnect_backoff_max_ms=1_000,  # a broker that is back is found at once
            )
        except (BrokerError, KafkaError) as error:
            raise PublishError(str(error)) from error

    def items(self, rows: Iterable[Row]) -> Published:
        """Sends item updates and deletions; returns when the broker has them. Raises PublishError."""
        return self.publish("items", rows)

    def users(self, rows: Iterable[Row]) -> Published:
        return self.publish("users", rows)

    def behaviours(self, rows: Iterable[Row]) -> Published:
        return self.publish("behaviours", rows)

    def models(self, rows: Iterable[Row]) -> Published:
        return self.publish("models", rows)

    def publish(
        self, kind: Kind, rows: Iterable[Row], progress: Callable[[], object] | None = None, *, bulk: bool = False
    ) -> Published:
        """The same for any kind; `progress` is called after each row. `bulk`: the rows are all there, not to be waited
        for, and where a message may hold many items, which costs ingest a fraction, it does.
        """
        out, acks = Published(), _Acks()
        packs: dict[int, _Pack] = {}
        for place, row in enumerate(rows, 1):
            try:
                checked = check(kind, row)
            except EventError as error:
                out.reject(place, error)
            else:
                if bulk and kind == "items":
                    self._pack(checked, packs, acks)
                else:
                    self._send(kind, checked, acks)
                out.sent += 1
                if out.sent % _IN_FLIGHT == 0:
                    self._finish(acks)
            if progress is not None:
                progress()
        for partition, pack in packs.items():
            self._send_pack(partition, pack, acks)
        self._finish(acks)
        return out

    def _pack(self, event: _Checked, packs: dict[int, _Pack], acks: _Acks) -> None:
        """Holds the event back, in the pack of its partition, until that is full."""
        partition = events.partition_of(event.key.encode(), self._settings.partitions)
        pack = packs.setdefault(partition, _Pack())
        if pack.events and (len(pack.events) == events.MAX_PACK or pack.size + len(event.value) > _PACK_BYTES):
            self._send_pack(partition, pack, acks)
            pack = packs[partition] = _Pack()
        pack.events.append(event)
        pack.size += len(event.value) + 1

    def _send_pack(self, partition: int, pack: _Pack, acks: _Acks) -> None:
        if len(pack.events) < _PACK_LEAST:
            for event in pack.events:
                self._send("items", event, acks)
            return
        count = len(pack.events)
        value = events.pack([event.value for event in pack.events])
        headers = [(events.PACK, str(count).encode())]
        self._produce("items", value, None, partition, events.new_event_id(), headers, acks, count)

    def _send(self, kind: Kind, event: _Checked, acks: _Acks) -> None:
        key = event.key.encode()
        partition = 0 if kind == "models" else events.partition_of(key, self._settings.partitions)
        self._produce(kind, event.value, key, partition, event.event_id, [], acks)

    def _produce(
        self,
        kind: Kind,
        value: bytes,
        key: bytes | None,
        partition: int,
        event_id: str,
        headers: list[events.Header],
        acks: _Acks,
        count: int = 1,
    ) -> None:
        now = time.time_ns() // 1_000_000
        cloud = events.cloud_headers(TOPICS[kind], event_id, self._source, now)
        try:
            topic = self._settings.topic(TOPICS[kind])
            future = self._producer.send(topic, value, key, [*cloud, *headers], partition, now)
        except KafkaError as error:
            raise PublishError(f"The Kafka broker did not take an event: {error}.") from error
        future.add_errback(acks.failed, count)

    def _finish(self, acks: _Acks) -> None:
        try:
            self._producer.flush(timeout=self._patience_s + 1)
        except KafkaError as error:
            raise PublishError(f"The Kafka broker did not acknowledge all events: {error}.") from error
        acks.check()

    def close(self) -> None:
        self._producer.close(timeout=10)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclasses.dataclass
class _Pack:
    """Events of one partition, to be sent together. `size`: bytes."""

    events: list[_Checked] = dataclasses.field(default_factory=list)
    size: int = 0


class _Acks:
    """Failed sends of one call; the producer's thread reports them."""

    def __init__(self) -> None:
        self._lock, self._count, self._first = threading.Lock(), 0, ""

    def failed(self, count: int, error: BaseException) -> None:
        with self._lock:
            self._count += count
            self._first = self._first or f"{type(error).__name__}: {error}"

    def check(self) -> None:
        with self._lock:
            if self._count:
                raise PublishError(f"The Kafka broker did not take {self._count} events ({self._first}).")


def read_rows(kind: Kind, path: Path, stdin: IO[bytes]) -> Iterator[Row]:
    """Rows of a JSONL, CSV or Parquet file by its name's end; `-` is JSONL from `stdin`. Raises OSError, ValueError.

    CSV and Parquet: columns are fields; `features.<name>` and `attributes.<name>` fill the objects; empty cells are
    absent. A CSV cell that is JSON (a number, true, a list, a quoted string) is read so, any other is text.
    """
    if str(path) == "-":
        yield from _lines(stdin)
    elif path.suffix == ".csv":
        yield from (_nested(row, kind, from_text=True) for row in _table(path))
    elif path.suffix == ".parquet":
        yield from (_nested(row, kind, from_text=False) for row in _table(path))
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        with path.open("rb") as file:
            yield from _lines(file)
    else:
        raise ValueError(f"{path}: the name must end in .jsonl, .csv or .parquet")


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    return (line.strip() for line in file if line.strip())


def _table(path: Path) -> Iterator[dict[str, Any]]:
    import polars as pl

    try:
        # numbers in CSV are decided cell by cell, not by guessing a column's type
        frame = pl.read_csv(path, infer_schema=False) if path.suffix == ".csv" else pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return frame.iter_rows(named=True)


def _nested(row: Mapping[str, Any], kind: Kind, *, from_text: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, cell in row.items():
        if cell is None or cell == "":
            continue
        outer, dot, inner = name.partition(".")
        is_text = outer.endswith("_id") or outer in ("event_time", "erased_at", "action", "generation", "uri", "sha256")
        value = _cell(cell) if from_text and not is_text else str(cell) if outer.endswith("_id") else cell
        if dot and outer in ("features", "attributes"):
            out.setdefault(outer, {})[inner] = value
        else:
            out[name] = value
    if from_text and kind == "items" and isinstance(out.get("crosses"), str):
        out["crosses"] = [out["crosses"]]
    return out


def _cell(text: str) -> Any:
    """A CSV cell: JSON where it is some, otherwise text. The text 12 is written as a JSON string, "12"."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return text
    return text if value is None else value


def _json(row: Mapping[str, Any]) -> bytes:
    try:
        value = msgspec.json.encode(row)
        wrong = _not_finite(msgspec.to_builtins(row), "") if b"null" in value else None  # such numbers are written so
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise EventError("malformed", f"not JSON: {error}") from None
    if wrong is not None:
        raise EventError("malformed", f"`{wrong}` is not a finite number", wrong)
    return value


def _not_finite(value: Any, place: str) -> str | None:
    """Where the first NaN or infinity is; None: nowhere."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        inner = ((f"{place}.{name}" if place else str(name), one) for name, one in value.items())
    elif isinstance(value, list | tuple):
        inner = ((f"{place}[{at}]", one) for at, one in enumerate(value))
    return next((found for name, one in inner if (found := _not_finite(one, name)) is not None), None)


def publish_files(settings: Settings, kind: Kind, paths: Iterable[Path], *, strict: bool) -> int:
    """The command: sends all rows of the files, with progress and counts on stderr. Gives the exit status.

    Rows that are refused are reported by file and row and the rest is sent; with `strict` one refused row means that
    nothing is sent. Raises PublishError, ValueError or OSError.
    """
    paths = list(paths)
    for path in paths:
        if str(path) != "-":
            path.stat()  # before anything is sent
    files: list[tuple[Path, Iterable[Row]]] = [(path, read_rows(kind, path, sys.stdin.buffer)) for path in paths]
    if strict:
        files = [(path, list(rows)) for path, rows in files]
        bad = sum(_report(path, _checked_only(kind, rows)) for path, rows in files)
        if bad:
            print(f"{bad} invalid rows: nothing was sent (--strict).", file=sys.stderr)
            return 1
    sent = bad = 0
    with Publisher(settings) as publisher:
        for path, rows in files:
            with tqdm(desc=str(path), unit=" rows", file=sys.stderr, mininterval=0.5, miniters=500) as bar:
                result = publisher.publish(kind, rows, bar.update, bulk=str(path) != "-")  # a pipe may trickle
            sent += result.sent
            bad += _report(path, result)
    print(
        f"{sent} {kind} published to {settings.topic(TOPICS[kind])}"
        + (f", {bad} invalid rows left out." if bad else ".")
    )
    return 1 if bad else 0


def _checked_only(kind: Kind, rows: Iterable[Row]) -> Published:
    out = Published()
    for place, row in enumerate(rows, 1):
        try:
            check(kind, row)
        except EventError as error:
            out.reject(place, error)
    return out


def _report(path: Path, result: Published) -> int:
    for error in result.errors:
        print(f"{path}, {error}", file=sys.stderr)
    if result.rejected > len(result.errors):
        print(f"{path}: {result.rejected - len(result.errors)} more invalid rows.", file=sys.stderr)
    return result.rejected
