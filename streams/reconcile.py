"""Reconcile: makes this host's index of one generation right again from `items` alone, where blocks that it needs are
no longer in Kafka.

The supervisor runs it in place of replicate, which has ended with `needs refill`. The rows that are there stay, and
requests go on reading them:

    1  take the ends of `rows.<generation>`, from which replicate will go on
    2  forget how far the index is, but none of its rows
    3  encode all of `items` up to its ends, which are taken after step 1, and apply the rows
    4  in one write: delete the rows that step 3 did not bring, and store that `items` is covered up to those ends with
       count and digest as step 3 had them, and the offsets of step 1
    5  end; replicate goes on

Nothing is missing between 3 and 5: a block before the offsets of step 1 was written before the ends of step 3 were
taken, so it has no later record of `items`, and what later blocks repeat is skipped. Nothing comes back: what was
deleted is not in `items`, or as its deletion. A refill through `rows.<generation>` could not do it: live blocks arrive
in between, and what they cover is skipped. Killed before 4, the index covers something and has no offset in
`rows.<generation>`, by which replicate knows that all steps have to be repeated; after 4 nothing is left to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from encoders.bundle import BundleError, load_bundle
from index.errors import StoreError
from index.n2o import N2OWriter
from infra.settings import Settings
from streams.bulk import open_reader
from streams.encode import Encode
from streams.fill import Proof, as_records
from streams.groups import group_admin
from streams.worker import BAD_BUNDLE, Job, JobError

_UNCHANGED = -2  # as a block's offset in `rows.<generation>`: it came from elsewhere

Step = Callable[[int], object]


async def prepare(job: Job, generation: str, step: Step = int) -> None:
    """Steps 1 to 4; `step(number)` is called after each. Raises JobError."""
    settings, folder = job.settings, job.settings.generation_dir(generation)
    try:
        bundle = await asyncio.to_thread(load_bundle, folder / "bundle")
    except BundleError as error:
        raise JobError(f"bad bundle: {error}", BAD_BUNDLE) from error
    torch.set_num_threads(1)
    encode = Encode(settings, generation, bundle, job.send, list)
    try:
        writer = await asyncio.to_thread(
            N2OWriter, folder / "n2o", encode.layout, settings.partitions, settings.hash_key.encode()
        )
    except StoreError as error:
        raise JobError(str(error)) from error
    job.say("reconciling")
    # a second time where the index had newer versions than `items` has: such items were forgotten, and made again
    for by_version in (True, False):
        if await _reconcile(job, encode, writer, settings.topic(f"rows.{generation}"), by_version, step):
            await asyncio.to_thread(writer.close)
            return
    raise JobError(f"the rows of generation {generation} are not those of items after all of them were applied")


async def _reconcile(job: Job, encode: Encode, writer: N2OWriter, topic: str, by_version: bool, step: Step) -> bool:
    """Whether the index is right."""
    settings = job.settings
    following = await asyncio.to_thread(_ends, settings, topic)
    step(1)
    writer.reconsider()
    step(2)
    proof = Proof(settings.partitions, settings.hash_key.encode())
    ends: list[int] = []
    # Twice, the second time what was written during the first. Of an item that changed then, compaction may have taken
    # the older record before it was read, and the block of the newer one may have no more than a patch.
    for _ in range(2):
        async with open_reader(settings, settings.topic("items"), ends or None) as reader:
            async for found in reader.batches():
                by_partition = as_records(found)
                covered = {partition: records[-1].offset for partition, records in by_partition.items()}
                batches, _refused = encode.rows(by_partition, covered)  # encode has sent their dead letters
                proof.add(batches)
                writer.apply([(batch, _UNCHANGED) for batch in batches], by_version)
                job.handled(sum(map(len, by_partition.values())))
            ends = reader.ends
    step(3)
    live = [proof.live(partition) for partition in range(settings.partitions)]
    whole = await asyncio.to_thread(writer.settle, live, [end - 1 for end in ends], following)
    if whole:
        step(4)
    return whole


def _ends(settings: Settings, topic: str) -> list[int]:
    with group_admin(settings) as groups:
        return groups.ends(topic)


def run(settings: Settings, generation: str) -> None:
    """Ends the process."""
    name = f"reconcile-{generation}"
    Job.start(settings, name, name, lambda job: prepare(job, generation))
