"""Token ids turned into text while they come: whole characters only, and never a part of a stop text."""

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

HALF = "\ufffd"  # what a tokenizer makes of a character that is not complete yet
OCTET = re.compile("<0x([0-9A-F]{2})>")  # a token of a single byte, as sentencepiece has them
OCTETS = {char: octet for octet, char in bytes_to_unicode().items()}  # of characters in byte-level vocabularies


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """The bytes that a token stands for, which may be a part of a character's; None where the vocabulary does not say."""
    text = tokenizer.decode([token])
    if HALF not in text:
        return list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token)
    if match := OCTET.fullmatch(piece):
        return [int(match[1], 16)]
    octets = [OCTETS.get(char) for char in piece]
    return None if None in octets else octets  # type: ignore[return-value]


class Writer:
    """Writes one answer.

    Args:
        tokenizer: of the base model.
        stop: texts that end the answer and are not part of it.

    Attributes:
        is_stopped: whether a stop text has come.
        num_chars: characters of the text so far, a stop text and what is held back included.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.is_stopped = False
        self.num_chars = 0
        self._ids: list[int] = []
        self._known, self._read = 0, 0  # ids before which the text is certain, and before which it has been taken
        self._held = ""

    def add(self, token: int) -> str:
        """Text that has become certain with one more token."""
        self._ids.append(token)
        before = self._decoded(self._known, self._read)
        now = self._decoded(self._known, len(self._ids))
        if now.endswith(HALF) and len(self._ids) - self._read < 8:
            return ""
        self._known, self._read = self._read, len(self._ids)
        return self._released(now[len(before) :])

    def finish(self) -> str:
        """What was held back, at the answer's end."""
        rest = self._decoded(self._known, len(self._ids))[len(self._decoded(self._known, self._read)) :]
        self._read = len(self._ids)
        text = "" if self.is_stopped else self._released(rest) + self._held
        self._held = ""
        return text

    def _decoded(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _released(self, text: str) -> str:
        self.num_chars += len(text)
        self._held += text
        found = [position for position in map(self._held.find, self.stop) if position >= 0]
        if found:
            self.is_stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        kept = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])),
        0,
    )
