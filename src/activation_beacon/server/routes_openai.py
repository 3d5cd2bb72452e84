"""OpenAI's older routes: models, chat, completions."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from activation_beacon.server.answers import Answers
from activation_beacon.server.failures import NotFoundError
from activation_beacon.server.responses import ResponseAnswer
from activation_beacon.server.schema import ChatRequest, CompletionRequest
from activation_beacon.server.state import Server
from activation_beacon.server.work import unless_gone

EVENT_STREAM = "text/event-stream"
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies


def openai_routes(server: Server, started: int) -> APIRouter:
    """The routes of one server.

    Args:
        server: answers them.
        started: seconds since 1970: the model's `created`.
    """
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    def model_object() -> dict[str, Any]:
        config = server.model.beacon_config
        return {
            "id": server.settings.model_name,
            "object": "model",
            "created": started,
            "owned_by": "activation-beacon",
            "beacon": {
                "base_model": config.base_model,
                "chunk_size": config.chunk_size,
                "local_tokens": config.local_tokens,
                "ratios": list(config.ratios),
                "ratio": server.settings.ratio,
                "is_trained": config.is_trained,
                "max_positions": server.model.max_positions,
            },
        }

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model_object()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model, if it is called that."""
        if name != server.settings.model_name:
            raise NotFoundError(f"There is no model {name[:100]!r} here. It is called {server.settings.model_name!r}.")
        return model_object()

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, on a context or of its own."""
        return await answered(Answers(server, body), request)

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text."""
        return await answered(Answers(server, body), request)

    return router


async def answered(answers: Answers | ResponseAnswer, request: Request) -> Response:
    """The reply to a request for answers, whole or as a stream."""
    await unless_gone(request, answers.begin())
    request.state.beacon = answers
    if answers.request.stream:
        end = BackgroundTask(_cancelled, answers)  # a client may leave before the stream has begun
        return StreamingResponse(answers.stream(), media_type=EVENT_STREAM, headers=NO_BUFFERING, background=end)
    return JSONResponse(await unless_gone(request, answers.whole()))


async def _cancelled(answers: Answers | ResponseAnswer) -> None:
    answers.cancel()
