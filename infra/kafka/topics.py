"""The topics of DESIGN.md section 4: made when missing, refused when they are not as the jobs need them.

Partition counts are part of the contract (ingest's state and every row's `covered` offset are per partition), so a
topic that exists with another count, or without the compaction, retention for ever or time stamps that its readers rely
on, is an error and never altered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError, TopicAlreadyExistsError, UnknownTopicOrPartitionError

from infra.kafka.broker import BrokerError, admin_of
from infra.settings import Settings

_DAY_MS = 86_400_000
_FOR_EVER = "-1"
_KEPT_FOR_EVER = {"cleanup.policy": "delete", "retention.ms": _FOR_EVER, "retention.bytes": _FOR_EVER}
_COMPACTED = {
    "cleanup.policy": "compact",
    "segment.bytes": str(64 << 20),  # the newest segment is never compacted, so a smaller one makes a fill shorter
    "delete.retention.ms": str(7 * _DAY_MS),  # encode away for longer may miss deletions: stage the bundle anew
}
_CHECKED = ("cleanup.policy", "message.timestamp.type")


class TopicError(RuntimeError):
    """A topic is not as the jobs need it; the message is one sentence for the user."""


@dataclass(frozen=True)
class Topic:
    name: str
    partitions: int
    config: Mapping[str, str]


def topics_of(settings: Settings) -> list[Topic]:
    """All topics but those of generations, with the prefix."""
    keyed = {
        "item-updates": {"cleanup.policy": "delete", "retention.ms": str(7 * _DAY_MS)},
        "items": _COMPACTED,
        "behaviours": {**_KEPT_FOR_EVER, "message.timestamp.type": "LogAppendTime"},
        "users": {**_COMPACTED, "message.timestamp.type": "LogAppendTime"},  # erasures are compared with `behaviours`
    }
    single = {"models": _KEPT_FOR_EVER, "hosts": _COMPACTED | {"segment.bytes": str(4 << 20)}}
    dead = {
        f"{name}.dlq": {"cleanup.policy": "delete", "retention.ms": str(30 * _DAY_MS)} for name in (*keyed, "models")
    }
    topics = [Topic(settings.topic(name), settings.partitions, config) for name, config in keyed.items()]
    return topics + [Topic(settings.topic(name), 1, config) for name, config in (single | dead).items()]


def rows_topic_of(settings: Settings, generation: str) -> Topic:
    """Blocks of rows of one generation; a block may hold a thousand rows with their attributes."""
    retention = {"cleanup.policy": "delete", "retention.ms": str(settings.rows_retention_ms)}
    config = {**retention, "segment.bytes": str(64 << 20), "max.message.bytes": str(8 << 20)}
    return Topic(settings.topic(f"rows.{generation}"), settings.partitions, config)


def ensure_topics(settings: Settings, overrides: Mapping[str, Mapping[str, str]] | None = None) -> list[Topic]:
    """Make what is missing. Raises BrokerError (it cannot do so now) or TopicError (an existing one does not fit).

    `overrides`: topic name without prefix -> settings put over those of a topic that is made.
    """
    given = {settings.topic(name): config for name, config in (overrides or {}).items()}
    wanted = [Topic(t.name, t.partitions, {**t.config, **given.get(t.name, {})}) for t in topics_of(settings)]
    _ensure(settings, wanted)
    return wanted


def ensure_rows_topic(settings: Settings, generation: str) -> Topic:
    """The same for `rows.<generation>`."""
    topic = rows_topic_of(settings, generation)
    _ensure(settings, [topic])
    return topic


def delete_rows_topic(settings: Settings, generation: str) -> bool:
    """Deletes `rows.<generation>`; False: there is none. Raises BrokerError."""
    name = rows_topic_of(settings, generation).name
    with admin_of(settings.kafka_bootstrap) as admin:
        try:
            if name not in admin.list_topics():
                return False
            admin.delete_topics([name])
            return True
        except UnknownTopicOrPartitionError:  # another host was quicker
            return False
        except KafkaError as error:
            raise BrokerError(f"Topic {name} could not be deleted: {error}.") from error


def _ensure(settings: Settings, wanted: list[Topic]) -> None:
    with admin_of(settings.kafka_bootstrap) as admin:
        try:
            present = set(admin.list_topics())
            missing = [topic for topic in wanted if topic.name not in present]
            if missing:
                _create(admin, missing, settings.replication)
            if len(missing) < len(wanted):
                _check(admin, [topic for topic in wanted if topic.name in present])
        except KafkaError as error:
            where = settings.kafka_bootstrap
            raise BrokerError(f"The topics could not be made or read at {where}: {error}.") from error


def _create(admin: KafkaAdminClient, topics: list[Topic], replication: int) -> None:
    request = {
        topic.name: {
            "num_partitions": topic.partitions,
            "replication_factor": replication,
            "configs": dict(topic.config),
        }
        for topic in topics
    }
    try:
        admin.create_topics(request)
    except TopicAlreadyExistsError:  # another process was quicker with one; the others were made
        admin.wait_for_topics(list(request))
        _check(admin, topics)
    admin.wait_for_topics(list(request))


def _check(admin: KafkaAdminClient, topics: list[Topic]) -> None:
    described = {found["name"]: found for found in admin.describe_topics([topic.name for topic in topics])}
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic.name, None) for topic in topics]
    configs = admin.describe_configs(resources, config_filter="all")["topic"]
    for topic in topics:
        count = len(described[topic.name]["partitions"])
        if count != topic.partitions:
            raise TopicError(
                f"Topic {topic.name} has {count} partitions where {topic.partitions} are needed: "
                "use FORERANK_PARTITIONS as before, or another FORERANK_TOPIC_PREFIX."
            )
        for name, needed in topic.config.items():
            found = configs[topic.name][name]["value"]
            if found != needed and (name in _CHECKED or needed == _FOR_EVER):
                raise TopicError(f"Topic {topic.name} has {name}={found} where {needed} is needed.")
