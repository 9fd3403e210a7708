"""Waits for rows: `GET /v1/items/{id}?wait_for=<version>` answers when that version is what requests see,
whichever generation answers them: under a canary both must have it.

A wait holds a connection and nothing else: one task per process has a thread look for all of them together, every 10 ms
and only while there are any.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive

from api.generations import Generation
from api.problems import ProblemError, invalid

PARAMETERS = {
    "wait_for": "answer when the item's row has this version or a newer one, under a canary in both generations",
    "timeout_ms": "with wait_for: how long at most, 0 .. 10000; default 5000",
    "deleted": "with wait_for, `1`: wait for the deletion of that version; answers 204 when the item has no row, and "
    "with the row when that is of a newer version",
}
WAITS_MAX = 1_024  # per process
_TICK_S = 0.01
_TOLD = 100  # waits that are ended before others have their turn
_VERSION_MAX = 2**63 - 1  # as events have it
_TIMEOUT_MS, _TIMEOUT_MAX_MS = 5_000, 10_000  # less than a process that ends has for its answers (serve.py)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is waited for, and how long."""

    version: int
    deleted: bool
    timeout_ms: int

    def granted(self, version: int | None) -> bool:
        """`version`: of the visible row, None where there is none."""
        if self.deleted:
            return version is None or version > self.version  # a newer row: published again since
        return version is not None and version >= self.version

    def refusal(self, generation: str, version: int | None) -> ProblemError:
        """What a wait that has taken too long is told."""
        visible = "no row of the item" if version is None else f"version {version}"
        wanted = f"{'the deletion of ' if self.deleted else ''}version {self.version}"
        said = f"{visible} is visible in generation {generation} after {self.timeout_ms} ms; {wanted} is not"
        return ProblemError(504, "not-visible-yet", said)


def wish_of(parameters: Mapping[str, str]) -> Wish | None:
    """None without `wait_for`. Raises ProblemError 422."""
    deleted = parameters.get("deleted", "0")
    if deleted not in ("0", "1"):
        raise invalid("deleted", "expected 1 or 0")
    if "wait_for" not in parameters:
        alone = next((name for name in ("timeout_ms", "deleted") if name in parameters), None)
        if alone is not None:
            raise invalid(alone, "it is of use with wait_for only")
        return None
    return Wish(
        _number(parameters["wait_for"], "wait_for", _VERSION_MAX),
        deleted == "1",
        _number(parameters.get("timeout_ms", str(_TIMEOUT_MS)), "timeout_ms", _TIMEOUT_MAX_MS),
    )


def _number(text: str, field: str, most: int) -> int:
    if text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most:
        return int(text)
    raise invalid(field, f"expected a whole number from 0 to {most}")


@dataclasses.dataclass(eq=False)
class _Waiter:
    key: NDArray[np.uint64]  # [1, 2]
    wish: Wish
    deadline: float
    answer: asyncio.Future[Generation]

    def end(self, end: Generation | Exception) -> None:
        """Tells the caller, unless he has gone meanwhile."""
        if self.answer.done():
            return
        if isinstance(end, Exception):
            self.answer.set_exception(end)
        else:
            self.answer.set_result(end)


_Ends = list[tuple[_Waiter, Generation | Exception]]


async def gone(receive: Receive) -> None:
    """Ends when the caller has gone, after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Waiters:
    """All waits of one process; to be used in its event loop only."""

    def __init__(self, answering: Callable[[], Sequence[Generation]]) -> None:
        """`answering`: the generations that requests are answered from; the wait's own answer is the first one's."""
        self._answering = answering
        self._waiting: dict[_Waiter, None] = {}  # in the order of their coming
        self._ticker: asyncio.Task[None] | None = None

    async def granted(self, key: NDArray[np.uint64], wish: Wish, receive: Receive) -> Generation:
        """The generation to answer from, when all have granted the wish for the item of `key` u8[1, 2]; `receive` is
        the request's and tells when its caller has gone. Raises ProblemError 504 after the wish's time, 503 where too
        many wait already or nothing is served.
        """
        if len(self._waiting) >= WAITS_MAX:
            raise ProblemError(503, "overloaded", f"{WAITS_MAX} requests wait for a version already")
        loop = asyncio.get_running_loop()
        waiter = _Waiter(key, wish, time.monotonic() + wish.timeout_ms / 1e3, loop.create_future())
        self._waiting[waiter] = None
        if self._ticker is None or self._ticker.done():
            self._ticker = loop.create_task(self._tick())
        left = loop.create_task(gone(receive))
        try:
            ends: list[asyncio.Future[Any]] = [waiter.answer, left]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not waiter.answer.done():
                raise ProblemError(503, "left", "the caller has gone")
            return waiter.answer.result()
        finally:
            left.cancel()
            self._waiting.pop(waiter, None)

    async def _tick(self) -> None:
        while self._waiting:
            waiters = list(self._waiting)
            try:
                ends: _Ends = await asyncio.to_thread(_looked, self._answering, waiters)
            except Exception as error:  # nothing served, or a store that cannot be read: each is told
                ends = [(waiter, error) for waiter in waiters]
            for first in range(0, len(ends), _TOLD):
                for waiter, end in ends[first : first + _TOLD]:
                    waiter.end(end)
                await asyncio.sleep(0)  # others' turn
            await asyncio.sleep(_TICK_S)


def _looked(answering: Callable[[], Sequence[Generation]], waiters: Sequence[_Waiter]) -> _Ends:
    """Those whose wish is granted or whose time is over, and what they are told. Runs in a thread."""
    waiters = [waiter for waiter in waiters if not waiter.answer.done()]
    if not waiters:
        return []
    generations, now = answering(), time.monotonic()
    keys = np.concatenate([waiter.key for waiter in waiters])
    visible = zip(*(_versions(generation, keys) for generation in generations), strict=True)
    ends: _Ends = []
    for waiter, versions in zip(waiters, visible, strict=True):
        seen = zip(generations, versions, strict=True)
        lacking = next(((one, version) for one, version in seen if not waiter.wish.granted(version)), None)
        if lacking is None:
            ends.append((waiter, generations[0]))
        elif now >= waiter.deadline:
            ends.append((waiter, waiter.wish.refusal(lacking[0].name, lacking[1])))
    return ends


def _versions(generation: Generation, keys: NDArray[np.uint64]) -> list[int | None]:
    """Of the visible rows; None where there is none."""
    rows, found = generation.arena.gather_cold(keys)
    return [version if there else None for version, there in zip(rows["version"].tolist(), found.tolist(), strict=True)]
