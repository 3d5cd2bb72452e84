"""Answers, written while they come: what `ask`, `chat` and `demo` share."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from activation_beacon.cli.models import Loaded

if TYPE_CHECKING:
    from activation_beacon.cache import BeaconCache

LEAST_REPEATED = 32  # tokens
Write = Callable[[str], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Options of `generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "temperature": self.temperature}


@dataclass(frozen=True)
class Answer:
    """An answer and where it leaves the context.

    Attributes:
        text: without special tokens.
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
    context: "BeaconCache"
    unread: list[int]
    is_repeating: bool = False


def answer(
    loaded: Loaded,
    context: "BeaconCache",
    ids: Sequence[int],
    sampling: Sampling,
    *,
    write: Write | None = None,
    should_stop: ShouldStop | None = None,
) -> Answer:
    """Answer `ids` on a context, which stays as it was.

    Args:
        loaded: the model.
        context: what was read before; may be empty.
        ids: the question, as tokens that follow the context.
        sampling: how to generate.
        write: called with each piece of the answer as it comes.
        should_stop: asked after each token.

    Raises:
        CapacityError: if question and answer do not fit.
    """
    import torch
    import transformers

    if sampling.seed is not None:
        transformers.set_seed(sampling.seed)
    model = loaded.model
    options = sampling.options()
    if write is not None:
        options["streamer"] = _streamer(loaded.tokenizer, write)
    repetition = Repetition(len(ids))
    criteria = [repetition] if sampling.temperature == 0 else []
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
    num_read = grown.tokens_seen - context.tokens_seen - len(ids)
    is_complete = bool(written) and written[-1] in _end_ids(loaded)
    return Answer(
        text=loaded.tokenizer.decode(written, skip_special_tokens=True).strip(),
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

    def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        """Whether to stop, for each row."""
        import torch

        self.is_found = is_circle(input_ids[0, self.start :].tolist())
        return torch.full((input_ids.shape[0],), self.is_found, device=input_ids.device)


def is_circle(ids: Sequence[int]) -> bool:
    """Whether ids end with the same run three times over, and with enough tokens of it to be no list or rhyme."""
    for period in range(1, len(ids) // 3 + 1):
        length = max(3 * period, LEAST_REPEATED)
        if length <= len(ids) and all(ids[-place] == ids[-place - period] for place in range(1, length - period + 1)):
            return True
    return False


def _end_ids(loaded: Loaded) -> set[int]:
    ends = loaded.model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _streamer(tokenizer: Any, write: Write) -> Any:
    from transformers import TextStreamer

    class WritingStreamer(TextStreamer):
        """Hands finished pieces of text to `write` instead of printing them."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002 - transformers' own
            if text:
                write(text)

    return WritingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _stopping(should_stop: ShouldStop) -> Any:
    import torch

    def criteria(input_ids: Any, _scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), should_stop(), device=input_ids.device)

    return criteria
