"""Messages and texts made token ids: a conversation of its own, or questions that follow a context."""

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from activation_beacon.errors import InputError, UnsupportedError
from activation_beacon.prompts import ChatPrompt
from activation_beacon.server.lengths import Lengths
from activation_beacon.server.schema import Message
from activation_beacon.special_tokens import SpecialTokens


class Prompting:
    """Makes ids; safe in any thread. In the template only its own special tokens are tokens; see `SpecialTokens`.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)  # the engine decodes with the other one
        self.prompt = ChatPrompt(self.tokenizer)
        self._special = SpecialTokens(self.tokenizer)
        self._lengths = Lengths(self.tokenizer)
        self._special.ids("")  # settings from its file, such as a truncation, are taken off by the first call
        # The fast ones only read themselves after that, and let other threads run meanwhile.
        self._lock = contextlib.nullcontext() if getattr(tokenizer, "is_fast", False) else threading.Lock()

    def least_tokens(self, prompt: str | Sequence[int] | Sequence[Message]) -> int:
        """A text, ids or messages have no fewer; told at once. Templates may drop other messages than the user's."""
        if isinstance(prompt, str):
            return self._lengths.least_tokens(prompt)
        if all(isinstance(part, int) for part in prompt):
            return len(prompt)
        texts = [part.text for part in prompt if isinstance(part, Message) and part.role == "user"]
        return sum(self._lengths.least_tokens(text.strip()) for text in texts)

    def document(self, text: str, *, system: str | None = None, is_plain: bool = False) -> list[int]:
        """Ids of a context: a text as the opening of a user's message, or as it is, special tokens in it included.

        Raises:
            InputError: if there is no text, or the template refuses a system message.
        """
        if not text.strip():
            raise InputError("The text is empty: there is nothing to compress. Send at least one word.")
        with self._lock:
            if is_plain:
                return self._special.ids(text, special=True)
            return self._prompt_with(system).opening(text)

    def _prompt_with(self, system: str | None) -> ChatPrompt:
        if system is None:
            return self.prompt
        with _template_may_refuse("a system message"):
            return ChatPrompt(self.tokenizer, system=system)

    def more(self, text: str) -> list[int]:
        """Ids of a text that goes on where a context ends."""
        if not text:
            raise InputError("The text is empty: there is nothing to append. Send at least one word.")
        with self._lock:
            return self._written(text)

    def completion(self, prompt: str | Sequence[int], *, is_first: bool) -> list[int]:
        """Ids of a prompt that is taken as it is; the tokenizer's special tokens stand before it only if it is `is_first`."""
        if not isinstance(prompt, str):
            return list(prompt)
        with self._lock:
            return self._special.ids(prompt, special=is_first)

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation on no context, as the model's chat template has them.

        Raises:
            InputError: if the template refuses them.
        """
        if not self.prompt.has_template:
            return self._without_template(messages)
        plain = [{"role": message.template_role, "content": self._special.marked(message.text)} for message in messages]
        with self._lock, _template_may_refuse("these messages"):
            text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        with self._lock:
            return self._special.ids(text)

    def _without_template(self, messages: Sequence[Message]) -> list[int]:
        if any(message.template_role == "system" for message in messages):
            raise UnsupportedError("The model has no chat template, and so no system messages. Leave them out.")
        _check_order(messages, "Without a chat template")
        with self._lock:
            return [*self.prompt.message(messages[0].text), *self._rest(messages[1:])]

    def on_context(self, context_ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Ids that ask on from where a context stands, earlier answers of this conversation included.

        Raises:
            UnsupportedError: for a system message, which belongs before the document.
            InputError: if the context does not open with the chat template.
        """
        _check_order(messages, "On a context")
        if any(message.template_role == "system" for message in messages):
            raise UnsupportedError(
                "A system message cannot follow a context. Give it as `system` when the context is made (POST /v1/contexts)."
            )
        with self._lock:
            if not self.prompt.opens(context_ids):
                raise InputError(
                    "The context does not open with the model's chat template (it was made as plain text). "
                    "Use /v1/completions: the prompt then follows the text as it is."
                )
            is_in_answer = self.prompt.is_in_answer(context_ids)
            ask = self.prompt.follow_up if is_in_answer else self.prompt.question
            return [*ask(messages[0].text), *self._rest(messages[1:])]

    def _rest(self, messages: Sequence[Message]) -> list[int]:
        """Ids of answers and further questions after the first question."""
        ids: list[int] = []
        for message in messages:
            ids += self._written(message.text) if message.role == "assistant" else self.prompt.follow_up(message.text)
        return ids

    def _written(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a special token."""
        return self.prompt.ids_of_texts([text])[0]


@contextlib.contextmanager
def _template_may_refuse(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # templates raise what they like
        raise InputError(f"The model's chat template refuses {what}: {error}") from error


def _check_order(messages: Sequence[Message], where: str) -> None:
    if not messages or messages[-1].role != "user":
        raise InputError(f"{where}, the last message must be the user's: it is what is answered.")
    talk = [message.role for message in messages if message.template_role != "system"]
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(talk)):
        raise InputError(
            f"{where}, messages must alternate between user and assistant, user first; got {', '.join(talk)}."
        )
