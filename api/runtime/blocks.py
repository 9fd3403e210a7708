"""An operator on blocks of a query's rows: its inner values stay in the core's cache, and several lanes share it.

Lanes draw blocks from the query's cursor until none is left, each in one call of generated code, so that the
interpreter has no part in what goes on between two blocks; a lane that is wanted for something else is told to stop
after its current one. Blocks depend on the number of rows alone, and each writes its own rows of the query's outputs.
"""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from api.runtime.forms import Form


def count(rows: int, size: int) -> int:
    """Blocks of about `size` rows."""
    return max(1, round(rows / size))


class Word:
    """A whole number that generated code reads and changes too."""

    __slots__ = ("_held", "address")

    def __init__(self) -> None:
        self._held = ctypes.c_int64()
        self.address = ctypes.addressof(self._held)

    @property
    def value(self) -> int:
        return self._held.value

    @value.setter
    def value(self, value: int) -> None:
        self._held.value = value


class Cursor:
    """Which blocks of a query have begun."""

    __slots__ = ("blocks", "next")

    _taking = threading.Lock()

    def __init__(self, blocks: int) -> None:
        self.blocks, self.next = blocks, Word()

    def left(self) -> int:
        return max(0, self.blocks - self.next.value)

    def take(self) -> int:
        """The next block; as many as there are, where none is left. For those that run no generated code."""
        with self._taking:
            found = min(self.next.value, self.blocks)
            self.next.value = found + 1
        return found


class Blocked:
    """A form of a group of operations that runs on blocks of about `size` rows."""

    def __init__(self, form: Form, given: Sequence[Any], parted: Sequence[bool], size: int) -> None:
        """`given`: an example of its inputs; those `parted` have a row for each candidate, as all outputs do."""
        self._form, self._parted, self._size = form, parted, size
        self.once_s = 0.0  # of a run, whatever its blocks: for the user's part
        found = form.call(*given)
        self._single = isinstance(found, Tensor)
        self._kinds = [(one.shape[1:], one.dtype) for one in self._many(found)]

    def _many(self, found: Any) -> tuple[Tensor, ...]:
        return (found,) if self._single else tuple(found)

    def sized(self, size: int) -> Blocked:
        """The same on blocks of another size."""
        found = copy.copy(self)
        found._size = size
        return found

    @property
    def once(self) -> bool:
        """Whether what does not depend on rows is computed once for all blocks that a lane runs together."""
        return self._form.alone is not None

    def count(self, rows: int) -> int:
        return count(rows, self._size)

    def outputs(self, rows: int) -> tuple[Tensor, ...]:
        """Memory for what it gives."""
        return tuple([torch.empty((rows, *tail), dtype=dtype) for tail, dtype in self._kinds])

    def run(
        self, inputs: Sequence[Any], outputs: Sequence[Tensor], rows: int, cursor: Cursor, stop: Word, most: int
    ) -> int:
        """Runs blocks until none is left, so many have run, or it is told to stop: how many it has run. Any number of
        threads at once; a query has ended when their sum is that of its blocks."""
        alone = self._form.alone
        if alone is not None:
            return alone.some(inputs, outputs, cursor.blocks, most, cursor.next.address, stop.address)
        done = 0
        size, larger = divmod(rows, cursor.blocks)
        while done < most and (block := cursor.take()) < cursor.blocks:
            own = slice(block * size + min(block, larger), (block + 1) * size + min(block + 1, larger))
            found = self._form.call(
                *[value[own] if by_rows else value for value, by_rows in zip(inputs, self._parted, strict=True)]
            )
            for out, one in zip(outputs, self._many(found), strict=True):
                out[own] = one
            done += 1
            if stop.value:
                break
        return done

    def __call__(self, *inputs: Any) -> Any:
        """All blocks, one after the other."""
        rows = next(len(value) for value, by_rows in zip(inputs, self._parted, strict=True) if by_rows)
        outputs, cursor = self.outputs(rows), Cursor(self.count(rows))
        self.run(inputs, outputs, rows, cursor, Word(), cursor.blocks)
        return outputs[0] if self._single else outputs
