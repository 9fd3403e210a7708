"""compose.yaml and the Dockerfile agree with the settings, the locked Kafka and the layout; read without Docker."""

import dataclasses
import re
from importlib.util import find_spec
from typing import Any

import pytest
import yaml

from infra.kafka import jars
from infra.settings import Settings, load, variable
from tests.conftest import ROOT

COMPOSE = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
OURS = ["topics", "nearline", "api"]


def interpolated(value: str, environ: dict[str, str]) -> str:
    """Compose's `${NAME:-default}`."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: environ.get(match[1]) or match[2], value)


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = COMPOSE["services"][name]
    return found


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_and_parses(name: str) -> None:
    environ = {key: interpolated(value, {}) for key, value in service(name)["environment"].items()}
    assert set(environ) <= {variable(field.name) for field in dataclasses.fields(Settings)}
    settings = load(environ)
    assert settings.kafka_bootstrap == "kafka:9092"
    assert settings.api_port == 8080


def test_nearline_and_api_are_one_host_with_the_same_stores() -> None:
    nearline, api = service("nearline"), service("api")
    assert nearline["environment"] == api["environment"]
    assert nearline["environment"]["FORERANK_HOST"]
    assert nearline["volumes"] == api["volumes"]
    assert api["pid"] == "service:nearline"
    state = nearline["environment"]["FORERANK_STATE"]
    assert any(state.startswith(volume.split(":")[1]) for volume in nearline["volumes"] if volume.startswith("state:"))


def test_kafka_is_the_locked_version_and_its_addresses_agree() -> None:
    kafka = service("kafka")
    version = kafka["image"].removeprefix("apache/kafka:")
    assert f"kafka_2.13-{version}.jar" in jars.locked()
    advertised = dict(entry.split("://") for entry in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(","))
    assert advertised == {"INSIDE": "kafka:9092", "OUTSIDE": Settings().kafka_bootstrap}
    listeners = {entry.split("://")[0] for entry in kafka["environment"]["KAFKA_LISTENERS"].split(",")}
    protocols = kafka["environment"]["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(",")
    assert listeners == {entry.split(":")[0] for entry in protocols}
    assert kafka["environment"]["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_only_loopback_is_published() -> None:
    ports = [interpolated(port, {}) for name in COMPOSE["services"] for port in service(name).get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", OURS)
def test_the_commands_exist(name: str) -> None:
    python, flag, module, _ = service(name)["command"]
    assert (python, flag) == ("python", "-m")
    assert find_spec(f"{module}.__main__")


def test_volumes_and_dependencies_are_declared() -> None:
    for name in COMPOSE["services"]:
        for volume in service(name).get("volumes", []):
            source = interpolated(volume, {}).split(":")[0]
            assert source in COMPOSE["volumes"] or source.startswith(("./", "../", "/"))
        assert set(service(name).get("depends_on", {})) <= set(COMPOSE["services"])


def test_the_image_holds_every_package_hashed_and_is_not_root() -> None:
    text = (ROOT / "infra" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE)
    assert sorted(copied) == ["api", "encoders", "index", "infra", "streams"]
    assert all((ROOT / name).is_dir() for name in copied)
    assert "--require-hashes -r requirements/base.txt" in text
    assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE)
    assert "://" not in text  # no address of an index
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == {*copied, "requirements"}
    declared = set(re.findall(r"^ARG (\w+)=", text, re.MULTILINE))
    assert declared == set(service("api")["build"]["args"])
