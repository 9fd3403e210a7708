"""`python -m infra.kafka wipe`: the local node's data, and what this host derived from them.

Offsets and rows of a cluster mean nothing to the next one, so its stores go with it. Bundles, exported data, logs and
records of processes stay; so does the state of another cluster (a broker of the user's own).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from infra import processes
from infra.kafka.broker import Broker, BrokerError
from infra.running import folder_of
from infra.settings import Settings

DERIVED = (
    "ingest",
    "histories",
    "generations",
    "serving.json",
    "requests",
    "heartbeats",
    "cluster.json",
)  # the mark last


def wipe(settings: Settings, broker: Broker) -> list[Path]:
    """Stops the node and deletes its data; gives the state folders that were emptied.

    Raises BrokerError, and touches nothing, while jobs or an API work on one of them.
    """
    states = [settings.state, *sorted(settings.state.glob("demo/*/state"))]
    for folder in (folder_of(settings), *(state / "logs" for state in states)):
        running = processes.listing(folder)
        if running:
            names = ", ".join(process.name for process in running)
            raise BrokerError(f"Nothing was wiped: {names} still work with Kafka; stop them with `make down` first.")
    own = _cluster_of_node(broker)
    states = [state for state in states if _cluster_of_state(state) in (own, None) or own is None]
    broker.wipe()
    return [state for state in states if _emptied(state)]


def _emptied(state: Path) -> bool:
    found = [path for name in DERIVED if (path := state / name).exists()]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return bool(found)


def _cluster_of_node(broker: Broker) -> str | None:
    """As Kafka's `meta.properties` names it; None where the node has no data."""
    try:
        lines = (broker.data / "meta.properties").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((line.partition("=")[2] for line in lines if line.startswith("cluster.id=")), None)


def _cluster_of_state(state: Path) -> str | None:
    """As the supervisor wrote it down; None where it has not."""
    try:
        return str(json.loads((state / "cluster.json").read_text())["cluster"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
