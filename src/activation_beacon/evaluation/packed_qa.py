"""Questions on contexts packed long: the passage that answers stands among others, and is asked about afterwards."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from activation_beacon.data.sources import OnError, ReadReport, questions
from activation_beacon.errors import InputError
from activation_beacon.evaluation.documents import told_apart
from activation_beacon.evaluation.samples import SLACK, Question, Sample, TooShort
from activation_beacon.prompts import ChatPrompt

logger = logging.getLogger(__name__)

GAP = "\n\n"
QUESTIONS = 3  # on one context
MAX_NEW_TOKENS = {"token_f1": 48, "rouge_l": 160}
LONG_ANSWER = 30  # words from which on an answer is a summary


@dataclass(frozen=True)
class Passage:
    """A context with the questions that it answers."""

    id: str
    context: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def read_passages(
    sources: Sequence[str | Path], *, on_error: OnError = "stop", report: ReadReport | None = None
) -> list[Passage]:
    """Passages of questions on contexts, as `data.sources.questions` reads them.

    Equal contexts become one; equal ids are told apart.

    Args:
        sources: where they stand.
        on_error: what becomes of a record that is no question.
        report: counts are added to it, and the caller tells them; without one, what was left out is logged.

    Raises:
        StorageError, FileFormatError, InputError: as `data.sources.questions` does.
    """
    counts = ReadReport() if report is None else report
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    names: dict[str, str] = {}
    for question in questions(sources, on_error=on_error, report=counts):
        if not question.context:
            counts.skip("without context", question.id)
            continue
        names.setdefault(question.context, question.id)
        found.setdefault(question.context, []).append((question.question, question.answers))
    if report is None and counts.skipped:
        logger.warning("Questions: %s", counts.summary())
    apart = told_apart(names[context] for context in found)
    return [Passage(name, context, tuple(asked)) for name, (context, asked) in zip(apart, found.items(), strict=True)]


def packed_samples(prompt: ChatPrompt, passages: Sequence[Passage], length: int, *, seed: int = 0) -> Iterator[Sample]:
    """One sample for each passage that fits: it stands at a random place among passages that fill up the length.

    Args:
        prompt: of the tokenizer.
        passages: each is asked about once, and fills up other samples.
        length: tokens of context, question and answer together.
        seed: of order and places.

    Raises:
        InputError: without passages, or if none of them fits.
    """
    if not passages:
        raise InputError(
            "There is no passage with a context to ask about. Give records with context, question and answer."
        )
    order = random.Random(seed).sample(range(len(passages)), len(passages))
    sizes = [len(ids) for ids in prompt.ids_of_texts([passage.context for passage in passages])]
    least = []
    for index in order:
        asked = [_question(*each) for each in passages[index].questions[:QUESTIONS]]
        longest = max(len(prompt.question(each.text)) + each.max_new_tokens for each in asked)
        room = length - longest - len(prompt.opening("")) - SLACK
        least.append(length - room + sizes[index])
        if sizes[index] <= room:
            chosen = _filled(
                sizes, index, room, len(prompt.ids_of_texts([GAP])[0]) + 1, random.Random(f"{seed} {length} {index}")
            )
            context = GAP.join(passages[each].context for each in chosen)
            depth = chosen.index(index) / max(1, len(chosen) - 1)
            facts = {"place": round(depth, 3), "passages": len(chosen)}
            yield Sample(passages[index].id, context, tuple(asked), facts=facts)
    if min(least) > length:
        raise TooShort(length, min(least))


def _filled(sizes: Sequence[int], index: int, room: int, gap: int, rng: random.Random) -> list[int]:
    """The passage and as many others as fit, in random order."""
    room -= sizes[index]
    chosen = []
    for other in rng.sample(range(len(sizes)), len(sizes)):
        if other != index and sizes[other] + gap <= room:
            chosen.append(other)
            room -= sizes[other] + gap
    chosen.insert(rng.randint(0, len(chosen)), index)
    return chosen


def _question(text: str, answers: tuple[str, ...]) -> Question:
    """Long answers are summaries and are measured by ROUGE-L, others by the words that they share."""
    words = sum(len(answer.split()) for answer in answers) / len(answers)
    score = "rouge_l" if words >= LONG_ANSWER else "token_f1"
    return Question(text, answers, score, MAX_NEW_TOKENS[score])
