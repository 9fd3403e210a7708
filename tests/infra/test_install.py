"""`make setup` on a copy of the project, with hand-made wheels in place of an index: what it installs, how it fails."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make: apt install make")


def wheel(folder: Path, name: str, version: str) -> Path:
    """A package with nothing in it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{file},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for file, text in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(zipfile.ZipInfo(file), text)
    return path


def pinned(path: Path) -> str:
    name, version = path.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's set-up, asking for one small package each; the wheels are in `wheels/`."""
    root, wheels = tmp_path / "project", tmp_path / "project" / "wheels"
    (root / "infra").mkdir(parents=True)
    (root / "requirements").mkdir()
    shutil.copy(ROOT / "Makefile", root)
    shutil.copy(ROOT / "infra" / "install.py", root / "infra")
    (root / "requirements" / "base.txt").write_text(pinned(wheel(wheels, "service", "1.0")))
    (root / "requirements" / "dev.txt").write_text(pinned(wheel(wheels, "checker", "1.0")))
    (root / "requirements" / "peers.txt").write_text(pinned(wheel(wheels, "rival", "1.0")))
    (root / "requirements" / "torch.txt").write_text("torch==2.13.0\n")
    wheel(wheels, "torch", "2.13.0")
    return root


def make(project: Path, target: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "MFLAGS", "TORCH", "FORERANK"))}
    environ |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project / "wheels")} | variables
    return subprocess.run(["make", target], cwd=project, env=environ, capture_output=True, text=True, timeout=120)


def installed(project: Path) -> set[str]:
    found = project.glob(".venv/lib/python3*/site-packages/*.dist-info")
    return {path.name.removesuffix(".dist-info") for path in found if not path.name.startswith(("pip-", "setuptools-"))}


def test_first_second_and_changed(project: Path) -> None:
    first = make(project, "setup")
    assert first.returncode == 0, first.stderr
    assert installed(project) == {"service-1.0", "torch-2.13.0"}
    assert make(project, "setup-dev").returncode == 0
    assert installed(project) == {"service-1.0", "torch-2.13.0", "checker-1.0", "rival-1.0"}

    second = make(project, "setup-dev", PIP_FIND_LINKS="")  # nothing changed, so pip is not even asked
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")

    (project / "requirements" / "base.txt").write_text(pinned(wheel(project / "wheels", "service", "1.1")))
    assert make(project, "setup").returncode == 0
    assert "service-1.1" in installed(project)


def test_an_environment_whose_python_is_gone_is_made_again(project: Path) -> None:
    """As after an upgrade of the machine's Python."""
    assert make(project, "setup-dev").returncode == 0
    (project / ".venv" / "bin" / "python").unlink()
    (project / ".venv" / "bin" / "python").symlink_to("/nothing/python3")
    assert make(project, "setup").returncode == 0
    assert installed(project) == {"service-1.0", "torch-2.13.0"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has one build")
def test_torch_cpu_demands_the_cpu_build(project: Path) -> None:
    assert make(project, "setup").returncode == 0
    missing = make(project, "setup", TORCH="cpu")
    assert missing.returncode != 0
    assert "TORCH=cpu: pip finds no torch==2.13.0+cpu" in missing.stderr
    assert "Traceback" not in missing.stderr
    wheel(project / "wheels", "torch", "2.13.0+cpu")
    assert make(project, "setup", TORCH="cpu").returncode == 0
    assert installed(project) == {"service-1.0", "torch-2.13.0+cpu"}
    again = make(project, "setup", PIP_FIND_LINKS="")  # the CPU build also serves where none was demanded
    assert (again.returncode, again.stdout) == (0, "")


def test_no_network(project: Path) -> None:
    failed = make(project, "setup", PIP_FIND_LINKS="")
    assert failed.returncode != 0
    assert "The Python packages could not be installed" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert make(project, "setup").returncode == 0  # nothing is left behind that hinders the next try


def test_a_changed_package_is_refused(project: Path) -> None:
    with zipfile.ZipFile(project / "wheels" / "service-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("service_extra.py", "")
    failed = make(project, "setup")
    assert failed.returncode != 0
    assert "service-1.0" not in installed(project)


@pytest.mark.parametrize("python", ["nothing-of-this-name", "old-python"])
def test_a_python_that_is_too_old_or_missing(project: Path, python: str) -> None:
    old = project / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check gives under an old one
    old.chmod(0o755)
    failed = make(project, "setup", PYTHON=f"./{python}")
    assert failed.returncode != 0
    assert failed.stderr.startswith(f"Python 3.11 or newer is needed and './{python}' is not one")
    assert not (project / ".venv").exists()


def test_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    shown = make(ROOT, "help").stdout
    phony = text.split(".PHONY:")[1].split("\n\n")[0].replace("\\", " ").split()
    assert {line.split()[1] for line in shown.splitlines()} == set(phony)
