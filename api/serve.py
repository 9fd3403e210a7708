"""`python -m api serve`: a parent that holds the listening sockets, and the API's processes below it.

All processes take connections from one port. With `api_sockets` each place among them has a Unix socket of its own too,
which whoever takes the place inherits: a proxy that sends a user's requests to one place (infra/nginx.py) finds the
user's block there.

SIGTERM or Ctrl-C ends all of them, SIGHUP exchanges them: new processes start, and once all are ready the old ones end.
A process that ends by itself is replaced. A process that is to end answers what it was asked, and tells callers with
each answer to come on another connection, before it closes those that are idle; whoever asks again within two seconds
loses no request to an exchange. One that does not end is killed. When all end, new connections are refused at once.
SIGUSR1 makes the processes forget the user blocks and crosses that they keep.
"""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from infra import telemetry
from infra.admin import admin_token
from infra.settings import Settings, environment, variable

LOG = logging.getLogger(__name__)
_SPAWN = multiprocessing.get_context("spawn")
_BACKLOG = 2_048
_DRAIN_S = 2.0  # for callers on idle connections to hear that they are to come on another
_LEAVE_S = 12.0  # for answers under way, after that; a wait for a version takes 10
_IDLE_S = 75  # a kept connection; longer than nginx (60) and other clients keep theirs, so that they close it, not we
_START_S = 120.0  # for a process until it serves
_AGAIN_S = 1.0  # until a process that ended is replaced
_ENDS_MAX = 5  # replacements in a row that ended before they served; then all end, and whoever started them may see it
_END_S = 20.0  # until a process that does not end is killed
_CLOSE = (b"connection", b"close")


class ServeError(RuntimeError):
    """The API cannot start; the message is one sentence for the operator."""


def serve(settings: Settings) -> None:
    """Raises ServeError when the port is taken or the address is not of this host, or no process can start, and
    SettingsError where there should be an admin token and is none.
    """
    with listening(settings) as listener:
        os.environ.update(environment(settings))  # for the processes
        telemetry.start_metrics(settings)  # what is wrong with the state's folder is wrong for all
        telemetry.configure_logging(settings, "api")
        admin_token(settings)
        _Processes(listener, settings).run()


def check_port(settings: Settings) -> None:
    """Raises ServeError where the API could not listen."""
    listening(settings).close()


def listening(settings: Settings) -> socket.socket:
    """The socket. Raises ServeError."""
    address = f"{settings.api_host}:{settings.api_port}"
    try:
        return socket.create_server((settings.api_host, settings.api_port), reuse_port=False, backlog=_BACKLOG)
    except OSError as error:
        raise ServeError(
            f"The API cannot listen on {address}: {error.strerror}. Set {variable('api_port')} to a free port."
        ) from error


def _own_socket(settings: Settings, place: int) -> socket.socket:
    """Of one place, instead of what is there; refuses connections until a process serves it. Raises ServeError."""
    path = settings.api_socket(place)
    new = path.with_name(f"{path.name}~")
    own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        own.bind(str(new))
        new.chmod(0o666)  # the proxy is another user; who may enter the folder is the operator's choice
        new.replace(path)
    except OSError as error:
        own.close()
        raise ServeError(
            f"The API cannot listen on {path}: {error.strerror or error}. Set {variable('api_sockets')} to a folder "
            "that it may write, with a short path."
        ) from error
    return own


class _Processes:
    """The processes below, as they come and go."""

    def __init__(self, listener: socket.socket, settings: Settings) -> None:
        """Raises ServeError."""
        self._listener, self._settings, self._count = listener, settings, settings.api_processes
        self._own = [_own_socket(settings, place) for place in range(self._count)] if settings.api_sockets else []
        self._serving: list[_Child] = []
        self._ending: list[_Child] = []
        self._ends = 0  # of processes in a row that never served
        self._signals, self._raised = multiprocessing.Pipe(duplex=False)

    def run(self) -> None:
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        for number in handled:
            signal.signal(number, lambda number, _: self._raised.send(number))
        try:
            self._serving = self._started()
            while self._serving or self._signals.poll():
                match self._next():
                    case signal.SIGTERM | signal.SIGINT:
                        return
                    case signal.SIGHUP:
                        self._exchange()
                    case signal.SIGUSR1:
                        self._forget()
                    case _:
                        self._kill_overdue()
                        self._replace_dead()
            raise ServeError("The API's processes end before they serve; the log has the reason.")
        finally:
            for number in handled:
                signal.signal(number, signal.SIG_IGN)
            for one in (self._listener, *self._own):
                one.close()
            for child in (*self._serving, *self._ending):
                child.end()
            for child in (*self._serving, *self._ending):
                child.join()

    def _next(self) -> int | None:
        """The next signal; None when a process has ended, or should have."""
        alive = [child.process.sentinel for child in (*self._serving, *self._ending)]
        due = min((child.due for child in self._ending), default=math.inf)
        left = None if due == math.inf else max(0.0, due - time.monotonic())
        if self._signals in wait([self._signals, *alive], left):
            number: int = self._signals.recv()
            return number
        return None

    def _started(self) -> list[_Child]:
        """As many processes as there are to be, all ready; none where one of them ended, or all are to end, before."""
        children = [self._child(place) for place in range(self._count)]
        left, signals = list(children), list[int]()
        deadline = time.monotonic() + _START_S
        while left and not {signal.SIGTERM, signal.SIGINT} & set(signals):
            came = wait([self._signals, *(child.ready for child in left)], deadline - time.monotonic())
            if not came:
                LOG.error("a process does not start", extra={"seconds": _START_S})
                break
            signals += [self._signals.recv()] if self._signals in came else []
            heard = {child: child.heard() for child in left if child.ready in came}
            if not all(heard.values()):
                break
            left = [child for child in left if child not in heard]
        for number in signals:
            self._raised.send(number)  # they are the next
        if not left:
            return children
        for child in children:
            child.end()
        self._ending += children
        return []

    def _exchange(self) -> None:
        began = time.monotonic()
        if fresh := self._started():
            for child in self._serving:
                child.end()
            self._ending, self._serving = self._ending + self._serving, fresh
            LOG.info("processes exchanged", extra={"seconds": round(time.monotonic() - began, 1)})
        elif self._serving:
            LOG.error("the new processes do not start; the old ones go on")

    def _forget(self) -> None:
        """Tells those that serve, or served and answer until they have ended; the others have nothing yet."""
        for child in (*self._serving, *self._ending):
            served = child.served or (child.ready.poll() and child.heard())
            if served and child.process.pid is not None and child.process.is_alive():  # else it waits to be replaced
                os.kill(child.process.pid, signal.SIGUSR1)

    def _kill_overdue(self) -> None:
        """It would keep its memory, and its generations from being retired."""
        for child in self._ending:
            if child.due <= time.monotonic() and child.process.is_alive():
                LOG.error("a process that does not end is killed", extra={"pid": child.process.pid})
                child.kill()

    def _replace_dead(self) -> None:
        self._ending = [child for child in self._ending if child.process.is_alive()]
        for place, child in enumerate(self._serving):
            if not child.process.is_alive() and not wait([self._signals], _AGAIN_S):  # else what came goes first
                LOG.error("a process has ended by itself", extra={"exit_code": child.process.exitcode})
                served = child.served or (child.ready.poll() and child.heard())
                self._ends = 0 if served else self._ends + 1
                if self._ends > _ENDS_MAX:
                    raise ServeError(
                        f"{self._ends} processes of the API in a row ended before they served; see the log."
                    )
                self._renew_socket(place)
                self._serving[place] = self._child(place)

    def _renew_socket(self, place: int) -> None:
        """Who waits at the dead process's socket, and who comes before the next one serves, learns it and goes on."""
        if not self._own:
            return
        try:
            fresh = _own_socket(self._settings, place)
        except ServeError as error:
            LOG.error("a process keeps the socket of the dead one", extra={"error": str(error)})
            return
        self._own[place].close()
        self._own[place] = fresh

    def _child(self, place: int) -> _Child:
        return _Child([self._listener, *self._own[place : place + 1]])


class _Child:
    """One process; `ready` hears when it serves, and closes with it."""

    def __init__(self, listeners: list[socket.socket]) -> None:
        self.ready, theirs = _SPAWN.Pipe()
        self.served = False
        self.due = math.inf  # when it must have ended; `time.monotonic`
        self.process: BaseProcess = _SPAWN.Process(target=_work, args=(listeners, theirs), name="api")
        self.process.start()
        theirs.close()

    def heard(self) -> bool:
        """Whether the process said that it serves; False where it ended instead."""
        try:
            self.served = bool(self.ready.recv())
        except EOFError:
            return False
        return self.served

    def end(self) -> None:
        self.process.terminate()
        self.due = min(self.due, time.monotonic() + _END_S)

    def kill(self) -> None:
        self.process.kill()
        self.due = math.inf  # no more can be done

    def join(self) -> None:
        """After `end`."""
        self.process.join(max(0.0, self.due - time.monotonic()) if self.due < math.inf else None)
        if self.process.is_alive():
            self.kill()
            self.process.join()


def _work(listeners: list[socket.socket], parent: Connection) -> None:
    """What a process runs."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of a terminal that closes; the parent decides
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    _Server(config_of("api.app:application", factory=True), parent).run(sockets=listeners)


def config_of(app: str | ASGIApp, **more: Any) -> uvicorn.Config:
    """How uvicorn serves the API; logs, their form and what they tell are the process's own."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=int(_LEAVE_S),
        **more,
    )


def _end_with(parent: Connection) -> None:
    """A parent that was killed leaves nobody behind."""
    try:
        parent.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn's, which says when it serves, and takes leave of its callers before it closes their connections."""

    def __init__(self, config: uvicorn.Config, parent: Connection) -> None:
        super().__init__(config)
        self._parent = parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._parent.send(True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        state: Any = self.server_state
        state.default_headers = [*state.default_headers, _CLOSE]
        deadline = time.monotonic() + _DRAIN_S
        while state.connections and time.monotonic() < deadline:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
