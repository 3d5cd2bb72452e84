"""Answers that a JSON schema allows: llguidance says which tokens may come next, all others are left out."""

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import LogitsProcessor

from activation_beacon.errors import InputError, UnsupportedError, reason
from activation_beacon.json_schema import refused, schema_text
from activation_beacon.row_ends import end_ids

# B batch · T tokens · V vocabulary

TRIED = 3  # tokens of an answer that are written before a schema is taken: what allows too much shows itself at once
# Written on one line, as models write it by themselves: a model that may put in blanks where it likes may do so without end.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes grammars for the answers of one model; safe in any thread.

    Args:
        tokenizer: of the base model.
        num_tokens: V, logits that a token is chosen among.
        ends: tokens that end an answer.

    Attributes:
        ends: those that the tokenizer has; its own where the model names none of them.
    """

    def __init__(self, tokenizer: Any, num_tokens: int, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        own = getattr(tokenizer, "eos_token_id", None)
        known = [token for token in sorted(ends) if token < min(num_tokens, len(tokenizer))]
        self.ends = known or ([] if own is None else [own])
        self._lock = threading.Lock()
        self._known: Any = None

    def of_schema(self, schema: Mapping[str, Any]) -> "Matcher":
        """What a JSON schema allows: follows an answer that has not begun, and is copied for each.

        What takes time is done here, not while an answer is written.

        Raises:
            UnsupportedError: if llguidance is not installed, or cannot read this tokenizer.
            InputError: for a schema that it cannot serve, with the reason.
        """
        text, known = schema_text(schema), self._vocabulary()
        from llguidance import LLMatcher

        with _telling("served"):
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT)
            if wrong := LLMatcher.validate_grammar(grammar, known):
                raise refused(_short(wrong))
            first = Matcher(LLMatcher(known, grammar, log_level=0), self._num_tokens)
        trial, scores = first.copy(), torch.zeros(self._num_tokens)
        for _ in range(TRIED):
            if trial.is_finished:
                break
            trial.add(int(trial.masked(scores).argmax()))
        return first

    def _vocabulary(self) -> Any:
        """What llguidance knows of the tokenizer; found out once, in a second or so."""
        with self._lock:
            if self._known is None:
                try:
                    self._known = self._made()
                except UnsupportedError as error:
                    self._known = error
            if isinstance(self._known, UnsupportedError):
                raise self._known
            return self._known

    def _made(self) -> Any:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise UnsupportedError(
                "Answers in JSON need llguidance, which is not installed here: pip install llguidance."
            ) from error
        if not self.ends or not getattr(self._tokenizer, "is_fast", False):
            raise UnsupportedError(
                "Answers in JSON need a fast tokenizer and a token that ends an answer; this model has not both. Leave the format out."
            )
        try:
            return from_tokenizer(
                self._tokenizer, n_vocab=max(self._num_tokens, len(self._tokenizer)), eos_token=self.ends
            )
        except Exception as error:
            raise UnsupportedError(
                f"llguidance cannot read the model's tokenizer, so it answers in no format: {reason(error)}. Leave the format out."
            ) from error


class Matcher:
    """Follows one answer, token by token.

    Args:
        matcher: llguidance's.
        num_tokens: V.
    """

    def __init__(self, matcher: Any, num_tokens: int) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (V,) of the tokens that may come next, minus infinity for all others.

        Raises:
            InputError: if llguidance has given up, as on a schema that allows too much at once.
        """
        with _telling("kept to"):
            octets = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = octets[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        return logits.masked_fill(bits.flatten()[: self._num_tokens] == 0, -torch.inf)

    def add(self, token: int) -> None:
        """Go on with a token that was allowed."""
        with _telling("kept to"):
            self._matcher.consume_token(token)
        self._check()

    def allows(self, token: int) -> bool:
        """Whether it may come next."""
        return bool(self._matcher.validate_tokens([token]))

    def copy(self) -> "Matcher":
        """One that has followed the same tokens and goes on by itself."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end may follow, or the end has come."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refused(_short(self._matcher.get_error()), "kept to")


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turns whatever llguidance raises into an error of ours; it is written in Rust, whose panics are no `Exception`."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise refused(_short(str(error)), what) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise refused("llguidance has failed on it", what) from error


def _short(told: str) -> str:
    """In one line, without what llguidance adds for its makers: states, options, and the answer so far."""
    return " ".join(told.split("<state>")[0].split(" Enable '")[0].split())[:300].rstrip(". ")


class SchemaLogitsProcessor(LogitsProcessor):
    """Keeps the answers of one call of `generate` to a JSON schema; beams and several answers each follow it by themselves.

    Args:
        model: that answers.
        tokenizer: its.
        schema: what an answer may be; `{"type": "object"}` is any object.

    Raises:
        UnsupportedError: if llguidance is not installed, or cannot read this tokenizer.
        InputError: for a schema that cannot be served.
    """

    def __init__(self, model: Any, tokenizer: Any, schema: Mapping[str, Any]) -> None:
        ends = end_ids(model.generation_config.eos_token_id)
        grammars = Grammars(tokenizer, model.get_input_embeddings().weight.shape[0], ends)
        self._first = grammars.of_schema(schema)
        self._ends = grammars.ends
        self._start: int | None = None
        # By what has been written; None where it is not allowed.
        self._followed: dict[tuple[int, ...], Matcher | None] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) of what may follow ids (B, T), minus infinity for everything else."""
        if self._start is None:
            self._start = input_ids.shape[1]
            self._followed = {(): self._first}
        written = [tuple(row) for row in input_ids[:, self._start :].tolist()]
        self._followed = {row: self._after(row) for row in set(written)}
        return torch.stack([self._masked(row, each) for row, each in zip(written, scores, strict=True)])

    def _after(self, written: tuple[int, ...]) -> Matcher | None:
        matcher = self._followed[written[:-1]]
        if not written or matcher is None or matcher.is_finished:  # behind an end there is padding
            return matcher
        if not matcher.allows(written[-1]):  # beams are filled up with what cannot win, where few tokens are left
            return None
        matcher = matcher.copy()
        matcher.add(written[-1])
        return matcher

    def _masked(self, written: tuple[int, ...], scores: torch.Tensor) -> torch.Tensor:
        matcher = self._followed[written]
        if matcher is None:
            return scores
        if not matcher.is_finished:
            return matcher.masked(scores.cpu()).to(scores.device)
        is_end = torch.zeros_like(scores, dtype=torch.bool)
        is_end[self._ends] = True
        return scores.masked_fill(~is_end, -torch.inf)
