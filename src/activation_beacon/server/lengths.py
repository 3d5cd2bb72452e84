"""How few tokens a text can have, told from its bytes: what can never fit is refused before anybody tokenizes it."""

import json
import unicodedata
from collections.abc import Iterable
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

SPLITTERS = frozenset({"ByteLevel", "Digits", "Split"})


class Lengths:
    """Knows the longest token of a tokenizer that reads a text byte by byte; of another one it knows nothing.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        self.longest = _longest_token(tokenizer, vocabulary) if _reads_bytes(tokenizer) else None
        self._unknown = bytes(octet for octet, letter in bytes_to_unicode().items() if letter not in vocabulary)

    def least_tokens(self, text: str) -> int:
        """A text has no fewer; 0 where nothing is known."""
        if self.longest is None:
            return 0
        octets = unicodedata.normalize("NFC", text).encode("utf-8", "replace")
        return -(-len(octets.translate(None, self._unknown)) // self.longest)


def _reads_bytes(tokenizer: Any) -> bool:
    """Whether each byte of a text, after NFC at most, is in one of its tokens if the vocabulary knows that byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return False
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return False
    if [part["type"] for part in _parts(backend.normalizer, "normalizers")] not in ([], ["NFC"]):
        return False
    splitters = _parts(backend.pre_tokenizer, "pretokenizers")
    kinds = {part["type"] for part in splitters}
    drops = any(part.get("behavior") == "Removed" for part in splitters)
    return "ByteLevel" in kinds and kinds <= SPLITTERS and not drops


def _parts(step: Any, name: str) -> list[dict[str, Any]]:
    """Settings of a tokenizer's step, or of those that it is a sequence of."""
    if step is None:
        return []
    settings = json.loads(step.__getstate__())
    return settings[name] if settings["type"] == "Sequence" else [settings]


def _longest_token(tokenizer: Any, vocabulary: Iterable[str]) -> int:
    """Bytes; in a byte-level vocabulary each letter is one, but for tokens that were added as they are."""
    added = [len(token.content.encode()) for token in tokenizer.added_tokens_decoder.values()]
    return max([*map(len, vocabulary), *added])
