"""Admission: never more than its places at once, a place is free again whatever became of the work, nobody waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from api.admission import Admission, FullError
from tests.conftest import wait_until


def refused() -> float:
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value("forerank_refused_total", {"kind": "test"}) or 0.0


def test_who_finds_no_place_is_told_at_once() -> None:
    admission, go = Admission("test", 2), threading.Event()
    before = refused()
    with ThreadPoolExecutor(1) as pool:  # one runs, one is queued: both have their places
        held = [admission.admit(pool.submit, go.wait, 30) for _ in range(2)]
        with pytest.raises(FullError):
            admission.admit(pool.submit, int)
        go.set()
        assert [one.result(30) for one in held] == [True, True]
        wait_until(lambda: admission._free._value == 2, "the places are free again")
        failing = admission.admit(pool.submit, int, "no number")
        with pytest.raises(ValueError, match="no number"):
            failing.result(30)
        wait_until(lambda: admission._free._value == 2, "a failure frees its place too")
    with pytest.raises(RuntimeError, match="shutdown"):
        admission.admit(pool.submit, int)
    assert admission._free._value == 2
    assert refused() == before + 1
    with admission.place(), admission.place(), pytest.raises(FullError), admission.place():
        pass
    assert admission._free._value == 2
    assert refused() == before + 2
