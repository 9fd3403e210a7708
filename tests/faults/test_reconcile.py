"""A host that was away for longer than `rows.<generation>` is kept: its index is made right from `items`, it goes on
answering requests meanwhile and says that it is not ready, whatever is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from kafka import TopicPartition

from encoders.bundle import Bundle
from index.keys import keys_of
from infra.kafka.broker import admin_of
from infra.settings import Settings, environment
from streams import reconcile, rollout
from streams.groups import group_admin
from streams.publish import Publisher
from streams.worker import NEEDS_REFILL, Job
from tests.conftest import answered, wait_until
from tests.faults.killed import killed_at, until_killed
from tests.streams.chain import ROOT, Chain, check_rows, item_body, oracle, patch_body, running_chain
from tests.streams.test_supervisor import jobs, serving, supervised

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 4
DEADLINE_S = 150.0


def reconcile_until(settings: Settings, generation: str, last: int) -> None:
    """Kills itself after that step."""
    name = f"reconcile-{generation}"
    Job.start(settings, name, name, lambda job: reconcile.prepare(job, generation, killed_at(last)))


def encoded(chain: Chain, generation: str) -> None:
    """Waits until encode has handled all of `items`, and ingest all that was published."""
    chain.settle()
    items, group = chain.settings.topic("items"), chain.settings.topic(f"encode-{generation}")
    with group_admin(chain.settings) as groups:
        wait_until(lambda: groups.committed(group, items) == groups.ends(items), "encode has everything", DEADLINE_S)


def forget_rows(chain: Chain, generation: str) -> None:
    """As if retention had passed: all blocks so far are gone."""
    topic, ends = chain.settings.topic(f"rows.{generation}"), chain.end_offsets(f"rows.{generation}")
    with admin_of(chain.settings.kafka_bootstrap) as admin:
        admin.delete_records({TopicPartition(topic, p): end for p, end in enumerate(ends)})


def away(random: np.random.Generator) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """What is published before the host is away, and while it is: updates, patches, new items, deletions, one item
    that comes back.
    """
    first = [item_body(f"{k}", 1, random) for k in range(100)]
    second = [item_body(f"{k}", 2, random) for k in range(30)] + [patch_body(f"{k}", 3, random) for k in range(20, 40)]
    second += [{"item_id": f"{k}", "version": 4, "deleted": True} for k in range(50, 70)]
    second += [item_body(f"{k}", 5, random) for k in (60, *range(200, 210))]
    return first, second


def test_killed_after_any_step_it_is_repeated_and_then_replicate_goes_on(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: object
) -> None:
    random = np.random.default_rng(1)
    first, second = away(random)
    host = settings(partitions=2, session_timeout_ms=2_000, tombstone_days=1e-5)
    with running_chain(host, bundle_path) as chain:  # type: ignore[arg-type]
        chain.add_generation("one")
        chain.start("ingest", "encode:one", "replicate:one")
        chain.publish([*first, item_body("forgotten", 50, random)])
        chain.settle("one")
        wait_until(lambda: chain.filled("one"), "the fill is proven", DEADLINE_S)
        assert chain.kill("replicate:one", signal.SIGTERM) == 0
        arena = chain.arena("one")  # as an API process has it open
        chain.publish([*second, {"item_id": "forgotten", "version": 60, "deleted": True}])
        tombstone = (b"forgotten", None)
        wait_until(lambda: tombstone in [(one.key, one.value) for one in chain.read("items")], "ingest forgets it")
        second.append(item_body("forgotten", 2, random))  # below the version that the index has
        chain.publish(second[-1:])
        encoded(chain, "one")
        forget_rows(chain, "one")
        bodies = [*first, *second]
        stay = keys_of([f"{k}" for k in range(20)], chain.settings.hash_key.encode())
        for last in range(1, STEPS + 1):
            chain.start("replicate:one")
            wait_until(lambda: chain.ended("replicate:one") is not None, "replicate ends", DEADLINE_S)
            assert chain.ended("replicate:one") == NEEDS_REFILL
            until_killed(reconcile_until, chain.settings, "one", last)
            assert arena.progress().filled.all() == (last in (1, 4)), "trusted only before and after"
            assert arena.gather(stay).found.all(), "what is there is read on"
            live = [item_body(f"{k}", 10 + last, random) for k in range(last, 8)]
            live += [{"item_id": f"{20 + last}", "version": 10, "deleted": True}, patch_body("10", 10 + last, random)]
            chain.publish(live)  # a live encoder goes on meanwhile
            bodies += live
        chain.start("replicate:one")
        chain.settle("one")
        assert chain.filled("one")
        check_rows(chain, "one", bundle, oracle(bodies))


@contextmanager
def served(settings: Settings) -> Iterator[httpx.Client]:
    """The API of a host."""
    environ = {**os.environ, **environment(settings), "OMP_NUM_THREADS": "1"}
    with (settings.state / "api.out").open("ab") as log:
        api = subprocess.Popen([sys.executable, "-m", "api", "serve"], cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.api_port}", timeout=30.0) as client:
            wait_until(lambda: answered(lambda: client.get("/readyz").is_success), "the API is ready", DEADLINE_S)
            yield client
    finally:
        api.terminate()
        api.wait(30)


def missing(client: httpx.Client, names: list[str]) -> list[str]:
    """Which of these candidates of a stranger have no row."""
    answer = client.post("/v1/score", json={"user_id": "nobody", "candidates": names})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["missing"])


def test_a_served_generation_is_reconciled_while_it_is_served(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: object
) -> None:
    host = settings(partitions=2, session_timeout_ms=2_000)
    first, second = away(np.random.default_rng(2))
    chain = Chain(host, bundle_path)  # type: ignore[arg-type]
    before = [str(k) for k in range(100)]
    stage = {"action": "stage", "generation": "one", "activate_when_complete": True}
    with supervised(host), Publisher(host) as publisher:
        publisher.items(first)
        publisher.models([stage | {"uri": bundle_path.as_uri(), "sha256": bundle.sha256}])  # type: ignore[attr-defined]
        wait_until(lambda: serving(host).active == "one", "one is active", DEADLINE_S)
        wait_until(lambda: int(chain.arena("one").progress().count.sum()) == 100, "all rows are there", DEADLINE_S)
    with served(host) as client:
        assert missing(client, before) == []
        try:
            chain.start("ingest", "encode:one")  # of another host, as it were
            chain.publish(second)
            encoded(chain, "one")
        finally:
            chain.stop()
        forget_rows(chain, "one")
        with supervised(host):
            wait_until(lambda: "reconcile-one" in jobs(host), "it is reconciled", DEADLINE_S)
            pid = jobs(host)["reconcile-one"]
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: client.get("/readyz").status_code == 503, "the host is not ready")
            assert rollout.REMADE in client.get("/readyz").json()["detail"]
            assert "replicate-one" not in jobs(host)
            assert serving(host).active == "one"
            assert missing(client, before) == []  # served from what there is
            os.kill(pid, signal.SIGCONT)
            while client.get("/readyz").status_code == 503:
                assert set(missing(client, before)) <= {str(k) for k in range(50, 70)}
            assert missing(client, before) == [str(k) for k in range(50, 70) if k != 60]
            assert missing(client, [str(k) for k in range(200, 210)]) == []
            check_rows(chain, "one", bundle, oracle([*first, *second]))
            wait_until(lambda: "replicate-one" in jobs(host), "replicate goes on", DEADLINE_S)
