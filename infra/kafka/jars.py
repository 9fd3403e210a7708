"""Apache Kafka's jars: fetched from the user's Maven repositories by jgo, checked against `jgo.lock.toml`.

What goes on the class path is exactly the files whose SHA-256 the lock file names, neither more nor less.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

_HERE = Path(__file__).parent
SPECIFICATION = _HERE / "jgo.toml"
LOCK = _HERE / "jgo.lock.toml"


class JarsError(RuntimeError):
    """The jars could not be fetched or are not the locked ones; the message is one sentence for the user."""


def locked() -> dict[str, str]:
    """File name -> SHA-256 of every jar that the lock file names."""
    dependencies = tomllib.loads(LOCK.read_text())["dependencies"]
    return {f"{entry['artifactId']}-{entry['version']}.jar": entry["sha256"] for entry in dependencies}


def fetch(folder: Path, say: Callable[[str], None] = print) -> list[Path]:
    """The jars in `folder`, downloaded if they are not there. Safe to call from several processes at once."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = folder / "jars"
        if difference(environment) is not None:
            say(f"Downloading Apache Kafka (about 42 MB) to {folder}; Ctrl-C stops it and loses nothing.")
            _download(folder, environment)
            wrong = difference(environment)
            if wrong:
                raise JarsError(f"The downloaded Kafka is not the locked one ({wrong}); delete {folder} and try again.")
        return sorted(environment.rglob("*.jar"))


def difference(environment: Path) -> str | None:
    """What tells the jars of a folder from the locked ones, in a few words; None if nothing does."""
    expected = locked()
    present = {path.name: path for path in environment.rglob("*.jar")}
    if missing := sorted(expected.keys() - present.keys()):
        return f"{missing[0]} is missing"
    if foreign := sorted(present.keys() - expected.keys()):
        return f"{foreign[0]} is not in the lock file"
    for name, path in sorted(present.items()):
        with path.open("rb") as jar:
            if hashlib.file_digest(jar, "sha256").hexdigest() != expected[name]:
                return f"{name} has another SHA-256"
    return None


def _download(folder: Path, environment: Path) -> None:
    repository = folder / "m2"
    for old in (environment, repository):  # a damaged file must not be taken up again
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "jgo", "--file", str(SPECIFICATION), "--resolver", "python", "--system-java"]
    command += ["--repo-cache", str(repository), "--cache-dir", str(environment), "--timeout", "60", "sync"]
    total = len(locked())
    with (
        (folder / "download.log").open("wb") as log,
        tqdm(total=total, unit=" jars", desc="Apache Kafka", disable=None) as bar,  # None: only on a terminal
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as child,
    ):
        while child.poll() is None:
            bar.n = min(total, sum(1 for _ in repository.rglob("*.jar")))
            bar.refresh()
            time.sleep(0.2)
        bar.n = total
    if child.returncode != 0:
        raise JarsError(
            f"Apache Kafka could not be downloaded (see {log.name}): is there a network, and room on the disk?"
        )
