"""The two shapes that OpenAI's API gives to answers: chat, and plain completions."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from activation_beacon.server.sampling import Chosen
from activation_beacon.server.writing import token_bytes


class Shape(Protocol):
    """How answers of one kind are told."""

    prefix: str
    whole_object: str
    piece_object: str

    def choice(
        self, index: int, text: str, chosen: Sequence[Chosen], reason: str, with_logprobs: bool
    ) -> dict[str, Any]:
        """A whole answer."""

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""

    def piece(self, index: int, text: str, chosen: Chosen | None) -> dict[str, Any]:
        """A piece of an answer, with its token's probability if that is wanted."""

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """An answer's end."""


class ChatShape:
    """`chat.completion` and its chunks.

    Args:
        tokenizer: of the base model.
    """

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def choice(
        self, index: int, text: str, chosen: Sequence[Chosen], reason: str, with_logprobs: bool
    ) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = self._logprobs(chosen) if with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """The role."""
        yield self._piece(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, chosen: Chosen | None) -> dict[str, Any]:
        """A delta."""
        return self._piece(index, {"content": text}, None if chosen is None else self._logprobs([chosen]))

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """An empty delta with the reason."""
        return {**self._piece(index, {}), "finish_reason": reason}

    def _piece(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, chosen: Sequence[Chosen]) -> dict[str, Any]:
        content = []
        for each in chosen:
            likeliest = [self._token(token, logprob) for token, logprob in each.likeliest]
            content.append({**self._token(each.token, each.logprob), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": token_bytes(self.tokenizer, token)}


class CompletionShape:
    """`text_completion`, whole or in pieces.

    Args:
        tokenizer: of the base model.
    """

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._offsets: dict[int, int] = {}  # by index: characters of a streamed answer so far

    def choice(
        self, index: int, text: str, chosen: Sequence[Chosen], reason: str, with_logprobs: bool
    ) -> dict[str, Any]:
        """A whole answer."""
        logprobs = self._logprobs(chosen, 0) if with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """Nothing: there are no roles."""
        self._offsets[index] = 0
        yield from ()

    def piece(self, index: int, text: str, chosen: Chosen | None) -> dict[str, Any]:
        """A piece of text."""
        logprobs = None if chosen is None else self._logprobs([chosen], self._offsets[index])
        self._offsets[index] += len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """No more text, and the reason."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _logprobs(self, chosen: Sequence[Chosen], offset: int) -> dict[str, Any]:
        tokens = [self.tokenizer.decode([each.token]) for each in chosen]
        offsets = [offset + sum(map(len, tokens[:number])) for number in range(len(tokens))]
        likeliest = [{self.tokenizer.decode([token]): value for token, value in each.likeliest} for each in chosen]
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }
