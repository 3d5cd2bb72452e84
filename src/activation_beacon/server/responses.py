"""OpenAI's Responses API: one answer to a conversation, kept for a while so that the next one can go on from it by its id."""

import contextlib
import functools
import itertools
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from activation_beacon.errors import InputError, UnsupportedError
from activation_beacon.server.answering import Answering, Choice, listed_with
from activation_beacon.server.failures import NotFoundError, described
from activation_beacon.server.jobs import Ended, Piece, Progress
from activation_beacon.server.listing import Listed
from activation_beacon.server.schema import Message, ResponseRequest
from activation_beacon.server.shapes import token_object
from activation_beacon.server.state import Server

FAILURES = {
    "rate_limit_error": "rate_limit_exceeded",
    "invalid_request_error": "invalid_prompt",
}  # as this API calls them
INCOMPLETE = {"length": "max_output_tokens"}  # what ended an answer before it was complete


@dataclass(frozen=True)
class Kept:
    """A response that another one may go on from.

    Attributes:
        told: as the client has got it.
        messages: of the conversation, the answer last; without instructions.
        context, ratio: that it was answered on, and at.
    """

    told: dict[str, Any]
    messages: tuple[Message, ...]
    context: str | None
    ratio: int | tuple[int, ...] | Literal["auto"] | None

    @functools.cached_property
    def num_chars(self) -> int:
        """Characters of the conversation, and of what the client was told."""
        return len(json.dumps(self.told)) + sum(len(message.text) for message in self.messages)


class Responses:
    """The last responses, by id, in the server's memory; the event loop's own.

    Args:
        most: that are kept.
        most_chars: that they have together, what several have in common counted with each.
    """

    def __init__(self, most: int = 1000, most_chars: int = 2**26) -> None:
        self.most = most
        self.most_chars = most_chars
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._num_chars = 0

    def keep(self, response: Kept) -> None:
        """Keep one more, and let go of those that nobody has asked for longest if there are too many."""
        self._kept[response.told["id"]] = response
        self._num_chars += response.num_chars
        while len(self._kept) > self.most or (len(self._kept) > 1 and self._num_chars > self.most_chars):
            self._num_chars -= self._kept.popitem(last=False)[1].num_chars

    def get(self, response_id: str) -> Kept:
        """The response of an id.

        Raises:
            NotFoundError: if it is not kept.
        """
        self._check(response_id)
        self._kept.move_to_end(response_id)
        return self._kept[response_id]

    def delete(self, response_id: str) -> None:
        """Let go of one.

        Raises:
            NotFoundError: if it is not kept.
        """
        self._check(response_id)
        self._num_chars -= self._kept.pop(response_id).num_chars

    def _check(self, response_id: str) -> None:
        if response_id not in self._kept:
            raise NotFoundError(
                f"There is no response {response_id[:100]!r} here: a server keeps at most {self.most:,} of its own, until it ends. "
                "Send the whole conversation as input."
            )


class ResponseAnswer(Answering):
    """One response.

    Args:
        server: with the engine and the library.
        request: checked already.
        kept: where the response that it goes on from is, and where it is kept itself.
    """

    request: ResponseRequest

    def __init__(self, server: Server, request: ResponseRequest, kept: Responses) -> None:
        super().__init__(server, request)
        self.kept = kept
        self.id = f"resp_{secrets.token_hex(24)}"
        self.item_id = f"msg_{secrets.token_hex(24)}"
        self.messages: list[Message] = []

    def prompts(self) -> list[Any]:
        """The conversation so far and what is said now, after this request's own instructions.

        What it goes on from says which context it is about, and at which ratio it is read unless the request does.
        """
        request = self.request
        self.messages = list(request.input)
        if request.previous_response_id is not None:
            before = self.kept.get(request.previous_response_id)
            if self.context not in (None, before.context):
                about = "no context" if before.context is None else f"context {before.context}"
                raise InputError(
                    f"Response {request.previous_response_id} is about {about}, and what goes on from it is, too; got context "
                    f"{self.context[:100]!r}. Leave context out, or previous_response_id."
                )
            self.messages = [*before.messages, *self.messages]
            self.context = before.context
            self.ratio = before.ratio if self.ratio is None else self.ratio
        if request.instructions is None:
            return [self.messages]
        if self.context is not None:
            raise UnsupportedError(
                "instructions cannot follow a context. Give them as `system` when the context is made (POST /v1/contexts)."
            )
        return [[Message(role="system", content=request.instructions), *self.messages]]

    async def whole(self) -> dict[str, Any]:
        """The response, when it has been written."""
        return self._ended((await self.gathered())[0])

    async def stream(self) -> AsyncIterator[str]:
        """The response as server-sent events; while the prompt is read, comments tell how far that is."""
        numbers = itertools.count()

        def event(kind: str, **values: Any) -> str:
            values = {"type": kind, **values, "sequence_number": next(numbers)}
            return f"event: {kind}\ndata: {json.dumps(values, ensure_ascii=False)}\n\n"

        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        choice, listing = Choice(), self.listings()[0]
        try:
            begun = self._response("in_progress")
            yield event("response.created", response=begun)
            yield event("response.in_progress", response=begun)
            yield event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
            yield event("response.content_part.added", **place, part=self._part("", []))
            async with contextlib.aclosing(self.heard()) as heard:
                async for told, _ in heard:
                    if isinstance(told, Progress):
                        yield f": {told.done} of {told.total} chunks read\n\n"
                    elif isinstance(told, Piece | Ended):
                        listed = listed_with(told, listing)
                        choice.add(told, listed)
                        logprobs = self._logprobs(listed)
                        if told.text or logprobs:
                            yield event("response.output_text.delta", **place, delta=told.text, logprobs=logprobs)
            response = self._ended(choice)
            part, item = response["output"][0]["content"][0], response["output"][0]
            yield event("response.output_text.done", **place, text=choice.text, logprobs=part["logprobs"])
            yield event("response.content_part.done", **place, part=part)
            yield event("response.output_item.done", output_index=0, item=item)
            yield event(f"response.{response['status']}", response=response)
        except Exception as error:  # noqa: BLE001 - the status has been sent: the error goes into the stream
            told_error = self.server.failed(error, described(error)[1])["error"]
            code = FAILURES.get(told_error["type"], "server_error")
            failed = {"code": code, "message": told_error["message"]}
            yield event("response.failed", response={**self._response("failed"), "error": failed})

    def usage(self) -> dict[str, Any]:
        """Tokens as this API calls them."""
        told = self.counts()
        return {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": {**told["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": told["total_tokens"],
            "beacon": told["beacon"],
        }

    def _ended(self, choice: Choice) -> dict[str, Any]:
        """The response with its answer, which is kept unless it is not to be."""
        reason = INCOMPLETE.get(choice.reason)
        status = "completed" if reason is None else "incomplete"
        response = {
            **self._response(status),
            "completed_at": int(time.time()) if reason is None else None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": [self._item(status, [self._part(choice.text, choice.listed)])],
            "usage": self.usage(),
        }
        if response["store"]:
            answer = Message(role="assistant", content=choice.text)
            self.kept.keep(Kept(response, (*self.messages, answer), self.context, self.ratio))
        return response

    def _response(self, status: str) -> dict[str, Any]:
        request = self.request
        wanted = None if request.text is None else request.text.format
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": self.sampling.temperature,
            "text": {
                "format": {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
            },
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": self.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str, listed: Sequence[Listed]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(listed)}

    def _logprobs(self, listed: Sequence[Listed]) -> list[dict[str, Any]]:
        if self.request.num_likeliest is None:
            return []
        tokenizer = self.server.prompting.tokenizer
        return [token_object(tokenizer, entry.chosen) for entry in listed]
