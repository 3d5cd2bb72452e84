"""What every request passes: key, origin, size; and the log line that it leaves. Texts are never logged."""

import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from activation_beacon.errors import InputError
from activation_beacon.server.addresses import ANY, host_name, origin_name
from activation_beacon.server.failures import body, described
from activation_beacon.server.state import Server

logger = logging.getLogger("activation_beacon.server.requests")

NOTHING_SENT = 499  # the client has gone, as nginx counts
OPEN_PATHS = frozenset({"/", "/health"})
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        server: whose settings and metrics it uses.
    """

    def __init__(self, app: App, server: Server) -> None:
        self.app = app
        self.server = server

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), NOTHING_SENT
        request_id = secrets.token_hex(8)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refusal = self._refusal(Request(scope))
            if refusal is not None:
                await refusal(scope, receive, sending)
            else:
                await self.app(scope, self._limited(receive), sending)
        except Exception as error:  # what nobody has foreseen: logged once, and told without details
            if status != NOTHING_SENT:
                raise
            code, values, _ = described(error)
            await JSONResponse(self.server.failed(error, values), code)(scope, receive, sending)
        finally:
            self._note(scope, request_id, status, time.monotonic() - started)

    def _refusal(self, request: Request) -> JSONResponse | None:
        settings = self.server.settings
        host = host_name(request.headers.get("host", ""))
        if host and settings.allowed_hosts and host not in settings.allowed_hosts:
            text = f"The server is not called {host[:100]!r}. Its operator allows other names with --allowed-host."
            return JSONResponse(body(text, kind="invalid_request_error", code="host_not_allowed"), 403)
        origin = request.headers.get("origin")
        if origin and not self._may_call(origin, request):
            text = "Pages of other origins may not call this server. Its operator allows them with --cors-origin."
            return JSONResponse(body(text, kind="invalid_request_error", code="origin_not_allowed"), 403)
        if not self._has_key(request):
            text = "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`."
            told = body(text, kind="authentication_error", code="invalid_api_key")
            return JSONResponse(told, 401, {"WWW-Authenticate": "Bearer"})
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > settings.max_body_bytes:
            return JSONResponse(self._too_large(), 413)
        return None

    def _may_call(self, origin: str, request: Request) -> bool:
        """Whether pages of an origin may call: those that the operator has named, and the server's own."""
        allowed = self.server.settings.cors_origins
        try:
            name = origin_name(origin)
        except InputError:
            return ANY in allowed
        return ANY in allowed or name in allowed or urlsplit(origin).netloc == request.headers.get("host", "")

    def _has_key(self, request: Request) -> bool:
        key = self.server.settings.api_key
        is_open = key is None or request.url.path in OPEN_PATHS or request.method == "OPTIONS"
        return is_open or secrets.compare_digest(_bearer(request).encode(), str(key).encode())

    def _too_large(self) -> dict[str, Any]:
        most = self.server.settings.max_body_bytes
        text = f"The request is larger than the {most:,} bytes that are allowed (--max-body)."
        return body(text, kind="invalid_request_error", code="request_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts, for bodies that do not say how long they are."""
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.server.settings.max_body_bytes:
                raise HTTPException(413, self._too_large()["error"]["message"])
            return message

        return limited

    def _note(self, scope: Message, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "(none)")
        self.server.metrics.requested(route, status, seconds)
        values: dict[str, Any] = {
            "request": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000),
        }
        answers = scope.get("state", {}).get("beacon")
        if answers is not None:
            values |= {"context": answers.context, **answers.counts()}
        logger.info("%s", json.dumps(values))


def _bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
