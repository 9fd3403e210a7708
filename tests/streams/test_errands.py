"""Work beside the rounds: begun once, one piece at a time, its end told once, an error where it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from streams.errands import Errands
from tests.conftest import ROOT, wait_until


def test_work_is_begun_once_in_turn_and_its_end_is_told_once() -> None:
    errands, go = Errands(), threading.Event()
    done: list[str] = []

    def first() -> int:
        go.wait(60)
        done.append("first")
        return 7

    def second() -> None:
        done.append("second")
        raise ValueError("no such thing")

    for _ in range(3):
        assert errands.ended("first", first) is None
        assert errands.ended("second", second) is None
    assert (errands.under_way("first"), errands.under_way("third"), done) == (True, False, [])
    go.set()
    wait_until(lambda: len(done) == 2, "both have run")
    assert done == ["first", "second"]
    with pytest.raises(ValueError, match="no such thing"):
        _end_of(errands, "second", second)
    assert _end_of(errands, "first", first) == 7
    assert not errands.under_way("first")
    assert errands.ended("first", first) is None, "it is begun anew"
    wait_until(lambda: done == ["first", "second", "first"], "it has run again")
    errands.forget()
    assert errands.under_way("first"), "its end was asked for"

    def forgotten() -> bool:
        errands.forget()
        return not errands.under_way("first")

    wait_until(forgotten, "nobody asks any more")
    errands.close()


def _end_of(errands: Errands, name: str, work: Callable[[], object]) -> object:
    found: list[Future[object]] = []

    def there() -> bool:
        ended = errands.ended(name, work)
        found.extend([ended] if ended is not None else [])
        return bool(found)

    wait_until(there, f"{name} has ended")
    return found[0].result()


def test_work_that_hangs_does_not_keep_a_process_from_ending() -> None:
    code = "import threading\nfrom streams.errands import Errands\nErrands().ended('x', threading.Event().wait)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0
