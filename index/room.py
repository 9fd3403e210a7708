"""Whether a host has room for one more generation: what its files and its memory will take, against what is free.

Before anything of a generation is fetched: a fill that meets a full disk would harm the live generation too.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from index import table
from index.arena_writer import entries_for, records_for
from index.layout import RowLayout

_ATTRIBUTES = 1_024  # bytes of a row's attributes as JSON: unknown before they are there
_STORED = 64  # bytes of a row in RocksDB beside its records and attributes: key, times, offset
_RETRIEVAL = 200  # bytes of an item in the retrieval index beside its vector: id, key, links
_MEMORY, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_UNKNOWN = 1 << 62  # where the system does not say


class RoomError(Exception):
    """There is too little room, or nobody says how much. One clause: "needs 3.1 GB of disk, 2.0 GB free"."""


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes."""

    disk: int
    memory: int


def need(layout: RowLayout, rows: int, bundle: int) -> Room:
    """What a generation of `rows` rows takes, of whose bundle `bundle` bytes are still to be copied: arena, row store
    (twice, while it compacts), retrieval index.
    """
    hot, cold = layout.hot.itemsize, layout.cold.itemsize
    slots = entries_for(rows) * table.ENTRY
    stored = 2 * (_STORED + hot + cold + _ATTRIBUTES) * rows
    retrieval = (2 * layout.dim + _RETRIEVAL) * rows
    disk = (hot + cold) * records_for(rows) + slots + stored + retrieval + bundle
    return Room(disk, hot * records_for(rows) + slots + bundle)


def remaining(needed: Room, done: float) -> Room:
    """What a fill has yet to write of what it needs, when this share of it is done."""
    return Room(int((1 - done) * needed.disk), int((1 - done) * needed.memory))


def free(folder: Path) -> Room:
    """What is free on the disk of `folder`, which need not exist yet, and of the memory that this host or its control
    group may use. Raises RoomError where the disk does not say.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return Room(shutil.disk_usage(existing).free, min(available(), allowed()))
    except OSError as error:
        raise RoomError(f"what is free at {folder} cannot be read: {error.strerror}") from error


def check(needed: Room, found: Room, others: Iterable[Room] = ()) -> None:
    """Raises RoomError where `found` is too little, naming all that is; the `others` will take of it as well."""
    fills, short = list(others), []
    for name in ("disk", "memory"):
        wanted, there = getattr(needed, name), getattr(found, name)
        taken = sum(getattr(fill, name) for fill in fills)
        if wanted > there - taken:
            beside = f", {_size(taken)} of it for fills under way" if taken else ""
            short.append(f"{_size(wanted)} of {name}, {_size(there)} free{beside}")
    if short:
        raise RoomError(f"needs {' and '.join(short)}")


def available(path: Path = _MEMORY) -> int:
    """Memory of the host that programs may still take, what is only cached included."""
    try:
        values = dict(line.split(":") for line in path.read_text().splitlines())
        return 1024 * int(values["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return _UNKNOWN


def allowed(group: Path = _CGROUP) -> int:
    """The same of the control group (version 2), if it has a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        kinds = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return _UNKNOWN if limit == "max" else max(0, int(limit) - used + int(kinds["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return _UNKNOWN


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
