"""A report is written whatever its numbers are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import report


def test_what_is_no_number_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "REPORTS", tmp_path)
    one = report.Report("some", seed=7, quick=True)
    one.figure("share", [float("nan"), float("inf")], "", 0.5)
    one.table("models", [{"model": "aif", "p": float("nan"), "gauc": 0.7}])
    written = json.loads(one.finish(lambda canvas: None).read_text())
    share = written["figures"]["share"]
    assert (share["value"], share["low"], share["high"]) == (0.5, None, None)
    assert written["tables"]["models"] == [{"model": "aif", "p": None, "gauc": 0.7}]
