"""Runs the application with uvicorn on one address."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from mme.errors import UserError

ENDS_WITHIN_S = 30  # time for requests in progress when the server is asked to stop


def listen(app: FastAPI, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM, and then answers the requests in progress.

    Raises:
        UserError: the server cannot listen on the address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends small pieces at once (TCP_NODELAY) only on sockets of this protocol; otherwise an answer waits 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}, expected a free address") from error
    bound = listener.getsockname()[1]
    print(f"serving on http://{host}:{bound}, see /docs", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=ENDS_WITHIN_S, access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
