"""Answers in the shapes of OpenAI's older two kinds: chat, and plain completions."""

import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from activation_beacon.server.answering import Answering, listed_with
from activation_beacon.server.failures import described
from activation_beacon.server.jobs import Ended, Piece, Progress
from activation_beacon.server.listing import Listing
from activation_beacon.server.schema import ChatRequest, CompletionRequest
from activation_beacon.server.shapes import ChatShape, CompletionShape, Shape
from activation_beacon.server.state import Server


class Answers(Answering):
    """Answers in the shapes of OpenAI's older two kinds.

    Args:
        server: with the engine and the library.
        request: checked already.
    """

    request: ChatRequest | CompletionRequest

    def __init__(self, server: Server, request: ChatRequest | CompletionRequest) -> None:
        super().__init__(server, request)
        kind: type[ChatShape | CompletionShape] = ChatShape if isinstance(request, ChatRequest) else CompletionShape
        self.shape: Shape = kind(server.prompting.tokenizer)
        self.id = f"{self.shape.prefix}-{secrets.token_hex(12)}"

    def prompts(self) -> list[Any]:
        """The request's."""
        return list(self.request.prompts)

    # --- a reply in one piece ---

    async def whole(self) -> dict[str, Any]:
        """The reply, when all answers have been written."""
        told = [
            self.shape.choice(index, choice.text, choice.listed, choice.reason, self.request.num_likeliest is not None)
            for index, choice in enumerate(await self.gathered())
        ]
        return {**self._head(self.shape.whole_object), "choices": told, "usage": self.counts()}

    # --- a stream ---

    async def stream(self) -> AsyncIterator[str]:
        """The reply as server-sent events; while the prompt is read, comments tell how far that is."""
        head = self._head(self.shape.piece_object)
        with_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        if with_usage:
            head["usage"] = None
        listings = self.listings()
        try:
            for index in range(len(listings)):
                for choice in self.shape.first(index):
                    yield _event({**head, "choices": [choice]})
            async with contextlib.aclosing(self.heard()) as heard:
                async for event, index in heard:
                    if isinstance(event, Progress):
                        yield f": {event.done} of {event.total} chunks read\n\n"
                        continue
                    for choice in self._pieces(event, index, listings[index]):
                        yield _event({**head, "choices": [choice]})
            if with_usage:
                yield _event({**head, "choices": [], "usage": self.counts()})
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status has been sent: the error goes into the stream
            yield _event(self.server.failed(error, described(error)[1]))

    def _pieces(self, event: Piece | Ended, index: int, listing: Listing) -> Iterator[dict[str, Any]]:
        listed = listed_with(event, listing)
        with_logprobs = self.request.num_likeliest is not None
        if event.text or (listed and with_logprobs):
            yield self.shape.piece(index, event.text, listed if with_logprobs else None)
        if isinstance(event, Ended):
            yield self.shape.last(index, event.reason)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
