"""Two hosts on one cluster, as two sets of processes: a generation is activated, rolled back and retired on both, while
one of them lags behind or is dead.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from encoders.bundle import Bundle
from infra import processes
from infra.settings import Settings
from streams.publish import Publisher
from tests.conftest import wait_until
from tests.faults.test_retire import left_of
from tests.streams.chain import Chain, check_rows, item_body, oracle
from tests.streams.test_supervisor import command, jobs, running, serving, state_of, supervised

LIMIT_S = 240.0


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_hosts_agree_however_far_each_of_them_is(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    one = settings(partitions=2)
    two = dataclasses.replace(one, host=f"{one.host}-two", state=one.state.parent / "two")
    chains = [Chain(host, bundle_path) for host in (one, two)]
    random = np.random.default_rng(4)
    bodies = [item_body(f"{at}", 1, random) for at in range(60)]
    stage = {"action": "stage", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}

    def active(name: str, *hosts: Settings) -> None:
        wait_until(lambda: all(serving(host).active == name for host in hosts), f"{name} is active", LIMIT_S)

    with ExitStack() as stack, Publisher(one) as publisher:
        first = stack.enter_context(supervised(one))
        second = stack.enter_context(supervised(two))
        publisher.items(bodies)
        publisher.models([stage | {"generation": "g1", "activate_when_complete": True}])
        active("g1", one, two)

        # one host lags: it hangs while the next generation fills, the other one goes on without it
        publisher.models([stage | {"generation": "g2"}])
        wait_until(lambda: "replicate-g2" in jobs(two), "the second host fills g2 too", LIMIT_S)
        hanging = [second.pid, jobs(two)["replicate-g2"]]
        for pid in hanging:
            os.kill(pid, signal.SIGSTOP)
        behind = state_of(two, "g2")
        assert behind in ("staged", "filling")
        wait_until(lambda: state_of(one, "g2") == "complete", "g2 is complete on the first host", LIMIT_S)
        publisher.models([{"action": "activate", "generation": "g2"}])
        active("g2", one)
        assert (serving(two).active, state_of(two, "g2")) == ("g1", behind)
        for pid in hanging:
            os.kill(pid, signal.SIGCONT)
        active("g2", two)

        publisher.models([{"action": "rollback", "generation": "g2"}])
        active("g1", one, two)
        assert [state_of(host, "g2") for host in (one, two)] == ["former", "former"]

        # one host dies; what happens meanwhile it finds when it comes back
        second.kill()
        second.wait(10)
        for job in processes.listing(two.state / "logs"):
            processes.stop(job, 0.0)
        changed = [item_body(f"{at}", 2, random) for at in range(30)]
        publisher.items(changed)
        publisher.models([{"action": "activate", "generation": "g2"}])
        active("g2", one)
        publisher.models([stage | {"generation": "g3", "activate_when_complete": True}])
        active("g3", one)
        publisher.models([{"action": "retire", "generation": "g1"}])
        wait_until(lambda: state_of(one, "g1") == "retired", "g1 is retired on the first host", LIMIT_S)
        assert f"topic {one.topic('rows.g1')}" in left_of(one, "g1")  # the dead host may need it
        assert (serving(two).active, state_of(two, "g1")) == ("g1", "active")

        second = stack.enter_context(supervised(two))
        active("g3", two)
        wait_until(lambda: state_of(two, "g1") == "retired", "g1 is retired on the second host", LIMIT_S)
        wait_until(
            lambda: not left_of(one, "g1") | left_of(two, "g1"),
            "nothing is left of g1",
            LIMIT_S,
            log=lambda: "; ".join(
                f"{left_of(host, 'g1')}, {serving(host).generations['g1']}, supervisor's status {process.poll()}"
                for host, process in ((one, first), (two, second))
            ),
        )
        wanted = oracle([*bodies, *changed])
        for host, chain in zip((one, two), chains, strict=True):
            wait_until(lambda host=host: running(host, "replicate-g3"), "replicate runs", LIMIT_S)  # type: ignore[misc]
            ends = chain.end_offsets("items")
            wait_until(
                lambda chain=chain, ends=ends: (chain.arena("g3").progress().covered + 1).tolist() == ends,  # type: ignore[misc]
                "g3 is up to date",
                LIMIT_S,
            )
            check_rows(chain, "g3", bundle, wanted)
        digests = [chain.arena("g3").progress().digest.tolist() for chain in chains]
        assert digests[0] == digests[1]
        said = command(one, "model", "status").stdout
        assert f"host {two.host}, heard of " in said
        assert "g3 active" in said
        assert "OTHER ROWS" not in said
