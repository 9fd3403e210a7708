"""What CI adds: a test that is skipped for want of a Debian package fails there, and only there."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

_TESTS = """
import pytest
from tests.conftest import debian_program

def test_program():
    debian_program("a-program-that-nobody-has", "its-package")

@pytest.mark.skipif(True, reason="needs another: apt install another")
def test_marked(): ...

def test_data():
    pytest.skip("no data set")

def test_present():
    assert debian_program("sh", "dash")
"""


@pytest.mark.parametrize(
    ("ci", "status", "closing"), [("", 0, "1 passed, 3 skipped"), ("1", 1, "1 failed, 1 passed, 1 skipped, 1 error")]
)
def test_a_skip_for_want_of_a_package(tmp_path: Path, ci: str, status: int, closing: str) -> None:
    (tmp_path / "test_it.py").write_text(_TESTS)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"FORERANK_CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == status, found.stdout
    assert closing in found.stdout.splitlines()[-1]
    assert "apt install its-package" in found.stdout


def test_ci_and_hook_call_the_makefile() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text()
    assert "make check\n" in text
    assert "make test " in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["make check"]
