"""Hot records out of the arena and out of RocksDB."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rocksdict import (
    BlockBasedOptions,
    CuckooTableOptions,
    DataBlockIndexType,
    DBCompressionType,
    Options,
    PlainTableFactoryOptions,
    Rdict,
    SliceTransform,
    WriteBatch,
)

from tests.bench.peers.data import Data
from tests.bench.report import Report
from tests.bench.rtp.common import PART, REQUESTS, interleaved


def measure(report: Report, folder: Path, data: Data, gather_rows: Callable[[int], object], rounds: int) -> None:
    """Hot records by the arena's `gather` against RocksDB's call for many keys, in turns. RocksDB holds nothing but
    these 192 bytes per key, in the forms that one would tune, mapped, compacted and warm; the best of them counts."""
    forms = {name: _Rocks(folder / name, options, data) for name, options in _forms().items()}
    work: dict[str, Callable[[int], object]] = {name: rocks.get for name, rocks in forms.items()}
    spent = interleaved(rounds, {"arena": gather_rows} | work, time.thread_time)
    for rocks in forms.values():
        rocks.close()
    for name, values in spent.items():
        report.figure(f"store_{name}_cpu_ms", values, "ms")
    best = min(forms, key=lambda name: float(np.median(spent[name])))
    report.figure("gather_over_rocksdb", (np.array(spent[best]) / spent["arena"]).tolist(), "x")


def _forms() -> dict[str, Options]:
    """RocksDB's tables for reads of single keys."""
    blocks, plain, cuckoo = (Options(raw_mode=True) for _ in range(3))
    small = BlockBasedOptions()
    small.set_block_size(1024)
    small.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    small.set_data_block_hash_ratio(0.75)
    small.disable_cache()  # mapped blocks that are not compressed need none
    blocks.set_block_based_table_factory(small)
    hashed = PlainTableFactoryOptions()
    hashed.user_key_length = 8
    plain.set_prefix_extractor(SliceTransform.create_fixed_prefix(8))
    plain.set_plain_table_factory(hashed)
    cuckoo.set_cuckoo_table_factory(CuckooTableOptions())
    forms = {"blocks": blocks, "plain": plain, "cuckoo": cuckoo}
    for options in forms.values():
        options.create_if_missing(True)
        options.set_compression_type(DBCompressionType.none())
        options.set_allow_mmap_reads(True)
        options.set_max_open_files(-1)
    return forms


class _Rocks:
    """The hot records in a RocksDB of their own; keys are the ids' eight bytes, ready before they are asked for."""

    def __init__(self, folder: Path, options: Options, data: Data) -> None:
        self._folder, size = folder, data.layout.hot.itemsize
        self._rocks = Rdict(str(folder), options)
        for at in range(0, len(data.hot), PART):
            raw, batch = data.hot[at : at + PART].tobytes(), WriteBatch(raw_mode=True)
            for place in range(0, len(raw), size):
                batch.put((at + place // size).to_bytes(8, "big"), raw[place : place + size])
            self._rocks.write(batch)
        self._rocks.flush()
        self._rocks.compact_range(None, None)
        self._names: list[list[str | int | float | bytes | bool]] = [
            [number.to_bytes(8, "big") for number in ids.tolist()] for ids in data.requests
        ]
        for names in self._names:
            found = self._rocks.get(names)
            assert isinstance(found, list)
            assert None not in found, "RocksDB holds other keys"

    def get(self, place: int) -> None:
        self._rocks.get(self._names[place % REQUESTS])

    def close(self) -> None:
        self._rocks.close()
        shutil.rmtree(self._folder)
