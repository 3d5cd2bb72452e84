"""OpenAI's routes for responses, which are kept for a while."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from activation_beacon.errors import UnsupportedError
from activation_beacon.server.responses import ResponseAnswer, Responses
from activation_beacon.server.routes_openai import answered
from activation_beacon.server.schema import ResponseRequest
from activation_beacon.server.state import Server


def response_routes(server: Server) -> APIRouter:
    """The routes of one server."""
    router, responses = APIRouter(prefix="/v1", tags=["OpenAI"]), Responses()

    @router.post("/responses")
    async def respond(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation, which may go on from an earlier response."""
        return await answered(ResponseAnswer(server, body, responses), request)

    @router.get("/responses/{response_id}")
    async def response(response_id: str, stream: bool = False) -> dict[str, Any]:
        """A response that is still kept."""
        if stream:
            raise UnsupportedError("stream is not supported for a response that is finished. Leave it out.")
        return responses.get(response_id).told

    @router.delete("/responses/{response_id}")
    async def delete_response(response_id: str) -> dict[str, Any]:
        """Let go of a response."""
        responses.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router
