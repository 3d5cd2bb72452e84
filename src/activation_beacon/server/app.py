"""The HTTP application: routes, errors, the page, health and metrics."""

import contextlib
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from activation_beacon.errors import BeaconError
from activation_beacon.server import schema
from activation_beacon.server.failures import body, described
from activation_beacon.server.gate import NOTHING_SENT, Gate
from activation_beacon.server.routes_contexts import context_routes
from activation_beacon.server.routes_openai import openai_routes
from activation_beacon.server.routes_responses import response_routes
from activation_beacon.server.settings import Settings
from activation_beacon.server.state import Server
from activation_beacon.server.work import GoneError

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)

WAYS = (
    "OpenAI's clients: /v1/chat/completions, /v1/responses, /v1/completions and /v1/models; contexts: /v1/contexts. "
    "All: /openapi.json."
)


def create_app(model: Any, tokenizer: Any, settings: Settings | None = None, *, behind_the_gate: Any = None) -> FastAPI:
    """The application that serves a model.

    Args:
        model: with beacons, as `load` gives it; the server's own from now on.
        tokenizer: of its base model.
        settings: see `Settings`.
        behind_the_gate: ASGI middleware for requests that have been let in, if there is any.

    Raises:
        StorageError: if the folder of contexts cannot be opened.
        RatioError: if the adapter does not know the ratio.
    """
    settings = settings or Settings()
    server = Server(model, tokenizer, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await run_in_threadpool(server.stop)

    app = FastAPI(title="activation-beacon", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    if behind_the_gate is not None:
        app.add_middleware(behind_the_gate)
    app.add_middleware(Gate, server=server)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.include_router(openai_routes(server, int(time.time())))
    app.include_router(response_routes(server))
    app.include_router(context_routes(server))
    _add_operation(app, server)
    _add_errors(app, server)
    return app


def _add_operation(app: FastAPI, server: Server) -> None:
    page = resources.files("activation_beacon.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        """The web page."""
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    @app.get("/health", tags=["operation"])
    async def health() -> JSONResponse:
        """Whether requests can be answered."""
        is_well = server.engine.is_alive
        values = {"status": "ok" if is_well else "stopped", "model": server.settings.model_name}
        return JSONResponse(values, 200 if is_well else 503)

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, server: Server) -> None:
    async def told(_: Request, error: Exception) -> Response:
        status, values, headers = described(error)
        return JSONResponse(server.failed(error, values), status, headers)

    async def not_valid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        text, param = schema.told(error.errors())
        return JSONResponse(body(text, kind="invalid_request_error", code="invalid_value", param=param), 400)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code)
        text = str(error.detail)
        if error.status_code in (404, 405):
            text = f"{request.method} {request.url.path} is not served here. {WAYS}"
        values = body(text, kind="invalid_request_error", code=code)
        return JSONResponse(values, error.status_code, error.headers)

    async def gone(_: Request, _error: Exception) -> Response:
        return Response(status_code=NOTHING_SENT)

    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(GoneError, gone)
    app.add_exception_handler(BeaconError, told)
