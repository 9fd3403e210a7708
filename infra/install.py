"""`python3 infra/install.py [--dev]`: makes `.venv` from the locked requirements; run by the Makefile's set-up.

Uses the standard library alone, since it runs before anything is installed, and the Makefile has checked Python's
version. Nothing happens when the environment already holds what the requirements files ask for. TORCH=cpu demands
torch's CPU build; else whichever build pip finds is taken.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
ENVIRONMENT = ROOT / ".venv"
_LEAST_FREE = 1 << 30


class InstallError(RuntimeError):
    """The environment could not be made; the message is one sentence for the user."""


def main(arguments: list[str]) -> int:
    try:
        install(dev="--dev" in arguments, cpu=os.environ.get("TORCH") == "cpu")
    except InstallError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run the same command again to go on.", file=sys.stderr)
        return 1
    return 0


def install(*, dev: bool, cpu: bool) -> None:
    """Make or complete the environment. Raises InstallError."""
    cpu = cpu and sys.platform == "linux"  # elsewhere torch's only build is the CPU one
    if not _works(ENVIRONMENT):
        print(f"Making {ENVIRONMENT} with Python {platform.python_version()}.", flush=True)
        _make_environment()
    if _changed("base.txt", "torch.txt") or (cpu and not _has_cpu_torch()):
        print("Installing what the services need; a few minutes, Ctrl-C stops it.", flush=True)
        _pip("--require-hashes", "-r", str(REQUIREMENTS / "base.txt"))
        _install_torch(cpu)
        _remember("base.txt", "torch.txt")
    if dev and _changed("dev.txt", "peers.txt"):
        print("Installing what tests, checks and benchmarks need.", flush=True)
        _pip("--require-hashes", "-r", str(REQUIREMENTS / "dev.txt"))
        _pip("--require-hashes", "--no-deps", "-r", str(REQUIREMENTS / "peers.txt"))  # they ask for torch, any build
        _remember("dev.txt", "peers.txt")


def _works(environment: Path) -> bool:
    """Is there an environment whose Python still runs and is new enough?"""
    command = [str(environment / "bin" / "python"), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _make_environment() -> None:
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=False)
    if made.returncode != 0:
        _room_or_raise()
        raise InstallError(
            "Python could not make a virtual environment: on Debian, `apt install python3-venv` is missing."
        )


def _install_torch(cpu: bool) -> None:
    pinned = (REQUIREMENTS / "torch.txt").read_text().strip()
    if not cpu:
        _pip(pinned)
    elif not _run_pip(f"{pinned}+cpu"):
        _room_or_raise()
        raise InstallError(
            f"TORCH=cpu: pip finds no {pinned}+cpu for this Python: let PIP_FIND_LINKS name a folder or page "
            "that has it, or leave TORCH out."
        )


def _pip(*arguments: str) -> None:
    if not _run_pip(*arguments):
        _room_or_raise()
        raise InstallError(
            "The Python packages could not be installed (pip says why above): this needs a network, and 8 GB of disk "
            "(2 GB with TORCH=cpu); then run the same command again."
        )


def _run_pip(*arguments: str) -> bool:
    """pip's own words go to `install.log`; a terminal shows the step it is at, and a failure what it said last."""
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    said: list[str] = []
    with (
        (ENVIRONMENT / "install.log").open("a") as log,
        subprocess.Popen(
            [*command, "--progress-bar", "off", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            said = [*said[-9:], line]
            if sys.stdout.isatty() and line.lstrip().startswith(
                ("Downloading", "Processing", "Installing", "Building")
            ):
                print(f"\r\x1b[K  {line.strip()[:100]}", end="", flush=True)
    if sys.stdout.isatty():
        print("\r\x1b[K", end="", flush=True)
    if pip.returncode != 0:
        print("".join(said), end="", file=sys.stderr)
    return pip.returncode == 0


def _room_or_raise() -> None:
    free = shutil.disk_usage(ROOT).free
    if free < _LEAST_FREE:
        raise InstallError(
            f"There are only {free >> 20} MB left on the disk of {ROOT}: make room and run the same again."
        )


def _has_cpu_torch() -> bool:
    return any(ENVIRONMENT.glob("lib/python3*/site-packages/torch-*+cpu.dist-info"))


def _stamp(names: tuple[str, ...]) -> tuple[Path, str]:
    digest = hashlib.sha256(b"".join((REQUIREMENTS / name).read_bytes() for name in names)).hexdigest()
    return ENVIRONMENT / f"installed-{names[0]}", digest


def _changed(*names: str) -> bool:
    path, digest = _stamp(names)
    return not path.exists() or path.read_text() != digest


def _remember(*names: str) -> None:
    path, digest = _stamp(names)
    path.write_text(digest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
