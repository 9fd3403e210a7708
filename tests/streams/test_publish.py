"""Publishing: validation with place and field, the file forms, and what arrives on the topics."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from infra.kafka.broker import Broker
from infra.kafka.topics import ensure_topics
from infra.settings import Settings, environment
from streams import events
from streams.events import EventError
from streams.publish import Publisher, PublishError, check, read_rows
from tests.conftest import JARS, free_ports
from tests.streams.chain import ROOT, Chain

ROWS = [
    {
        "item_id": "007",
        "version": 1,
        "crosses": ["a", "b"],
        "features": {"tag": "x", "price": 1.5},
        "embedding": [1.0, 2],
    },
    {"item_id": "8", "version": 2, "deleted": True},
    {"item_id": "9", "version": 3, "attributes": {"title": "12", "in_stock": True, "bid": 0.5}},
]


def decoded(path: Path, kind: str = "items") -> list[events.Item]:
    rows = read_rows(kind, path, io.BytesIO())  # type: ignore[arg-type]
    return [events.item_update(check("items", row).value, None, 0) for row in rows]


EXPECTED = [events.item_update(json.dumps(row).encode(), None, 0) for row in ROWS]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert decoded(path) == EXPECTED
    assert list(read_rows("items", Path("-"), io.BytesIO(path.read_bytes()))) == path.read_bytes().split()[:0] + [
        json.dumps(row).encode() for row in ROWS
    ]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "item_id,version,deleted,crosses,features.tag,features.price,embedding,attributes.title,attributes.in_stock,"
        "attributes.bid\n"
        '007,1,,"[""a"",""b""]",x,1.5,"[1.0, 2]",,,\n'
        "8,2,true,,,,,,,\n"
        '9,3,,,,,,"""12""",true,0.5\n'
    )
    assert decoded(path) == EXPECTED


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {
        "item_id": ["007", "8", "9"],
        "version": [1, 2, 3],
        "deleted": [None, True, None],
        "crosses": [["a", "b"], None, None],
        "features.tag": ["x", None, None],
        "features.price": [1.5, None, None],
        "embedding": [[1.0, 2.0], None, None],
        "attributes": [None, None, {"title": "12", "in_stock": True, "bid": 0.5}],
    }
    pl.DataFrame(columns).write_parquet(path)
    found = decoded(path)
    assert found[:2] == EXPECTED[:2]
    assert found[2].attributes == EXPECTED[2].attributes


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(ValueError, match="must end in"):
        list(read_rows("items", tmp_path / "rows.xlsx", io.BytesIO()))
    (tmp_path / "rows.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_rows("items", tmp_path / "rows.parquet", io.BytesIO()))


def test_rows_that_json_cannot_hold_are_malformed() -> None:
    for row in ({"item_id": object()}, {"item_id": "a", "version": 1, "embedding": [float("nan")]}, {1: {2: {3}}}):
        with pytest.raises(EventError) as caught:
            check("items", row)  # type: ignore[arg-type]
        assert caught.value.kind == "malformed"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_place(number: float) -> None:
    """JSON has none, and what is written in their stead, null, means something else: no share is everybody."""
    item, user = {"item_id": "a", "version": 1}, {"user_id": "u"}
    for kind, row, place in (
        ("models", {"action": "activate", "generation": "g", "share": number}, "share"),
        ("items", item | {"patch": {"attributes": {"bid": number}}}, "patch.attributes.bid"),
        ("items", item | {"embedding": (1.0, number)}, "embedding[1]"),
        ("users", user | {"features": {"null": "null", "age": number}}, "features.age"),
    ):
        with pytest.raises(EventError, match="is not a finite number") as caught:
            check(kind, row)  # type: ignore[arg-type]
        assert (caught.value.kind, caught.value.field) == ("malformed", place)
    check("items", item | {"patch": {"attributes": {"bid": None, "title": "null"}}})


def test_an_unreachable_broker_is_a_publish_error() -> None:
    (port,) = free_ports(1)
    with pytest.raises(PublishError, match="cannot be reached"):
        Publisher(Settings(kafka_bootstrap=f"127.0.0.1:{port}"))


@pytest.mark.e2e
def test_everything_arrives_with_key_partition_and_cloud_events_headers(
    settings: Callable[..., Settings], bundle_path: Path
) -> None:
    chain = Chain(settings(partitions=3), bundle_path)
    with Publisher(chain.settings) as publisher:
        result = publisher.items([*ROWS, {"item_id": "x"}, b"{", {"item_id": "y", "version": 1, "colour": "red"}])
        assert (result.sent, result.rejected) == (3, 3)
        assert [(e.place, e.field) for e in result.errors] == [(4, "version"), (5, ""), (6, "colour")]
        behaviour = {"event_id": "e", "user_id": "u", "item_id": "8", "action": "click"}
        assert publisher.behaviours([behaviour]).sent == 1
        assert publisher.users([{"user_id": "u", "features": {"age": 3}}]).sent == 1
        assert publisher.models([{"action": "activate", "generation": "g"}]).sent == 1
    for topic, count in (("item-updates", 3), ("behaviours", 1), ("users", 1), ("models", 1)):
        records = chain.read(topic)
        assert len(records) == count
        for record in records:
            if topic != "models":
                assert record.partition == events.partition_of(record.key, 3)
            headers = dict(record.headers)
            assert headers["ce_type"] == f"forerank.{topic}".encode()
            assert headers["ce_specversion"] == b"1.0"
            assert headers["ce_id"]
            assert abs(events.cloud_time(record.headers, 0) - record.timestamp) < 5_000
    assert {record.key for record in chain.read("item-updates")} == {b"007", b"8", b"9"}


# publishes once for each line that it reads, and says what became of it; alone, because kafka-python leaves the sockets
# of refused connections to the garbage collector
_PUBLISHES = """
import sys, time
from infra.settings import load
from streams.publish import Publisher, PublishError
with Publisher(load(), patience_s=4.0) as publisher:
    for _ in sys.stdin:
        began = time.monotonic()
        try:
            said = publisher.items([{"item_id": "1", "version": 1}]).sent
        except PublishError:
            said = "refused"
        print(said, time.monotonic() - began, flush=True)
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_a_broker_that_goes_away_is_said_soon_and_found_again_soon(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    ports = free_ports(2)
    own = Broker(tmp_path / "kafka", ports[0], ports[1], jars=JARS)
    host = settings(partitions=2, kafka_bootstrap=own.bootstrap, kafka_port=own.port)

    def publish() -> tuple[str, float]:
        assert publisher.stdin is not None
        assert publisher.stdout is not None
        publisher.stdin.write("\n")
        publisher.stdin.flush()
        said, took = publisher.stdout.readline().split()
        return said, float(took)

    with own:
        ensure_topics(host)
        with subprocess.Popen(
            [sys.executable, "-c", _PUBLISHES],
            cwd=ROOT,
            env={**os.environ, **environment(host)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as publisher:
            assert publish()[0] == "1"
            own.down()
            for _ in range(3):  # the client's pauses between its attempts grow meanwhile
                said, took = publish()
                assert (said, took < 6.0) == ("refused", True)
            own.up()
            said, took = publish()
            assert (said, took < 3.0) == ("1", True)


@pytest.mark.e2e
def test_the_command_counts_and_its_status_tells(settings: Callable[..., Settings], tmp_path: Path) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    bad.write_text(json.dumps(ROWS[0]) + '\n{"item_id":"a","version":"1"}\n')

    def publish(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "streams", "publish", "items", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment(host)},
            input=good.read_text(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = publish(str(good), "-")
    assert (done.returncode, done.stdout.strip()) == (0, f"6 items published to {host.topic('item-updates')}.")
    done = publish(str(good), str(bad))
    assert done.returncode == 1
    assert "4 items published" in done.stdout
    assert "1 invalid rows left out" in done.stdout
    assert f"{bad}, row 2, version: Expected `int`, got `str`" in done.stderr
    done = publish("--strict", str(good), str(bad))
    assert done.returncode == 1
    assert "nothing was sent" in done.stderr
    for name in ("none.jsonl", "none.csv", "none.xlsx"):
        done = publish(str(good), str(tmp_path / name))
        assert (done.returncode, done.stdout) == (1, "")
        said = f"A file could not be read or written: {tmp_path / name}: No such file or directory."
        assert done.stderr.strip() == said


def test_the_help_shows_the_columns_of_a_csv_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streams", "publish", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("    item_id,"))
    path = tmp_path / "example.csv"
    path.write_text("\n".join(line.strip() for line in lines[at:] if line.strip()) + "\n")
    (item,) = decoded(path)
    assert (item.item_id, item.version, item.crosses) == ("42", 7, ["genre:Comedy", "genre:War"])
    assert (item.features, item.attributes) == ({"year": 1997}, {"title": "A Day Out"})
