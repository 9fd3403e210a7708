"""Rows in any order -> by user, then time, in bounded memory: an external bucket sort.

Rows are appended to one temporary file per range of users; each file is then sorted in memory, one after the other.
Equal times keep the order in which rows came.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from encoders.data.dataset import by_user

# code: the action of a behaviour, or whether an example was clicked
RECORD = np.dtype([("user", "<i4"), ("item", "<i4"), ("time", "<i8"), ("code", "u1")])
IN_MEMORY = 250_000  # rows sorted at a time
_FILES = 256  # open at a time, at most

Records = npt.NDArray[np.void]  # of RECORD


def records(
    user: npt.NDArray[np.integer],
    item: npt.NDArray[np.integer],
    time: npt.NDArray[np.int64],
    code: npt.NDArray[np.integer] | npt.NDArray[np.bool_],
) -> Records:
    out = np.empty(len(user), dtype=RECORD)
    out["user"], out["item"], out["time"], out["code"] = user, item, time, code
    return out


class Sorter:
    """Takes records, gives them sorted. `expected` rows of users 0..`users` decide the number of files; where one range
    of users has more rows than the others, its file is as much larger.
    """

    def __init__(self, folder: Path, users: int, expected: int, in_memory: int = IN_MEMORY) -> None:
        count = max(1, min(_FILES, users, -(-expected // in_memory)))
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = [folder / f"{number:03d}" for number in range(count)]
        self._files: list[BinaryIO] = [path.open("wb") for path in self._paths]
        self._users = max(1, users)

    def __enter__(self) -> Sorter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, rows: Records) -> None:
        bucket = rows["user"].astype(np.int64) * len(self._files) // self._users
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(len(self._files) + 1))
        ordered = rows[order]
        for file, begin, end in zip(self._files, ends[:-1], ends[1:], strict=True):
            if begin < end:
                file.write(ordered[begin:end].tobytes())

    def parts(self) -> Iterator[Records]:
        """All rows in order, one range of users at a time; may be called again."""
        for file, path in zip(self._files, self._paths, strict=True):
            file.flush()
            rows = np.fromfile(path, dtype=RECORD)
            if len(rows):
                yield in_order(rows)


def in_order(rows: Records) -> Records:
    ordered: Records = rows[by_user(rows["user"], rows["time"])]
    return ordered


def distinct(rows: Records) -> Records:
    """Without the rows that equal an earlier one."""
    order = np.lexsort((rows["code"], rows["item"], rows["time"], rows["user"]))
    again = np.zeros(len(rows), dtype=bool)
    again[order[1:]] = rows[order[1:]] == rows[order[:-1]]
    kept: Records = rows[~again]
    return kept
