"""A host whose folder was deleted, and one that was never there: from a checkpoint with the rest from Kafka, from Kafka
alone, or from `items`; always to the same rows.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest

from encoders.bundle import Bundle
from infra.settings import Settings
from streams import rollout
from streams.checkpoints import Manifest
from streams.heartbeat import read_heartbeat
from streams.publish import Publisher
from streams.worker import NEEDS_REFILL
from tests.conftest import wait_until
from tests.faults.test_reconcile import DEADLINE_S, away, encoded, forget_rows
from tests.streams.chain import Chain, check_rows, item_body, oracle, running_chain
from tests.streams.test_supervisor import jobs, running, serving, supervised

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def finished(settings: Settings, generation: str) -> list[str]:
    """The checkpoints that have a manifest, oldest first."""
    store, root = fsspec.core.url_to_fs(f"{settings.checkpoint_uri}/{settings.topic_prefix}{generation}")
    found = store.glob(f"{root}/*/manifest.json")
    return sorted(str(path).split("/")[-2] for path in found)


def manifest(settings: Settings, generation: str) -> Manifest:
    """Of the newest checkpoint."""
    store, root = fsspec.core.url_to_fs(f"{settings.checkpoint_uri}/{settings.topic_prefix}{generation}")
    raw = store.cat(f"{root}/{finished(settings, generation)[-1]}/manifest.json")
    return msgspec.json.decode(raw, type=Manifest)


def replayed(chain: Chain, generation: str) -> int:
    """Blocks that the present replicate has handled."""
    beat = read_heartbeat(chain.settings.heartbeat_dir, f"replicate-{generation}")
    assert beat is not None
    return beat.handled if beat.pid == chain.pid(f"replicate:{generation}") else -1


def digests(chain: Chain) -> tuple[list[int], list[int]]:
    found = chain.progress("one")
    assert found is not None
    return found.count.tolist(), found.digest.tolist()


def test_a_deleted_index_comes_back_from_a_checkpoint_from_kafka_or_from_items(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    """And a second host starts from the first one's checkpoint."""
    random = np.random.default_rng(1)
    first, second = away(random)
    host = settings(partitions=2, session_timeout_ms=2_000, checkpoint_uri=f"file://{tmp_path}/store")
    with running_chain(host, bundle_path) as chain:
        chain.add_generation("one")
        chain.start("ingest", "encode:one", "replicate:one")
        for at in range(0, len(first), 5):  # many blocks
            chain.publish(first[at : at + 5])
            chain.settle("one")
        wait_until(lambda: chain.filled("one"), "the fill is proven", DEADLINE_S)
        for _ in range(2):
            had = finished(host, "one")
            os.kill(chain.pid("replicate:one"), signal.SIGUSR1)
            wait_until(lambda had=had: set(finished(host, "one")) - set(had), "a checkpoint", DEADLINE_S)  # type: ignore[misc]
        chain.publish(second)
        chain.settle("one")
        bodies, wanted = [*first, *second], digests(chain)
        index = host.generation_dir("one") / "n2o"

        def lost(blocks: int, **changes: str) -> None:
            """The folder is deleted under the running job, which ends; the next one has to replay so many blocks."""
            before = chain.arena("one")
            shutil.rmtree(index)
            wait_until(lambda: chain.ended("replicate:one") is not None, "replicate ends", DEADLINE_S)
            chain.settings = dataclasses.replace(host, **changes)
            chain.start("replicate:one")
            chain.settle("one")
            wait_until(lambda: chain.filled("one"), "the rows are proven", DEADLINE_S)
            wait_until(lambda: replayed(chain, "one") == blocks, f"{blocks} blocks are replayed", DEADLINE_S)
            assert digests(chain) == wanted
            check_rows(chain, "one", bundle, oracle(bodies))
            assert before.replaced()

        total = sum(chain.end_offsets("rows.one"))
        rest = total - sum(manifest(host, "one").rows_offset)
        assert 0 < rest < total / 2
        lost(rest)
        lost(total, checkpoint_uri="")  # from Kafka alone

        # another host, whose index was never there
        other = dataclasses.replace(host, host=f"{host.host}-b", state=tmp_path / "state-b")
        with running_chain(other, bundle_path) as beside:
            beside.add_generation("one")
            beside.start("replicate:one")
            wait_until(lambda: beside.filled("one") and digests(beside) == wanted, "it has all rows", DEADLINE_S)
            wait_until(lambda: replayed(beside, "one") == rest, f"{rest} blocks are replayed", DEADLINE_S)
            check_rows(beside, "one", bundle, oracle(bodies))

        # the checkpoint's next blocks are gone, as is the start of the log
        encoded(chain, "one")
        forget_rows(chain, "one")
        shutil.rmtree(index)
        wait_until(lambda: chain.ended("replicate:one") is not None, "replicate ends", DEADLINE_S)
        chain.settings = host
        chain.start("replicate:one")
        wait_until(lambda: chain.ended("replicate:one") is not None, "replicate ends", DEADLINE_S)
        assert chain.ended("replicate:one") == NEEDS_REFILL
        chain.start("reconcile:one")
        wait_until(lambda: chain.ended("reconcile:one") is not None, "it is reconciled", DEADLINE_S)
        assert chain.ended("reconcile:one") == 0, chain.log("reconcile:one").read_text()
        assert digests(chain) == wanted
        late = [item_body(f"{k}", 9, random) for k in range(5)]
        chain.publish(late)
        chain.start("replicate:one")
        chain.settle("one")
        check_rows(chain, "one", bundle, oracle([*bodies, *late]))


def test_a_host_that_lost_its_generation_is_not_ready_until_it_has_it_again(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    """Bundle and index are deleted under the running host, and the start of the log is gone."""
    host = settings(partitions=2, session_timeout_ms=2_000)
    chain = Chain(host, bundle_path)
    bodies = [item_body(f"{k}", 1, np.random.default_rng(k)) for k in range(100)]
    stage = {"action": "stage", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}
    with supervised(host), Publisher(host) as publisher:
        publisher.items(bodies)
        publisher.models([stage | {"generation": "one", "activate_when_complete": True}])
        wait_until(lambda: serving(host).active == "one", "one is active", DEADLINE_S)
        wait_until(lambda: running(host, "replicate-one"), "replicate runs", DEADLINE_S)
        forget_rows(chain, "one")
        reasons = set()

        def reason() -> str:
            found = serving(host).generations["one"].reason
            reasons.add(found)
            return found

        host.generation_dir("one").rename(host.state / "gone")
        wait_until(lambda: reason() == rollout.REMADE, "it is not ready", DEADLINE_S)
        wait_until(lambda: reason() == "", "it is ready again", DEADLINE_S)
        assert reasons == {"", rollout.REMADE}
        assert serving(host).active == "one"
        check_rows(chain, "one", bundle, oracle(bodies))
        wait_until(lambda: {"replicate-one", "encode-one"} <= set(jobs(host)), "its jobs run", DEADLINE_S)
