"""The `hosts` topic as a log: what every host has said about its generations."""

from __future__ import annotations

import time
from contextlib import closing

import msgspec
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from infra.settings import Settings
from streams.events import HostReport

_READ_S = 10.0


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
