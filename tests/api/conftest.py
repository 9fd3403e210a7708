"""Hosts for the tests of the API."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.settings import Settings
from tests.conftest import free_ports
from tests.host import HOUR, NOW, CatalogueItem, Host, Seen, catalogue

USERS: dict[str, dict[str, Any]] = {
    "anna": {"segment": "s1", "age": 34},
    "7": {"segment": "s2"},
    "lonely": {"segment": "s3", "age": 80},
}


def behaviours_of(items: Sequence[CatalogueItem]) -> list[Seen]:
    """anna: 300 over many items, some of them gone; 7: one; lonely: only a profile; ghost: only items that are gone."""
    random = np.random.default_rng(1)
    anna = [
        Seen(
            "anna",
            items[int(random.integers(len(items)))].item_id,
            NOW - (300 - at) * HOUR,
            ("view", "click", "buy")[at % 3],
        )
        for at in range(300)
    ]
    anna[10] = Seen("anna", "gone-1", anna[10].time)
    anna[290] = Seen("anna", "999999", anna[290].time)
    return [*anna, Seen("7", items[4].item_id, NOW - HOUR), Seen("ghost", "gone-1", NOW - HOUR)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """200 items, four users, generation g1 active with a retrieval index, the API ready. Not to be changed."""
    state = tmp_path_factory.mktemp("host")
    settings = Settings(
        kafka_bootstrap=f"127.0.0.1:{free_ports(1)[0]}",  # nobody listens: the broker is away
        state=state,
        api_port=free_ports(1)[0],
        candidates_max=1_000,
        retrieval_interval_s=0.2,
    )
    one = Host(settings)
    try:
        items = catalogue(200)
        one.bundle("g1")
        one.write("g1", items)
        one.behave(behaviours_of(items), dict(USERS))
        one.activate("g1")
        one.retrieval("g1")
        one.start()
        one.ready()
        yield one
    finally:
        one.close()


@pytest.fixture
def own_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """`own_host(**settings)`: an empty host for one test, which fills and starts it itself."""
    hosts = []

    def make(**changes: Any) -> Host:
        base = Settings(
            kafka_bootstrap=f"127.0.0.1:{free_ports(1)[0]}",
            state=tmp_path / f"h{len(hosts)}",
            api_port=free_ports(1)[0],
        )
        base.state.mkdir()
        hosts.append(Host(dataclasses.replace(base, **changes)))
        return hosts[-1]

    yield make
    for one in hosts:
        one.close()
