"""The `hosts` topic: what every host says about its generations, and all that hosts have said."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import closing

import msgspec
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from index.arena import Progress
from infra.settings import Settings
from streams import events
from streams.events import HostReport
from streams.rollout import Serving

LOG = logging.getLogger(__name__)
_READ_S = 10.0
_REPORT_S = 5.0
_SIGN_S = 60.0  # between two life signs


class HostsError(RuntimeError):
    """The topic cannot be read; the message is one sentence."""


def read_hosts(settings: Settings) -> list[HostReport]:
    """All of it up to its end as it is now, oldest first; nothing where there is no such topic. Raises HostsError."""
    place = TopicPartition(settings.topic("hosts"), 0)
    out: list[HostReport] = []
    try:
        with closing(
            KafkaConsumer(
                bootstrap_servers=settings.kafka_bootstrap.split(","), group_id=None, enable_auto_commit=False
            )
        ) as consumer:
            if not consumer.partitions_for_topic(place.topic):
                return out
            consumer.assign([place])
            consumer.seek_to_beginning(place)
            end, deadline = consumer.end_offsets([place])[place], time.monotonic() + _READ_S
            while consumer.position(place) < end:
                found = consumer.poll(timeout_ms=200).get(place, [])
                out += [msgspec.json.decode(record.value, type=HostReport) for record in found]
                if time.monotonic() > deadline:
                    raise HostsError(f"topic {place.topic} could not be read to its end")
    except KafkaError as error:
        raise HostsError(f"topic {place.topic} cannot be read: {error}") from error
    except msgspec.DecodeError as error:
        raise HostsError(f"topic {place.topic} holds what is no report: {error}") from error
    return out


class Hosts:
    """What this host says on `hosts`: at each change of state or reason (of what fills, every few seconds at most), and
    each minute that it is there and how far its rows are.
    """

    def __init__(self, settings: Settings, producer: KafkaProducer, sign_s: float = _SIGN_S) -> None:
        self._settings, self._producer, self._sign_s = settings, producer, sign_s
        self._said: dict[str, tuple[str, str]] = {}
        self._lost: set[str] = set()  # generations of which a report did not reach the broker: others wait for it
        self._due, self._sign = 0.0, -1

    def report(
        self, serving: Serving, running: Collection[str], progress: Callable[[str], Progress | None]
    ) -> list[str]:
        """The generations of which something new was said. Of those with jobs (`running`) each sign tells again."""
        now, told = time.monotonic(), list[str]()
        sign = int(time.time() / self._sign_s)  # of all hosts at one moment: few offsets differ then
        signs, periodic = sign != self._sign, now > self._due
        if signs:
            self._sign = sign
            self._say("", "up", "", None)
        for name, known in serving.generations.items():
            if periodic and name in self._lost:
                self._lost.discard(name)
                self._said.pop(name, None)
            said, before = (known.state, known.reason), self._said.get(name, ("", ""))
            news = said != before and (periodic or not said[0] == before[0] == "filling")
            if news or (signs and name in running):
                self._said[name] = said
                self._say(name, known.state, known.reason, progress(name))
            if news:
                told.append(name)
        if periodic:
            self._due = now + _REPORT_S
        return told

    def _say(self, generation: str, state: str, reason: str, found: Progress | None) -> None:
        host = self._settings.host
        report = HostReport(
            host=host,
            generation=generation,
            state=state,
            time=time.time_ns() // 1_000_000,
            reason=reason,
            covered=found.covered.tolist() if found else [],
            counts=found.count.tolist() if found else [],
            digests=[f"{digest:016x}" for digest in found.digest.tolist()] if found else [],
        )
        key = f"{host}/{generation}" if generation else host

        def lost(error: BaseException) -> None:
            LOG.warning("no report on hosts of %s: %s", key, error)
            self._lost.add(generation)

        try:
            sent = self._producer.send(self._settings.topic("hosts"), events.encode(report), key.encode(), partition=0)
            sent.add_errback(lost)
        except KafkaError as error:
            lost(error)
