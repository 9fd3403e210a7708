"""A lane's memory is its own, is used again, and is as large as its largest use."""

from __future__ import annotations

import threading

from api.runtime import arena


def test_memory_is_a_threads_own_and_stays() -> None:
    def run() -> None:
        small = arena.scratch(60)
        assert small % 64 == 0
        assert arena.scratch(60) == arena.scratch(10) == small
        arena.scratch(60_000)
        held.append(arena.held())
        assert arena.scratch(60) == arena.scratch(60_000)

    held: list[int] = []
    for work in (run, lambda: held.append(arena.held())):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert 60_000 <= held[0] < 60_200, "as large as its largest use"
    assert held[1] == 0, "and each thread has its own"
