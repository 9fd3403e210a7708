"""The environment of the peers, `.local/peers`: the project's own locked packages, and those of `requirements.txt`.

It is made once and again when a list changes. torch comes as infra/install.py has it: TORCH=cpu demands the CPU build,
PIP_FIND_LINKS may name a folder that has it. Those who need Redis need Debian's redis-server on PATH.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = ROOT / ".local" / "peers"
_LISTS = (ROOT / "requirements/base.txt", ROOT / "requirements/torch.txt", Path(__file__).with_name("requirements.txt"))


class PeersError(RuntimeError):
    """The peers cannot run; the message is one sentence for the user."""


def need_redis() -> None:
    """Raises PeersError."""
    if shutil.which("redis-server") is None:
        raise PeersError("The peers need a redis-server: on Debian, `apt install redis-server`.")


def environment(make: bool = True) -> Path:
    """The environment's Python; where it is not there, it is made, or not. Raises PeersError."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _LISTS)).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        if not make:
            raise PeersError("The peers' environment is not there; a full run makes it.")
        print(f"Making {ENVIRONMENT} for the peers; a few minutes.", flush=True)
        _run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT))
        base, torch, peers = _LISTS
        build = "+cpu" if os.environ.get("TORCH") == "cpu" and sys.platform == "linux" else ""
        install = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(*install, "--require-hashes", "-r", str(base))
        _run(*install, torch.read_text().strip() + build)
        _run(*install, "--require-hashes", "--no-deps", "-r", str(peers))
        stamp.write_text(digest)
    return python


def _run(*command: str) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise PeersError(
            f"The peers' environment could not be made: `{' '.join(command[:4])} ...` failed, as said above."
        )


if __name__ == "__main__":
    print(environment())
