"""How a nearline job runs: a Faust app around one batch handler, its heartbeat, and its ways to stop.

Every job is `handler.batch(records)`: when it returns, the batch's effects are stored and Faust may commit its offsets.
Faust acknowledges a batch also when its agent fails or is cancelled half way, so neither ever happens here: a handler
that raises ends the process before anything is acknowledged, and a stop waits for the batch in hand, commits, and ends
the process. What a job cannot lose is in its store, so both are no more than a kill between two batches.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import faust
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from infra.kafka.broker import BrokerError
from infra.settings import Settings
from streams.bulk import BulkReadError
from streams.events import EventError, Header, dead_letter_headers, header_list
from streams.groups import GroupError

LOG = logging.getLogger(__name__)
STALL_S = 30.0  # records waiting, none handled for so long: the agent has died silently
NEEDS_REFILL, BAD_BUNDLE = 3, 4  # exit statuses: a restart cannot help
_BEAT_S = 1.0


class JobError(RuntimeError):
    """The job cannot go on; the message is one sentence. `status` becomes the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Record(NamedTuple):
    """One record as read from a topic; `timestamp` in ms."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header] | Mapping[str, bytes]


class Heartbeat(msgspec.Struct):
    """What a job says about itself every second, in `<heartbeat_dir>/<job>.json`. Times in ms, lag in records."""

    job: str
    pid: int
    time: int = 0
    state: str = "starting"
    handled: int = 0
    lag: int = 0
    reason: str = ""
    status: int = 0  # exit status, once stopped

    def write(self, folder: Path) -> None:
        self.time = time.time_ns() // 1_000_000
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{self.job}.json.new"
        new.write_bytes(msgspec.json.encode(self))
        new.replace(folder / f"{self.job}.json")


def read_heartbeat(folder: Path, job: str) -> Heartbeat | None:
    try:
        return msgspec.json.decode((folder / f"{job}.json").read_bytes(), type=Heartbeat)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


class Send(Protocol):
    """Queues one record and returns a future of its acknowledgement."""

    async def __call__(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[Header] = (),
        timestamp: int | None = None,
    ) -> Awaitable[object]: ...


class Handler(Protocol):
    async def batch(self, records: Sequence[Record]) -> None:
        """Returns when the effects of all of them are stored. Any exception ends the process."""

    def close(self) -> None: ...


async def dead_letter(send: Send, settings: Settings, record: Record, error: EventError) -> Awaitable[object]:
    """Queues the original record to its topic's dead-letter topic."""
    base = record.topic.removeprefix(settings.topic_prefix)
    headers = dead_letter_headers(record.topic, record.partition, record.offset, error)
    kept = [pair for pair in header_list(record.headers) if pair[0] not in dict(headers)]
    value = record.value if record.value is None or len(record.value) <= 900_000 else record.value[:900_000]
    return await send(settings.topic(f"{base}.dlq"), 0, record.key, value, [*headers, *kept])


class Plan(NamedTuple):
    """What a job reads, and with what: topic -> next offset per partition, as the group will begin, and the handler."""

    topics: Mapping[str, Sequence[int]]
    handler: Handler


class Job:
    """One process's job: name (also the group, after the prefix), heartbeat and producer."""

    def __init__(self, settings: Settings, name: str, group: str) -> None:
        self.settings, self.name = settings, name
        self.group = settings.topic(group)
        self.instance = f"{settings.host}-{self.group}"
        self.heartbeat = Heartbeat(name, os.getpid())
        self._busy = asyncio.Lock()
        self._moved = time.monotonic()
        self._next: dict[tuple[str, int], int] = {}
        self._producer: AIOKafkaProducer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._app: faust.App | None = None

    @classmethod
    async def start(
        cls, settings: Settings, name: str, group: str, prepare: Callable[[Job], Awaitable[Plan]]
    ) -> NoReturn:
        """Runs the job to its end, which is the process's. `prepare` does what comes before the group is joined."""
        await cls(settings, name, group)._run(prepare)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs beside the batches; when it raises, the process ends."""
        self._tasks.append(asyncio.create_task(work))

    async def send(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[Header] = (),
        timestamp: int | None = None,
    ) -> Awaitable[object]:
        assert self._producer is not None
        sent: Awaitable[object] = await self._producer.send(
            topic, value, key, partition, timestamp_ms=timestamp, headers=list(headers)
        )
        return sent

    def handled(self, count: int) -> None:
        """Progress of whatever the job does, for the watchdogs."""
        self.heartbeat.handled += count
        self._moved = time.monotonic()

    def say(self, state: str) -> None:
        self.heartbeat.state = state
        self._moved = time.monotonic()
        LOG.info("%s: %s", self.name, state)

    async def _run(self, prepare: Callable[[Job], Awaitable[Plan]]) -> NoReturn:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        handler: Handler | None = None
        app: faust.App | None = None
        self.background(self._beat())
        try:
            self._producer = AIOKafkaProducer(
                bootstrap_servers=self.settings.kafka_bootstrap,
                acks="all",
                linger_ms=1,
                max_batch_size=256 << 10,
                max_request_size=4 << 20,
            )
            await self._producer.start()
            preparing = asyncio.ensure_future(prepare(self))
            await _first(preparing, stop.wait())
            if preparing.done():
                plan = preparing.result()
                handler = plan.handler
                self._next = {(t, p): offset for t, offsets in plan.topics.items() for p, offset in enumerate(offsets)}
                app = self._faust(list(plan.topics), handler)
                await app.start()
                self.say("running")
                self._app = app
                await _first(stop.wait(), *self._tasks)
                for task in self._tasks:
                    if task.done():
                        task.result()
        except (JobError, BrokerError, GroupError, BulkReadError) as error:
            self._end(getattr(error, "status", 1), str(error))
        except Exception as error:
            LOG.exception("%s failed", self.name)
            self._end(1, f"{type(error).__name__}: {error}")
        if not stop.is_set():
            self._end(1, "Faust stopped by itself")
        await self._busy.acquire()  # the batch in hand is stored; the next one will not begin
        if app is not None:
            try:
                async with asyncio.timeout(3):
                    await app.consumer.commit()
            except Exception as error:  # the store knows; the group will read a second's records again
                LOG.info("%s: offsets not committed at the end (%s)", self.name, type(error).__name__)
        if handler is not None:
            handler.close()
        self._end(0, "stopped")

    def _faust(self, topics: list[str], handler: Handler) -> faust.App:
        settings = self.settings
        datadir = settings.state / "faust" / self.name  # Faust insists on one; nothing is kept in it
        datadir.mkdir(parents=True, exist_ok=True)
        app = faust.App(
            self.group,
            broker=[f"kafka://{server}" for server in settings.kafka_bootstrap.split(",")],
            store="memory://",
            datadir=datadir,
            loop=asyncio.get_running_loop(),
            web_enabled=False,  # it would listen on all interfaces
            autodiscover=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            stream_wait_empty=False,
            worker_redirect_stdouts=False,
            consumer_auto_offset_reset="earliest",
            consumer_group_instance_id=self.instance,
            broker_session_timeout=settings.session_timeout_ms / 1000,
            broker_heartbeat_interval=settings.session_timeout_ms / 4000,
            broker_commit_interval=1.0,
            broker_max_poll_records=1000,
        )
        source = app.topic(
            *topics, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", partitions=None
        )
        within = settings.take_within_ms / 1000

        async def consume(stream: Any) -> None:
            batches: AsyncIterator[Sequence[Any]] = stream.take_events(settings.take_max, within=within)
            async for events in batches:
                async with self._busy:
                    try:
                        records = [_record(event.message) for event in events]
                        await handler.batch(records)
                    except JobError as error:
                        self._end(error.status, str(error))
                    except BaseException as error:  # Faust would acknowledge the batch
                        LOG.exception("%s: a batch failed", self.name)
                        self._end(1, f"{type(error).__name__}: {error}")
                    self.handled(len(records))
                    for record in records:
                        self._next[record.topic, record.partition] = record.offset + 1

        app.agent(source, name=self.name, concurrency=1)(consume)
        return app

    async def _beat(self) -> None:
        """Every second: the heartbeat, with the lag asked from the broker by a client of its own."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.settings.kafka_bootstrap, group_id=None)
        await consumer.start()
        try:
            while True:
                try:
                    async with asyncio.timeout(10):
                        await self._measure(consumer)
                except Exception as error:  # a broker that is away shows as age of progress
                    LOG.warning("%s: lag unknown (%s)", self.name, type(error).__name__)
                if self._app is not None and self._app.should_stop:
                    self._end(1, "Faust stopped by itself")
                if self.heartbeat.lag == 0:
                    self._moved = time.monotonic()  # idle is no stall
                if self.heartbeat.lag > 0 and time.monotonic() - self._moved > STALL_S:
                    self._end(1, f"{self.heartbeat.lag} records wait and none was handled for {STALL_S:.0f} s")
                self.heartbeat.write(self.settings.heartbeat_dir)
                await asyncio.sleep(_BEAT_S)
        finally:
            await consumer.stop()

    async def _measure(self, consumer: AIOKafkaConsumer) -> None:
        if not self._next:
            return
        ends = await consumer.end_offsets([TopicPartition(*place) for place in self._next])
        self.heartbeat.lag = sum(max(0, ends[TopicPartition(*place)] - found) for place, found in self._next.items())

    def _end(self, status: int, reason: str) -> NoReturn:
        self.heartbeat.state, self.heartbeat.reason, self.heartbeat.status = "stopped", reason, status
        self.heartbeat.write(self.settings.heartbeat_dir)
        if status:
            LOG.error("%s: %s", self.name, reason)
            print(f"{self.name}: {reason}", file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(status)


def _record(message: Any) -> Record:
    return Record(
        message.topic,
        message.partition,
        message.offset,
        round(message.timestamp * 1000),
        message.key,
        message.value,
        message.headers or (),
    )


async def _first(*waits: Any) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
