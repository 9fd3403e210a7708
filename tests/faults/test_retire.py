"""Retiring a generation: the supervisor is killed after each numbered step and another one completes it; what is needed
is not retired; and the topic stays while another host needs it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from encoders.bundle import Bundle
from infra.kafka.broker import admin_of
from infra.settings import Settings
from streams.publish import Publisher
from streams.supervisor import Supervisor
from tests.conftest import wait_until
from tests.faults.killed import killed_at, until_killed
from tests.streams.chain import Chain, check_rows, item_body, oracle
from tests.streams.test_supervisor import command, jobs, running, serving, state_of, supervised

STEPS = 7
DEADLINE_S = 150.0


def supervise_until(settings: Settings, last: int) -> None:
    """Kills itself after that step."""
    with Supervisor(settings, retrieval=False, step=killed_at(last)) as supervisor:
        while True:
            supervisor.round()


def left_of(settings: Settings, generation: str) -> set[str]:
    """Whatever there still is of the generation, by kind: files of this host, topics, groups, processes; not those of
    other tests on the same broker, whose generations may have its name.
    """
    found = {("process", name) for name in jobs(settings)}
    for folder, folders, files in os.walk(settings.state):
        found |= {(Path(folder).name, name) for name in (*folders, *files)}
    with admin_of(settings.kafka_bootstrap) as admin:
        kafka = [("topic", name) for name in admin.list_topics()]
        kafka += [("group", group["group_id"]) for group in admin.list_groups()]
        found |= {(kind, name) for kind, name in kafka if name.startswith(settings.topic_prefix)}
    ours = re.compile(rf"(.*[-.])?{re.escape(generation)}(\.(json|log)(\..*)?)?")
    return {f"{kind} {name}" for kind, name in found if ours.fullmatch(name)}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_retirement_that_is_killed_after_each_of_its_steps_is_completed(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    """Each supervisor finds what the killed one left, and is killed one step later."""
    host = settings(partitions=2)
    host = dataclasses.replace(host, checkpoint_uri=str(host.state / "checkpoints"))
    chain = Chain(host, bundle_path)
    bodies = [item_body(f"{at}", 1, np.random.default_rng(at)) for at in range(50)]
    stage = {"action": "stage", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}
    with supervised(host) as first, Publisher(host) as publisher:
        publisher.items(bodies)
        publisher.models([stage | {"generation": "live", "activate_when_complete": True}])
        wait_until(lambda: serving(host).active == "live", "live is active", DEADLINE_S)
        publisher.models([stage | {"generation": "gone"}])
        wait_until(lambda: state_of(host, "gone") == "complete", "gone is complete", DEADLINE_S)
        wait_until(lambda: running(host, "encode-gone") and running(host, "replicate-gone"), "its jobs are in groups")
        os.kill(jobs(host)["replicate-gone"], signal.SIGUSR1)
        store = Path(host.checkpoint_uri) / host.topic("gone")
        wait_until(lambda: list(store.glob("*/manifest.json")), "it has a checkpoint", DEADLINE_S)
        for torn in (host.heartbeat_dir / "verify-gone.json.new", host.state / "logs" / "verify-gone.json.tmp"):
            torn.write_bytes(b"{")  # its writer was killed
        before = left_of(host, "gone")
        names = ("rows.gone", "encode-gone", f"replicate-{host.host}-gone")
        kafka = {f"{kind} {host.topic(name)}" for kind, name in zip(("topic", "group", "group"), names, strict=True)}
        assert (
            kafka
            | {
                f"checkpoints {host.topic('gone')}",
                "generations gone",
                "process encode-gone",
                "heartbeats encode-gone.json",
            }
            <= before
        )
        live = {name: pid for name, pid in jobs(host).items() if name.endswith("-live")}
        first.kill()
        first.wait(10)

        publisher.models([{"action": "retire", "generation": "gone"}])
        for last in range(1, STEPS + 1):
            until_killed(supervise_until, host, last)
            after = left_of(host, "gone")
            assert after < before or last == 5, f"step {last} deletes something"  # 5 is a report
            assert state_of(host, "gone") == ("retiring" if last < 5 else "retired")
            assert (serving(host).active, jobs(host).items() >= live.items()) == ("live", True)
            before = after
        assert before == set()

        with supervised(host):
            wait_until(lambda: running(host, "ingest"), "a supervisor goes on", DEADLINE_S)
            refused = command(host, "model", "stage", str(bundle_path), "--generation", "gone")
            assert (refused.returncode, "never used twice" in refused.stderr) == (1, True)
            assert left_of(host, "gone") == set()
            assert "  gone: retired" in command(host, "status").stdout
        check_rows(chain, "live", bundle, oracle(bodies))
