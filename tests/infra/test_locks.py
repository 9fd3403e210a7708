"""What is installed is pinned: hashed requirements and locked jars, without addresses, in agreement with each other."""

import ast
import hashlib
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from infra.kafka import jars
from infra.kafka.broker import Broker
from tests.conftest import JARS, ROOT

REQUIREMENTS = ROOT / "requirements"
PINNED = ["base.txt", "dev.txt"]
PEERS = "peers.txt"  # installed without dependencies
ONLINE_PEERS = ROOT / "tests/bench/peers"  # run in an environment of their own
_ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[a-z,]+\])?==(?P<version>[^ ]+)(?P<marker> ; [^\\]+)?", re.MULTILINE)


def entries(name: str | Path) -> dict[tuple[str, str], str]:
    """(package, marker) -> version."""
    text = (REQUIREMENTS / name).read_text()  # an absolute path stays what it is
    found = _ENTRY.finditer(text)
    return {(normal(e["name"]), (e["marker"] or "").strip()): e["version"] for e in found}


def wanted(name: str | Path) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    return {normal(line.partition("[")[0]) for line in lines if line and not line.startswith("-")}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", [*PINNED, PEERS, ONLINE_PEERS / "requirements.txt"], ids=str)
def test_every_requirement_is_pinned_and_hashed(name: str | Path) -> None:
    text = (REQUIREMENTS / name).read_text()
    logical = [
        line for line in re.sub(r"\\\n", "", text).splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(logical) == len(entries(name)) >= (3 if name == PEERS else 20)
    for line in logical:
        assert re.match(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+ ", line), line
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), line


@pytest.mark.parametrize(
    "path",
    [*sorted(REQUIREMENTS.iterdir()), *sorted(ONLINE_PEERS.glob("requirements.*")), jars.SPECIFICATION, jars.LOCK],
    ids=str,
)
def test_no_address_in_a_lock_file(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host|^\s*-[if] ", text, re.MULTILINE)


def test_the_locks_hold_what_was_asked_for() -> None:
    base, dev, peers = ({package for package, _ in entries(name)} for name in [*PINNED, PEERS])
    assert wanted("base.in") <= base
    assert wanted("dev.in") <= dev
    assert wanted("peers.in") == peers
    assert not peers & (base | dev)
    assert "torch" not in base | dev | peers  # its builds differ in hash
    assert not {name for name in base | dev | peers if name.startswith(("nvidia", "triton"))}
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+\n", (REQUIREMENTS / "torch.txt").read_text())


def modules_of(paths: Iterable[Path]) -> set[str]:
    """Top-level modules of others that these files import."""
    ours = {"infra", "index", "encoders", "streams", "api", "tests", "__future__"}
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    return modules - ours - sys.stdlib_module_names


def imported(*folders: str) -> set[str]:
    """Distributions that the folders' modules import by themselves."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    known = packages_distributions()
    return {normal(known[module][0]) for module in modules_of(set(paths) - set(ONLINE_PEERS.rglob("*.py")))}


def test_what_is_imported_is_asked_for_and_the_other_way_round() -> None:
    base, dev, peers = wanted("base.in"), wanted("dev.in"), wanted("peers.in")
    services = imported("infra", "index", "encoders", "streams", "api")
    of_torch = {"filelock", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions"}
    # jgo is a command; uvicorn and kafka-python take the other two when they are there
    by_command = {"jgo", "httptools", "crc32c"}
    assert services - base == {"torch"}
    assert base - services == of_torch | by_command
    checks = {"import-linter", "mypy", "pre-commit", "pytest-timeout", "ruff", "uv"}
    assert imported("tests") - base - {"torch"} <= dev | peers
    assert peers - imported("tests") == {"pandas"}  # a peer's own
    assert dev - imported("tests") <= checks


def test_the_online_peers_lock_holds_what_they_import() -> None:
    asked, locked = wanted(ONLINE_PEERS / "requirements.in"), entries(ONLINE_PEERS / "requirements.txt")
    packages = {package for package, _ in locked}
    by_others = {"hiredis", "onnx", "onnxscript"}  # redis-py and torch's exporter take them
    own = {normal(module) for module in modules_of(ONLINE_PEERS.rglob("*.py"))}
    of_project = {normal(name[0]) for name in packages_distributions().values()} | set(packages_distributions())
    assert asked <= packages
    assert own - of_project <= packages
    assert asked - own <= by_others
    base = entries("base.txt")
    assert {key: base[key] for key in base.keys() & locked.keys()} == {
        key: locked[key] for key in base.keys() & locked.keys()
    }


def test_both_locks_agree() -> None:
    base, dev = entries("base.txt"), entries("dev.txt")
    assert {key: base[key] for key in base.keys() & dev.keys()} == {key: dev[key] for key in base.keys() & dev.keys()}


def test_this_environment_is_the_locked_one() -> None:
    for name in [*PINNED, PEERS]:
        for (package, marker), pinned in entries(name).items():
            if not marker:
                assert version(package) == pinned, package
    assert version("torch").partition("+")[0] == (REQUIREMENTS / "torch.txt").read_text().strip().partition("==")[2]


def test_the_locked_kafka_is_the_one_asked_for() -> None:
    """A resolver that is given a logging binding too once took other clients, with which the broker dies."""
    asked = tomllib.loads(jars.SPECIFICATION.read_text())["dependencies"]["coordinates"]
    assert asked == [
        "org.apache.kafka:kafka_2.13:4.3.0",
        "org.apache.kafka:kafka-clients:4.3.0",
        "org.slf4j:slf4j-simple:1.7.36",
    ]
    names = set(jars.locked())
    assert {f"{c.split(':')[1]}-{c.split(':')[2]}.jar" for c in asked} <= names
    kafka = {name for name in names if name.startswith(("kafka-", "kafka_"))}
    assert len(kafka) > 10
    assert all(name.endswith("-4.3.0.jar") for name in kafka)
    assert [name for name in names if name.startswith("slf4j-")].count("slf4j-api-1.7.36.jar") == 1
    assert not {name for name in names if name.startswith(("logback", "log4j-slf4j", "slf4j-reload4j"))}


@pytest.mark.usefixtures("broker")
def test_the_downloaded_jars_are_the_locked_ones() -> None:
    assert jars.difference(JARS / "jars") is None
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in jars.fetch(JARS)}
    assert files == jars.locked()


def test_a_missing_foreign_or_changed_jar_is_named(tmp_path: Path, broker: Broker) -> None:
    for path in (JARS / "jars").rglob("*.jar"):
        (tmp_path / path.name).symlink_to(path)
    assert jars.difference(tmp_path) is None
    changed = tmp_path / "kafka-clients-4.3.0.jar"
    content = changed.read_bytes()
    changed.unlink()
    assert jars.difference(tmp_path) == "kafka-clients-4.3.0.jar is missing"
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert jars.difference(tmp_path) == "kafka-clients-4.3.0.jar has another SHA-256"
    changed.write_bytes(content)
    (tmp_path / "kafka-clients-3.9.1.jar").write_bytes(content)
    assert jars.difference(tmp_path) == "kafka-clients-3.9.1.jar is not in the lock file"
