"""Published files -> typed parts of bounded size. Every adapter reads through here.

A file is read in pieces that end at a line end, so memory does not grow with the file. Plain and gzip files read alike.
What a file must not hold is a `DataError` with file, line and column; nothing is skipped here.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from encoders.data.dataset import DataError

PIECE = 8 << 20  # bytes of a file that are in memory at a time
MISSING = ("", "NULL", "null", "\\N")  # how the published files write that there is no value

I8 = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Column:
    """What a column must hold: whole numbers, finite numbers or text; `required` forbids a missing value."""

    kind: Literal["whole", "number", "text"]
    required: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive rows of a file; a missing value is null."""

    path: Path
    frame: pl.DataFrame
    lines: I8  # [n], line of each row

    def where(self, row: int) -> str:
        return f"{self.path.name}:{self.lines[row]}"

    def array(self, name: str) -> npt.NDArray[Any]:
        """A required column of numbers."""
        return self.frame[name].to_numpy()


def found(folder: Path, *patterns: str) -> list[Path]:
    """The files in `folder` (or in its `data` folder) that match a pattern, gzip or not, by name; DataError if none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    places = [folder, folder / "data"] if (folder / "data").is_dir() else [folder]
    matches = {
        path for place in places for pattern in patterns for end in ("", ".gz") for path in place.glob(pattern + end)
    }
    if not matches:
        raise DataError(f"{folder} holds no {' or '.join(patterns)} (nor with .gz)")
    return sorted(matches)


def found_one(folder: Path, *patterns: str) -> Path:
    """The one file that matches; DataError if several do."""
    matches = found(folder, *patterns)
    if len(matches) > 1:
        raise DataError(f"{folder} holds several of one kind: {', '.join(path.name for path in matches)}")
    return matches[0]


def csv_parts(
    path: Path, columns: Mapping[str, Column], names: Sequence[str] | None = None, piece: int = PIECE
) -> Iterator[Part]:
    """The wanted `columns` of a CSV file in parts of about `piece` bytes. Its columns are named by `names`, or else by
    its first line. Raises DataError, also where the file holds no row.
    """
    pieces = _pieces(path, piece)
    rows = 0
    first, text = next(pieces, (1, b""))
    if text.startswith(b"\xef\xbb\xbf"):
        text = text[3:]
    if names is None:
        header, _, text = text.partition(b"\n")
        names = [name.strip() for name in _fields(header, f"{path.name}:1")]
        first = 2
    for name in columns:
        if name not in names:
            raise DataError(f"{path.name}:1: no column {name}; there are {', '.join(names)}")
    while True:
        part = _part(path, first, text, columns, names)
        rows += len(part.frame)
        if len(part.frame):
            yield part
        following = next(pieces, None)
        if following is None:
            break
        first, text = following
    if not rows:
        raise DataError(f"{path.name} holds no rows")


def json_lines(path: Path, piece: int = PIECE) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line, JSON or (in files of 2014) a Python literal. Raises DataError."""
    rows = 0
    for first, text in _pieces(path, piece):
        for number, line in enumerate(text.split(b"\n"), start=first):
            if stripped := line.strip():
                rows += 1
                yield f"{path.name}:{number}", _object(stripped, f"{path.name}:{number}")
    if not rows:
        raise DataError(f"{path.name} holds no rows")


def _pieces(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines) of a file, about `size` bytes at a time."""
    first, rest = 1, b""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while read := file.read(size):
                text, newline, rest = (rest + read).rpartition(b"\n")
                if newline:
                    yield first, text + newline
                    first += text.count(b"\n") + 1
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error
    if rest:
        yield first, rest


def _part(path: Path, first: int, text: bytes, columns: Mapping[str, Column], names: Sequence[str]) -> Part:
    """One piece, checked: every line has the columns' number of fields, and every field what its column must hold."""
    if not text.endswith(b"\n"):
        text += b"\n"
    keep = _whole_rows(path, first, text, len(names))
    header = ",".join(f"c{place}" for place in range(len(names))).encode() + b"\n"
    wanted = {f"c{names.index(name)}": name for name in columns}
    try:
        raw = pl.read_csv(header + text, columns=list(wanted), infer_schema=False, empty_string_is_null=False)
    except pl.exceptions.PolarsError as error:
        raise _explained(path, first, text, error) from error
    frame = raw.rename(wanted).select(list(columns)).with_columns(pl.all().replace(list(MISSING), None))
    lines = np.arange(first, first + len(keep))
    if not keep.all():
        frame, lines = frame.filter(pl.Series(keep)), lines[keep]
    part = Part(path, frame, lines)
    return dataclasses.replace(part, frame=frame.select(_typed(part, name, want) for name, want in columns.items()))


def _whole_rows(path: Path, first: int, text: bytes, fields: int) -> npt.NDArray[np.bool_]:
    """Which lines are rows (the others are empty). Raises DataError on a line with another number of fields."""
    letters = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(letters == ord("\n"))
    commas = np.searchsorted(np.flatnonzero(letters == ord(",")), ends)
    count = np.diff(commas, prepend=0) + 1
    starts = np.concatenate([[0], ends[:-1] + 1])
    keep = np.ones(len(ends), dtype=bool)
    for row in np.flatnonzero((count != fields) | (ends - starts < 2)):
        line = text[starts[row] : ends[row]].rstrip(b"\r")
        if not line:
            keep[row] = False
            continue
        where = f"{path.name}:{first + row}"
        if (got := len(_fields(line, where))) != fields:
            raise DataError(f"{where}: {got} fields, {fields} are needed")
    return keep


def _fields(line: bytes, where: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(line.decode().rstrip("\r")), strict=True), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason}") from error
    except csv.Error as error:
        raise DataError(f"{where}: {error}") from error


def _explained(path: Path, first: int, text: bytes, error: Exception) -> DataError:
    """The line because of which a piece did not parse."""
    for number, line in enumerate(text.split(b"\n"), start=first):
        try:
            _fields(line, f"{path.name}:{number}")
        except DataError as found:
            return found
    return DataError(f"{path.name}, in the lines from {first}: {str(error).splitlines()[0]}")


def _typed(part: Part, name: str, want: Column) -> pl.Series:
    """A column of text -> of its kind. Raises DataError with the first row that does not fit."""
    text = part.frame[name]
    missing = text.is_null()
    if want.required and missing.any():
        raise DataError(f"{part.where(int(missing.arg_max() or 0))}: column {name} is empty")
    if want.kind == "text":
        return text
    values = text.str.strip_chars().cast(pl.Int64 if want.kind == "whole" else pl.Float64, strict=False)
    bad = values.is_null() & ~missing
    if want.kind == "number":
        bad = bad | ~values.is_finite().fill_null(True)
    if bad.any():
        row = int(bad.arg_max() or 0)
        kind = "a whole number" if want.kind == "whole" else "a finite number"
        raise DataError(f"{part.where(row)}: {name} {text[row]!r} is not {kind}")
    return values


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            value = ast.literal_eval(line.decode())
        except UnicodeDecodeError as undecodable:
            raise DataError(f"{where}: not UTF-8: {undecodable.reason}") from undecodable
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object")
    return value
