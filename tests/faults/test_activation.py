"""Activation: the supervisor is killed after each of its numbered steps, and API processes while they load; requests
go on, of one generation each.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from encoders.bundle import Bundle, seeded_bundle
from infra.settings import Settings
from streams import fleet, rollout
from streams.publish import Publisher
from streams.supervisor import Supervisor
from tests.conftest import wait_until
from tests.faults.killed import killed_at, until_killed
from tests.host import NOW, CatalogueItem, Host
from tests.streams.chain import CONFIG, FEATURES, item_body
from tests.streams.test_supervisor import command, jobs, serving, state_of, supervised

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 4
DEADLINE_S = 150.0
BODIES = [item_body(f"{at}", 1, np.random.default_rng(at)) for at in range(50)]
IDS = [str(body["item_id"]) for body in BODIES]
EXACT = 1e-5  # rows are fp32


def supervise_until(settings: Settings, last: int) -> None:
    """Kills itself after that step of an activation."""
    with Supervisor(settings, retrieval=False, activation_step=killed_at(last)) as supervisor:
        while True:
            supervisor.round()


class Callers:
    """Threads that score all items again and again, each over a connection of its own, and check what they are told.
    Whoever loses his connection to a killed process makes another one."""

    def __init__(self, host: Host) -> None:
        self._host, self._stop = host, threading.Event()
        self._wanted = {name: host.reference(name, [], None, IDS, NOW) for name in host.bundles}
        assert np.abs(self._wanted["a"] - self._wanted["b"]).max() > 0.1
        self.told: list[str] = []  # generation of each answer
        self.wrong: list[str] = []
        self.lost: list[str] = []  # connections
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]

    def __enter__(self) -> Callers:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._threads:
            one.join()

    def _ask(self) -> None:
        body = {"user_id": "nobody", "candidates": IDS, "as_of": NOW}
        while not self._stop.is_set():
            try:
                with httpx.Client(base_url=self._host.client.base_url, timeout=30.0) as own:
                    while not self._stop.is_set():
                        self._check(own.post("/v1/score", json=body))
            except httpx.TransportError as error:
                self.lost.append(repr(error))

    def _check(self, answer: httpx.Response) -> None:
        found = answer.json()
        if not answer.is_success:
            self.wrong.append(answer.text)
        elif np.abs(np.array(found["scores"]) - self._wanted[found["generation"]]).max() > EXACT:
            self.wrong.append(f"not the scores of {found['generation']}")
        else:
            self.told.append(found["generation"])

    def only(self, generation: str) -> bool:
        """Whether answers come to be all of it, 30 in a row: a process looks at `serving.json` every 20 ms or later."""
        before = len(self.told)

        def settled() -> bool:
            newest = self.told[before:][-30:]
            return bool(self.wrong) or (len(newest) == 30 and set(newest) == {generation})

        wait_until(settled, f"answers are of {generation} alone", DEADLINE_S)
        return not self.wrong


def warm(settings: Settings) -> list[set[str]]:
    return [set(report.warm) for report in fleet.reports(settings)]


@contextmanager
def served(settings: Settings, bundle: Bundle, path: Path, other_path: Path) -> Iterator[Host]:
    """Generation a is served by two API processes, b is complete, and no supervisor is left."""
    other = seeded_bundle(other_path, CONFIG, 1, features=FEATURES, precision="fp32")
    host = Host(settings)
    host.bundles = {"a": bundle, "b": other}
    for body in BODIES:
        fields = {name: body[name] for name in ("item_id", "features", "crosses", "attributes")}
        item = CatalogueItem(**fields, embedding=np.array(body["embedding"], np.float32))  # type: ignore[arg-type]
        host.items[item.item_id] = item
    try:
        with supervised(settings) as first, Publisher(settings) as publisher:
            publisher.items(BODIES)
            stage = {"action": "stage", "generation": "a", "uri": path.as_uri(), "sha256": bundle.sha256}
            publisher.models([stage | {"activate_when_complete": True}])
            wait_until(lambda: serving(settings).active == "a", "a is active", DEADLINE_S)
            host.start()
            host.ready()
            publisher.models([stage | {"generation": "b", "uri": other_path.as_uri(), "sha256": other.sha256}])
            wait_until(lambda: state_of(settings, "b") == "complete", "b is complete", DEADLINE_S)
            wait_until(lambda: len(warm(settings)) == 2, "both API processes are there", DEADLINE_S)
            first.kill()
            first.wait(10)
            yield host
    finally:
        host.close()


def test_an_activation_that_is_killed_after_each_of_its_steps_is_completed(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    """Each supervisor finds what the killed one left, and is killed one step later, under requests."""
    mine = settings(partitions=2, api_processes=2)
    with served(mine, bundle, bundle_path, tmp_path / "other") as host, Callers(host) as callers:
        assert command(mine, "model", "activate", "b").returncode == 0
        for last in range(1, STEPS + 1):
            until_killed(supervise_until, mine, last)
            found = serving(mine)
            if last < 3:
                assert (found.active, found.next, found.generations["b"].state) == ("a", "b", "complete")
            else:
                assert (found.active, found.previous, found.next) == ("b", "a", None)
            if last == 2:
                assert warm(mine) == [{"a", "b"}] * 2
            assert callers.only(found.active or "")
        with supervised(mine):
            assert command(mine, "model", "rollback", "b").returncode == 0
            wait_until(lambda: serving(mine).active == "a", "a is served again", DEADLINE_S)
            assert callers.only("a")
    assert (callers.wrong, callers.lost) == ([], [])


def test_an_api_process_that_is_killed_while_it_loads_delays_the_switch_and_no_request(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    """The tensors of the next generation are a pipe: whoever loads it waits there, is waited for, and is killed."""
    mine = settings(partitions=2, api_processes=2)
    with served(mine, bundle, bundle_path, tmp_path / "other") as host:
        tensors = mine.generation_dir("b") / "bundle" / "model.safetensors"
        content = tensors.read_bytes()
        tensors.unlink()
        os.mkfifo(tensors)
        with Callers(host) as callers, supervised(mine):
            assert command(mine, "model", "activate", "b").returncode == 0
            pipe = _opened(tensors)
            wait_until(lambda: "has not loaded it yet" in serving(mine).generations["b"].reason, "it is waited for")
            said = serving(mine).generations["b"].reason
            loading = {report.pid for report in fleet.reports(mine)}
            assert all(str(pid) in said for pid in loading)
            assert said in command(mine, "model", "status").stdout
            assert callers.only("a")

            killed = max(loading)
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: killed not in {one.pid for one in fleet.reports(mine)}, "its file is removed")
            assert (serving(mine).active, serving(mine).next) == ("a", "b")
            (tensors.parent / "whole").write_bytes(content)
            (tensors.parent / "whole").replace(tensors)
            with suppress(BrokenPipeError):  # where the killed process alone had come to read
                os.set_blocking(pipe, True)
                os.write(pipe, content)
            os.close(pipe)
            wait_until(lambda: serving(mine).active == "b", "b is active", DEADLINE_S)
            wait_until(lambda: warm(mine) == [{"a", "b"}] * 2, "the killed process is replaced", DEADLINE_S)
            assert callers.only("b")
        assert callers.wrong == []
        assert len(callers.lost) <= 3  # one each of those that the killed process was answering


def _opened(pipe: Path) -> int:
    """For writing, once somebody reads it."""
    found = -1

    def read_from() -> bool:
        nonlocal found
        with suppress(OSError):
            found = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return found >= 0

    wait_until(read_from, "the next generation is being loaded")
    return found


def test_a_canary_serves_its_users_over_kills_of_everybody_and_then_all(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    """The share is in the log: a supervisor or an API process that starts anew serves the same users from it. What is
    canary stays so until it serves all, so that none of its users goes back for a while."""
    mine = settings(partitions=2, api_processes=2)
    users = [f"u{number}" for number in range(40)]
    with served(mine, bundle, bundle_path, tmp_path / "other") as host:
        wanted = {name: host.reference(name, [], None, IDS, NOW) for name in host.bundles}

        def canary_users() -> set[str]:
            """Whom b serves now; each answer is right for the generation that it names."""
            found = set()
            for user in users:
                with httpx.Client(base_url=host.client.base_url, timeout=30.0) as own:
                    answer = own.post("/v1/score", json={"user_id": user, "candidates": IDS, "as_of": NOW}).json()
                np.testing.assert_allclose(answer["scores"], wanted[answer["generation"]], rtol=0, atol=EXACT)
                found |= {user} if answer["generation"] == "b" else set()
            return found

        def of_share(share: float) -> set[str]:
            return {user for user in users if rollout.bucket("b", user) < share}

        with supervised(mine) as supervisor:
            told = command(mine, "model", "activate", "b", "--share", "0.25")
            assert (told.returncode, "25.00% of the users" in told.stdout) == (0, True)
            wait_until(lambda: serving(mine).canary is not None, "b is canary", DEADLINE_S)
            assert warm(mine) == [{"a", "b"}] * 2
            wait_until(lambda: canary_users() == of_share(0.25), "its users", DEADLINE_S)
            assert "serving: a, and 25.00% of the users b" in command(mine, "model", "status").stdout
            assert {"encode-b", "replicate-b", "encode-a", "replicate-a"} <= set(jobs(mine))
            supervisor.kill()
            supervisor.wait(10)
        killed = min(report.pid for report in fleet.reports(mine))
        os.kill(killed, signal.SIGKILL)
        with supervised(mine):
            assert command(mine, "model", "activate", "b", "--share", "0.6").returncode == 0
            wait_until(lambda: serving(mine).canary == rollout.Canary("b", 0.6), "more of them", DEADLINE_S)
            wait_until(lambda: [{"a", "b"}] * 2 == warm(mine), "the killed one is replaced", DEADLINE_S)
            assert killed not in {report.pid for report in fleet.reports(mine)}
            wait_until(lambda: canary_users() == of_share(0.6), "its users", DEADLINE_S)
            refused = command(mine, "model", "activate", "a", "--share", "0.1")
            assert (refused.returncode, "is the one that serves all" in refused.stderr) == (1, True)

            assert command(mine, "model", "activate", "b").returncode == 0
            early = of_share(0.6)
            while serving(mine).active != "b":
                assert early <= canary_users()
            wait_until(lambda: canary_users() == set(users), "all", DEADLINE_S)
            assert (serving(mine).canary, serving(mine).previous) == (None, "a")
