"""Questions and answers in words on a compressed context that grows with them: nothing is read twice."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from activation_beacon.base_models import max_positions
from activation_beacon.cache import BeaconCache
from activation_beacon.errors import InputError
from activation_beacon.prompts import ChatPrompt
from activation_beacon.row_ends import end_ids

DEFAULTS = {"max_new_tokens": 256, "do_sample": False}  # of an answer, where nobody says otherwise
LEAST_REPEATED = 32  # tokens
Write = Callable[[str], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Answer:
    """An answer and where it leaves the context.

    Attributes:
        text: without special tokens; `str(answer)` too.
        num_tokens: tokens generated.
        seconds: for reading the question and writing the answer.
        is_complete: whether the model ended it, rather than a limit or the user.
        context: the context, grown by the question and the answer.
        unread: ids at the answer's end that the context has not seen yet; an end-of-text token is left out.
        is_repeating: whether it was ended because it had begun to say the same again and again.
    """

    text: str
    num_tokens: int
    seconds: float
    is_complete: bool
    context: BeaconCache
    unread: list[int]
    is_repeating: bool = False

    def __str__(self) -> str:
        return self.text


class Conversation:
    """A conversation with a model, about a compressed text or about anything.

    Args:
        model: with beacons attached.
        tokenizer: of its base model.
        context: one text, compressed from `ChatPrompt.opening`, or what another conversation has left; stays as it was.
            None for a conversation about nothing in particular.
        prompt: how messages are put into ids; by default the tokenizer's chat template.

    Attributes:
        context: what has been read so far.
        unread: ids at the end of the last answer that the context has not seen.
        num_turns: questions answered.

    Raises:
        InputError: if the context is a batch, or does not open with the chat template.
        MismatchError: if another base model or adapter made it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, context: BeaconCache | None = None, *, prompt: ChatPrompt | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompt = prompt or ChatPrompt(tokenizer)
        self._start = model.new_cache() if context is None else context
        if self._start.batch_size != 1:
            raise InputError(
                f"A conversation is about one context; this is a batch of {self._start.batch_size}. "
                "Use one of them: context.row(0)."
            )
        model.check_context(self._start)
        self.reset()
        self._question_ids("")

    def reset(self) -> None:
        """Back to where it began."""
        self.context: BeaconCache = self._start.fork()
        self.unread: list[int] = []
        self.num_turns = 0

    def ask(
        self, text: str, *, write: Write | None = None, should_stop: ShouldStop | None = None, **options: Any
    ) -> Answer:
        """Answer the next message; if that fails, the conversation stays as it was.

        Args:
            text: of the message.
            write: is called with each piece of the answer as it comes.
            should_stop: is asked after each token.
            options: of `generate`, such as `max_new_tokens` (256) or `do_sample` (False).

        Raises:
            InputError: if the message is longer than what the base model reads at once.
            CapacityError: if message and answer do not fit.
        """
        ids = self._question_ids(text)
        reply = answer(
            self.model, self.tokenizer, self.context, ids, write=write, should_stop=should_stop, **options
        )  # fmt: skip
        self.context, self.unread = reply.context, reply.unread
        self.num_turns += 1
        return reply

    def whole_context(self) -> BeaconCache:
        """All that has been said, the last answer to its end: to be saved, and gone on from in another conversation."""
        context = self.context.fork()
        if self.unread:
            self.model.compress([self.unread], cache=context)
        return context

    def _question_ids(self, text: str) -> list[int]:
        if not self.num_turns:
            return question_ids(self.model, self.prompt, self.context, text)
        ids = [*self.unread, *self.prompt.follow_up(text)]
        check_question_fits(self.model, ids)
        return ids


def question_ids(
    model: Any, prompt: ChatPrompt, context: BeaconCache, text: str, *, is_plain: bool = False
) -> list[int]:
    """Ids that ask on from where a context stands: in an open message, after an answer, or at no message at all.

    Args:
        model: with beacons attached.
        prompt: of its tokenizer.
        context: what has been read.
        text: of the question.
        is_plain: whether it follows the text as it is, without a chat template.

    Raises:
        InputError: if the context does not open with the chat template and `is_plain` is not asked for, or if the ids are
            more than the base model reads at once.
    """
    if is_plain:
        ids = prompt.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    elif not context.token_ids.numel():
        ids = prompt.message(text)
    elif not prompt.opens(context.token_ids[0].tolist()):
        raise InputError(
            "The context does not open with this model's chat template (it was compressed with --plain, or without "
            "ChatPrompt.opening). Ask with --plain: the question then follows the text as it is."
        )
    else:
        ids = prompt.follow_up(text) if prompt.is_in_answer(context.token_ids[0].tolist()) else prompt.question(text)
    check_question_fits(model, ids)
    return ids


def check_question_fits(model: Any, ids: Sequence[int]) -> None:
    """Refuse a question that is longer than what the base model reads at once.

    Raises:
        InputError: with both numbers.
    """
    longest = max_positions(model)
    if longest is not None and len(ids) > longest:
        raise InputError(
            f"The question has {len(ids):,} tokens; the base model reads {longest:,} at once. Put what is long "
            "into a text, compress it (beacon compress TEXT... -o FILE), and ask about it in fewer words."
        )


def answer(
    model: Any,
    tokenizer: Any,
    context: BeaconCache,
    ids: Sequence[int],
    *,
    write: Write | None = None,
    should_stop: ShouldStop | None = None,
    **options: Any,
) -> Answer:
    """Answer `ids` on a context, which stays as it was.

    The likeliest tokens can go round in a circle, which they do not leave: such an answer is ended.

    Args:
        model: with beacons attached.
        tokenizer: of its base model.
        context: what was read before; may be empty.
        ids: the question, as tokens that follow the context.
        write: is called with each piece of the answer as it comes.
        should_stop: is asked after each token.
        options: of `generate`; what neither they nor their `generation_config` name is as in `DEFAULTS`. With beams, question
            and answer are read once more: their cache holds all beams.

    Raises:
        InputError: for `num_return_sequences`: there is one answer.
        CapacityError: if question and answer do not fit.
    """
    config = options.get("generation_config")
    options = {name: value for name, value in DEFAULTS.items() if getattr(config, name, None) is None} | options
    option = model.generation_option(config, options)
    if (option("num_return_sequences") or 1) > 1:
        raise InputError(
            f"A question has one answer to go on from; got num_return_sequences={option('num_return_sequences')}. "
            "Leave it out, or use model.generate."
        )
    if write is not None:
        options["streamer"] = _streamer(tokenizer, write)
    repetition = Repetition(len(ids))
    criteria = [*options.pop("stopping_criteria", ())]
    criteria += [] if option("do_sample") else [repetition]
    criteria += [] if should_stop is None else [_stopping(should_stop)]
    options["stopping_criteria"] = transformers.StoppingCriteriaList(criteria)
    prompt = torch.tensor([list(ids)], device=model.device)
    start = time.perf_counter()
    output = model.generate(
        prompt, context=context, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **options
    )
    seconds = time.perf_counter() - start
    written = output.sequences[0, len(ids) :].tolist()
    grown = output.past_key_values
    if grown.batch_size > 1:
        grown = model.compress([[*ids, *written[:-1]]], cache=context.fork())
    num_read = grown.tokens_seen - context.tokens_seen - len(ids)
    is_complete = bool(written) and written[-1] in end_ids(option("eos_token_id"))
    return Answer(
        text=tokenizer.decode(written, skip_special_tokens=True).strip(),
        num_tokens=len(written),
        seconds=seconds,
        is_complete=is_complete,
        context=grown,
        unread=written[num_read : len(written) - is_complete],
        is_repeating=repetition.is_found,
    )


class Repetition:
    """A stopping criterion for the likeliest tokens: once they go round in a circle, they do not leave it.

    Args:
        start: tokens before the answer.

    Attributes:
        is_found: whether the answer has ended in a circle.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.is_found = False

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Whether to stop, for each row."""
        self.is_found = is_circle(input_ids[0, self.start :].tolist())
        return torch.full((input_ids.shape[0],), self.is_found, device=input_ids.device)


def is_circle(ids: Sequence[int]) -> bool:
    """Whether ids end with the same run three times over, and with enough tokens of it to be no list or rhyme."""
    for period in range(1, len(ids) // 3 + 1):
        length = max(3 * period, LEAST_REPEATED)
        if length <= len(ids) and all(ids[-place] == ids[-place - period] for place in range(1, length - period + 1)):
            return True
    return False


def _streamer(tokenizer: Any, write: Write) -> transformers.TextStreamer:
    class WritingStreamer(transformers.TextStreamer):
        """Hands finished pieces of text to `write` instead of printing them."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002 - transformers' own
            if text:
                write(text)

    return WritingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _stopping(should_stop: ShouldStop) -> Callable[..., torch.Tensor]:
    def criteria(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), should_stop(), device=input_ids.device)

    return criteria
