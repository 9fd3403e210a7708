"""The shape of one row in memory: what the encoder fills, the arena stores and the kernels read.

A row has a hot record, read for every candidate of every request, and a cold record, read for few. Both are structured
dtypes; a hot record is a multiple of 64 bytes, so that with an aligned array no record touches one cache line more than
it must. The default hot record is 192 bytes: joint 128, bridge 32, signature 16, slot version 4, crosses 12.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LINE = 64  # bytes of a cache line


class LayoutError(ValueError):
    """The numbers do not make a row."""


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Sizes of a row: `width` h, `bridges` n, `bits` b (a multiple of 8), `dim` d of the item vector, `crosses` kept
    per item, `precision` of joint, bridge and vector, `attributes` the names of the numeric attributes, in order."""

    width: int = 64
    bridges: int = 16
    bits: int = 128
    dim: int = 64
    crosses: int = 6
    precision: str = "fp16"
    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("width", "bridges", "bits", "dim", "crosses"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 8192:
                raise LayoutError(f"{name}={value!r} must be an integer from 1 to 8192")
        if self.bits % 8:
            raise LayoutError(f"bits={self.bits} must be a multiple of 8")
        if self.precision not in ("fp16", "fp32"):
            raise LayoutError(f"precision={self.precision!r} must be fp16 or fp32")
        if len(set(self.attributes)) != len(self.attributes):
            raise LayoutError("attribute names must differ")

    @property
    def float_type(self) -> str:
        return "<f2" if self.precision == "fp16" else "<f4"

    @functools.cached_property
    def hot(self) -> np.dtype[np.void]:
        """joint [h], bridge [n], signature u1[b/8] (little bit order, set = +1), slot_version u4 (the arena's),
        crosses u2."""
        fields = [
            ("joint", self.float_type, self.width),
            ("bridge", self.float_type, self.bridges),
            ("signature", "u1", self.bits // 8),
            ("slot_version", "<u4", None),
            ("crosses", "<u2", self.crosses),
        ]
        return _structured(fields, LINE)

    @functools.cached_property
    def cold(self) -> np.dtype[np.void]:
        """vector [d], attributes f4[A] (NaN = absent, booleans 0/1), version u8, four times i8 (ms since the epoch)."""
        fields = [
            ("vector", self.float_type, self.dim),
            ("attributes", "<f4", len(self.attributes)),
            ("version", "<u8", None),
            ("event_time", "<i8", None),
            ("publish_time", "<i8", None),
            ("encode_time", "<i8", None),
            ("visible_time", "<i8", None),
        ]
        return _structured(fields, LINE)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "attributes": list(self.attributes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowLayout:
        """The layout that `to_json` described. Raises LayoutError on an unknown or missing name or a wrong value."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(data) != names:
            raise LayoutError(f"a row layout has {sorted(names)}, not {sorted(data)}")
        return cls(**{**data, "attributes": tuple(data["attributes"])})

    @classmethod
    def of_manifest(cls, path: Path) -> RowLayout:
        """The layout that a bundle's `manifest.json` describes. Raises OSError where it cannot be read, LayoutError
        where it describes none."""
        try:
            return cls.from_json(json.loads(path.read_bytes())["row"])
        except (ValueError, KeyError, TypeError) as error:
            raise LayoutError(f"{path} does not describe rows: {error}") from error

    def fingerprint(self) -> int:
        """64 bits that differ when anything about the rows differs; stores keep it and refuse another layout's rows."""
        text = json.dumps(self.to_json(), sort_keys=True).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def aligned_empty(count: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """An uninitialised array of `count` records that begins at a multiple of 64 bytes."""
    raw = np.empty(count * dtype.itemsize + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + count * dtype.itemsize].view(dtype)


def _structured(fields: list[tuple[str, str, int | None]], multiple: int) -> np.dtype[np.void]:
    """Fields in order, each at a multiple of its own item size, the whole padded to `multiple` bytes."""
    names, formats, offsets, end = [], [], [], 0
    for name, kind, count in fields:
        item = np.dtype(kind).itemsize
        end = -(-end // item) * item
        names.append(name)
        formats.append(kind if count is None else (kind, (count,)))
        offsets.append(end)
        end += item * (1 if count is None else count)
    size = -(-end // multiple) * multiple
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})
