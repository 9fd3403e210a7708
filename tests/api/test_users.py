"""The user side inside one process, against rows and histories that change while it is computed."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable

import numpy as np

from api.generations import load
from api.users import INLINE, UserSource, infer
from index.keys import keys_of
from tests.host import HOUR, NOW, Host, catalogue

ITEMS = catalogue(40)


def test_a_history_row_is_never_of_two_versions(own_host: Callable[..., Host]) -> None:
    """One behaviour's item changes all the time between two forms; each user block is that of one of them."""
    host = own_host()
    bundle = host.bundle("g1")
    forms = [dataclasses.replace(ITEMS[at], item_id="1") for at in (4, 5)]
    keys = keys_of(["1"], host.settings.hash_key.encode())
    source = UserSource(None, None, keys, np.zeros(1, np.uint8), np.array([NOW - HOUR]), ("click",), INLINE, NOW, ())
    host.write("g1", [forms[0]])
    generation = load(host.settings, "g1", bundle.sha256)
    wanted = []
    for version, form in enumerate((*forms, *forms), 2):
        host.write("g1", [dataclasses.replace(form, version=version)])
        wanted.append(infer(generation, source).block.D)
    np.testing.assert_array_equal(wanted[0], wanted[2])
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-4

    stop, written, arena = threading.Event(), 0, host._writers["g1"]._arena
    rows = []
    for form in wanted[:2]:  # the rows as they are stored, to publish them at full speed
        host.write("g1", [dataclasses.replace(forms[len(rows)], version=10 + len(rows))])
        rows.append(generation.arena.gather_both(keys)[:2])
        np.testing.assert_array_equal(infer(generation, source).block.D, form)

    def change() -> None:
        nonlocal written
        while not stop.is_set():
            arena.apply(keys, np.ones(1, np.uint8), *rows[written % 2])
            written += 1

    thread, interval = threading.Thread(target=change), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # as the API does
    thread.start()
    seen = [0, 0, 0]
    try:
        for _ in range(300):
            side = infer(generation, source)
            which = [side.used == 1 and np.array_equal(side.block.D, form) for form in wanted[:2]]
            seen[which.index(True) if any(which) else 2] += side.used
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert seen[2] == 0, seen
    assert min(seen[:2]) > 20, seen
    assert written > 300
