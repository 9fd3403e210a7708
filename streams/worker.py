"""How a nearline job runs: a Faust app around one batch handler, its heartbeat, and its ways to stop.

Every job is `handler.batch(records)`: when it returns, the batch's effects are stored and Faust may commit its offsets.
Faust acknowledges a batch also when its agent fails or is cancelled half way, so neither ever happens here: a handler
that raises ends the process before anything is acknowledged, and a stop waits for the batch in hand, commits, and ends
the process. What a job cannot lose is in its store, so both are no more than a kill between two batches.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import faust
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from faust.sensors import Monitor
from faust.transport.drivers import aiokafka as aiokafka_driver

from infra.kafka.broker import BrokerError
from infra.priority import Background
from infra.settings import Settings
from infra.telemetry import counter, gauge
from streams.bulk import BulkReadError
from streams.events import EventError, Header, dead_letter_headers, fitting_headers, header, header_list
from streams.groups import GroupError
from streams.heartbeat import Heartbeat

T = TypeVar("T")
LOG = logging.getLogger(__name__)
STALL_S = 30.0  # records waiting, none handled for so long: the agent has died silently
NEEDS_REFILL, BAD_BUNDLE = 3, 4  # exit statuses: a restart cannot help
DONE = "done"  # reason of a job that has come to its end
_BEAT_S = 1.0
_GATHER_S = 0.05  # at most, where a batch takes long
_RATE_BEATS = 10  # over which a rate is taken
_DEAD_BYTES = 900_000  # of a dead letter: what a publisher got through plus our headers might not pass again


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


class Outgoing(NamedTuple):
    """One record to be written; `timestamp` in ms, None = now."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header] = ()
    timestamp: int | None = None


class Send(Protocol):
    """Writes records, those of one partition in their order; returns when the broker has acknowledged all of them."""

    async def __call__(self, records: Sequence[Outgoing]) -> None: ...


class Handler(Protocol):
    async def batch(self, records: Sequence[Record]) -> None:
        """Returns when the effects of all of them are stored. Any exception ends the process."""

    def close(self) -> None: ...


def dead_letter(settings: Settings, record: Record, error: EventError) -> Outgoing:
    """The original record for its topic's dead-letter topic; where it is too large for one, value, key and headers
    have room in this order.
    """
    base = record.topic.removeprefix(settings.topic_prefix)
    headers = dead_letter_headers(record.topic, record.partition, record.offset, error)
    kept = [pair for pair in header_list(record.headers) if pair[0] not in dict(headers)]
    value = record.value if record.value is None else record.value[:_DEAD_BYTES]
    room = _DEAD_BYTES - len(value or b"")
    key = record.key if record.key is None else record.key[:room]
    kept = fitting_headers(kept, room - len(key or b""))
    return Outgoing(settings.topic(f"{base}.dlq"), 0, key, value, [*headers, *kept])


class _Silent(Monitor):
    """Faust's monitor without its statistics of every message, which nobody reads and which cost 10 us each."""

    logger = aiokafka_driver.logger

    def on_message_in(self, *_: Any) -> None: ...

    def on_stream_event_in(self, *_: Any) -> None: ...

    def on_stream_event_out(self, *_: Any) -> None: ...

    def on_message_out(self, *_: Any) -> None: ...


class _Consumer(aiokafka_driver.Consumer):
    """Faust's consumer without the two tasks that it makes per message, for a rebalance to interrupt its delivery."""

    logger = aiokafka_driver.logger

    async def wait_first(self, *work: Any, **options: Any) -> Any:
        if len(work) == 2 and self.app.flow_control.is_active() and asyncio.iscoroutine(work[0]):
            work[1].close()
            return await work[0]  # nothing to wait for: the message goes into a queue
        return await super().wait_first(*work, **options)


class _Transport(aiokafka_driver.Transport):
    Consumer = _Consumer


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
        self._reached: dict[tuple[str, int], int] = {}  # ms: nothing that waits there is older
        self._began = time.time_ns() // 1_000_000
        self._producer: AIOKafkaProducer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._app: faust.App | None = None

    @classmethod
    def start(
        cls, settings: Settings, name: str, group: str, prepare: Callable[[Job], Awaitable[Plan | None]]
    ) -> NoReturn:
        """Runs the job to its end, which is the process's. `prepare` does what comes before the group is joined, or all
        there is to do: then it gives None.
        """

        async def main() -> NoReturn:
            await cls(settings, name, group)._run(prepare)

        uvloop.install()  # for Faust's consumer thread too
        asyncio.run(main())
        raise AssertionError("a job ends its process")

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs beside the batches; when it raises, the process ends."""
        self._tasks.append(asyncio.create_task(work))

    async def send(self, records: Sequence[Outgoing]) -> None:
        """See Send."""
        assert self._producer is not None
        await self._send(self._producer, records)

    async def in_background(self, work: Callable[[Send], Coroutine[Any, Any, T]]) -> T:
        """Runs `work` in a thread of low priority; it gets the `send` of a producer in an event loop of its own."""

        async def main() -> T:
            async with self._new_producer() as producer:
                return await work(lambda records: self._send(producer, records))

        with Background() as background:
            return await asyncio.wrap_future(background.submit(lambda: asyncio.run(main())))

    def _new_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka_bootstrap,
            acks="all",
            max_batch_size=900_000,
            max_request_size=4 << 20,
        )

    async def _send(self, producer: AIOKafkaProducer, records: Sequence[Outgoing]) -> None:
        """Batches are built here: handing aiokafka one record at a time costs several times as much."""
        by_place: dict[tuple[str, int], list[Outgoing]] = {}
        for record in records:
            by_place.setdefault((record.topic, record.partition), []).append(record)
        acks = []
        for (topic, partition), found in by_place.items():
            batch = producer.create_batch()
            for _, _, key, value, headers, timestamp in found:
                while batch.append(timestamp=timestamp, key=key, value=value, headers=list(headers)) is None:  # full
                    acks.append(await producer.send_batch(batch, topic, partition=partition))
                    batch = producer.create_batch()
            acks.append(await producer.send_batch(batch, topic, partition=partition))
        await asyncio.gather(*acks)
        if dead := [record for record in records if record.topic.endswith(".dlq")]:
            self.heartbeat.dead += len(dead)
            counter("forerank_dead_letters", "Records sent to dead-letter topics", ("job",)).labels(self.name).inc(
                len(dead)
            )
            kind, message = (header(dead[0].headers, name) or b"" for name in ("error_type", "message"))
            LOG.warning(
                "%s: %d to %s, the first: %s, %s",
                self.name,
                len(dead),
                dead[0].topic,
                kind.decode(),
                message.decode(errors="replace"),
            )

    def handled(self, count: int) -> None:
        """Progress of whatever the job does, for the watchdogs."""
        self.heartbeat.handled += count
        self._moved = time.monotonic()

    def read_up_to(self, topic: str, following: Mapping[int, int]) -> None:
        """What is read before the group is joined, for the lag: next offset by partition."""
        found = {(topic, partition): offset for partition, offset in following.items()}
        self._next = self._next | found  # another thread may be looking at the old one

    def say(self, state: str) -> None:
        self.heartbeat.state = state
        self._moved = time.monotonic()
        LOG.info("%s: %s", self.name, state)

    async def _run(self, prepare: Callable[[Job], Awaitable[Plan | None]]) -> NoReturn:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        handler: Handler | None = None
        app: faust.App | None = None
        self.background(self._beat())
        try:
            self._producer = self._new_producer()
            await self._producer.start()
            preparing = asyncio.ensure_future(prepare(self))
            await _first(preparing, stop.wait())
            if preparing.done():
                plan = preparing.result()
                if plan is None:
                    self._end(0, DONE)
                handler = plan.handler
                self._next = {(t, p): offset for t, offsets in plan.topics.items() for p, offset in enumerate(offsets)}
                app = self._faust(list(plan.topics), handler)
                await app.start()
                gc.freeze()  # what is there now stays: later collections need not look at it
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
            stream_buffer_maxsize=8192,
            monitor=_Silent(),
        )
        app.transport = _Transport(app.conf.broker_consumer, app)
        source = app.topic(
            *topics, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", partitions=None
        )

        async def consume(stream: Any) -> None:
            async for events in _batches(app, stream, settings.take_max, settings.take_within_ms / 1000):
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
                        self._reached[record.topic, record.partition] = record.timestamp

        app.agent(source, name=self.name, concurrency=1)(consume)
        return app

    async def _beat(self) -> None:
        """Every second: the heartbeat, with the lag asked from the broker by a client of its own."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.settings.kafka_bootstrap, group_id=None)
        await consumer.start()
        counted = 0
        beats: deque[tuple[float, int]] = deque(maxlen=_RATE_BEATS + 1)
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
                beats.append((time.monotonic(), self.heartbeat.handled))
                if len(beats) > 1:
                    (since, before), (now, after) = beats[0], beats[-1]
                    self.heartbeat.rate = round((after - before) / (now - since), 1)
                self.heartbeat.write(self.settings.heartbeat_dir)
                counter("forerank_records", "Records handled by a nearline job", ("job",)).labels(self.name).inc(
                    self.heartbeat.handled - counted
                )
                gauge("forerank_lag", "Records that wait for a nearline job", ("job",)).labels(self.name).set(
                    self.heartbeat.lag
                )
                gauge("forerank_lag_seconds", "Age of what waits for a nearline job", ("job",)).labels(self.name).set(
                    self.heartbeat.lag_s
                )
                counted = self.heartbeat.handled
                await asyncio.sleep(_BEAT_S)
        finally:
            await consumer.stop()

    async def _measure(self, consumer: AIOKafkaConsumer) -> None:
        """Sets the lag in records and in seconds: of each partition where records wait, the age of the last handled
        one, or the time since none waited; since the start where the process has handled none of it.
        """
        if not self._next:
            return
        ends = await consumer.end_offsets([TopicPartition(*place) for place in self._next])
        now = time.time_ns() // 1_000_000
        lags = {place: max(0, ends[TopicPartition(*place)] - found) for place, found in self._next.items()}
        for place, lag in lags.items():
            if lag == 0:
                self._reached[place] = now  # an idle topic's last record may be of last year
        behind = [self._reached.get(place, self._began) for place, lag in lags.items() if lag]
        self.heartbeat.lag = sum(lags.values())
        self.heartbeat.lag_s = max(0, now - min(behind, default=now)) / 1e3

    def _end(self, status: int, reason: str) -> NoReturn:
        self.heartbeat.state, self.heartbeat.reason, self.heartbeat.status = "stopped", reason, status
        self.heartbeat.write(self.settings.heartbeat_dir)
        if status:
            LOG.error("%s: %s", self.name, reason)
            print(f"{self.name}: {reason}", file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(status)


def gather_s(within: float, took: float, idle: float) -> float:
    """How long a batch waits for more to come: `within`, or as long as the batch before took, of which the time counts
    in which nothing came. Where the processors are wanted by many, what each batch costs by itself is then at most half
    of the time; what comes alone does not wait.
    """
    return max(within, min(took, _GATHER_S) - idle)


async def _batches(app: faust.App, stream: Any, most: int, within: float) -> AsyncIterator[list[Any]]:
    """Events of a stream as they come, in batches; a batch is acknowledged when the next one is asked for.

    What Faust's `take_events` does, without its clock (which wakes up every `within` whether or not something came, and
    delays every hop by half of it) and without its three tasks per event. A batch is what has come `gather_s` after its
    first event; while one is at work the next one gathers, so batches grow with the load.
    """
    channel = aiter(stream.channel)
    queue, consumer = channel.queue, app.consumer
    took, ended = 0.0, time.monotonic()
    while True:
        events = [await queue.get()]
        if queue.qsize() < most and within:
            await asyncio.sleep(gather_s(within, took, time.monotonic() - ended))
        while len(events) < most and not queue.empty():
            events.append(queue.get_nowait())
        # those fetched before a rebalance will come again; Faust's own iterator skips them likewise
        events = [event for event in events if event.message.generation_id == app.consumer_generation_id]
        for event in events:
            consumer.track_message(event.message)
        if events:
            began = time.monotonic()
            yield events
            ended = time.monotonic()
            took = ended - began
            for event in events:
                event.ack()


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
