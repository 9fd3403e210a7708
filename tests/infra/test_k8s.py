"""infra/k8s agrees with the settings, the commands, the API's routes and the image; read without a cluster."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.app import _operation_routes
from api.service import Service
from infra.settings import Settings, load, variable
from tests.conftest import ROOT

FOLDER = ROOT / "infra" / "k8s"
README = (ROOT / "README.md").read_text()
PLACE = "GENERATION"


def documents(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """What `kubectl kustomize` would give: all that the kustomization names."""
    named = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert {path.name for path in folder.glob("*.yaml")} == {"kustomization.yaml", *named["resources"]}
    assert [(folder / path).resolve() for path in named["components"]] == [FOLDER / "image"]
    return [one for name in named["resources"] for one in yaml.safe_load_all((folder / name).read_text())]


HOSTS = documents()
(ENCODER,) = documents(FOLDER / "encoder")
ALL = [*HOSTS, ENCODER]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [one for one in ALL if one["kind"] == kind]
    return found


WORKLOADS = [of_kind(kind) for kind in ("Job", "StatefulSet", "Deployment")]
CONTAINERS = [
    pytest.param(one, container, id=container["name"])
    for one in WORKLOADS
    for container in one["spec"]["template"]["spec"]["containers"]
]


def environ(container: dict[str, Any]) -> dict[str, str]:
    """The variables that the container sees; those of its pod as they might be."""
    (source,) = container["envFrom"]
    assert source["configMapRef"]["name"] == of_kind("ConfigMap")["metadata"]["name"]
    return of_kind("ConfigMap")["data"] | {one["name"]: "forerank-0" for one in container.get("env", [])}


def probes(container: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return (
        (name, container[name]) for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container
    )


@pytest.mark.parametrize(("workload", "container"), CONTAINERS)
def test_every_command_is_one_and_every_variable_a_setting(workload: dict[str, Any], container: dict[str, Any]) -> None:
    python, *arguments = container["command"]
    assert python == "python"
    shown = subprocess.run(
        [sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    assert all(option in shown.stdout for option in options)
    found = environ(container)
    assert set(found) <= {variable(field.name) for field in dataclasses.fields(Settings)}
    assert all(isinstance(value, str) for value in found.values()), "numbers are refused by the API server"
    settings = load(found)
    assert settings.encoders == "apart"
    assert settings.api_host == "0.0.0.0"
    if workload["kind"] != "Job":
        (host,) = [one for one in container["env"] if one["name"] == "FORERANK_HOST"]
        assert host["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


@pytest.mark.parametrize(("workload", "container"), CONTAINERS)
def test_a_container_is_closed_and_writes_only_where_volumes_are(
    workload: dict[str, Any], container: dict[str, Any]
) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert container["image"] == "forerank"
    uid = re.search(r"useradd --uid (\d+)", (ROOT / "infra" / "Dockerfile").read_text())
    assert uid is not None
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, int(uid[1]))
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert (pod["enableServiceLinks"], pod["automountServiceAccountToken"]) == (False, False)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) <= {*volumes, *claims}
    assert "/tmp" in mounts
    if workload["kind"] != "Job":
        assert pod["securityContext"]["fsGroup"] == int(uid[1])
        state = Path(environ(container)["FORERANK_STATE"])
        assert any(state.is_relative_to(path) for path in mounts)
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] == of_kind("PersistentVolumeClaim")["metadata"]["name"]


def test_the_containers_of_a_host_are_one_host() -> None:
    pod = of_kind("StatefulSet")["spec"]["template"]["spec"]
    nearline, api = pod["containers"]
    assert pod["shareProcessNamespace"]
    name = "FORERANK_HOST"
    assert [one for one in nearline["env"] if one["name"] == name] == [one for one in api["env"] if one["name"] == name]
    state = [mount for mount in nearline["volumeMounts"] if mount["name"] == "state"]
    assert state == [mount for mount in api["volumeMounts"] if mount["name"] == "state"]


def test_probes_and_ports_are_the_api_s() -> None:
    (_, api) = of_kind("StatefulSet")["spec"]["template"]["spec"]["containers"]
    app = FastAPI()
    _operation_routes(app, cast(Service, None))
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    (port,) = api["ports"]
    assert str(port["containerPort"]) == environ(api)["API_PORT"]
    asked = {name: probe["httpGet"]["path"] for name, probe in probes(api)}
    assert asked == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    scraped = of_kind("StatefulSet")["spec"]["template"]["metadata"]["annotations"]
    assert {*asked.values(), scraped["prometheus.io/path"]} <= paths
    assert scraped["prometheus.io/port"] == str(port["containerPort"])
    (served,) = of_kind("Service")["spec"]["ports"]
    assert {served["targetPort"], *(probe["httpGet"]["port"] for _, probe in probes(api))} == {port["name"]}


def test_selectors_meet_the_pods_they_are_for_and_no_others() -> None:
    labels = {one["kind"]: one["spec"]["template"]["metadata"]["labels"] for one in WORKLOADS}

    def met(selector: dict[str, str]) -> list[str]:
        return [kind for kind, found in labels.items() if selector.items() <= found.items()]

    for kind in ("StatefulSet", "Deployment"):
        assert met(of_kind(kind)["spec"]["selector"]["matchLabels"]) == [kind]
    assert met(of_kind("Service")["spec"]["selector"]) == ["StatefulSet"]
    assert met(of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]) == ["StatefulSet"]
    assert of_kind("StatefulSet")["spec"]["serviceName"] == of_kind("Service")["metadata"]["name"]


def test_the_readme_makes_the_secret_that_the_api_reads() -> None:
    (_, api) = of_kind("StatefulSet")["spec"]["template"]["spec"]["containers"]
    (secret,) = [one["valueFrom"]["secretKeyRef"] for one in api["env"] if "secretKeyRef" in one["valueFrom"]]
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in README
    assert not [one for one in ALL if one["kind"] == "Secret"], "none that everybody knows"


def test_only_the_generation_is_to_be_set_in_an_encoder() -> None:
    """As YAML it stays text, whatever the name; its probe looks for the heartbeat that the job writes."""
    text = (FOLDER / "encoder" / "encoder.yaml").read_text()
    (made,) = yaml.safe_load_all(text.replace(PLACE, "7"))
    assert made["metadata"]["name"] == "encode-7"
    assert made["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == "encode-7"
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["command"][-1] == "--generation=7"
    assert made["spec"]["replicas"] == 1
    assert made["spec"]["strategy"] == {"type": "Recreate"}
    assert f"sed s/{PLACE}/g1/g" in README


def test_the_encoder_s_probe_wants_a_fresh_heartbeat(tmp_path: Path) -> None:
    text = (FOLDER / "encoder" / "encoder.yaml").read_text().replace(PLACE, "g1")
    (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    settings = Settings(state=tmp_path)
    beat = settings.heartbeat_dir / "encode-g1.json"
    for _, probe in probes(container):

        def alive(command: list[str] = probe["exec"]["command"]) -> bool:
            seen = {**os.environ, "FORERANK_STATE": str(tmp_path)}
            return subprocess.run(command, env=seen, capture_output=True, check=False).returncode == 0

        beat.unlink(missing_ok=True)
        assert not alive()
        beat.parent.mkdir(exist_ok=True)
        beat.touch()
        assert alive()
        old = time.time() - 60
        os.utime(beat, (old, old))
        assert not alive()
