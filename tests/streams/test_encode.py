"""Encode without a broker: which patches of attributes it sends as patched rows, and which it encodes in full."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from encoders.bundle import Bundle
from index.n2o import DELETED, PATCHED, WHOLE, N2OReader, N2OWriter
from infra.kafka.broker import BrokerError
from infra.settings import Settings
from streams import blocks, events
from streams.encode import Encode
from streams.fill import Proof
from streams.merge import ATTRIBUTES_ONLY
from streams.worker import Outgoing, Record
from tests.streams.chain import item_body

RANDOM = np.random.default_rng(1)


class Log:
    """`items` with one partition; what encode makes of it, as (id, kind) per batch."""

    def __init__(self, bundle: Bundle) -> None:
        self.encode = Encode(Settings(partitions=1), "g", bundle, self.send, self.ends)
        self.end, self.asked, self.away = 0, 0, False
        self.sent: list[Outgoing] = []

    async def send(self, records: Sequence[Outgoing]) -> None:
        self.sent += records

    def ends(self) -> list[int]:
        self.asked += 1
        if self.away:
            raise BrokerError("away")
        return [self.end]

    def batch(self, *records: Record) -> list[tuple[str, int]]:
        self.sent.clear()
        asyncio.run(self.encode.batch(records))
        found = [record for record in self.sent if record.topic == "rows.g"]
        rows = [blocks.decode(record.value or b"", self.encode.layout) for record in found]
        return [pair for batch in rows for pair in zip(batch.ids, batch.kinds.tolist(), strict=True)]


def item(offset: int, name: str = "a", **changes: object) -> Record:
    found = events.item_update(events.encode(item_body(name, offset, RANDOM) | changes), None, 0)
    return Record("items", 0, offset, 0, name.encode(), events.encode(found), ())


def patched(offset: int, name: str = "a", **changes: object) -> Record:
    return item(offset, name, **changes)._replace(headers=[ATTRIBUTES_ONLY])


def test_a_patch_is_one_from_the_end_that_the_log_had_at_the_first_patch(bundle: Bundle) -> None:
    log = Log(bundle)
    assert log.batch(item(5), item(6, "b")) == [("a", WHOLE), ("b", WHOLE)]
    assert log.asked == 0, "nothing depends on it yet"
    log.end = 9
    assert log.batch(patched(7), patched(8, "b")) == [("a", WHOLE), ("b", WHOLE)]
    assert log.batch(patched(9), item(10, "c")) == [("a", PATCHED), ("c", WHOLE)]
    assert log.batch(patched(11), patched(12)) == [("a", PATCHED)]
    assert log.asked == 1


def test_after_a_gap_patches_that_were_there_are_encoded_in_full(bundle: Bundle) -> None:
    """What compaction took may have been what a patch builds on."""
    log = Log(bundle)
    log.batch(patched(0))
    assert log.batch(patched(1)) == [("a", PATCHED)]
    log.end = 6
    assert log.batch(patched(2), patched(4, "b")) == [("a", WHOLE), ("b", WHOLE)]  # 3 is gone
    assert log.batch(patched(5)) == [("a", WHOLE)]
    assert log.batch(patched(6)) == [("a", PATCHED)]
    log.end = 20
    assert log.batch(patched(9)) == [("a", WHOLE)]  # 7 and 8 are gone, or another host's encode had them
    log.end = 21
    assert log.batch(patched(3)) == [("a", WHOLE)]  # read again
    assert log.asked == 4


def test_a_patch_beside_another_record_of_its_item_is_encoded_in_full(bundle: Bundle) -> None:
    log = Log(bundle)
    log.batch(patched(0))
    assert log.batch(item(1), patched(2), patched(3, "b")) == [("a", WHOLE), ("b", PATCHED)]


def test_an_item_made_again_below_its_version_is_the_row_that_the_proof_of_a_fill_has(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Also where deletion, tombstone and the new item are read at once."""
    log, proof = Log(bundle), Proof(1, b"key")
    words = {"deleted": True}  # an attribute of that name
    made = [item(0, version=10), item(1, "b", version=10, attributes=words), item(2, "c", version=7)]
    gone = [item(3, version=11, deleted=True), item(4, version=11, deleted=True)]
    gone[1] = gone[1]._replace(value=None, headers=[("version", b"11")])
    again = [item(5, version=3), item(6, version=4, deleted=True), item(7, version=2, attributes=words)]
    writer = N2OWriter(tmp_path, log.encode.layout, 1, b"key")
    for chunk in (made, [*gone, *again, item(8, "b", version=11)]):
        batches, refused = log.encode.rows({0: chunk}, {0: chunk[-1].offset})
        assert refused == []
        proof.add(batches)
        writer.apply([(batch, chunk[-1].offset) for batch in batches])
    writer.apply([(proof.block(0, 8, log.encode.layout), 9)])
    assert (writer.progress().filled.tolist(), writer.progress().mismatch.tolist()) == ([True], [False])
    with closing(N2OReader(tmp_path)) as reader:
        rows = reader.get(["a", "b", "c"])
    assert [row and (row.version, row.offset) for row in rows] == [(2, 7), (11, 8), (7, 2)]
    writer.close()


def test_a_broker_that_is_away_costs_nothing_but_the_encoding(bundle: Bundle) -> None:
    log = Log(bundle)
    log.away = True
    assert log.batch(patched(0)) == log.batch(patched(1)) == [("a", WHOLE)]
    log.away, log.end = False, 2
    assert log.batch(patched(2)) == [("a", PATCHED)]


def test_a_patched_row_has_its_attributes_and_times_and_no_record(bundle: Bundle) -> None:
    log = Log(bundle)
    log.batch(patched(0))
    log.batch(patched(1, attributes={"bid": 0.5, "title": "x"}), patched(2, "b", attributes={}))
    (batch,) = [blocks.decode(record.value or b"", log.encode.layout) for record in log.sent]
    assert batch.cold["attributes"][:, 0].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)
    assert batch.cold["version"].tolist() == [1, 2]
    assert (batch.cold["event_time"] > 0).all()
    assert (batch.cold["encode_time"] > 0).all()
    assert batch.attributes == [b'{"bid":0.5,"title":"x"}', b"{}"]
    assert not batch.hot["joint"].any()
    assert not batch.cold["vector"].any()


def test_an_attribute_that_does_not_fit_removes_the_row_as_ever(bundle: Bundle) -> None:
    log = Log(bundle)
    log.batch(patched(0))
    assert log.batch(patched(1, attributes={"bid": 1e300})) == [("a", DELETED)]
    (dead,) = [record for record in log.sent if record.topic == "items.dlq"]
    assert dict(dead.headers)["error_type"] == b"not_encodable"


def test_what_is_no_item_is_a_dead_letter_and_spoils_nothing(bundle: Bundle) -> None:
    log = Log(bundle)
    gone = Record("items", 0, 2, 7, b"c", None, [("version", b"9")])
    wrong = [item(1, "b")._replace(key=b"x"), item(3)._replace(value=b"{"), gone._replace(offset=4, key=b"")]
    found = log.batch(item(0), wrong[0], gone, wrong[1]._replace(key=b"y"), wrong[2], item(5, "d"))
    assert found == [("a", WHOLE), ("c", DELETED), ("d", WHOLE)]
    assert log.batch(item(6), gone._replace(offset=7)) == [("a", WHOLE), ("c", DELETED)]
    log.batch(item(8), *wrong)
    dead = [dict(record.headers) for record in log.sent if record.topic == "items.dlq"]
    assert [one["error_type"] for one in dead] == [b"key_mismatch", b"malformed", b"malformed"]
