"""docs/walkthrough.md, run: every command works as it stands there, and prints what the page shows, values apart."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from infra.settings import Settings
from tests.conftest import ROOT, wait_until
from tests.e2e.conftest import environ_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

PAGE = (ROOT / "docs" / "walkthrough.md").read_text()
KILLED_AFTER = "epoch 2"  # its checkpoint is that of epoch 1 at least
VALUES = re.compile(r"\b[0-9a-f]{16,}\b|-?\d+(,\d{3})*(\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Step:
    command: str
    shown: list[str]


def steps() -> list[Step]:
    """The page's consoles: a command behind `$ `, and what it prints."""
    found = []
    for console in re.findall(r"^```console\n\$ (.*?)^```$", PAGE, flags=re.M | re.S):
        command, _, shown = re.sub(r" *\\\n +", " ", console).partition("\n")
        found.append(Step(command, shown.splitlines()))
    return found


@pytest.fixture
def stack(settings: Callable[..., Settings]) -> Iterator[Settings]:
    """Settings whose stack is stopped afterwards."""
    one = settings(partitions=2)
    yield one
    subprocess.run([sys.executable, "-m", "api", "down"], env=environ_of(one), check=True, capture_output=True)


def test_the_page_has_ten_commands() -> None:
    assert re.findall(r"^\*\*(\d+)\.\*\*", PAGE, flags=re.M) == [str(number) for number in range(1, 11)]
    assert len({step.command for step in steps()}) == 10


def test_every_command_does_what_the_page_shows(stack: Settings, films: Path, tmp_path: Path) -> None:
    environ = {**environ_of(stack), "PYTHONPATH": str(ROOT)}
    environ.pop("PYTHONUNBUFFERED", None)
    ready = f"http://127.0.0.1:{stack.api_port}/readyz"
    for step in steps():
        command = step.command.replace(".venv/bin/python", sys.executable).replace("../shared/data/ml-100k", str(films))
        command = command.replace("localhost:8080", f"127.0.0.1:{stack.api_port}")
        if "/v1/recommend" in command:
            wait_until(lambda: httpx.get(ready).is_success, "the generation serves")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}" if step.shown[-1] == "Killed" else command],
            cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if step.shown[-1] == "Killed":
            _kill_after(process, KILLED_AFTER)
            continue
        printed, errors = process.communicate(timeout=250)
        assert process.returncode == 0, f"{command}\n{errors}"
        if "/v1/recommend" in command:
            _recommended(json.loads(printed), json.loads("".join(step.shown)))
        else:
            _alike(printed.replace(stack.topic_prefix, "").splitlines(), step.shown)


def _kill_after(process: subprocess.Popen[str], beginning: str) -> None:
    """SIGKILL as soon as the process prints such a line: so it prints while it works, through a pipe too."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            process.kill()
            break
    process.communicate()
    assert process.returncode == -9


def _alike(printed: list[str], shown: list[str]) -> None:
    """Every line that the page shows is printed, whatever its values. How many users lack a click is the data's."""
    masked = {_masked(line) for line in printed}
    for line in shown:
        if line and line != "..." and "users have no click" not in line:
            assert _masked(line) in masked, f"{line!r} is not among {printed}"


def _masked(line: str) -> str:
    line = re.sub(r"logs are in \S+;", "logs are in #;", line.replace("Kafka was running", "Kafka started"))
    return re.sub(r"(# ?)+", "#", re.sub(r" +", " ", VALUES.sub("#", line)))


def _recommended(answer: dict[str, object], shown: dict[str, object]) -> None:
    assert list(answer) == list(shown)
    assert answer["generation"] == shown["generation"]
    assert answer["degraded"] == []
    ids = answer["ids"]
    assert isinstance(ids, list)
    assert len(ids) == 3
