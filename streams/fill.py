"""The fill: all of `items` through a bundle, in bulk, before the generation's group is joined. Part of encode.

    1  read every record from the first offset to the end taken at opening (bulk.py proves that), encode, send blocks
    2  a last block per partition, also of an empty one, carries row count and digest: the proof for the hosts
    3  return the end offsets, which the caller commits for the group; Faust goes on from there

A bundle that cannot encode half of the first items ends the job before step 1 sends a dead letter of theirs.

A crash before the commit repeats the fill; hosts skip what they have. The same reading, without proof, catches up a
group that is far behind: Faust takes about 70 us per record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import numpy as np
from aiokafka.structs import ConsumerRecord
from numpy.typing import NDArray

from index.keys import digest_of, keys_of
from index.layout import RowLayout
from index.n2o import FillProof, RowBatch
from streams.bulk import open_reader
from streams.events import EventError
from streams.worker import BAD_BUNDLE, Job, JobError, Record

BULK_LAG = 20_000  # records behind from which Faust would be the slower way
_SEND_S = 0.001  # enough to hand blocks to the broker, which acknowledges them while the next ones are made
_TRIAL, _TRIAL_LEAST = 1024, 64  # live items by which a bundle is judged; with fewer it is not

Refused = list[tuple[Record, EventError]]


class Rows(Protocol):
    """What encode does with records, whoever read them."""

    @property
    def layout(self) -> RowLayout: ...

    def rows(
        self, by_partition: Mapping[int, Sequence[Record]], covered: Mapping[int, int]
    ) -> tuple[list[RowBatch], Refused]: ...

    async def emit(self, batches: Sequence[RowBatch], refused: Refused) -> None: ...


def bulk_starts(committed: Sequence[int], ends: Sequence[int]) -> list[int] | None:
    """Where to read in bulk from: [] = everything, for a fill; offsets, to catch up; None: Faust may go on by
    itself.
    """
    if any(offset < 0 for offset in committed):
        return []
    # Faust's commit can stick on a compacted partition that it reads from offset 0
    stuck = any(offset == 0 < end for offset, end in zip(committed, ends, strict=True))
    far = sum(ends) - sum(committed) > BULK_LAG
    return list(committed) if stuck or far else None


async def fill(job: Job, encode: Rows, topic: str, starts: Sequence[int]) -> list[int]:
    """Steps 1 and 2 from `starts` (empty: from the beginning, with proof). Gives the next offset per partition. Raises
    JobError (BAD_BUNDLE) where the bundle cannot encode half of the first items of a fill.
    """
    job.say("catching up" if starts else "filling")
    proof = None if starts else Proof(job.settings.partitions, job.settings.hash_key.encode())
    trial = _Trial(over=bool(starts))
    sending = asyncio.create_task(encode.emit([], []))
    async with open_reader(job.settings, topic, starts or None) as reader:
        job.read_up_to(topic, dict(enumerate(reader.starts)))
        async for found in reader.batches():
            by_partition = as_records(found)
            covered = {partition: records[-1].offset for partition, records in by_partition.items()}
            batches, refused = encode.rows(by_partition, covered)
            letters = trial.passed(batches, refused)
            await sending
            sending = asyncio.create_task(encode.emit(batches, letters))  # 1
            await asyncio.wait([sending], timeout=_SEND_S)
            if proof is not None:
                proof.add(batches)
            job.read_up_to(topic, {partition: offset + 1 for partition, offset in covered.items()})
            job.handled(sum(map(len, by_partition.values())))
        ends = reader.ends
    await sending
    if proof is not None:
        last = [proof.block(partition, end - 1, encode.layout) for partition, end in enumerate(ends)]
        await encode.emit([], trial.over())
        await encode.emit(last, [])  # 2
    return ends  # 3


def as_records(found: Mapping[int, list[ConsumerRecord]]) -> dict[int, list[Record]]:
    """aiokafka's records have what a Record has: to make one of each is a twentieth of a fill."""
    return cast(dict[int, list[Record]], {place: some for place, some in found.items() if some})


class _Trial:
    """Holds dead letters back until the first items have shown that the bundle can encode them: one with a wrong
    feature spec would send the whole catalogue to `items.dlq`, and be complete without a row.
    """

    def __init__(self, over: bool) -> None:
        self._live = 0
        self._unfit: list[EventError] = []
        self._held: Refused = []
        self._over = over

    def passed(self, batches: Sequence[RowBatch], refused: Refused) -> Refused:
        """The dead letters that may be sent with these batches. Raises JobError (BAD_BUNDLE)."""
        if self._over:
            return refused
        unfit = [error for _, error in refused if error.kind == "not_encodable"]
        self._unfit += unfit
        self._live += len(unfit) + sum(int((~batch.deleted).sum()) for batch in batches)
        self._held += refused
        return self.over() if self._live >= _TRIAL else []

    def over(self) -> Refused:
        """The dead letters that were held back. Raises JobError (BAD_BUNDLE)."""
        if not self._over and self._live >= _TRIAL_LEAST and 2 * len(self._unfit) >= self._live:
            what = f"{len(self._unfit)} of the first {self._live} items"
            raise JobError(f"bad bundle: it cannot encode {what}, the first: {self._unfit[0].message}", BAD_BUNDLE)
        self._over, held, self._held = True, self._held, []
        return held


class Proof:
    """The rows of each partition after all that was added: of every key the last one counts."""

    def __init__(self, partitions: int, hash_key: bytes) -> None:
        self._hash_key = hash_key
        self._keys: list[list[NDArray[np.uint64]]] = [[] for _ in range(partitions)]
        self._versions: list[list[NDArray[np.uint64]]] = [[] for _ in range(partitions)]
        self._deleted: list[list[NDArray[np.bool_]]] = [[] for _ in range(partitions)]

    def add(self, batches: Sequence[RowBatch]) -> None:
        for batch in batches:
            if batch.ids:
                self._keys[batch.partition].append(keys_of(batch.ids, self._hash_key))
                self._versions[batch.partition].append(batch.versions)
                self._deleted[batch.partition].append(batch.deleted)

    def block(self, partition: int, covered: int, layout: RowLayout) -> RowBatch:
        """The empty last block of a partition."""
        none = np.empty(0, np.int64)
        hot, cold = np.empty(0, layout.hot), np.empty(0, layout.cold)
        kinds = none.astype(np.uint8)
        live = self.live(partition)
        proof = FillProof(len(live), int(live.sum(dtype=np.uint64)))
        return RowBatch(partition, covered, [], none.astype(np.uint64), none, kinds, hot, cold, [], proof)

    def live(self, partition: int) -> NDArray[np.uint64]:
        """Digests (digest_of) of the partition's rows."""
        if not self._keys[partition]:
            return np.empty(0, np.uint64)
        keys = np.concatenate(self._keys[partition])
        versions = np.concatenate(self._versions[partition])
        deleted = np.concatenate(self._deleted[partition])
        order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
        ordered = keys[order]
        last = np.append((ordered[1:] != ordered[:-1]).any(axis=1), True)
        kept = order[last]
        kept = kept[~deleted[kept]]
        return digest_of(keys[kept], versions[kept])
