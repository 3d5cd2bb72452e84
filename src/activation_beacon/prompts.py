"""Where a document and a question meet: the document opens a user's message, the question closes it.

So that a context can be compressed before the question is known, a chat template is cut where the document ends. Works
with any tokenizer; one without a chat template gets a plain "Question: ... Answer:". What stands in documents, questions and
system messages is text, also where it looks like the template's special tokens.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from activation_beacon.errors import InputError
from activation_beacon.special_tokens import SpecialTokens

DOCUMENT, QUESTION, ANSWER = "[[the-document]]", "[[the-question]]", "[[the-answer]]"
GAP = "\n\n"


class ChatPrompt:
    """Cuts a tokenizer's chat template into what comes before, between and after document, questions and answers.

    Args:
        tokenizer: of the base model.
        system: a system message; None leaves it to the template.
    """

    def __init__(self, tokenizer: Any, *, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if not self.has_template:
            self._before, self._close, self._next = "", "\nAnswer:", f"{GAP}Question: "
            return
        first = {"role": "user", "content": DOCUMENT + QUESTION}
        opening = [{"role": "system", "content": self._special.marked(system)}] if system else []
        messages = [*opening, first, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": QUESTION}]
        start = self._render([*opening, first])
        whole = self._render(messages)
        self._before = _between(start, None, DOCUMENT)
        self._close = _between(start, QUESTION, None)
        self._next = _between(whole, ANSWER, QUESTION)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def holds(self, system: str) -> bool:
        """Whether a system message stands in what opens a conversation."""
        return self._special.marked(system) in self._before

    def opening(self, document: str) -> list[int]:
        """Ids of the message as far as the document goes: what is compressed."""
        return self._ids(self._before + self._special.marked(document), special=not self.has_template)

    def question(self, text: str) -> list[int]:
        """Ids that close the message that `opening` began, and open the answer."""
        label = "" if self.has_template else "Question: "
        return self._ids(f"{GAP}{label}{self._special.marked(text)}{self._close}")

    def message(self, text: str) -> list[int]:
        """Ids of a whole first message, without a document, and of the opening of its answer."""
        label = "" if self.has_template else "Question: "
        return self._ids(
            f"{self._before}{label}{self._special.marked(text)}{self._close}", special=not self.has_template
        )

    def follow_up(self, text: str) -> list[int]:
        """Ids that end an answer, ask on, and open the next answer."""
        return self._ids(self._next + self._special.marked(text) + self._close)

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by itself, as they stand in a message: nothing in it is a special token."""
        return self._special.ids_of_texts(texts)

    def opens(self, ids: Sequence[int]) -> bool:
        """Whether a text's first special tokens are those of the template's opening (which may hold a date)."""
        special = set(self.tokenizer.get_added_vocab().values()) | set(self.tokenizer.all_special_ids)
        expected = [token for token in self.opening("") if token in special]
        found = (token for token in ids if token in special)
        return all(token == next(found, None) for token in expected)

    def is_in_answer(self, ids: Sequence[int]) -> bool:
        """Whether a question has been asked in a text already: the ids that open an answer are among its own."""
        closing, ids, start = self._closing, list(ids), 0
        if not closing:
            return True
        with contextlib.suppress(ValueError):  # no further first one of them
            while ids[start : start + len(closing)] != closing:
                start = ids.index(closing[0], start + 1)
            return True
        return False

    @functools.cached_property
    def _closing(self) -> list[int]:
        """The ids that end a question and open its answer, whatever is asked."""
        first, second = self.question("a"), self.question("1")
        length = 0
        while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
            length += 1
        return first[len(first) - length :]

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return self._special.ids(text, special=special)


def _between(text: str, left: str | None, right: str | None) -> str:
    for mark in (left, right):
        if mark is not None and mark not in text:
            raise InputError(
                f"The tokenizer's chat template drops or changes the message's text ({mark} is not in it)."
            )
    start = 0 if left is None else text.rindex(left) + len(left) if right is None else text.index(left) + len(left)
    stop = len(text) if right is None else text.index(right, start)
    return text[start:stop]
