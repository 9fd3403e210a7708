"""The arena: the rows of one generation in memory-mapped files, written by `replicate`, read by all API processes.

Files in `<n2o>/arena`: `control` (a page or more, kept for ever), `hot.<k>` and `cold.<k>` (records by slot),
`table.<k>` (id table). Which of them are in force stands in the control page. `index/table.py` has the rows'
publication protocol, `index/arena_writer.py` growth; this file has the control page, the mapped files and the reader.

Readers look at the control page's `epoch` before each gather, and map anew where it has changed; what they have mapped
stays valid memory as long as they use it, and a row replaced or removed meanwhile is void there, so they notice.

Guarantees: a row read is whole, belongs to the key asked for, and was live at some time during the call, whatever the
writer does, however long either side pauses, and whether or not the writer is killed. After power loss (another boot id
without a clean end) nothing here is trusted: readers refuse, the writer builds anew from RocksDB.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index import table
from index.errors import N2OError, StoreMissingError
from index.layout import RowLayout, aligned_empty

MAGIC = 0x414E455241524F46  # "FORARENA"
FORMAT = 1
PAGE = 4096
_TRIES = 8
_SAMPLED = 1 << 13  # entries that a sample looks at, at least


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an N2O index has come, one entry per partition."""

    covered: NDArray[np.int64]  # last `items` offset covered, -1: none
    rows_offset: NDArray[np.int64]  # next offset to read of `rows.<generation>`, -1: none
    count: NDArray[np.int64]  # live rows
    digest: NDArray[np.uint64]  # sum of digest_of(key, version) over the live rows
    filled: NDArray[np.bool_]  # the newest fill proof agreed with count and digest
    mismatch: NDArray[np.bool_]  # the newest fill proof did not: the generation has failed

    @classmethod
    def empty(cls, partitions: int) -> Progress:
        """No partition has covered anything."""
        return cls(
            covered=np.full(partitions, -1, np.int64),
            rows_offset=np.full(partitions, -1, np.int64),
            count=np.zeros(partitions, np.int64),
            digest=np.zeros(partitions, np.uint64),
            filled=np.zeros(partitions, np.bool_),
            mismatch=np.zeros(partitions, np.bool_),
        )

    def copy(self) -> Progress:
        return Progress(**{field.name: getattr(self, field.name).copy() for field in dataclasses.fields(self)})

    def to_array(self) -> NDArray[Any]:
        """As PROGRESS records, the form of both stores."""
        out = np.zeros(len(self.covered), PROGRESS)
        for field in dataclasses.fields(self):
            out[field.name] = getattr(self, field.name)
        return out

    @classmethod
    def from_array(cls, array: NDArray[Any]) -> Progress:
        return cls(**{name: np.ascontiguousarray(array[name]) for name in PROGRESS.names or ()})


PROGRESS: np.dtype[np.void] = np.dtype(
    [
        ("covered", "<i8"),
        ("rows_offset", "<i8"),
        ("count", "<i8"),
        ("digest", "<u8"),
        ("filled", "?"),
        ("mismatch", "?"),
    ]
)
GEOMETRY = np.dtype(
    [("records_number", "<u8"), ("records", "<u8"), ("table_number", "<u8"), ("entries", "<u8")]
)  # which files, how many records and entries they hold


def control_type(partitions: int) -> np.dtype[np.void]:
    """Two halves for what is more than one word: the one in force is the parity of the word before it."""
    return np.dtype(
        [
            ("magic", "<u8"),
            ("format", "<u8"),
            ("layout", "<u8"),
            ("partitions", "<u8"),
            ("store", "<u8"),  # the RocksDB these rows come from
            ("clean", "<u8"),  # the last writer ended in order, with all memory on disk
            ("epoch", "<u8"),
            ("geometry", GEOMETRY, (2,)),
            ("progress_number", "<u8"),
            ("batch", "<u8", (2,)),  # number of the last batch applied, as RocksDB counts
            ("progress", PROGRESS, (2, partitions)),
            ("boot", "S40"),
        ]
    )


@dataclasses.dataclass(frozen=True)
class ArenaSize:
    """Items and bytes of an arena; `capacity` is how many records fit before it grows."""

    items: int
    capacity: int
    hot_bytes: int
    cold_bytes: int
    table_bytes: int


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Rows of n keys: `hot` aligned structured copy [n], all zero where not found; `found` bool[n]."""

    hot: NDArray[Any]
    found: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Publications:
    """Which publication of its row each of n keys had. Where it is the same again, it was so all the time between."""

    words: NDArray[np.uint64]  # slot version and slot, 0 = no row
    slots: tuple[object, int]  # the reader, and the record files that have them

    def same(self, other: Publications) -> bool:
        return self.slots == other.slots and np.array_equal(self.words, other.words)


def arena_folder(path: Path) -> Path:
    """Where the arena of the N2O index at `path` lies."""
    return path / "arena"


class Control:
    """The mapped control page."""

    def __init__(self, path: Path, partitions: int, writable: bool) -> None:
        kind = control_type(partitions)
        self._path = path
        self.file = _file_of(
            path
        )  # before it is mapped: where it is replaced in between, this one is not there any more
        memory = _map(path, -(-kind.itemsize // PAGE) * PAGE, writable)
        self.page = memory[: kind.itemsize].view(kind)[0:1]
        self._memory = memory
        self._kind = kind

    def flush(self) -> None:
        sync(self._path)

    def _address(self, name: str) -> int:
        fields = self._kind.fields
        assert fields is not None
        return int(self._memory.ctypes.data) + int(fields[name][1])

    @property
    def epoch_address(self) -> int:
        return self._address("epoch")

    def geometry(self) -> tuple[int, NDArray[Any]]:
        """(epoch, geometry in force)."""
        while True:
            epoch = int(table.load_word(self.epoch_address))
            geometry = self.page["geometry"][0, epoch & 1].copy()
            if int(table.load_word_after(self.epoch_address)) == epoch:
                return epoch, geometry

    def publish_geometry(self, geometry: NDArray[Any]) -> int:
        """Returns the new epoch."""
        epoch = int(self.page["epoch"][0]) + 1
        table.hold_stores()
        self.page["geometry"][0, epoch & 1] = geometry
        table.store_word(self.epoch_address, epoch)
        return epoch

    def progress(self) -> tuple[int, Progress]:
        """(number of the last batch, progress) as of one moment."""
        address = self._address("progress_number")
        while True:
            number = int(table.load_word(address))
            batch = int(self.page["batch"][0, number & 1])
            records = self.page["progress"][0, number & 1].copy()
            if int(table.load_word_after(address)) == number:
                return batch, Progress.from_array(records)

    def publish_progress(self, batch: int, progress: Progress) -> None:
        number = int(self.page["progress_number"][0]) + 1
        table.hold_stores()
        self.page["batch"][0, number & 1] = batch
        self.page["progress"][0, number & 1] = progress.to_array()
        table.store_word(self._address("progress_number"), number)

    def belongs_to(self, layout: RowLayout, partitions: int) -> bool:
        head = self.page[0]
        return (int(head["magic"]), int(head["format"]), int(head["layout"]), int(head["partitions"])) == (
            MAGIC,
            FORMAT,
            layout.fingerprint(),
            partitions,
        )

    def survived(self) -> bool:
        """Whether memory is what the last writer left: written since this boot, or put on disk in order."""
        return bool(self.page["clean"][0]) or (self.page["boot"][0] == boot_id() != b"")


@dataclasses.dataclass(frozen=True)
class Files:
    """One mapping of all files of a geometry. The arrays keep the mapping alive; the addresses are theirs."""

    epoch: int
    geometry: NDArray[Any]
    hot: NDArray[np.uint8]
    cold: NDArray[np.uint8]
    table: NDArray[np.uint8]

    @property
    def records(self) -> int:
        return int(self.geometry["records"])

    @property
    def entries(self) -> int:
        return int(self.geometry["entries"])

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of hot records, cold records and table."""
        return int(self.hot.ctypes.data), int(self.cold.ctypes.data), int(self.table.ctypes.data)

    @classmethod
    def map(cls, folder: Path, layout: RowLayout, epoch: int, geometry: NDArray[Any], writable: bool) -> Files:
        records, entries = int(geometry["records"]), int(geometry["entries"])
        return cls(
            epoch,
            geometry,
            _map(folder / f"hot.{geometry['records_number']}", records * layout.hot.itemsize, writable),
            _map(folder / f"cold.{geometry['records_number']}", records * layout.cold.itemsize, writable),
            _map(folder / f"table.{geometry['table_number']}", entries * table.ENTRY, writable),
        )


class ArenaReader:
    """Many may be open, in any process and thread. Use `ArenaReader.open`."""

    def __init__(self, folder: Path, layout: RowLayout, control: Control) -> None:
        self._folder = folder
        self._layout = layout
        self._control = control
        self._files = self._mapped()
        self._version_at = np.uint64(offset_of(layout.hot, "slot_version"))
        self._itself = object()  # tells it from all others, and keeps nothing of it

    @classmethod
    def open(cls, path: Path, layout: RowLayout) -> ArenaReader:
        """`path` is the folder given to N2OWriter. Raises StoreMissingError when there is no arena yet, or none that
        can be trusted until the writer has built it anew, and N2OError when it has another layout."""
        folder = arena_folder(path)
        try:
            with (folder / "control").open("rb") as file:
                head = np.frombuffer(file.read(control_type(1).itemsize), control_type(1))[0:1]
        except (FileNotFoundError, ValueError) as error:
            raise StoreMissingError(f"{folder} holds no arena yet") from error
        if int(head["magic"][0]) != MAGIC:
            raise StoreMissingError(f"{folder} holds no finished arena yet")
        partitions = int(head["partitions"][0])
        control = Control(folder / "control", partitions, writable=False)
        if not control.belongs_to(layout, partitions):
            raise N2OError(f"{folder} holds rows of another layout or format")
        if not control.survived():
            raise StoreMissingError(f"{folder} was not closed before the machine stopped; its writer builds it anew")
        return cls(folder, layout, control)

    def replaced(self) -> bool:
        """Whether another index is in its place by now, or none; what was opened stays readable as it was."""
        return _file_of(self._folder / "control") != self._control.file

    def _mapped(self) -> Files:
        while True:
            epoch, geometry = self._control.geometry()
            try:
                return Files.map(self._folder, self._layout, epoch, geometry, writable=False)
            except FileNotFoundError:
                if self._control.geometry()[0] == epoch:  # not the writer's growth
                    raise

    def _current(self) -> Files:
        """The files in force; one load where nothing has changed."""
        files = self._files
        if int(table.load_word(self._control.epoch_address)) != files.epoch:
            files = self._files = self._mapped()
        return files

    def gather(self, keys: NDArray[np.uint64]) -> Gathered:
        """Hot records of keys u8[n, 2]."""
        hot = aligned_empty(len(keys), self._layout.hot)
        words = self._copy(keys, hot, cold=False)
        return Gathered(hot, words != 0)

    def gather_cold(self, keys: NDArray[np.uint64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Cold records of keys u8[n, 2], zero where not found, and found bool[n]."""
        rows = aligned_empty(len(keys), self._layout.cold)
        words = self._copy(keys, rows, cold=True)
        return rows, words != 0

    def gather_both(self, keys: NDArray[np.uint64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
        """Hot [n] and cold [n] records of keys u8[n, 2], both of one publication of the row, and found bool[n]. What
        changes in between is read again; a row that changed at every look counts as not found."""
        keys = np.ascontiguousarray(keys, np.uint64).reshape(-1, 2)
        hot, cold = aligned_empty(len(keys), self._layout.hot), aligned_empty(len(keys), self._layout.cold)
        found, torn = np.zeros(len(keys), np.bool_), np.arange(len(keys))
        for attempt in range(_TRIES):
            wanted = keys[torn] if attempt else keys
            hot_out = aligned_empty(len(torn), hot.dtype) if attempt else hot
            cold_out = aligned_empty(len(torn), cold.dtype) if attempt else cold
            epoch = self._current().epoch
            words = self._copy(wanted, hot_out, cold=False)
            same = words == self._copy(wanted, cold_out, cold=True)  # slot and slot version: the same publication
            if self._current().epoch != epoch:
                same[:] = False  # words of an arena that was built anew may be equal by accident
            if attempt:
                hot[torn], cold[torn] = hot_out, cold_out
            found[torn] = same & (words != 0)
            torn = torn[~same]
            if not len(torn):
                break
        return hot, cold, found

    def publications(self, keys: NDArray[np.uint64]) -> Publications:
        """Those that keys u8[n, 2] have now. Reads the id table alone, so it costs much less than the records do."""
        keys = np.ascontiguousarray(keys, np.uint64).reshape(-1, 2)
        words = np.empty(len(keys), np.uint64)
        while True:
            files = self._current()
            table.words_of(np.uint64(files.addresses[2]), np.uint64(files.entries - 1), keys, words)
            if self._current() is files:  # as in `snapshot`
                return Publications(words, (self._itself, int(files.geometry["records_number"])))

    def _copy(self, keys: NDArray[np.uint64], out: NDArray[Any], cold: bool) -> NDArray[np.uint64]:
        keys = np.ascontiguousarray(keys, np.uint64).reshape(-1, 2)
        words = np.empty(len(keys), np.uint64)
        done = 0
        while done < len(keys):
            files = self._current()
            hot_base, cold_base, table_base = files.addresses
            done = table.gather(
                np.uint64(table_base),
                np.uint64(files.entries - 1),
                np.uint64(hot_base),
                np.uint64(self._layout.hot.itemsize),
                self._version_at,
                np.uint64(cold_base if cold else hot_base),
                np.uint64(out.dtype.itemsize),
                np.uint64(files.records),
                keys,
                done,
                words,
                np.uint64(out.ctypes.data),
            )
        return words

    def snapshot(self) -> tuple[NDArray[np.uint64], NDArray[Any]]:
        """Keys u8[m, 2] and cold records [m] of all live rows; each row as it was at some time during the call."""
        while True:
            files = self._current()
            most = int(files.entries * table.LOAD) + 1
            keys, rows = np.empty((most, 2), np.uint64), aligned_empty(most, self._layout.cold)
            count = table.scan(*self._walk(files), keys, np.uint64(rows.ctypes.data))
            # An epoch that changed meanwhile means rows that the old table does not know.
            if count >= 0 and self._current() is files:
                return keys[:count], rows[:count]

    def sample(self, count: int, random: np.random.Generator) -> NDArray[np.uint64]:
        """Keys u8[m, 2] of live rows, drawn evenly: `count` of them, all where there are not so many, and fewer only
        where a large table has become almost empty, because a bounded part of it is read.
        """
        files = self._current()
        places = np.arange(files.entries)
        looked_at = max(_SAMPLED, int(count / table.LOAD) * 3)  # most of a table may be deleted rows, or room to grow
        if files.entries > looked_at:
            places = np.unique(random.integers(files.entries, size=looked_at))
        keys = np.empty((len(places), 2), np.uint64)
        live = table.keys_at(np.uint64(files.addresses[2]), places, keys)
        return keys[random.permutation(live)[:count]]

    def oldest(self) -> int | None:
        """The least `event_time` of all live rows, None without one. 35 ms of CPU for 1M rows, without the GIL."""
        while True:
            files = self._current()
            sound, least = table.least(*self._walk(files), np.uint64(offset_of(self._layout.cold, "event_time")))
            if sound and self._current() is files:  # as in `snapshot`
                return None if least == np.iinfo(np.int64).max else int(least)

    def _walk(self, files: Files) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any]:
        """What the kernels that go over the whole table begin with."""
        hot_base, cold_base, table_base = files.addresses
        return (
            np.uint64(table_base),
            files.entries,
            np.uint64(hot_base),
            np.uint64(self._layout.hot.itemsize),
            self._version_at,
            np.uint64(cold_base),
            np.uint64(self._layout.cold.itemsize),
            np.uint64(files.records),
        )

    def progress(self) -> Progress:
        return self._control.progress()[1]

    def size(self) -> ArenaSize:
        files = self._current()
        items = int(self.progress().count.sum())
        return ArenaSize(items, files.records, files.hot.nbytes, files.cold.nbytes, files.table.nbytes)


def offset_of(kind: np.dtype[np.void], name: str) -> int:
    assert kind.fields is not None
    return int(kind.fields[name][1])


def _map(path: Path, size: int, writable: bool) -> NDArray[np.uint8]:
    """Shared memory of the first `size` bytes of a file. Raises ValueError when it is shorter."""
    with path.open("r+b" if writable else "rb") as file:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        return np.frombuffer(mmap.mmap(file.fileno(), size, access=access), np.uint8)


def sync(path: Path) -> None:
    """Puts a file's memory on disk, what was stored through mappings too."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _file_of(path: Path) -> tuple[int, int]:
    """Tells a file from any other that exists at the same time; no file is one too."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    return found.st_dev, found.st_ino


def boot_id() -> bytes:
    """Changes with every start of the machine; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""
