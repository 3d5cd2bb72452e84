"""Special tokens kept apart: those of a chat template are tokens, those that somebody writes in a text are letters.

A text is marked before it goes into a template: each special token that stands in it gets a mark after its first letter. What
stands between marks is then tokenized piece by piece, and no piece has the whole token in it. Texts without special tokens are
tokenized as ever. Nothing of the tokenizer is changed, so that threads may share it.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

MARK = "\ud8ff"  # half of a surrogate pair: no text has it


class SpecialTokens:
    """Marks texts, and makes ids of what has been marked.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._first_letters = _first_letters(_special_texts(tokenizer))

    def marked(self, text: str) -> str:
        """A text as it goes into a template, or to `ids`."""
        text = text.replace(MARK, "\ufffd")  # as what is no letter is read elsewhere
        return text if self._first_letters is None else self._first_letters.sub(rf"\g<0>{MARK}", text)

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by itself, in which nothing is a special token."""
        marked = [self.marked(text) for text in texts]
        if any(MARK in text for text in marked):
            return [self.ids(text) for text in marked]
        return self.tokenizer(marked, add_special_tokens=False, verbose=False)["input_ids"]

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text with or without marks.

        Args:
            text: whose special tokens are tokens where they are not marked.
            special: whether the tokenizer puts its own special tokens around it.
        """
        first, *others = text.split(MARK)
        ids = self._encoded(first, special=special)
        if not others:
            return ids
        around = ids if special else []
        ids = self._encoded(first)
        start = next((place for place in range(len(around)) if around[place : place + len(ids)] == ids), len(around))
        before, after = around[:start], around[start + len(ids) :]
        for piece in others:
            ids += self._continued(piece)
        return [*before, *ids, *after]

    def _continued(self, piece: str) -> list[int]:
        """Ids of a piece that goes on within a word: tokenizers that begin every text with a blank must not begin it so."""
        line, both = self._encoded("\n"), self._encoded(f"\n{piece}")
        return both[len(line) :] if both[: len(line)] == line else self._encoded(piece)

    def _encoded(self, text: str, *, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _special_texts(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _first_letters(texts: set[str]) -> re.Pattern[str] | None:
    """Matches the first letter of every special token of more than one, also of those that overlap."""
    rests = defaultdict(list)
    for text in sorted(texts):
        if len(text) > 1:
            rests[text[0]].append(re.escape(text[1:]))
    starts = [f"{re.escape(first)}(?={'|'.join(others)})" for first, others in rests.items()]
    return re.compile("|".join(starts)) if starts else None
