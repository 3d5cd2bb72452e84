"""A context and the questions asked on it, and what came of asking them: the form that all tasks with answers share."""

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from activation_beacon.answer_scores import SCORES
from activation_beacon.errors import InputError
from activation_beacon.evaluation.contexts import Context
from activation_beacon.evaluation.documents import prefix_ids
from activation_beacon.evaluation.methods import read_context
from activation_beacon.prompts import ChatPrompt
from activation_beacon.ratios import Ratio


class TooShort(InputError):  # noqa: N818 - the length is
    """A length that has no room for a sample.

    Args:
        length: asked for.
        least: that this sample needs.
    """

    def __init__(self, length: int, least: int) -> None:
        super().__init__(
            f"A length of {length} tokens has no room for template, question, answer and some text: this sample needs {least}. "
            "Use a longer length."
        )
        self.least = least


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: as a user asks it.
        references: right answers, each as good as the others (all wanted, with the score "contains_share").
        score: a key of `answer_scores.SCORES`.
        max_new_tokens: tokens of an answer at most.
    """

    text: str
    references: tuple[str, ...]
    score: str = "contains"
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Sample:
    """One context with its questions.

    Attributes:
        id: among the samples of one task and length.
        context: the document.
        questions: asked after the document has been read.
        is_conversation: whether each question follows the answer before it; otherwise each is asked on the context alone.
        is_plain: whether context and question follow one another as they are, without a chat template; there is one
            question then.
        facts: what the report groups by, such as depth or kind.
    """

    id: str
    context: str
    questions: tuple[Question, ...]
    is_conversation: bool = False
    is_plain: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


def answer_sample(
    model: Any,
    prompt: ChatPrompt,
    sample: Sample,
    method: str,
    *,
    ratio: Ratio | None = None,
    context: str | None = None,
) -> dict[str, Any]:
    """Read the context in one way, once, and ask every question on it.

    Args:
        model: with beacons attached.
        prompt: of its tokenizer.
        sample: what to read and to ask.
        method: a key of `methods.METHODS`.
        ratio: where the method has one.
        context: a document to be read in place of the sample's own (another's, to see scores drop to chance).

    Returns:
        Plain values: `score` (the mean over questions), `scores`, `answers`, sizes and seconds, and the sample's facts.
    """
    ids, opening, asked = asked_ids(prompt, sample, context)
    held = read_context(model, ids, method, ratio=ratio, opening=opening)
    answers, seconds = _ask_all(held, sample, asked)
    sizes = {"cache_length": held.cache_length, "cache_bytes": held.cache_bytes}
    times = {"read_seconds": round(held.seconds, 3), "answer_seconds": [round(each, 3) for each in seconds]}
    return {**scored(prompt, sample, answers), "context_tokens": len(ids), **sizes, **times}


def asked_ids(prompt: ChatPrompt, sample: Sample, context: str | None = None) -> tuple[list[int], int, list[list[int]]]:
    """Ids of the context, how many of them stand before its text, and ids of each question that follows.

    What stands before the text opens the chat template; without one it is what the tokenizer puts before every text.

    Args:
        prompt: of the tokenizer.
        sample: what to read and to ask.
        context: to be read in place of the sample's own.
    """
    document = sample.context if context is None else context
    if sample.is_plain:
        ids, asked = split_ids(prompt.tokenizer, document, sample.questions[0].text)
        return ids, min(len(ids), len(prefix_ids(prompt.tokenizer))), [asked]
    return prompt.opening(document), len(prompt.opening("")), _question_ids(prompt, sample)


def scored(prompt: ChatPrompt, sample: Sample, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Answers as text, their scores and the sample's facts."""
    texts = [str(prompt.tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in answers]
    pairs = zip(texts, sample.questions, strict=True)
    scores = [SCORES[question.score](text, question.references) for text, question in pairs]
    return {
        "score": sum(scores) / len(scores),
        "scores": scores,
        "answers": texts,
        "is_conversation": sample.is_conversation,
        **sample.facts,
    }


def split_ids(tokenizer: Any, context: str, question: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it; together those of both texts in one, special tokens in front.

    Where the last tokens of the context run into the question, they are part of the question.
    """
    whole: list[int] = tokenizer(context + question, verbose=False)["input_ids"]
    alone: list[int] = tokenizer(context, verbose=False)["input_ids"]
    pairs = zip(whole, alone, strict=False)
    common = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(whole), len(alone)))
    return whole[:common], whole[common:]


def _question_ids(prompt: ChatPrompt, sample: Sample) -> list[list[int]]:
    """What each question comes as: closing the message that the document opens, or following the answer before it."""
    return [
        prompt.follow_up(question.text) if number and sample.is_conversation else prompt.question(question.text)
        for number, question in enumerate(sample.questions)
    ]


def _ask_all(held: Context, sample: Sample, asked: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[float]]:
    answers, seconds, now = [], [], held
    for ids, question in zip(asked, sample.questions, strict=True):
        start = time.perf_counter()
        answer, grown = now.ask(ids, max_new_tokens=question.max_new_tokens)
        now = grown if sample.is_conversation else held
        answers.append(answer)
        seconds.append(time.perf_counter() - start)
    return answers, seconds


def fitted(
    prompt: ChatPrompt,
    ids: Sequence[int],
    length: int,
    questions: Sequence[Question],
    extra: str = "",
    *,
    num_words: int = 1,
) -> str:
    """As much of a background (ids) as leaves room within `length` tokens for template, questions and answers.

    Args:
        prompt: of the tokenizer.
        ids: the background, as plain tokens.
        length: tokens that context, question and answer may have together.
        questions: that will be asked.
        extra: text that will be put into the background.
        num_words: of the background at least.

    Raises:
        TooShort: if so many words find no room.
    """
    asked = sum(len(prompt.question(question.text)) + question.max_new_tokens for question in questions)
    overhead = len(prompt.opening(extra)) + asked + SLACK

    def text(num_tokens: int) -> str:
        return str(prompt.tokenizer.decode(list(ids[:num_tokens]), skip_special_tokens=True))

    found = text(max(0, length - overhead))
    if len(found.split()) < num_words:
        enough = bisect_left(range(len(ids) + 1), num_words, key=lambda count: len(text(count).split()))
        raise TooShort(length, overhead + enough)
    return found


SLACK = 8  # tokens by which a text may grow where something is put into it
