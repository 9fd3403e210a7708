"""Topics against the real broker: made as the design says, made once, refused when they differ."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from infra.kafka.broker import BrokerError, admin_of
from infra.kafka.topics import TopicError, ensure_rows_topic, ensure_topics
from infra.settings import Settings
from tests.conftest import free_ports

pytestmark = pytest.mark.e2e

MakeSettings = Callable[..., Settings]


def described(settings: Settings) -> dict[str, tuple[int, dict[str, str]]]:
    """Name without prefix -> (partitions, settings)."""
    with admin_of(settings.kafka_bootstrap) as admin:
        topics = [t for t in admin.describe_topics() if t["name"].startswith(settings.topic_prefix)]
        resources = [ConfigResource(ConfigResourceType.TOPIC, topic["name"], None) for topic in topics]
        configs = admin.describe_configs(resources, config_filter="all")["topic"]
    return {
        topic["name"].removeprefix(settings.topic_prefix): (
            len(topic["partitions"]),
            {name: entry["value"] for name, entry in configs[topic["name"]].items()},
        )
        for topic in topics
    }


def test_the_topics_of_the_design(settings: MakeSettings) -> None:
    mine = settings(partitions=5, rows_retention_ms=7_200_000)
    ensure_topics(mine)
    ensure_rows_topic(mine, "g-1")
    found = described(mine)
    keyed = {"item-updates", "items", "behaviours", "users", "rows.g-1"}
    dead = {f"{name}.dlq" for name in ("item-updates", "items", "behaviours", "users", "models")}
    assert found.keys() == keyed | dead | {"models", "hosts"}
    assert {name: count for name, (count, _) in found.items()} == {name: 5 if name in keyed else 1 for name in found}
    compacted = {name for name, (_, config) in found.items() if config["cleanup.policy"] == "compact"}
    assert compacted == {"items", "users", "hosts"}
    assert {name for name, (_, config) in found.items() if config["retention.ms"] == "-1"} == {"behaviours", "models"}
    for name in ("behaviours", "users"):  # one clock: erasures are compared with behaviours
        assert found[name][1]["message.timestamp.type"] == "LogAppendTime"
    assert found["rows.g-1"][1]["retention.ms"] == "7200000"


def test_making_them_twice_or_at_the_same_time_changes_nothing(settings: MakeSettings) -> None:
    mine = settings()
    with ThreadPoolExecutor(4) as pool:
        for made in [pool.submit(ensure_topics, mine) for _ in range(4)]:
            made.result()
    before = described(mine)
    ensure_topics(mine)
    ensure_rows_topic(mine, "g")
    ensure_rows_topic(mine, "g")
    assert before.items() <= described(mine).items()


def test_another_partition_count_is_refused_and_nothing_altered(settings: MakeSettings) -> None:
    mine = settings(partitions=2)
    ensure_topics(mine)
    ensure_rows_topic(mine, "g")
    other = settings(partitions=3, topic_prefix=mine.topic_prefix)
    with pytest.raises(TopicError, match=r"has 2 partitions where 3 are needed.*FORERANK_PARTITIONS"):
        ensure_topics(other)
    with pytest.raises(TopicError, match=r"rows\.g has 2 partitions"):
        ensure_rows_topic(other, "g")
    assert described(mine)["items"][0] == 2


@pytest.mark.parametrize(
    ("topic", "config", "message"),
    [
        ("items", {"cleanup.policy": "delete"}, r"items has cleanup\.policy=delete where compact is needed"),
        ("users", {"cleanup.policy": "compact"}, r"users has message\.timestamp\.type=CreateTime where LogAppendTime"),
        (
            "behaviours",
            {"retention.ms": "-1"},
            r"behaviours has message\.timestamp\.type=CreateTime where LogAppendTime is needed",
        ),
        (
            "behaviours",
            {"message.timestamp.type": "LogAppendTime", "retention.ms": "-1", "retention.bytes": "1000000"},
            r"behaviours has retention\.bytes=1000000 where -1 is needed",
        ),
        ("models", {}, r"models has retention\.ms=604800000 where -1 is needed"),
    ],
)
def test_a_topic_without_what_its_readers_rely_on_is_refused(
    settings: MakeSettings, topic: str, config: dict[str, str], message: str
) -> None:
    mine = settings()
    partitions = 1 if topic == "models" else 8
    request = {mine.topic(topic): {"num_partitions": partitions, "replication_factor": 1, "configs": config}}
    with admin_of(mine.kafka_bootstrap) as admin:
        admin.create_topics(request, wait_for_metadata=True)
    with pytest.raises(TopicError, match=message):
        ensure_topics(mine)


@pytest.mark.parametrize(("own", "advice"), [(False, "make kafka-up"), (True, "check KAFKA_BOOTSTRAP")])
def test_a_broker_that_is_not_there_is_one_sentence(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, own: bool, advice: str
) -> None:
    nowhere = f"127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.delenv("KAFKA_BOOTSTRAP", raising=False)
    if own:
        monkeypatch.setenv("KAFKA_BOOTSTRAP", nowhere)
    with pytest.raises(BrokerError, match=f"{nowhere} cannot be reached: .*{advice}"):
        ensure_topics(settings(kafka_bootstrap=nowhere))


def test_compaction_can_be_forced(settings: MakeSettings) -> None:
    """What the tests of later fills stand on: eager settings leave one record per key within seconds."""
    mine = settings(partitions=1)
    eager = {"segment.ms": "100", "min.cleanable.dirty.ratio": "0.001", "max.compaction.lag.ms": "100"}
    ensure_topics(mine, {"items": eager})
    producer = KafkaProducer(bootstrap_servers=mine.kafka_bootstrap)
    end = 0

    def write(version: int) -> None:
        nonlocal end
        for key in range(50):
            producer.send(mine.topic("items"), key=b"%d" % key, value=b"%d" % version)
        producer.flush()
        end += 50

    try:
        write(1)
        write(2)
        deadline = time.monotonic() + 60
        while True:
            values = [value for offset, value in read_all(mine, "items", end) if offset < 100]
            if len(values) <= 50 and b"1" not in values:
                break
            assert time.monotonic() < deadline, f"{len(values)} records are still there"
            write(3)  # the newest segment is never compacted: rolling it needs another record
        assert len(read_all(mine, "items", end)) >= 50  # the newest of each key stays
    finally:
        producer.close()


def read_all(settings: Settings, name: str, end: int) -> list[tuple[int, bytes]]:
    """(offset, value) of partition 0 up to the end offset."""
    consumer = KafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, auto_offset_reset="earliest", consumer_timeout_ms=10_000
    )
    try:
        consumer.assign([TopicPartition(settings.topic(name), 0)])
        consumer.seek_to_beginning()
        found: list[tuple[int, bytes]] = []
        for record in consumer:
            found.append((record.offset, record.value))
            if record.offset == end - 1:
                break
        return found
    finally:
        consumer.close()
