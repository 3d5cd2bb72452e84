"""The HTTP server around the application: at its end requests finish, or are told why not, before connections are cut."""

import errno
import math
import socket

import uvicorn
from fastapi import FastAPI

from activation_beacon.errors import InputError, reason

BACKSTOP_S = 60  # the engine lets go between two chunks; a connection that outlasts this is cut


class HttpServer(uvicorn.Server):
    """uvicorn, closing the engine first.

    Args:
        app: from `create_app`.
        options: uvicorn's own.
    """

    def __init__(self, app: FastAPI, **options: object) -> None:
        self.beacon = app.state.server
        grace = math.ceil(self.beacon.settings.shutdown_s) + BACKSTOP_S
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options))  # type: ignore[arg-type]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the engine finish or refuse what it has while connections are still there to be told."""
        self.beacon.close()
        await super().shutdown(sockets)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket of an address, taken before anything slow is done.

    Raises:
        InputError: if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"--host {host} is no address of this machine: {reason(error)}. Use 127.0.0.1 or 0.0.0.0."
        ) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        way = "Choose another --host" if error.errno == errno.EADDRNOTAVAIL else "Choose another --port"
        raise InputError(f"{host}:{port} cannot be listened on: {reason(error)}. {way}.") from error
    return bound
