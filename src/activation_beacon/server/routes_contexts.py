"""Contexts: made of texts and files, listed, asked for, grown, copied, deleted."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from activation_beacon.errors import InputError
from activation_beacon.ratios import parse_ratio
from activation_beacon.server.failures import described
from activation_beacon.server.folder import Record
from activation_beacon.server.jobs import Progress
from activation_beacon.server.routes_openai import EVENT_STREAM, NO_BUFFERING
from activation_beacon.server.schema import AppendRequest, ContextRequest, ForkRequest
from activation_beacon.server.state import Server
from activation_beacon.server.work import unless_gone

PRIVATE = ("base_fingerprint", "adapter_fingerprint")
BYTE_ORDER_MARK = "\ufeff"
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "A UTF-8 text."},
        **{name: {"type": "string"} for name in ("name", "ratio", "system", "plain", "quantize", "stream")},
    },
}

CREATE_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": ContextRequest.model_json_schema()},
        "multipart/form-data": {"schema": FORM},
    },
}
Making = AsyncGenerator[Progress | Record, None]


def context_routes(server: Server) -> APIRouter:
    """The routes of one server."""
    router = APIRouter(prefix="/v1/contexts", tags=["contexts"])
    routes = _Routes(server)
    router.post("", status_code=201, openapi_extra={"requestBody": CREATE_BODY})(routes.create)
    router.get("")(routes.contexts)
    router.get("/{context_id}")(routes.context)
    router.delete("/{context_id}")(routes.delete)
    router.post("/{context_id}/append", status_code=201)(routes.append)
    router.post("/{context_id}/fork", status_code=201)(routes.fork)
    return router


class _Routes:
    """The functions behind them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.library = server.library

    async def create(self, request: Request) -> Response:
        """Compress a text: JSON with `text`, or a form with a UTF-8 `file`. With `stream`, progress comes as events."""
        wanted = await _context_request(request)
        least = self.server.prompting.least_tokens(wanted.text)
        self.library.check_can_fit(self.library.empty(wanted.ratio), least)
        document = functools.partial(self.server.prompting.document, system=wanted.system, is_plain=wanted.plain)
        ids = await run_in_threadpool(document, wanted.text)
        name = wanted.name or _first_words(wanted.text)
        making = self.library.create(name, ids, ratio=wanted.ratio, bits=wanted.quantize)
        return await self._made(request, making, is_stream=wanted.stream)

    async def contexts(self) -> dict[str, Any]:
        """All contexts, newest first."""
        return {"object": "list", "data": [self._told(record) for record in await self.library.records()]}

    async def context(self, context_id: str) -> dict[str, Any]:
        """One context."""
        return self._told(await self.library.record(context_id))

    async def delete(self, context_id: str) -> dict[str, Any]:
        """Delete a context, from memory and disk."""
        await self.library.delete(context_id)
        return {"id": context_id, "object": "context.deleted", "deleted": True}

    async def append(self, context_id: str, body: AppendRequest, request: Request) -> Response:
        """Read more text at a context's end."""
        roomiest = self.library.empty(max(self.server.model.beacon_config.ratios))
        self.library.check_can_fit(roomiest, self.server.prompting.least_tokens(body.text))
        ids = await run_in_threadpool(self.server.prompting.more, body.text)
        making = self.library.append(context_id, ids, ratio=body.ratio)
        return await self._made(request, making, is_stream=body.stream)

    async def fork(self, context_id: str, body: ForkRequest | None = None) -> dict[str, Any]:
        """Copy a context."""
        record = await self.library.record(context_id)
        name = body.name if body is not None else ""
        return self._told(await self.library.fork(context_id, name or f"{record.name} (copy)"))

    async def _made(self, request: Request, making: Making, *, is_stream: bool) -> Response:
        """The context that is being made, or its progress: a stream begins when the work has been taken on."""
        if not is_stream:
            return JSONResponse(self._told(await unless_gone(request, _last(making))), status_code=201)
        first = await unless_gone(request, anext(making))
        end = BackgroundTask(making.aclose)  # a client may leave before the stream has begun
        events = self._events(first, making)
        return StreamingResponse(events, media_type=EVENT_STREAM, headers=NO_BUFFERING, background=end)

    async def _events(self, first: Progress | Record, making: Making) -> AsyncIterator[str]:
        try:
            async with contextlib.aclosing(making):
                yield self._event(first)
                async for event in making:
                    yield self._event(event)
        except Exception as error:  # noqa: BLE001 - the status has been sent: the error goes into the stream
            yield _event("error", self.server.failed(error, described(error)[1]))

    def _event(self, event: Progress | Record) -> str:
        if isinstance(event, Progress):
            return _event("progress", dataclasses.asdict(event))
        return _event("context", self._told(event))

    def _told(self, record: Record) -> dict[str, Any]:
        values = {name: value for name, value in dataclasses.asdict(record).items() if name not in PRIVATE}
        status = "ready" if record.error is None else "unusable"
        in_memory = self.library.is_in_memory(record)
        return {"object": "context", **values, "ratios": list(record.ratios), "status": status, "in_memory": in_memory}


async def _context_request(request: Request) -> ContextRequest:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            return await _from_form(request)
        if kind in ("application/json", ""):
            return ContextRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    raise InputError(f"Send application/json or multipart/form-data; got {kind[:100]!r}.")


async def _from_form(request: Request) -> ContextRequest:
    async with request.form(max_files=1, max_fields=10) as form:
        values: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InputError("The form has no file. Send it as the field `file`.")
        values["text"] = _decoded(await file.read())
        values.setdefault("name", (file.filename or "").replace("\\", "/").rsplit("/", 1)[-1][:200])
    if "ratio" in values:
        ratio = parse_ratio(values["ratio"])
        values["ratio"] = list(ratio) if isinstance(ratio, tuple) else ratio
    if values.get("quantize") in ("8", "4"):
        values["quantize"] = int(values["quantize"])
    return ContextRequest.model_validate(values)


def _decoded(content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"The file is not UTF-8 text (byte {error.start}). Convert it first.") from error
    if "\0" in text:
        raise InputError("The file is binary: it has NUL bytes. Send UTF-8 text.")
    return text.removeprefix(BYTE_ORDER_MARK)


def _first_words(text: str) -> str:
    return " ".join(text[:200].split())[:60]


async def _last(making: Making) -> Record:
    async with contextlib.aclosing(making):
        records = [event async for event in making if isinstance(event, Record)]
    return records[-1]


def _event(kind: str, values: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(values, ensure_ascii=False)}\n\n"
