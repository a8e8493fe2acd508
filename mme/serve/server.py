"""Runs the application under uvicorn on one address."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from mme.errors import UserError

ENDS_WITHIN_S = 30  # requests that are under way when the server is asked to end


def listen(app: FastAPI, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM; requests under way are answered first.

    Raises:
        UserError: the address can't be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}: expected an address that is free") from error
    bound = listener.getsockname()[1]
    print(f"serving on http://{host}:{bound}, see /docs", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=ENDS_WITHIN_S, access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
