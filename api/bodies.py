"""Request bodies: how many bytes of them a process holds, and how long a caller may take to send his.

Bytes count from when the head announces them, or else from when they come, until the request has ended, whatever became
of it. What the server has read ahead (up to 64 KiB and a read of 256 kB per connection) is not among them.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from api.admission import refusals
from api.problems import ProblemError
from infra import telemetry
from infra.settings import Settings

BODY_MAX = 16 << 20  # bytes
_TICK_S = 0.5  # between two looks at those that are late, and at all for the gauge: no request then pays for either


class Body:
    """A request's body in the parts in which it came. The request's thread takes it whole: to join megabytes, and to
    give their memory back, takes milliseconds, in which the event loop would serve nobody.
    """

    def __init__(self, bodies: Bodies, media: str) -> None:
        self._bodies, self.media = bodies, media
        self._parts: list[bytes] = []
        self._held = self._size = 0

    def take(self) -> bytes:
        """All of it, once."""
        whole = b"".join(self._parts)
        self._parts.clear()
        return whole

    def __len__(self) -> int:
        """Bytes that came."""
        return self._size

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        """The request has ended."""
        self._bodies.give_back(self._held)
        self._held = 0

    def announce(self, size: int) -> None:
        """Raises ProblemError 413 beyond BODY_MAX, 503 where the process holds too much already."""
        if size > BODY_MAX:
            raise ProblemError(413, "body-too-large", f"at most {BODY_MAX} bytes are accepted")
        self._bodies.hold(size - self._held)
        self._held = size

    async def read(self, receive: Receive) -> None:
        """Raises ProblemError as `announce`, and ClientDisconnect where the caller goes away."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part, more = message.get("body", b""), message.get("more_body", False)
            self._size += len(part)
            if self._size > self._held:
                self.announce(self._size)
            self._parts.append(part)


class Bodies:
    """Those that a process holds; to be used in its event loop only."""

    def __init__(self, settings: Settings) -> None:
        self._most, self._timeout_s = settings.body_bytes, settings.body_timeout_s
        self._held = 0
        self._coming: dict[asyncio.Task[object], float] = {}  # who reads one, and when it is late; in this order
        self._late: set[asyncio.Task[object]] = set()
        self._ticking = False
        self._refused = refusals("bodies")
        meaning = "Bytes of request bodies that are held, of all live processes"
        self._told = telemetry.gauge("forerank_body_bytes", meaning, total=True)

    async def of(self, request: Request, *accepted: str, empty: bool = False) -> Body:
        """The request's whole body, to be used in a `with` that the request ends with. Raises ProblemError: 415 for one
        that is compressed, or of another media type than the `accepted`, if any, 413 beyond BODY_MAX, 503 where the
        process holds too much already, 408 where the body does not come in time."""
        head = dict(request.scope["headers"])
        body = Body(self, head.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower())
        task = asyncio.current_task()
        assert task is not None
        self._coming[task] = monotonic() + self._timeout_s
        if not self._ticking:
            self._look_later()
        try:
            body.announce(int(head.get(b"content-length", 0)))  # a number: the HTTP server has read it
            await body.read(request.receive)
            if (packed := head.get(b"content-encoding", b"identity").decode("latin-1").lower()) != "identity":
                raise ProblemError(415, "unsupported-media-type", f"the body is {packed}; send it as it is")
            if accepted and body.media not in accepted and not (empty and not len(body)):
                given = body.media or "no content type"
                expected = " or ".join(accepted)
                raise ProblemError(415, "unsupported-media-type", f"{given} was sent; expected {expected}")
        except BaseException as error:
            body.__exit__()
            if task in self._late and task.uncancel() == 0:
                raise ProblemError(408, "too-slow", f"the body has not come within {self._timeout_s:g} s") from error
            raise
        finally:
            del self._coming[task]
            self._late.discard(task)
        return body

    def hold(self, count: int) -> None:
        """Raises ProblemError 503."""
        if self._held + count > self._most:
            self._refused.inc()
            raise ProblemError(503, "overloaded", f"bodies of {self._most} bytes are held, as many as may; try again")
        self._held += count

    def give_back(self, count: int) -> None:
        self._held -= count

    def _look(self) -> None:
        """Ends the waits for bodies that are late, while there is anything to look after."""
        now = monotonic()
        for task, due in self._coming.items():
            if due > now:
                break
            if task not in self._late:
                self._late.add(task)
                task.cancel()
        self._told.set(self._held)
        self._ticking = False
        if self._held or self._coming:
            self._look_later()

    def _look_later(self) -> None:
        self._ticking = True
        asyncio.get_running_loop().call_later(_TICK_S, self._look)
