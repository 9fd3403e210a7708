"""Shared by all tests: one real Kafka broker for the session, settings for each test, and the real data set."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import httpx
import hypothesis
import pytest
from playwright.sync_api import Browser, sync_playwright

from infra.kafka.broker import Broker, BrokerError
from infra.settings import Settings

hypothesis.settings.register_profile("forerank", deadline=None)  # how long an example takes is no property
hypothesis.settings.load_profile("forerank")

ROOT = Path(__file__).parent.parent
JARS = ROOT / ".local" / "kafka"  # where `make kafka-up` downloads Kafka to; used again here


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listened on a moment ago."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def wait_until(
    there: Callable[[], object],
    what: str,
    deadline_s: float = 60.0,
    alive: Callable[[], None] = lambda: None,
    log: Callable[[], str] = str,
) -> None:
    """Poll until something is there. Raises AssertionError, with what `log` says; `alive` may raise one before."""
    deadline = time.monotonic() + deadline_s
    while not there():
        alive()
        assert time.monotonic() < deadline, f"{what} did not come true in {deadline_s:.0f} s; {log()}"
        time.sleep(0.02)


def answered(there: Callable[[], bool]) -> bool:
    """`there`, false where nobody listens yet."""
    try:
        return there()
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A running broker. It compacts eagerly where a topic asks for it (`segment.ms`, `min.cleanable.dirty.ratio`)."""
    folder = tmp_path_factory.mktemp("kafka")
    options = {"log.cleaner.backoff.ms": "200", "log.retention.check.interval.ms": "1000"}
    for attempt in range(3):
        port, controller_port = free_ports(2)
        node = Broker(folder, port, controller_port, jars=JARS, options=options)
        try:
            node.up()
            break
        except BrokerError as error:
            if "taken" not in str(error) or attempt == 2:  # somebody was quicker with the port
                raise
    try:
        yield node
    finally:
        node.wipe()


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Callable[..., Settings]:
    """`settings(**changes)`: the broker, topics of this test alone (a new prefix each call), state under tmp_path."""

    def make(**changes: object) -> Settings:
        name = uuid.uuid4().hex[:8]
        base = Settings(
            kafka_bootstrap=broker.bootstrap,
            topic_prefix=f"t{name}.",
            state=tmp_path / f"state-{name}",
            host=f"host-{name}",
            api_port=free_ports(1)[0],
        )
        return dataclasses.replace(base, **changes)  # type: ignore[arg-type]

    return make


def debian_program(name: str, package: str) -> str:
    """Path of a program that a Debian package brings; skips the test where it is missing."""
    return shutil.which(name) or pytest.skip(f"needs {name}: apt install {package}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With FORERANK_CI=1 a skip because of a missing Debian package (its reason says what to install) is a failure."""
    report = yield
    if report.skipped and "apt install" in str(report.longrepr) and os.environ.get("FORERANK_CI") == "1":
        report.outcome, report.longrepr = "failed", str(report.longrepr)
    return report


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window. Per test: Playwright's loop would hinder other tests' asyncio."""
    program = debian_program("chromium", "chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield chromium
        finally:
            chromium.close()


@pytest.fixture(scope="session")
def ml100k() -> Path:
    """The folder of the MovieLens 100K data in the published form (`DATA=` of the demo)."""
    given = os.environ.get("FORERANK_TEST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data" / "ml-100k"
    if folder.is_dir():
        return folder
    shared = ROOT.parent / "shared"
    if os.environ.get("FORERANK_CI") == "1" and shared.is_dir():
        pytest.fail(f"{folder} is missing although {shared} is there")
    return pytest.skip("MovieLens 100K is not here: set FORERANK_TEST_DATA to its folder")
