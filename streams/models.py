"""The `models` topic as a log: all its events, in order, for whoever reduces them (rollout.py).

Read from its start by the supervisor, which follows it, and by `python -m streams model` and the API, which ask before
they publish whether an event would be refused.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord

from infra.settings import Settings
from streams import events, rollout
from streams.events import EventError, ModelEvent

LOG = logging.getLogger(__name__)


class ModelsError(RuntimeError):
    """The topic cannot be read; the message is one sentence."""


class Models:
    """The `models` topic from its start."""

    def __init__(self, settings: Settings, patience_s: float = 60.0) -> None:
        """`patience_s`: for reading all of it. Raises ModelsError where there is no such topic, or KafkaError."""
        self._tp, self._patience_s = TopicPartition(settings.topic("models"), 0), patience_s
        self._consumer = KafkaConsumer(
            bootstrap_servers=settings.kafka_bootstrap.split(","),
            group_id=None,
            enable_auto_commit=False,
            bootstrap_timeout_ms=int(patience_s * 1000),
        )
        if not self._consumer.partitions_for_topic(self._tp.topic):
            self._consumer.close()
            raise ModelsError(f"There is no topic {self._tp.topic}: `make kafka-topics` makes it.")
        self._consumer.assign([self._tp])
        self._consumer.seek(self._tp, self._consumer.beginning_offsets([self._tp])[self._tp])
        self.events: list[tuple[int, ModelEvent]] = []
        self.refused: list[tuple[ConsumerRecord, EventError]] = []  # in the order of their offsets
        self.following = 0

    def read_all(self) -> None:
        """Everything up to the end as it is now. Raises ModelsError if that takes longer than is waited."""
        end = self._consumer.end_offsets([self._tp])[self._tp]
        deadline = time.monotonic() + self._patience_s
        while self._consumer.position(self._tp) < end:
            self.poll(0.5)
            if time.monotonic() > deadline:
                raise ModelsError(f"Topic {self._tp.topic} could not be read to its end.")

    def poll(self, wait_s: float) -> None:
        """New events join `events`. What is no model event is among `refused`."""
        for record in self._consumer.poll(timeout_ms=int(wait_s * 1000)).get(self._tp, []):
            self.following = record.offset + 1
            try:
                event = events.model(record.value)
            except EventError as error:
                LOG.error("models offset %d is no model event: %s", record.offset, error)
                self.refused.append((record, error))
                continue
            self.events.append((record.offset, event))

    def close(self) -> None:
        self._consumer.close()


def refusal(settings: Settings, event: ModelEvent, patience_s: float = 60.0) -> str:
    """Why the event would be refused by the log as it is now, or why this host, if there is one here, cannot do without
    what would be retired, will never serve what would be activated or is staged again, or has nothing to roll back to;
    empty: nothing is against it. Raises ModelsError, KafkaError or Refused.
    """
    with closing(Models(settings, patience_s)) as log:
        log.read_all()
    desired = rollout.reduce_models([*log.events, (log.following, event)])
    why = desired.refused.get(log.following, "")
    if why:
        return why
    serving = rollout.read(settings.serving_file)
    if event.action == "rollback":
        return rollout.stuck(desired, serving, event.generation)
    if event.action == "stage":
        return rollout.spent(serving, event.generation)
    if event.action == "activate":
        return rollout.never(serving, event.generation)
    return rollout.kept(rollout.reduce_models(log.events), serving, event.generation)
