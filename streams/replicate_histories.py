"""Replicate histories: writes `behaviours` and `users` into this host's store. The store's only writer.

Beside the items' path: what user inference reads. For each batch:

    1  decode; dead letters of refused records, and erasures in the place of nulls on `users`, are sent and acknowledged
    2  behaviours, profiles and the next offsets go into the store in one transaction
    3  return, which lets Faust commit

The store's offsets are the truth: Faust's commits can stick on a compacted topic such as `users` (its first surviving
offset being 0 and the next a later one), so the group is moved to the store's offsets wherever they differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from index.errors import StoreError
from index.histories import HistoriesWriter, StoredBehaviour, StoredProfile
from infra.settings import Settings
from streams import events
from streams.events import EventError
from streams.groups import group_admin
from streams.worker import Job, JobError, Outgoing, Plan, Record, Send, dead_letter


class ReplicateHistories:
    """The handler of `behaviours` and `users`."""

    def __init__(self, settings: Settings, writer: HistoriesWriter, send: Send) -> None:
        self._settings, self._writer, self._send = settings, writer, send
        self._users = settings.topic("users")

    async def batch(self, records: Sequence[Record]) -> None:
        behaviours: list[StoredBehaviour] = []
        profiles: list[StoredProfile] = []
        out: list[Outgoing] = []
        for record in records:
            try:
                if record.topic != self._users:
                    behaviours.append(self._behaviour(record))
                elif record.value is not None:
                    profiles.append(self._profile(record))
                else:
                    erased = self._erasure(record)
                    body = events.erasure(erased.user_id, record.timestamp)
                    profiles.append(erased)
                    out.append(Outgoing(record.topic, record.partition, record.key, body))
            except EventError as error:
                out.append(dead_letter(self._settings, record, error))
        await self._send(out)  # 1
        following = {(record.topic, record.partition): record.offset + 1 for record in records}
        self._writer.apply(behaviours, profiles, following)  # 2

    def _behaviour(self, record: Record) -> StoredBehaviour:
        found = events.behaviour(record.value, record.headers, record.timestamp)
        self._check(record, found.user_id)
        return StoredBehaviour(
            found.user_id,
            found.item_id,
            found.event_id,
            found.action,
            found.event_time,
            found.publish_time,
            record.partition,
            record.offset,
        )

    def _profile(self, record: Record) -> StoredProfile:
        found = events.user(record.value, record.headers, record.timestamp)
        self._check(record, found.user_id)
        features = None if found.features is None else events.encode(found.features)
        return StoredProfile(
            found.user_id, features, found.erased_at, found.publish_time, record.partition, record.offset
        )

    def _erasure(self, record: Record) -> StoredProfile:
        try:
            user_id = (record.key or b"").decode()
        except UnicodeDecodeError:
            raise EventError("malformed", "the key of a record without value is not UTF-8") from None
        events.check_id(user_id, "user_id")
        self._check(record, user_id)
        return StoredProfile(user_id, None, record.timestamp, record.timestamp, record.partition, record.offset)

    def _check(self, record: Record, user_id: str) -> None:
        events.check_key(record.key, user_id.encode(), record.partition, self._settings.partitions)

    def close(self) -> None:
        self._writer.close()


def prepare(job: Job) -> Plan:
    """Opens the store and moves the group to the store's offsets where they differ."""
    settings = job.settings
    try:
        writer = HistoriesWriter(settings.histories_dir, settings.history_length, settings.hash_key.encode())
    except StoreError as error:
        raise JobError(str(error)) from error
    stored = writer.offsets()
    topics = {}
    with group_admin(settings) as groups:
        for name in ("behaviours", "users"):
            topic = settings.topic(name)
            starts = groups.starts(topic)
            following = [max(start, stored.get((topic, p), 0)) for p, start in enumerate(starts)]
            if groups.committed(job.group, topic) != following:
                groups.commit(job.group, topic, following, job.instance)
            topics[topic] = following
    return Plan(topics, ReplicateHistories(settings, writer, job.send))


def run(settings: Settings) -> None:
    """Ends the process."""
    Job.start(
        settings, "histories", f"replicate-histories-{settings.host}", lambda job: asyncio.to_thread(prepare, job)
    )
