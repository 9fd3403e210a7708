"""Events over HTTP: validated as ingest will, published to Kafka, answered when the broker has them.

A body with a wrong event is refused whole. Where the broker fails half way some events may have arrived; the answer is
503, and sending the body again does no harm: items are versioned, behaviours carry their ids. Whatever waits for the
broker does so in threads of its own, so a broker that is away keeps no ranking request waiting.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import numpy as np
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from api.problems import ProblemError, decode
from api.schemas import Accepted
from infra.settings import Settings
from streams import models, rollout
from streams.events import BehaviourBody, EventError, ItemUpdate, ModelEvent, UserBody, item, model
from streams.publish import TOPICS, Kind, Publisher, PublishError, check

T = TypeVar("T")
KINDS: Mapping[Kind, Any] = {"items": ItemUpdate, "behaviours": BehaviourBody, "users": UserBody, "models": ModelEvent}
_PATIENCE_S = 4.0  # how long the publisher waits for the broker
_WAIT_S = 5.0
_READ_MS = 3_000
_BODY = msgspec.json.Decoder(msgspec.Raw)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])


class Feed:
    """The way from HTTP to Kafka of one process. Thread safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool = ThreadPoolExecutor(2, "kafka")
        self._lock = threading.Lock()
        self._publisher: Publisher | None = None

    async def publish(self, kind: Kind, rows: list[bytes]) -> Accepted:
        """Events that `checked` has seen. Raises ProblemError 503 where the broker is away."""
        if rows:
            await self._with_broker(lambda: self._connected().publish(kind, rows, bulk=True))
        return Accepted(len(rows), self._settings.topic(TOPICS[kind]))

    async def roll_out(self, event: bytes) -> Accepted:
        """A model event that `checked` has seen, unless the log would refuse it. Raises ProblemError 409 with the
        reason, 503.
        """
        await self._with_broker(lambda: self._unless_refused(event))
        return Accepted(1, self._settings.topic(TOPICS["models"]))

    async def item_event(self, partition: int, offset: int) -> dict[str, Any] | None:
        """The record at this place of `items`; None where compaction has removed it. Raises ProblemError 503."""
        return await self._with_broker(lambda: _record(self._settings, partition, offset))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._publisher is not None:
                self._publisher.close()

    def _unless_refused(self, event: bytes) -> None:
        publisher = self._connected()
        try:
            why = models.refusal(self._settings, model(event), _WAIT_S)
        except rollout.Refused as error:
            raise ProblemError(503, "not-ready", str(error)) from error
        if why:
            raise ProblemError(409, "refused", why)
        publisher.models([event])

    def _connected(self) -> Publisher:
        with self._lock:
            if self._publisher is None:
                self._publisher = Publisher(self._settings, _PATIENCE_S)
            return self._publisher

    async def _with_broker(self, work: Callable[[], T]) -> T:
        """`work` in the pool; given up, and not even begun where it waits for others, after _WAIT_S."""
        try:
            async with asyncio.timeout(_WAIT_S):
                return await asyncio.wrap_future(self._pool.submit(work))
        except TimeoutError as error:
            said = "the Kafka broker has not answered in time; events may still arrive"
            raise ProblemError(503, "broker-away", said) from error
        except (PublishError, KafkaError, models.ModelsError) as error:
            raise ProblemError(503, "broker-away", str(error)) from error


def checked(kind: Kind, body: bytes, lines: bool) -> list[bytes]:
    """The events of a body. Raises ProblemError 400 or 422 where one of them, or all of it, is wrong."""
    rows = _rows(body, lines)
    single = not lines and not body.lstrip().startswith(b"[")
    for at, row in enumerate(rows):
        try:
            check(kind, row)
        except EventError as error:
            place = "" if single else f"[{at}]"
            field = ".".join(part for part in (place, error.field) if part) or None
            raise ProblemError(422, "invalid-event", f"event {at}: {error.message}", field) from error
    return rows


def _rows(body: bytes, lines: bool) -> list[bytes]:
    """One JSON text per event. Raises ProblemError where the body is no JSON at all."""
    if lines:
        return [line for line in body.split(b"\n") if line.strip()]
    if body.lstrip().startswith(b"["):
        return [bytes(row) for row in decode(_LIST, body)]
    return [bytes(decode(_BODY, body))]


def _record(settings: Settings, partition: int, offset: int) -> dict[str, Any] | None:
    place = TopicPartition(settings.topic("items"), partition)
    consumer = KafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap.split(","),
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_poll_records=1,
        bootstrap_timeout_ms=_READ_MS,
    )
    try:
        consumer.assign([place])
        consumer.seek(place, offset)
        found = consumer.poll(timeout_ms=_READ_MS).get(place, [])
    finally:
        consumer.close(autocommit=False)
    if not found or found[0].offset != offset or found[0].value is None:
        return None
    return shown(found[0].value)


def shown(value: bytes) -> dict[str, Any]:
    """A record of `items` as its publisher wrote it, embedding included: fit to be published again, as a whole."""
    record: dict[str, Any] = msgspec.json.decode(value)
    for name in ("base", "versions"):  # which versions patches of it had
        record.pop(name, None)
    packed = item(value).embedding
    if isinstance(packed, bytes):  # the shortest decimals of 32-bit floats, which is what publishers send
        record["embedding"] = [float(str(number)) for number in np.frombuffer(packed, "<f4")]
    return record
