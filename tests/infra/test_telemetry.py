"""Logs that can be read by people and machines; metrics of several processes in one page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

_JOB = """
import logging, sys
from infra import settings, telemetry
mine = settings.load()
telemetry.start_metrics(mine)
telemetry.configure_logging(mine, "job")
telemetry.counter("rows_total", "Rows.", ("kind",)).labels("new").inc(int(sys.argv[1]))
telemetry.counter("rows_total", "Rows.", ("kind",)).labels("new").inc()
telemetry.gauge("lag", "Lag.").set(int(sys.argv[1]))
telemetry.gauge("held", "Bytes.", total=True).set(int(sys.argv[1]))
telemetry.histogram("seconds", "Time.", buckets=(0.1, 1.0)).observe(0.5)
logging.getLogger("streams.ingest").info("kept %d", 3, extra={"partition": 7})
logging.getLogger("kafka.conn").info("chatter")
"""
_PAGE = "\nprint(telemetry.render(mine).decode())"


def run(code: str, state: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environ = os.environ | {"FORERANK_STATE": str(state), "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True, check=True, timeout=60
    )


def test_metrics_of_all_processes_add_up_and_gauges_of_ended_ones_go(tmp_path: Path) -> None:
    run(_JOB, tmp_path, "10")
    page = run(_JOB + _PAGE, tmp_path, "20").stdout
    assert 'rows_total{kind="new"} 32.0' in page
    assert 'seconds_bucket{le="1.0"} 2.0' in page
    assert "seconds_count 2.0" in page
    assert "\nlag 20.0" in page
    ended = run(
        "from infra import settings, telemetry\nmine = settings.load()\ntelemetry.start_metrics(mine)" + _PAGE, tmp_path
    )
    assert "\nlag " not in ended.stdout
    assert 'rows_total{kind="new"} 32.0' in ended.stdout


def test_a_gauge_may_be_the_sum_over_live_processes(tmp_path: Path) -> None:
    run(_JOB, tmp_path, "100")  # has ended
    other = "import subprocess\nsubprocess.run([sys.executable, '-c', sys.argv[2], '5'], check=True)"
    page = run(_JOB + other, tmp_path, "20", _JOB + _PAGE).stdout
    assert "\nheld 25.0" in page
    assert "\nlag 5.0" in page


def test_files_of_ended_processes_become_one_of_each_kind(tmp_path: Path) -> None:
    for _ in range(6):
        run(_JOB, tmp_path, "10")
    left = sorted(path.name for path in (tmp_path / "metrics").glob("*.db"))
    assert len(left) == 6  # two archives, and the four files of the process that ended last
    assert left[0] == "counter_0.db"
    # before it looks, this one counts as well, and its own goes on after that
    page = run(_JOB + "\ntelemetry.render(mine)\n" + _JOB + _PAGE, tmp_path, "20").stdout
    assert 'rows_total{kind="new"} 108.0' in page
    assert 'seconds_bucket{le="0.1"} 0.0' in page
    assert 'seconds_bucket{le="1.0"} 8.0' in page
    assert "seconds_count 8.0" in page
    assert "seconds_sum 4.0" in page
    assert "\nlag 20.0" in page


def test_clearing_forgets_ended_processes_alone(tmp_path: Path) -> None:
    run(_JOB, tmp_path, "10")
    page = run(_JOB + "\ntelemetry.clear_metrics(mine)" + _PAGE, tmp_path, "20").stdout
    assert 'rows_total{kind="new"} 21.0' in page


def test_what_is_gone_is_left_out_of_live_and_of_ended_processes(tmp_path: Path) -> None:
    """Also of jobs, whose names end with their generation; `a-b` is not `b`."""
    served = (
        _JOB
        + """
for name in ("b", "a-b"):
    telemetry.counter("asked", "Asked.", ("route", "generation")).labels("score", name).inc()
    telemetry.histogram("took", "Time.", ("generation",), (1.0,)).labels(name).observe(0.5)
    telemetry.gauge("oldest", "Age.", ("generation",)).labels(name).set(1)
    telemetry.counter("records", "Records.", ("job",)).labels(f"encode-{name}").inc()
telemetry.counter("records", "Records.", ("job",)).labels("ingest").inc()
"""
    )
    run(served, tmp_path, "10")
    page = run(served + _PAGE.replace("mine", "mine, {'b'}"), tmp_path, "20").stdout
    assert '"b"' not in page
    assert "encode-b" not in page
    wanted = ('asked_total{generation="a-b",route="score"} 2', 'took_count{generation="a-b"} 2', 'job="encode-a-b"} 2')
    for series in (*wanted, 'oldest{generation="a-b"} 1', 'job="ingest"} 2', 'rows_total{kind="new"} 32', "\nlag 20.0"):
        assert series in page


def test_sharing_must_begin_before_the_client_is_imported(tmp_path: Path) -> None:
    code = "import prometheus_client\n" + _JOB
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(code, tmp_path, "1")
    assert "must be called before prometheus_client is imported" in caught.value.stderr


def test_a_line_for_people(tmp_path: Path) -> None:
    lines = run(_JOB, tmp_path, "1").stderr.splitlines()
    assert len(lines) == 1  # the client library's own information is left out
    assert lines[0].endswith("INFO    job streams.ingest: kept 3")


def test_an_object_for_machines(tmp_path: Path) -> None:
    (line,) = run(_JOB, tmp_path, "1", FORERANK_LOG_JSON="1", FORERANK_HOST="a").stderr.splitlines()
    record = json.loads(line)
    del record["time"]
    assert record == {
        "level": "INFO",
        "logger": "streams.ingest",
        "message": "kept 3",
        "partition": 7,
        "job": "job",
        "host": "a",
    }


def test_debug_shows_the_libraries_too(tmp_path: Path) -> None:
    assert "chatter" in run(_JOB, tmp_path, "1", FORERANK_LOG_LEVEL="debug").stderr
