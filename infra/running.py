"""Which stack runs on this host, as `<state>/run/stack.json` says: the demo's has a prefix and a state of its own.

Written by `python -m api up` and the demo when they start one, removed by `down`; read by every command that a user
gives without naming a stack.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from infra.settings import Settings, variable

_FILE = "stack.json"


def folder_of(settings: Settings) -> Path:
    """Where pids and logs of the stack lie, whichever it is."""
    return settings.state / "run"


def running(settings: Settings) -> Settings:
    """Those of the stack that was started last below `settings.state`; `settings` where none is recorded."""
    try:
        found = json.loads((folder_of(settings) / _FILE).read_text())
        return dataclasses.replace(settings, topic_prefix=found["topic_prefix"], state=Path(found["state"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return settings


def addressed(settings: Settings, environ: Mapping[str, str] = os.environ) -> Settings:
    """The stack that a user's command is about: the running one, unless the environment names one itself."""
    named = any(environ.get(variable(name)) for name in ("topic_prefix", "state"))
    return settings if named else running(settings)


def remember(folder: Path, stack: Settings) -> None:
    """`stack` is what runs from now on; `folder` is `folder_of` the settings it was started with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps({"topic_prefix": stack.topic_prefix, "state": str(stack.state)}))


def forget(folder: Path) -> None:
    (folder / _FILE).unlink(missing_ok=True)
