"""One Apache Kafka node (KRaft, broker and controller in one process) on this machine's loopback address.

`up` returns only when the broker answers, or raises; `down` ends only what `up` started here; the data outlive both.
Below `folder`: `data/` (the log), `server.properties`, `kafka.log` and `kafka.json` (the process).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from infra import processes
from infra.kafka.jars import fetch
from infra.kafka.java import find_java

_UP_DEADLINE_S = 90.0
_DOWN_DEADLINE_S = 30.0


class BrokerError(RuntimeError):
    """The broker could not be started or reached; the message is one sentence for the user."""


@dataclass(frozen=True)
class Broker:
    folder: Path
    port: int
    controller_port: int
    heap_mb: int = 256
    jars: Path | None = None  # where Kafka is downloaded to; None: `folder`
    options: Mapping[str, str] = field(default_factory=dict)  # replace or add to server.properties

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        return self.folder / "kafka.log"

    def __enter__(self) -> Broker:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def process(self) -> processes.Process | None:
        """The running broker, None if it does not run."""
        return processes.find("kafka", self.folder)

    def up(self, say: Callable[[str], None] = print) -> None:
        """Start it and wait until it answers; nothing to do if it runs. Raises BrokerError, JarsError or JavaError."""
        running = self.process()
        if running:
            _wait_until_ready(self.bootstrap, running)
            return
        for port, variable in (
            (self.port, "FORERANK_KAFKA_PORT"),
            (self.controller_port, "FORERANK_KAFKA_CONTROLLER_PORT"),
        ):
            if not port_is_free(port):
                raise BrokerError(f"Port {port} is taken: set {variable} to a free one.")
        java, jars = find_java(), fetch(self.jars or self.folder, say)
        self.folder.mkdir(parents=True, exist_ok=True)
        properties = self.folder / "server.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in self.properties().items()))
        command = [str(java), "-cp", os.pathsep.join(map(str, jars)), f"-Xmx{self.heap_mb}m", *_JVM_OPTIONS]
        if not (self.data / "meta.properties").exists():
            _format(command, properties)
        process = processes.start("kafka", [*command, "kafka.Kafka", str(properties)], self.folder)
        say(f"Kafka is starting; waiting until it answers at {self.bootstrap} (a few seconds) ...")
        try:
            _wait_until_ready(self.bootstrap, process)
        except BaseException:
            processes.stop(process, _DOWN_DEADLINE_S)
            raise

    def down(self) -> bool:
        """Stop it; data stay. False if it did not run."""
        process = self.process()
        if process:
            processes.stop(process, _DOWN_DEADLINE_S)
        return process is not None

    def wipe(self) -> None:
        """Stop it and delete its data; the downloaded jars stay."""
        self.down()
        shutil.rmtree(self.data, ignore_errors=True)

    def properties(self) -> dict[str, str]:
        """server.properties: one node, loopback only, no topic made by accident, small buffers."""
        listeners = f"PLAINTEXT://{self.bootstrap},CONTROLLER://127.0.0.1:{self.controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self.controller_port}",
            "controller.listener.names": "CONTROLLER",
            "listeners": listeners,
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.data.absolute()),
            "auto.create.topics.enable": "false",  # it would have the wrong number of partitions
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "log.cleaner.dedupe.buffer.size": str(32 << 20),  # the default is half of our heap
            "log.cleaner.backoff.ms": "5000",
            "num.network.threads": "2",
            "num.io.threads": "4",
            **self.options,
        }


_JVM_OPTIONS = (
    # it shares the processors with everything else: half as busy for a small load is worth more than its highest speed
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Djava.awt.headless=true",
    "-Djava.net.preferIPv4Stack=true",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaConfig=warn",  # a page of defaults at each start
)


@contextmanager
def admin_of(bootstrap: str, timeout_s: float = 10.0) -> Iterator[KafkaAdminClient]:
    """An admin client of kafka-python. Raises BrokerError if the broker does not answer within the time."""
    advice = "check KAFKA_BOOTSTRAP" if os.environ.get("KAFKA_BOOTSTRAP") else "start it with `make kafka-up`"
    unreachable = f"The Kafka broker at {bootstrap} cannot be reached: {advice}."
    servers = [server.strip() for server in bootstrap.split(",")]
    if not any(_accepts(server) for server in servers):  # quick, and without kafka-python's log of every attempt
        raise BrokerError(unreachable)
    try:
        client = KafkaAdminClient(bootstrap_servers=servers, bootstrap_timeout_ms=int(timeout_s * 1000))
    except KafkaError as error:
        raise BrokerError(unreachable) from error
    try:
        yield client
    finally:
        client.close()


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _accepts(server: str) -> bool:
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def _format(command: list[str], properties: Path) -> None:
    cluster = "f" + secrets.token_urlsafe(16)[1:]  # base64 of 16 bytes that does not begin with a dash
    formatted = subprocess.run(
        [*command, "kafka.tools.StorageTool", "format", "--cluster-id", cluster, "--config", str(properties)],
        capture_output=True,
        text=True,
        check=False,
    )
    if formatted.returncode != 0:
        reason = (formatted.stderr.strip() or formatted.stdout.strip() or "no reason given").splitlines()[-1]
        raise BrokerError(f"Kafka could not prepare its data folder: {reason}")


def _wait_until_ready(bootstrap: str, process: processes.Process) -> None:
    deadline = time.monotonic() + _UP_DEADLINE_S
    while time.monotonic() < deadline:
        if not process.alive():
            raise BrokerError(f"Kafka ended while starting; the reason is at the end of {process.log}.")
        try:
            with admin_of(bootstrap, timeout_s=5.0) as admin:
                admin.list_topics()
                return
        except (BrokerError, KafkaError):
            time.sleep(0.05)
    raise BrokerError(f"Kafka did not answer within {_UP_DEADLINE_S:.0f} s; its log is {process.log}.")
