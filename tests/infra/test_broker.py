"""The local Kafka as its commands run it: up, status, down, restart, taken ports, strangers, a user's own broker."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from infra import processes
from infra.kafka.broker import Broker
from tests.conftest import JARS, ROOT, free_ports

pytestmark = pytest.mark.e2e


def run_kafka(command: str, environ: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    base = {name: value for name, value in os.environ.items() if not name.startswith(("FORERANK_", "KAFKA_"))}
    return subprocess.run(
        [sys.executable, "-m", "infra.kafka", command], cwd=ROOT, env=base | environ, capture_output=True, text=True
    )


def one_sentence(text: str) -> bool:
    return text.count("\n") == 1 and "Traceback" not in text and text.strip().endswith(".")


@pytest.fixture
def local(tmp_path: Path, broker: Broker) -> Iterator[dict[str, str]]:
    """Variables of a local node in a folder of its own, which uses the jars that are already here."""
    folder = tmp_path / "kafka"
    folder.mkdir()
    (folder / "jars").symlink_to(JARS / "jars")
    port, controller_port = free_ports(2)
    environ = {
        "FORERANK_KAFKA_DIR": str(folder),
        "FORERANK_KAFKA_PORT": str(port),
        "FORERANK_KAFKA_CONTROLLER_PORT": str(controller_port),
        "FORERANK_STATE": str(tmp_path / "state"),
    }
    yield environ
    run_kafka("down", environ)


def test_up_status_topics_down_and_data_survive(local: dict[str, str]) -> None:
    bootstrap = f"127.0.0.1:{local['FORERANK_KAFKA_PORT']}"
    folder = Path(local["FORERANK_KAFKA_DIR"])
    assert run_kafka("status", local).returncode == 1

    up = run_kafka("up", local)
    assert up.returncode == 0, up.stderr
    assert bootstrap in up.stdout
    assert "waiting until it answers" in up.stdout
    assert run_kafka("up", local).returncode == 0  # already running: nothing to do
    assert bootstrap in run_kafka("status", local).stdout
    listed = run_kafka("topics", local).stdout
    assert "item-updates" in listed
    assert "behaviours.dlq" in listed

    producer = KafkaProducer(bootstrap_servers=bootstrap)
    producer.send("item-updates", key=b"1", value=b"kept", partition=3).get(timeout=30)
    producer.close()
    process = processes.find("kafka", folder)
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)  # not even a clean end is needed
    assert run_kafka("up", local).returncode == 0
    assert read(bootstrap, "item-updates", 3) == [b"kept"]

    down = run_kafka("down", local)
    assert down.returncode == 0
    assert processes.find("kafka", folder) is None
    assert run_kafka("down", local).stdout == "Kafka was not running.\n"
    assert run_kafka("up", local).returncode == 0
    assert read(bootstrap, "item-updates", 3) == [b"kept"]
    assert "started" in run_kafka("logs", local).stdout

    derived = Path(local["FORERANK_STATE"]) / "serving.json"
    derived.parent.mkdir()
    derived.touch()
    wiped = run_kafka("wipe", local)
    assert (wiped.returncode, f"derived from it in {derived.parent}" in wiped.stdout) == (0, True)
    assert not derived.exists()
    assert processes.find("kafka", folder) is None
    assert not (folder / "data").exists()
    assert (folder / "jars").exists()


def test_only_loopback_is_served(broker: Broker) -> None:
    listeners = broker.properties()["listeners"].split(",")
    assert all("://127.0.0.1:" in listener for listener in listeners)


@pytest.mark.parametrize("variable", ["FORERANK_KAFKA_PORT", "FORERANK_KAFKA_CONTROLLER_PORT"])
def test_a_taken_port_is_said_and_nothing_started(local: dict[str, str], variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = run_kafka("up", local | {variable: port})
    assert found.returncode == 1
    assert one_sentence(found.stderr)
    assert port in found.stderr
    assert variable in found.stderr
    assert processes.listing(Path(local["FORERANK_KAFKA_DIR"])) == []


def test_down_leaves_a_stranger_alone(local: dict[str, str]) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        folder = Path(local["FORERANK_KAFKA_DIR"])
        (folder / "kafka.json").write_text(
            json.dumps({"name": "kafka", "pid": stranger.pid, "identity": "before", "folder": str(folder)})
        )
        assert run_kafka("down", local).stdout == "Kafka was not running.\n"
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_broker_that_cannot_start_says_where_the_reason_is(local: dict[str, str]) -> None:
    folder = Path(local["FORERANK_KAFKA_DIR"])
    assert run_kafka("up", local).returncode == 0
    assert run_kafka("down", local).returncode == 0
    (folder / "data" / "meta.properties").write_text("version=1\ncluster.id=another\nnode.id=2\n")
    found = run_kafka("up", local)
    assert found.returncode == 1
    assert one_sentence(found.stderr)
    assert str(folder / "kafka.log") in found.stderr
    assert processes.listing(folder) == []


def test_a_broker_of_the_users_own_is_checked_and_never_touched(broker: Broker, local: dict[str, str]) -> None:
    theirs = local | {"KAFKA_BOOTSTRAP": broker.bootstrap, "FORERANK_TOPIC_PREFIX": "theirs."}
    assert broker.bootstrap in run_kafka("up", theirs).stdout
    assert run_kafka("status", theirs).returncode == 0
    assert "theirs.items" in run_kafka("topics", theirs).stdout
    assert run_kafka("down", theirs).returncode == 0
    assert run_kafka("wipe", theirs).returncode == 1
    process = broker.process()
    assert process is not None
    assert process.alive()
    assert processes.listing(Path(local["FORERANK_KAFKA_DIR"])) == []


def test_an_unreachable_broker_of_the_users_own(local: dict[str, str]) -> None:
    nowhere = f"127.0.0.1:{free_ports(1)[0]}"
    for command in ("up", "status", "topics"):
        found = run_kafka(command, local | {"KAFKA_BOOTSTRAP": nowhere})
        assert found.returncode == 1
        assert one_sentence(found.stderr)
        assert nowhere in found.stderr
        assert "make kafka-up" not in found.stderr  # it would not help


def test_no_network_for_the_first_download(tmp_path: Path) -> None:
    """A proxy that is not there stands for a machine without network."""
    proxy = f"http://127.0.0.1:{free_ports(1)[0]}"
    port, controller_port = free_ports(2)
    found = run_kafka(
        "up",
        {
            "FORERANK_KAFKA_DIR": str(tmp_path),
            "FORERANK_KAFKA_PORT": str(port),
            "FORERANK_KAFKA_CONTROLLER_PORT": str(controller_port),
            **dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"], proxy),
            **dict.fromkeys(["no_proxy", "NO_PROXY"], ""),
        },
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("Apache Kafka could not be downloaded")
    assert "Traceback" not in found.stderr


def read(bootstrap: str, topic: str, partition: int) -> list[bytes]:
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", consumer_timeout_ms=20_000)
    try:
        where = TopicPartition(topic, partition)
        consumer.assign([where])
        end = consumer.end_offsets([where])[where]
        return [next(consumer).value for _ in range(end)]
    finally:
        consumer.close()
