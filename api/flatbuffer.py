"""Flatbuffers, as far as Arrow's messages need them. All numbers are little-endian.

A table is a signed i4 (how far before it its vtable lies) and its fields; the vtable is u2s: its own size, the table's,
then per field where it lies in the table, 0 = absent. Strings, vectors and other tables are reached by unsigned offsets
from where they are named, so reading only goes forward and ends. Guarantee of reading: what lies outside of the buffer
raises ValueError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

# What `encoded` writes: a text, a table (field -> scalar as bytes, or node), a vector of nodes, or of 8-byte integers.
Node = Union[str, Mapping[int, "bytes | Node"], "list[Node]", NDArray[np.int64]]


class Table:
    """A table to read. Fields are known by their numbers; an absent one has its default."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._vtable = at - _number(data, "<i", at)
        self._fields = (_number(data, "<H", self._vtable) - 4) // 2

    @classmethod
    def root(cls, data: bytes) -> Table:
        return cls(data, _number(data, "<I", 0))

    def number(self, field: int, form: str, default: int = 0) -> int:
        """A scalar; `form` as of `struct`, with its sign and width."""
        at = self._place(field)
        return default if at is None else _number(self._data, form, at)

    def table(self, field: int) -> Table | None:
        at = self._place(field)
        return None if at is None else Table(self._data, self._follow(at))

    def tables(self, field: int) -> Iterator[Table]:
        count, at = self._vector(field, 4)
        return (Table(self._data, self._follow(one)) for one in range(at, at + 4 * count, 4))

    def count(self, field: int) -> int:
        """The length of a vector of tables."""
        return self._vector(field, 4)[0]

    def integers(self, field: int, width: int = 1) -> NDArray[np.int64]:
        """A vector of i8, or of structs of `width` of them: i8[n, width]."""
        count, at = self._vector(field, 8 * width)
        return np.frombuffer(self._data, "<i8", count * width, at).reshape(count, width)

    def text(self, field: int) -> str:
        count, at = self._vector(field, 1)
        return str(self._data[at : at + count], "utf-8")

    def says(self, field: int, text: bytes) -> bool:
        """Whether a text is this one; of others nothing is copied."""
        count, at = self._vector(field, 1)
        return count == len(text) and self._data[at : at + count] == text

    def _vector(self, field: int, size: int) -> tuple[int, int]:
        """Length and place of a vector whose elements have `size` bytes."""
        named = self._place(field)
        if named is None:
            return 0, 0
        at = self._follow(named)
        count = _number(self._data, "<I", at)
        if at + 4 + count * size > len(self._data):
            raise ValueError("a vector ends outside of its message")
        return count, at + 4

    def _place(self, field: int) -> int | None:
        if field >= self._fields:
            return None
        offset = _number(self._data, "<H", self._vtable + 4 + 2 * field)
        return self._at + offset if offset else None

    def _follow(self, at: int) -> int:
        return at + _number(self._data, "<I", at)


def encoded(root: Node) -> bytes:
    """The buffer of `root`, as long as a multiple of 8."""
    out = bytearray(4)
    struct.pack_into("<I", out, 0, _append(out, root))
    return bytes(out + bytes(-len(out) % 8))


def _append(out: bytearray, node: Node) -> int:
    """Puts `node` and what it names behind `out` and gives its place. What stands behind the first four bytes of a
    table or vector is 8-aligned, and every field of a table has 8 bytes, so that any number is aligned.
    """
    out += bytes(-len(out) % 8)
    named: list[tuple[int, Any]] = []
    if isinstance(node, Mapping):
        vtable = len(out)
        cells = {field: 4 + 8 * order for order, field in enumerate(node)}
        places = [cells.get(field, 0) for field in range(max(node, default=-1) + 1)]
        out += struct.pack(f"<{2 + len(places)}H", 4 + 2 * len(places), 4 + 8 * len(cells), *places)
        at = _aligned(out)
        out += struct.pack("<i", at - vtable)
        out += b"".join(value.ljust(8, b"\0") if isinstance(value, bytes) else bytes(8) for value in node.values())
        named += [(at + cells[field], value) for field, value in node.items() if not isinstance(value, bytes)]
    elif isinstance(node, list):
        at = _aligned(out)
        out += struct.pack("<I", len(node)) + bytes(4 * len(node))
        named += [(at + 4 + 4 * order, value) for order, value in enumerate(node)]
    else:
        count, data = (len(node), node.tobytes()) if isinstance(node, np.ndarray) else _text(node)
        at = _aligned(out)
        out += struct.pack("<I", count) + data
    for where, value in named:
        struct.pack_into("<I", out, where, _append(out, value) - where)
    return at


def _aligned(out: bytearray) -> int:
    """Pads so that what comes four bytes later is 8-aligned."""
    out += bytes((4 - len(out)) % 8)
    return len(out)


def _text(text: str) -> tuple[int, bytes]:
    data = text.encode()
    return len(data), data + b"\0"


def _number(data: bytes, form: str, at: int) -> int:
    if not 0 <= at <= len(data) - struct.calcsize(form):
        raise ValueError("an offset leads outside of its message")
    (found,) = struct.unpack_from(form, data, at)
    return int(found)
