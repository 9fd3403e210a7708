"""What an N2O index is given, blocks of a log of `items`, and what it is to hold then, by an oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from index import n2o
from index.arena import ArenaReader
from index.keys import digest_of, keys_of
from index.n2o import FillProof, N2OWriter, RowBatch
from tests.index.rows import LAYOUT, cold_faults, hot_faults, made

KEY = b"hash key"
PARTITIONS = 2


@dataclasses.dataclass(frozen=True)
class Change:
    """One item event as the encoder saw it in `items`."""

    item: int
    version: int
    offset: int
    deleted: bool

    @property
    def item_id(self) -> str:
        return str(self.item) if self.item % 3 else f"item {self.item}"


def block(partition: int, changes: list[Change], covered: int, fill: FillProof | None = None) -> RowBatch:
    ids = [change.item_id for change in changes]
    versions = np.array([change.version for change in changes], np.uint64)
    hot, cold = made(keys_of(ids, KEY), versions)
    cold["event_time"] = versions
    return RowBatch(
        partition,
        covered,
        ids,
        versions,
        np.array([change.offset for change in changes], np.int64),
        np.array([change.deleted for change in changes], np.uint8),
        hot,
        cold,
        [json.dumps({"version": change.version}).encode() for change in changes],
        fill,
    )


class Oracle:
    """Rules 4 and 5 of the design, one row after the other."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, int, int]] = {}  # id -> version, offset, partition
        self.covered = [-1] * PARTITIONS
        self.next = [-1] * PARTITIONS
        self.filled = [False] * PARTITIONS
        self.mismatch = [False] * PARTITIONS

    def proof(self, partition: int) -> FillProof:
        mine = [(name, row[0]) for name, row in self.rows.items() if row[2] == partition]
        keys = keys_of([name for name, _ in mine], KEY)
        versions = np.array([version for _, version in mine], np.uint64)
        return FillProof(len(mine), int(digest_of(keys, versions).sum(dtype=np.uint64)))

    def apply(self, batches: list[tuple[RowBatch, int]]) -> None:
        for batch, rows_offset in batches:
            p = batch.partition
            for at, name in enumerate(batch.ids):
                version, offset = int(batch.versions[at]), int(batch.offsets[at])
                known = self.rows.get(name, (-1, -1, p))
                if offset <= self.covered[p] or (version, offset) <= known[:2]:
                    continue
                if batch.deleted[at]:
                    self.rows.pop(name, None)
                else:
                    self.rows[name] = (version, offset, p)
            self.covered[p] = max(self.covered[p], batch.covered)
            self.next[p] = max(self.next[p], rows_offset + 1)
            if batch.fill is not None and batch.covered == self.covered[p]:
                self.filled[p] = batch.fill == self.proof(p)
                self.mismatch[p] = not self.filled[p]


def check(path: Path, writer: N2OWriter, oracle: Oracle, ids: set[str]) -> None:
    """Arena, RocksDB and progress are the oracle's."""
    names = sorted(ids | set(oracle.rows))
    arena = ArenaReader.open(path, LAYOUT)
    keys = keys_of(names, KEY)
    gathered = arena.gather(keys)
    cold, _ = arena.gather_cold(keys)
    assert gathered.found.tolist() == [name in oracle.rows for name in names]
    assert cold["version"].tolist() == [oracle.rows.get(name, (0,))[0] for name in names]
    assert hot_faults(keys[gathered.found], gathered.hot[gathered.found]) == 0
    assert cold_faults(keys[gathered.found], cold[gathered.found]) == 0
    assert (cold["visible_time"][gathered.found] > 0).all()
    stored = [writer._rocks.get(n2o.ROW + name.encode()) for name in names]
    for name, value in zip(names, stored, strict=True):
        row = None if value is None else n2o.decode_row(value)
        assert (None if row is None else (row.version, row.offset, row.partition)) == oracle.rows.get(name)
    progress = writer.progress()
    shared = arena.progress()
    proofs = [oracle.proof(p) for p in range(PARTITIONS)]
    for got in (progress, shared):
        assert got.covered.tolist() == oracle.covered
        assert got.rows_offset.tolist() == oracle.next
        assert got.count.tolist() == [proof.count for proof in proofs]
        assert got.digest.tolist() == [proof.digest for proof in proofs]
        assert got.filled.tolist() == oracle.filled
        assert got.mismatch.tolist() == oracle.mismatch
    assert writer.rows_offsets().tolist() == oracle.next
