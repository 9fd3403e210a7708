"""`python -m api serve`: the API's processes. Runs until SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
import socket

import uvicorn

from infra.settings import Settings, environment, variable


class ServeError(RuntimeError):
    """The API cannot start; the message is one sentence for the operator."""


def serve(settings: Settings) -> None:
    """Raises ServeError when the port is taken or the address is not of this host."""
    check_port(settings)
    os.environ.update(environment(settings))  # for uvicorn's workers
    uvicorn.run(
        "api.app:application",
        factory=True,
        host=settings.api_host,
        port=settings.api_port,
        workers=settings.api_processes,
        loop="uvloop",
        http="httptools",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        timeout_graceful_shutdown=10,
    )


def check_port(settings: Settings) -> None:
    address = f"{settings.api_host}:{settings.api_port}"
    try:
        socket.create_server((settings.api_host, settings.api_port), reuse_port=False).close()
    except OSError as error:
        raise ServeError(
            f"The API cannot listen on {address}: {error.strerror}. Set {variable('api_port')} to a free port."
        ) from error
