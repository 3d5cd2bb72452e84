"""The two shapes that OpenAI's older API gives to answers: chat, and plain completions."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from activation_beacon.server.listing import Listed
from activation_beacon.server.sampling import Chosen
from activation_beacon.server.writing import HALF, token_bytes


class Shape(Protocol):
    """How answers of one kind are told."""

    prefix: str
    whole_object: str
    piece_object: str

    def choice(
        self, index: int, text: str, listed: Sequence[Listed], reason: str, with_logprobs: bool
    ) -> dict[str, Any]:
        """A whole answer."""

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""

    def piece(self, index: int, text: str, listed: Sequence[Listed] | None) -> dict[str, Any]:
        """A piece of an answer, with probabilities of tokens if they are wanted."""

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """An answer's end."""


def token_object(tokenizer: Any, chosen: Chosen) -> dict[str, Any]:
    """A token with its log probability, and the likeliest ones in its place."""

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": tokenizer.decode([token]), "logprob": logprob, "bytes": token_bytes(tokenizer, token)}

    likeliest = [told(token, logprob) for token, logprob in chosen.likeliest]
    return {**told(chosen.token, chosen.logprob), "top_logprobs": likeliest}


class ChatShape:
    """`chat.completion` and its chunks.

    Args:
        tokenizer: of the base model.
    """

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def choice(
        self, index: int, text: str, listed: Sequence[Listed], reason: str, with_logprobs: bool
    ) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = self._logprobs(listed) if with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """The role."""
        yield self._piece(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, listed: Sequence[Listed] | None) -> dict[str, Any]:
        """A delta."""
        return self._piece(index, {"content": text}, None if listed is None else self._logprobs(listed))

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """An empty delta with the reason."""
        return {**self._piece(index, {}), "finish_reason": reason}

    def _piece(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, listed: Sequence[Listed]) -> dict[str, Any]:
        return {"content": [token_object(self.tokenizer, entry.chosen) for entry in listed], "refusal": None}


class CompletionShape:
    """`text_completion`, whole or in pieces.

    Args:
        tokenizer: of the base model.
    """

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def choice(
        self, index: int, text: str, listed: Sequence[Listed], reason: str, with_logprobs: bool
    ) -> dict[str, Any]:
        """A whole answer."""
        logprobs = self._logprobs(listed) if with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def first(self, index: int) -> Iterator[dict[str, Any]]:  # noqa: ARG002 - the other shape's
        """Nothing: there are no roles."""
        yield from ()

    def piece(self, index: int, text: str, listed: Sequence[Listed] | None) -> dict[str, Any]:
        """A piece of text."""
        logprobs = None if listed is None else self._logprobs(listed)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """No more text, and the reason."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _logprobs(self, listed: Sequence[Listed]) -> dict[str, Any]:
        return {
            "tokens": [self._name(each.chosen.token) for each in listed],
            "token_logprobs": [each.chosen.logprob for each in listed],
            "top_logprobs": [{self._name(token): value for token, value in each.chosen.likeliest} for each in listed],
            "text_offset": [each.offset for each in listed],
        }

    def _name(self, token: int) -> str:
        """A token's text; one that is a part of a character is named by its bytes, as OpenAI does it."""
        text = str(self.tokenizer.decode([token]))
        octets = bytes(token_bytes(self.tokenizer, token) or text.encode())
        named = octets.decode("utf-8", "backslashreplace")
        return text if HALF not in text or HALF in named else f"bytes:{named}"
