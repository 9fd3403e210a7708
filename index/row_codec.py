"""The bytes of one row in RocksDB: written by N2OWriter, read by N2OReader and when the arena is built anew.

Little-endian, in this order:

    codec u2 = 1, partition u2, hot size u4, cold size u4, zero u4, version u8, items offset i8,
    event, publish, encode and visible time i8 (ms since the epoch)                              64 bytes
    the hot record (slot_version zero), the cold record                                          as the layout says
    attributes                                                                                   JSON object, to the end
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CODEC = 1
TIMES = ("event_time", "publish_time", "encode_time", "visible_time")
HEADER = np.dtype(
    [
        ("codec", "<u2"),
        ("partition", "<u2"),
        ("hot_size", "<u4"),
        ("cold_size", "<u4"),
        ("zero", "<u4"),
        ("version", "<u8"),
        ("offset", "<i8"),
        *[(name, "<i8") for name in TIMES],
    ]
)


class RowCodecError(ValueError):
    """These bytes are no row of a known codec version."""


class StoredRow(NamedTuple):
    """One row as RocksDB holds it; times in ms since the epoch, `offset` in `items`."""

    version: int
    offset: int
    partition: int
    event_time: int
    publish_time: int
    encode_time: int
    visible_time: int
    attributes: dict[str, Any]


def encode_rows(
    partitions: NDArray[Any],
    offsets: NDArray[np.int64],
    hot: NDArray[Any],
    cold: NDArray[Any],
    attributes: Sequence[bytes],
) -> list[bytes]:
    """One value per row; all arguments have the same length."""
    count = len(hot)
    header = np.zeros(count, HEADER)
    header["codec"], header["partition"], header["offset"] = CODEC, partitions, offsets
    header["hot_size"], header["cold_size"] = hot.dtype.itemsize, cold.dtype.itemsize
    for name in ("version", *TIMES):
        header[name] = cold[name]
    size = HEADER.itemsize + hot.dtype.itemsize + cold.dtype.itemsize
    fixed = np.empty((count, size), np.uint8)
    start = 0
    clean_hot, clean_cold = np.zeros(count, hot.dtype), np.zeros(count, cold.dtype)
    clean_hot[:], clean_cold[:] = hot, cold  # field by field: what lies between the fields stays zero
    clean_hot["slot_version"] = 0
    for part in (header, clean_hot, clean_cold):
        fixed[:, start : start + part.dtype.itemsize] = part.view(np.uint8).reshape(count, part.dtype.itemsize)
        start += part.dtype.itemsize
    blob = fixed.tobytes()
    return [blob[at * size : (at + 1) * size] + attributes[at] for at in range(count)]


def decode_row(value: bytes) -> StoredRow:
    """Everything but the records. Raises RowCodecError."""
    header = _header(value)
    start = HEADER.itemsize + int(header["hot_size"]) + int(header["cold_size"])
    numbers = {name: int(header[name]) for name in ("version", "offset", "partition", *TIMES)}
    return StoredRow(**numbers, attributes=json.loads(value[start:]))


def decode_records(
    values: Sequence[bytes], hot: NDArray[Any], cold: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fills hot [n] and cold [n] from the values; returns partitions and offsets. Raises RowCodecError."""
    sizes = (HEADER.itemsize, hot.dtype.itemsize, cold.dtype.itemsize)
    whole = sum(sizes)
    if any(len(value) < whole for value in values):
        raise RowCodecError("a stored row is too short")
    fixed = np.frombuffer(b"".join([value[:whole] for value in values]), np.uint8).reshape(len(values), whole)
    header = np.ascontiguousarray(fixed[:, : sizes[0]]).view(HEADER)[:, 0]
    wrong = (header["codec"] != CODEC) | (header["hot_size"] != sizes[1]) | (header["cold_size"] != sizes[2])
    if wrong.any():
        raise RowCodecError("a stored row has another codec version or layout")
    hot.view(np.uint8).reshape(len(values), sizes[1])[:] = fixed[:, sizes[0] : sizes[0] + sizes[1]]
    cold.view(np.uint8).reshape(len(values), sizes[2])[:] = fixed[:, sizes[0] + sizes[1] :]
    return header["partition"].astype(np.int64), header["offset"].astype(np.int64)


def _header(value: bytes) -> Any:
    if len(value) < HEADER.itemsize:
        raise RowCodecError("a stored row is too short")
    header = np.frombuffer(value, HEADER, 1)[0]
    if int(header["codec"]) != CODEC:
        raise RowCodecError(f"a stored row has codec version {header['codec']}, not {CODEC}")
    return header
