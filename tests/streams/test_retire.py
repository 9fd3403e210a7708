"""What keeps a generation from being deleted, on its host and in Kafka."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing

import pytest
from kafka import KafkaProducer

from index.lock import UserLock
from infra.kafka.broker import admin_of
from infra.kafka.topics import delete_rows_topic, ensure_rows_topic, ensure_topics
from infra.settings import Settings
from streams import events, retire
from streams.events import HostReport
from streams.groups import group_admin
from streams.retire import NotYetError, keepers
from tests.conftest import free_ports, wait_until


def said(host: str, generation: str, state: str, time: int) -> HostReport:
    return HostReport(host=host, generation=generation, state=state, time=time)


def test_a_topic_is_kept_for_hosts_that_have_not_retired_it_and_were_heard_of() -> None:
    reports = [said("a", "g", "retired", 1_000), said("b", "g", "former", 1_000), said("c", "other", "active", 9_000)]
    assert keepers(reports, "g", 10_000, 10.0) == ["b"]
    assert keepers(reports, "g", 11_000, 10.0) == [], "b was silent for ten seconds"
    assert keepers([*reports, said("b", "", "up", 9_000)], "g", 11_000, 10.0) == ["b"], "but it lives"
    assert keepers([*reports, said("b", "other", "active", 9_000)], "g", 11_000, 10.0) == ["b"]
    assert keepers([*reports, said("b", "g", "retiring", 9_000)], "g", 11_000, 10.0) == ["b"]
    assert keepers([*reports, said("b", "g", "retired", 9_000)], "g", 11_000, 10.0) == []


@pytest.mark.e2e
def test_the_last_host_deletes_what_all_share(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    ensure_rows_topic(host, "g")
    with group_admin(host) as groups:
        groups.commit(host.topic("encode-g"), host.topic("items"), [0, 0], "nobody")

    def tell(name: str, generation: str, state: str) -> None:
        with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer:
            report = said(name, generation, state, retire.now_ms())
            producer.send(host.topic("hosts"), events.encode(report), f"{name}/{generation}".encode(), partition=0)

    def shared() -> tuple[bool, bool]:
        with admin_of(host.kafka_bootstrap) as admin:
            group = any(found["group_id"] == host.topic("encode-g") for found in admin.list_groups())
            return host.topic("rows.g") in admin.list_topics(), group

    tell("one", "g", "retired")
    tell("two", "g", "former")
    assert retire.clean_up(host, ["g"]) == {"g": "its topic is kept until two has retired it"}
    assert shared() == (True, True)
    tell("two", "g", "retired")
    steps: list[int] = []
    deleted = {"g": "what it had in Kafka was deleted, and is looked for once more"}
    assert retire.clean_up(host, ["g"], steps.append) == deleted
    assert (shared(), steps) == ((False, False), [6, 7])
    with group_admin(host) as groups:  # what a late commit does
        groups.commit(host.topic(f"replicate-{host.host}-g"), host.topic("items"), [0, 0], "nobody")
    assert retire.clean_up(host, ["g"]) == deleted
    assert retire.clean_up(host, ["g"]) == {}, "nothing was there"
    delete_rows_topic(host, "g")

    with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer:
        producer.send(host.topic("hosts"), b"{", b"x", partition=0)
    with pytest.raises(NotYetError, match="no report"):
        retire.clean_up(host, ["g"])


@pytest.mark.e2e
def test_what_is_in_use_is_not_deleted_and_a_broker_that_is_away_is_waited_for(
    settings: Callable[..., Settings],
) -> None:
    host = settings(partitions=2)
    folder = host.generation_dir("g")
    (folder / "n2o").mkdir(parents=True)
    (host.state / "faust" / "encode-g").mkdir(parents=True)
    (host.state / "faust" / "encode-other-g").mkdir()
    user, steps = UserLock(folder), list[int]()
    with pytest.raises(NotYetError, match="still uses it"):
        retire.leave(host, "g", steps.append)
    assert (steps, (folder / "n2o").exists()) == ([1], True)
    user.release()
    away = dataclasses.replace(host, kafka_bootstrap=f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(NotYetError, match="cannot be reached"):
        retire.leave(away, "g", steps.append)
    assert (steps, folder.exists()) == ([1, 1, 2, 3], False)

    def left() -> bool:
        try:
            retire.leave(host, "g", steps.append)
        except NotYetError:  # the broker's first group: it is not yet able to answer
            return False
        return True

    for _ in range(2):  # again, where there is nothing any more
        wait_until(left, "nothing of it is here")
        assert steps[-4:] == [1, 2, 3, 4]
    assert [path.name for path in (host.state / "faust").iterdir()] == ["encode-other-g"]
