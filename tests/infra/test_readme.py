"""The README's first promises: its commands exist, and its tables are the code's."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys

from encoders.baselines import MODELS
from encoders.config import COMPONENTS
from encoders.data.commands import readers
from infra.settings import Settings, variable
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
NOT_LITERAL = {
    "topic_prefix": "none",
    "api_sockets": "none",
    "host": "the host's name",
    "kafka_bootstrap": "the local node",
    "log_json": "0",
}


def test_every_setting_is_listed_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", _section("Settings"), flags=re.M))
    expected = {
        variable(field.name): NOT_LITERAL.get(field.name, str(field.default)) for field in dataclasses.fields(Settings)
    }
    assert listed == expected


def test_formats_models_and_options_are_the_code_s() -> None:
    formats = re.findall(r"^\| `([\w-]+)` \|", _section("Bring your data"), flags=re.M)
    assert sorted(formats) == sorted(readers(0))
    options = re.findall(r"^\| .*? \|", _section("Train, compare, roll out"), flags=re.M)
    named = set(re.findall(r"--\w+", " ".join(options[1:])))
    assert named | {"--data", "--out", "--help"} == set(re.findall(r"--\w+", _help("encoders", "train")))
    assert all(f"`{name}`" in README for name in MODELS)
    assert ",".join(COMPONENTS) in README


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", README)) | {"up", "kafka-up", "kafka-wipe", "bench", "check"}
    assert named <= targets


def test_every_python_command_it_names_is_understood() -> None:
    commands = re.findall(r"^\.venv/bin/python (-m [^#\n]*)", README, flags=re.M)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        upto = next((place for place, word in enumerate(words) if place > 2 and word.startswith("-")), len(words))
        verbs = [word for word in words[1:upto] if "." not in word and "/" not in word]
        shown = _help(*verbs)
        options = [word for word in words if word.startswith("--")]
        assert all(option in shown for option in options), command


def _section(name: str) -> str:
    return README.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def _help(*verbs: str) -> str:
    shown = subprocess.run([sys.executable, "-m", *verbs, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout
