"""What `wipe` deletes beside the broker's data, and what it leaves alone."""

import json
import sys
from pathlib import Path

import pytest

from infra import processes
from infra.kafka.broker import Broker, BrokerError
from infra.kafka.wipe import wipe
from infra.settings import Settings

DERIVED = ("ingest/store", "histories/data.mdb", "generations/g/n2o/CURRENT", "heartbeats/ingest.json", "serving.json")
KEPT = ("run/stack.json", "run/api.log", "logs/ingest.log", "demo/movies/bundle/manifest.json", "demo/movies/data/x")


@pytest.fixture
def node(tmp_path: Path) -> Broker:
    """A node that does not run, with data of the cluster `mine`."""
    one = Broker(tmp_path / "kafka", 1, 2)
    put(one.data / "meta.properties", "version=1\ncluster.id=mine\nnode.id=1\n")
    put(one.data / "items-0/0.log", "")
    put(tmp_path / "kafka" / "jars" / "kafka.jar", "")
    return one


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fill(state: Path, cluster: str | None) -> Path:
    for name in DERIVED:
        put(state / name, "")
    if cluster is not None:
        put(state / "cluster.json", json.dumps({"cluster": cluster, "prefix": "", "partitions": 8}))
    return state


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("cluster", ["mine", None])
def test_what_was_derived_goes_and_the_rest_stays(tmp_path: Path, node: Broker, cluster: str | None) -> None:
    state = fill(tmp_path / "state", cluster)
    demo = fill(state / "demo" / "movies" / "state", cluster)
    for name in KEPT:
        put(state / name, "")
    assert wipe(Settings(state=state), node) == [state, demo]
    assert files(state) == set(KEPT)
    assert files(tmp_path / "kafka") == {"jars/kafka.jar"}
    assert wipe(Settings(state=state), node) == []


def test_the_state_of_another_cluster_stays(tmp_path: Path, node: Broker) -> None:
    state = fill(tmp_path / "state", "theirs")
    demo = fill(state / "demo" / "movies" / "state", "mine")
    assert wipe(Settings(state=state), node) == [demo]
    assert files(state) == {*DERIVED, "cluster.json"}


@pytest.mark.parametrize("folder", ["run", "logs", "demo/movies/state/logs"])
def test_nothing_is_touched_while_somebody_works_with_it(tmp_path: Path, node: Broker, folder: str) -> None:
    state = fill(tmp_path / "state", "mine")
    fill(state / "demo" / "movies" / "state", "mine")
    job = processes.start("ingest", [sys.executable, "-c", "import time; time.sleep(600)"], state / folder)
    before = files(tmp_path)
    try:
        with pytest.raises(BrokerError, match="ingest still work"):
            wipe(Settings(state=state), node)
        assert files(tmp_path) == before
        assert job.alive()
    finally:
        processes.stop(job, 0.0)
