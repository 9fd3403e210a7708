"""Consumer groups from outside: which offsets a group has committed, and setting them before its first member joins.

Beside every Faust job: the stores, not the groups, know what was applied, so a job compares the two when it starts
and moves the group where they disagree. Kafka allows that only for a group without members; a killed member stays
one until its session ends, unless it is removed by the static id that it shares with the process that takes over
from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import MemberToRemove, OffsetSpec
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from infra.kafka.broker import admin_of
from infra.settings import Settings

T = TypeVar("T")
_PATIENCE_S = 20.0


class GroupError(RuntimeError):
    """The group's offsets cannot be read or set; the message is one sentence."""


@contextmanager
def group_admin(settings: Settings) -> Iterator[Groups]:
    """Raises BrokerError where the broker cannot be reached."""
    with admin_of(settings.kafka_bootstrap) as admin:
        yield Groups(admin, settings.partitions, settings.session_timeout_ms / 1000)


class Groups:
    """Offsets as lists with one entry per partition of a topic; -1 = none."""

    def __init__(self, admin: KafkaAdminClient, partitions: int, session_s: float) -> None:
        self._admin, self._partitions, self._session_s = admin, partitions, session_s

    def committed(self, group: str, topic: str) -> list[int]:
        wanted = [TopicPartition(topic, partition) for partition in range(self._partitions)]
        found = self._patiently(lambda: self._admin.list_group_offsets({group: wanted}))[group]
        return [found[tp].offset if tp in found else -1 for tp in wanted]

    def members(self, group: str) -> set[str]:
        """Static ids of the members whose sessions last; "" stands for those without one."""
        found = self._patiently(lambda: self._admin.describe_groups([group]))[group]
        if found["error"] and "GroupIdNotFound" not in found["error"]:
            raise GroupError(f"The members of group {group} cannot be read: {found['error']}.")
        return {str(member["group_instance_id"] or "") for member in found["members"]}

    def cluster(self) -> str:
        """The id of the cluster, which no other has."""
        return str(self._patiently(self._admin.describe_cluster)["cluster_id"])

    def starts(self, topic: str) -> list[int]:
        """First offset still there, per partition."""
        return self._offsets(topic, OffsetSpec.EARLIEST)

    def ends(self, topic: str) -> list[int]:
        """Offset of the next record to be written, per partition."""
        return self._offsets(topic, OffsetSpec.LATEST)

    def commit(self, group: str, topic: str, offsets: list[int], instance: str) -> None:
        """Sets the group's offsets (those >= 0), removing `instance`, a dead predecessor of the caller, from the group.

        Waits for other members' sessions to end, at most three sessions. Raises GroupError after that.
        """
        wanted = {
            TopicPartition(topic, partition): OffsetAndMetadata(offset, "", -1)
            for partition, offset in enumerate(offsets)
            if offset >= 0
        }
        deadline = time.monotonic() + 3 * self._session_s
        while True:
            try:
                self._admin.remove_group_members(group, [MemberToRemove(group_instance_id=instance)])
                results = self._admin.alter_group_offsets(group, wanted)
                errors = {found for found in results.values() if found.errno != 0}
            except KafkaError as error:
                errors = {type(error)}
            if not errors and self.committed(group, topic) == [max(offset, -1) for offset in offsets]:
                return
            if time.monotonic() > deadline:
                names = ", ".join(sorted(error.__name__ for error in errors)) or "they read back differently"
                raise GroupError(f"The offsets of group {group} could not be set ({names}): is another member running?")
            time.sleep(0.2)

    def delete(self, group: str) -> bool:
        """Deletes the group, and removes members that died without leaving it; False: there is none. Call it when the
        group's jobs have ended. Raises GroupError while it has members without a static id, or the broker cannot.
        """
        try:
            dead = [MemberToRemove(group_instance_id=instance) for instance in self.members(group) if instance]
            if dead:
                self._admin.remove_group_members(group, dead)
            outcome = self._admin.delete_groups([group])[group]
        except KafkaError as error:
            outcome = type(error).__name__
        if outcome not in ("OK", "GroupIdNotFoundError"):
            raise GroupError(f"Consumer group {group} could not be deleted ({outcome}).")
        return bool(outcome == "OK")

    def _offsets(self, topic: str, spec: OffsetSpec) -> list[int]:
        wanted = [TopicPartition(topic, partition) for partition in range(self._partitions)]
        found = self._patiently(lambda: self._admin.list_partition_offsets(dict.fromkeys(wanted, spec)))
        return [found[tp].offset for tp in wanted]

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Asks again while the broker is not yet able to answer: its first group makes it create a topic."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return ask()
            except KafkaError as error:
                if not error.retriable or time.monotonic() > deadline:
                    raise GroupError(f"Group offsets cannot be read: {type(error).__name__}.") from error
            time.sleep(0.2)
