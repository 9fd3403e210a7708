"""The arena's one writer, and how an arena grows without stopping its readers:

1. the new table is filled, the record files are made longer, 2. the other half of the control page's geometry is
written, 3. `epoch` is increased (release), 4. what is no longer used is unlinked.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index import table
from index.arena import (
    FORMAT,
    GEOMETRY,
    MAGIC,
    PAGE,
    Control,
    Files,
    Progress,
    arena_folder,
    boot_id,
    control_type,
    offset_of,
    sync,
)
from index.layout import RowLayout

SPARE = 16  # one record in so many is room for what is to come
LEAST_RECORDS = 1024  # room of an empty arena, and as much beside it in any other


class ArenaWriter:
    """The one writer; whoever constructs it holds the index's lock. Use `open` or `create`."""

    def __init__(self, folder: Path, layout: RowLayout, control: Control, files: Files) -> None:
        self._folder = folder
        self._layout = layout
        self._control = control
        self._files = files
        self._free = np.zeros(files.records, np.uint32)
        self._state = np.zeros(3, np.int64)
        self._hot_size = np.uint64(layout.hot.itemsize)
        self._cold_size = np.uint64(layout.cold.itemsize)
        self._version_at = np.uint64(offset_of(layout.hot, "slot_version"))
        self._version_in_cold = np.uint64(offset_of(layout.cold, "version"))
        self._published = False
        self.digest = np.uint64(0)  # of all rows, as `open` found them

    @classmethod
    def open(cls, path: Path, layout: RowLayout, partitions: int, store: int) -> ArenaWriter | None:
        """Goes on with what the former writer left; None when that cannot be trusted and an arena must be created."""
        folder = arena_folder(path)
        try:
            control = Control(folder / "control", partitions, writable=True)
            if not control.belongs_to(layout, partitions) or not control.survived():
                return None
            if int(control.page["store"][0]) != store:
                return None
            epoch, geometry = control.geometry()
            files = Files.map(folder, layout, epoch, geometry, writable=True)
        except (FileNotFoundError, ValueError):  # never made, or a file is shorter than its geometry
            return None
        writer = cls(folder, layout, control, files)
        hot, cold, entries = files.addresses
        sound, digest = table.take_over(
            np.uint64(entries),
            files.entries,
            np.uint64(hot),
            writer._hot_size,
            np.uint64(cold),
            writer._cold_size,
            writer._version_at,
            writer._version_in_cold,
            files.records,
            writer._free,
            writer._state,
        )
        if not sound:
            return None
        writer.digest = np.uint64(digest)
        writer._published = True
        control.page["boot"] = boot_id()
        control.page["clean"] = 0
        control.flush()  # the power may fail from here on
        writer._unlink_others()
        return writer

    @classmethod
    def create(cls, path: Path, layout: RowLayout, partitions: int, items: int) -> ArenaWriter:
        """An empty arena with room for `items` rows. Readers go on with the former one, if any, until `publish`."""
        folder = arena_folder(path)
        folder.mkdir(parents=True, exist_ok=True)
        size = -(-control_type(partitions).itemsize // PAGE) * PAGE
        if not (folder / "control").exists() or (folder / "control").stat().st_size != size:
            (folder / "control").unlink(missing_ok=True)
            _make(folder / "control", size)
        control = Control(folder / "control", partitions, writable=True)
        number = 1 + max([int(file.suffix[1:]) for file in _record_files(folder)], default=0)
        records, entries = records_for(items), entries_for(items)
        geometry = np.array((number, records, number, entries), GEOMETRY)
        _make(folder / f"hot.{number}", records * layout.hot.itemsize)
        _make(folder / f"cold.{number}", records * layout.cold.itemsize)
        _make(folder / f"table.{number}", entries * table.ENTRY)
        writer = cls(folder, layout, control, Files.map(folder, layout, 0, geometry, writable=True))
        writer._free[:] = np.arange(records, dtype=np.uint32)[::-1]
        writer._state[table.FREE] = records
        return writer

    def publish(self, store: int, batch: int, progress: Progress) -> None:
        """Puts a created arena in force."""
        page = self._control.page
        self._control.publish_progress(batch, progress)
        epoch = self._control.publish_geometry(self._files.geometry)
        self._files = dataclasses.replace(self._files, epoch=epoch)
        page["format"], page["layout"], page["partitions"] = FORMAT, self._layout.fingerprint(), len(progress.covered)
        page["store"], page["clean"], page["boot"] = store, 0, boot_id()
        table.store_word(int(page.ctypes.data), MAGIC)  # last: readers look at it first
        self._control.flush()
        self._published = True
        self._unlink_others()

    @property
    def items(self) -> int:
        return int(self._state[table.LIVE])

    @property
    def batch(self) -> int:
        """Number of the last batch that was applied completely."""
        return self._control.progress()[0]

    def versions(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """(versions u8[n], exists bool[n]) of the live rows of keys u8[n, 2]."""
        versions, exists = np.empty(len(keys), np.uint64), np.empty(len(keys), np.bool_)
        _, cold, entries = self._files.addresses
        mask = np.uint64(self._files.entries - 1)
        table.versions_of(
            np.uint64(entries), mask, np.uint64(cold), self._cold_size, self._version_in_cold, keys, versions, exists
        )
        return versions, exists

    def apply(self, keys: NDArray[np.uint64], kinds: NDArray[np.uint8], hot: NDArray[Any], cold: NDArray[Any]) -> None:
        """Puts (kind 1) or removes (kind 2) the rows of keys u8[n, 2]; kind 0 does nothing. `hot` and `cold` are
        aligned arrays [n] of the layout's records; hot's `slot_version` is overwritten."""
        self.make_room(int(np.count_nonzero(kinds == table.PUT)))
        hot_base, cold_base, entries = self._files.addresses
        table.apply_rows(
            np.uint64(entries),
            np.uint64(self._files.entries - 1),
            np.uint64(hot_base),
            self._hot_size,
            np.uint64(cold_base),
            self._cold_size,
            self._version_at,
            self._free,
            self._state,
            keys,
            kinds,
            np.uint64(hot.ctypes.data),
            np.uint64(cold.ctypes.data),
        )

    def publish_progress(self, batch: int, progress: Progress) -> None:
        """After `apply` of the same batch."""
        self._control.publish_progress(batch, progress)

    def close(self) -> None:
        """Puts all memory on disk, so that the arena outlives a reboot."""
        if self._published:
            for file in _record_files(self._folder):
                sync(file)
            self._control.page["clean"] = 1
            self._control.flush()

    def make_room(self, puts: int) -> None:
        """Grows where `puts` rows would not fit. Raises OSError when the disk is full; nothing has changed then."""
        files = self._files
        live, used = int(self._state[table.LIVE]), int(self._state[table.USED])
        records_short = int(self._state[table.FREE]) < puts
        table_short = used + puts > files.entries * table.LOAD
        if not records_short and not table_short:
            return
        geometry = files.geometry.copy()
        if records_short:
            geometry["records"] = records_for(live + puts)
            for name, size in (("hot", self._layout.hot.itemsize), ("cold", self._layout.cold.itemsize)):
                _lengthen(self._folder / f"{name}.{geometry['records_number']}", int(geometry["records"]) * size)
        if table_short:
            geometry["table_number"] += 1
            geometry["entries"] = entries_for(live + puts)
            _make(self._folder / f"table.{geometry['table_number']}", int(geometry["entries"]) * table.ENTRY)
        grown = Files.map(self._folder, self._layout, files.epoch, geometry, writable=True)
        if table_short:
            mask = np.uint64(grown.entries - 1)
            live = table.copy_table(np.uint64(files.addresses[2]), files.entries, np.uint64(grown.addresses[2]), mask)
            self._state[table.USED] = live
        if records_short:
            free = np.zeros(grown.records, np.uint32)
            new = grown.records - files.records
            free[:new] = np.arange(files.records, grown.records, dtype=np.uint32)[::-1]
            free[new : new + self._state[table.FREE]] = self._free[: self._state[table.FREE]]
            self._free = free
            self._state[table.FREE] += new
        if self._published:
            grown = dataclasses.replace(grown, epoch=self._control.publish_geometry(geometry))
        self._files = grown
        if self._published:
            self._unlink_others()

    def _unlink_others(self) -> None:
        """Removes what no geometry names: former tables, and what an interrupted growth left."""
        geometry = self._files.geometry
        records, table_number = int(geometry["records_number"]), int(geometry["table_number"])
        keep = {f"hot.{records}", f"cold.{records}", f"table.{table_number}"}
        for file in _record_files(self._folder):
            if file.name not in keep:
                file.unlink()


def records_for(items: int) -> int:
    """Records for `items` rows and the updates between two growths: at most 1.15 per row from 11,703 rows on. A step of
    a share keeps growth linear in all: each lays out what it adds and maps the rest anew."""
    return items + items // SPARE + LEAST_RECORDS


def entries_for(items: int) -> int:
    """Entries of a table for `items` rows: a power of two, at least four times as many, which leaves room up to
    LOAD."""
    return 1 << max(12, (4 * items - 1).bit_length())


def _record_files(folder: Path) -> Iterator[Path]:
    for file in list(folder.iterdir()):
        if file.stem in ("hot", "cold", "table") and file.suffix[1:].isdigit():
            yield file


def _make(path: Path, size: int) -> None:
    """A file of zeros with its disk space reserved: a full disk is an OSError here, not a SIGBUS at a later store."""
    path.unlink(missing_ok=True)
    _lengthen(path, size)


def _lengthen(path: Path, size: int) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(file, 0, size)
    finally:
        os.close(file)
