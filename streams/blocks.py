"""The binary form of one block of rows: what encode writes to `rows.<generation>` and replicate reads.

A pure codec, RowBatch <-> bytes, little-endian. Version 2 (version 1, which is read too, has no patched rows):

    bytes  field
    4      magic "FRBK"
    2      version, 2
    2      flags: bit 0 = a fill proof is present
    8      fingerprint of the row layout (RowLayout.fingerprint)
    4      partition of `items`
    4      n, number of rows
    8      covered, last `items` offset covered (-1: none)
    8      fill proof: row count (0 without one)
    8      fill proof: digest (0 without one)
    8n     versions, u8
    8n     offsets in `items`, i8
    4n     lengths of the attributes, u4
    n      lengths of the ids, u1
    n      kinds, u1: 0 a row, 1 deleted, 2 patched: version, times and attributes alone count
    n*hot  hot records
    n*cold cold records
    ...    ids, UTF-8, one after the other
    ...    attributes, JSON objects, one after the other

Decoding checks everything that could make a wrong row: version, layout, lengths, and that not one byte is left over.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

import numpy as np

from index.layout import RowLayout
from index.n2o import DELETED, PATCHED, FillProof, RowBatch

MAGIC, VERSION = b"FRBK", 2
REFUSED = "forerank-refused"  # header of an empty record in a block's place: why the bundle cannot be encoded with
_LAST_KIND = {1: DELETED, 2: PATCHED}  # by version
MAX_BLOCK_BYTES = 512 << 10  # well below the 1 MB at which brokers refuse a message
_HEAD = struct.Struct("<4sHHQiIqQQ")
_FILL = 1
_PER_ROW = 8 + 8 + 4 + 1 + 1


class BlockError(ValueError):
    """Bytes that are no block of this version and layout; the message says what is wrong."""


def encode(batch: RowBatch, layout: RowLayout) -> bytes:
    """One block. Raises BlockError on columns that do not fit together (a defect of the caller, not of its input)."""
    n = len(batch.ids)
    ids = [text.encode() for text in batch.ids]
    columns = (batch.versions, batch.offsets, batch.kinds, batch.hot, batch.cold, batch.attributes)
    if any(len(column) != n for column in columns):
        raise BlockError("the columns of the block differ in length")
    if batch.hot.dtype != layout.hot or batch.cold.dtype != layout.cold:
        raise BlockError("the records have another layout than the block")
    lengths = [*map(len, ids)]
    if n and not 1 <= min(lengths) <= max(lengths) <= 255:
        raise BlockError("an id is empty or longer than 255 bytes")
    flags, fill = (_FILL, batch.fill) if batch.fill is not None else (0, FillProof(0, 0))
    head = _HEAD.pack(
        MAGIC, VERSION, flags, layout.fingerprint(), batch.partition, n, batch.covered, fill.count, fill.digest
    )
    return b"".join(
        (
            head,
            np.asarray(batch.versions, "<u8").tobytes(),
            np.asarray(batch.offsets, "<i8").tobytes(),
            np.array([*map(len, batch.attributes)], "<u4").tobytes(),
            bytes(lengths),
            np.asarray(batch.kinds, "u1").tobytes(),
            np.ascontiguousarray(batch.hot).view("u1").data,
            np.ascontiguousarray(batch.cold).view("u1").data,
            *ids,
            *batch.attributes,
        )
    )


def decode(block: bytes, layout: RowLayout) -> RowBatch:
    """The RowBatch of a block; its arrays are read-only views of `block`. Raises BlockError on anything else."""
    if len(block) < _HEAD.size:
        raise BlockError(f"{len(block)} bytes are too few for a block")
    magic, version, flags, fingerprint, partition, n, covered, count, digest = _HEAD.unpack_from(block)
    if magic != MAGIC:
        raise BlockError(f"not a block of rows: it begins with {magic!r}")
    if version not in _LAST_KIND:
        raise BlockError(f"block version {version}; this program reads versions 1 to {VERSION}")
    if flags & ~_FILL or (not flags & _FILL and (count or digest)):
        raise BlockError(f"unknown flags {flags:#x}")
    if fingerprint != layout.fingerprint():
        raise BlockError("the block has rows of another layout")
    if partition < 0 or covered < -1:
        raise BlockError(f"partition {partition} or offset {covered} is out of range")
    fixed = _HEAD.size + n * (_PER_ROW + layout.hot.itemsize + layout.cold.itemsize)
    if len(block) < fixed:
        raise BlockError(f"truncated: {len(block)} of at least {fixed} bytes for {n} rows")
    at = _HEAD.size
    columns = []
    for dtype in ("<u8", "<i8", "<u4", "u1", "u1", layout.hot, layout.cold):
        columns.append(np.frombuffer(block, dtype, n, at) if n else np.empty(0, dtype))
        at += columns[-1].nbytes
    versions, offsets, attribute_lengths, id_lengths, kinds, hot, cold = columns
    expected = fixed + int(attribute_lengths.sum(dtype=np.int64)) + int(id_lengths.sum(dtype=np.int64))
    if len(block) != expected:
        raise BlockError(
            f"{'truncated' if len(block) < expected else 'trailing bytes'}: {len(block)} of {expected} bytes"
        )
    if kinds.max(initial=0) > _LAST_KIND[version] or id_lengths.min(initial=1) < 1:
        raise BlockError("the kind of a row or the length of an id is out of range")
    try:
        ids = [raw.decode() for raw in _cut(block, at, id_lengths)]
    except UnicodeDecodeError as error:
        raise BlockError(f"an id is not UTF-8: {error}") from None
    attributes = list(_cut(block, at + int(id_lengths.sum(dtype=np.int64)), attribute_lengths))
    fill = FillProof(count, digest) if flags & _FILL else None
    return RowBatch(partition, covered, ids, versions, offsets, kinds, hot, cold, attributes, fill)


def split(batch: RowBatch, layout: RowLayout, max_bytes: int = MAX_BLOCK_BYTES) -> Iterator[RowBatch]:
    """The batch in pieces of at most `max_bytes` (one row at least), rows in their order, which must be that of
    their offsets.

    Each piece covers up to its last row; the last one has the batch's `covered` and fill proof.
    """
    per_row = _PER_ROW + layout.hot.itemsize + layout.cold.itemsize
    at_most = 4 * sum(map(len, batch.ids)) + sum(map(len, batch.attributes)) + len(batch.ids) * per_row  # UTF-8
    if _HEAD.size + at_most <= max_bytes:
        yield batch
        return
    sizes = [per_row + len(text.encode()) + len(raw) for text, raw in zip(batch.ids, batch.attributes, strict=True)]
    ends = np.cumsum(sizes)
    start, before = 0, 0
    while start + 1 < len(sizes) and ends[-1] - before > max_bytes - _HEAD.size:
        end = max(start + 1, int(np.searchsorted(ends, before + max_bytes - _HEAD.size, "right")))
        yield _piece(batch, start, end)
        start, before = end, ends[end - 1]
    yield batch if start == 0 else _piece(batch, start, len(batch.ids))


def _piece(batch: RowBatch, start: int, end: int) -> RowBatch:
    last = end == len(batch.ids)
    return dataclasses.replace(
        batch,
        covered=batch.covered if last else int(batch.offsets[end - 1]),
        ids=batch.ids[start:end],
        versions=batch.versions[start:end],
        offsets=batch.offsets[start:end],
        kinds=batch.kinds[start:end],
        hot=batch.hot[start:end],
        cold=batch.cold[start:end],
        attributes=batch.attributes[start:end],
        fill=batch.fill if last else None,
    )


def _cut(block: bytes, at: int, lengths: np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]) -> Iterator[bytes]:
    for length in lengths.tolist():
        yield block[at : at + length]
        at += length
