"""Samples that are conversations on a document: read in the chat template, the loss on the answers alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from activation_beacon.errors import InputError
from activation_beacon.prompts import GAP, ChatPrompt
from activation_beacon.training.sampling import Sample

MOST_PROMPTS = 1024  # system messages whose prompts are kept
AT_A_TIME = 256  # a tokenizer holds a hundred bytes for each token that it hands out


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Conversations:
    """Writes conversations as a model reads them when it is asked.

    Args:
        tokenizer: of the base model.

    Raises:
        InputError: if the tokenizer has no token that ends an answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prompt = ChatPrompt(tokenizer)
        following = self.prompt.follow_up("?")
        # Most templates end an answer themselves; where one does not, the model's own end of text does.
        self._num_ending = _num_ending(following, tokenizer) if self.prompt.has_template else 0
        end = following[self._num_ending - 1] if self._num_ending else tokenizer.eos_token_id
        if end is None:
            raise InputError("The tokenizer has no eos_token, so that no answer could end. Set tokenizer.eos_token.")
        self.end: int = end
        self.overhead = len(self.prompt.opening("")) + len(self.prompt.question("")) + 1
        self._prompts: dict[str, ChatPrompt] = {}  # by their system messages
        self.turn_overhead = len(self.prompt.follow_up("")) + 1

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself."""
        slices = (list(texts[start : start + AT_A_TIME]) for start in range(0, len(texts), AT_A_TIME))
        return [len(ids) for part in slices for ids in self.prompt.ids_of_texts(part)]

    def ids(self, text: str) -> list[int]:
        """Ids of a text by itself."""
        return self.prompt.ids_of_texts([text])[0]

    def sample(self, document: str, turns: Sequence[Turn]) -> Sample:
        """One conversation on a document; every answer and the token that ends it are targets."""
        return self._written(self.prompt.opening(document) + self.prompt.question(turns[0].question), turns)

    def chat(self, system: str, turns: Sequence[Turn]) -> Sample:
        """One conversation on nothing but what is said in it; every answer and the token that ends it are targets.

        Args:
            system: a system message; it opens the first question where the chat template has no place for one. "" for none.
            turns: one at least.
        """
        prompt, first = self._prompt_with(system), turns[0].question
        if system and prompt is self.prompt:
            first = f"{system}{GAP}{first}"
        return self._written(prompt.message(first), turns)

    def _prompt_with(self, system: str) -> ChatPrompt:
        """Prompts with a system message; those without where the template has no place for it."""
        if not (system and self.prompt.has_template):
            return self.prompt
        if system not in self._prompts:
            try:
                made = ChatPrompt(self.tokenizer, system=system)
            except (TemplateError, InputError):
                made = self.prompt
            if len(self._prompts) >= MOST_PROMPTS:
                self._prompts.clear()
            self._prompts[system] = made if made.holds(system) else self.prompt
        return self._prompts[system]

    def _written(self, ids: list[int], turns: Sequence[Turn]) -> Sample:
        """A conversation from the ids of its first question on."""
        is_target = [False] * len(ids)
        for number, turn in enumerate(turns):
            # The answer before has ended already.
            asking = self.prompt.follow_up(turn.question)[self._num_ending :] if number else []
            answer = [*self.ids(turn.answer if self.prompt.has_template else f" {turn.answer}"), self.end]
            ids += asking + answer
            is_target += [False] * len(asking) + [True] * len(answer)
        return Sample(torch.tensor(ids, dtype=torch.long), torch.tensor(is_target))


def _num_ending(following: Sequence[int], tokenizer: Any) -> int:
    """How many of the ids that follow an answer end it: a mark, or (as in Llama 2) a blank and the end of text; 0 if none do."""
    if following[0] in _marks(tokenizer):
        return 1
    for place, number in enumerate(following):
        if number == tokenizer.eos_token_id:
            return place + 1
        if tokenizer.decode([number]).strip():
            break
    return 0


def _marks(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
