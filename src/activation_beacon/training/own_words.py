"""Questions that the base model has answered in its own words: what keeps beacons from teaching it another manner.

Answers of question sets are a word or two, and a model that reads beacons trained on these alone opens its answers as nobody
asked it to. So the base answers itself, on passages short enough for it to answer rightly; what it gets wrong, or does not
end, is left out. `training.questions` then packs the passages into long texts.
"""

import contextlib
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from activation_beacon.answer_scores import contains_whole, token_f1
from activation_beacon.base_models import max_positions
from activation_beacon.data.hiding import hide
from activation_beacon.data.sources import Question
from activation_beacon.errors import ConfigError, InputError
from activation_beacon.files import write_text
from activation_beacon.json_lines import append_lines, read_lines
from activation_beacon.processes import Processes
from activation_beacon.prompts import ChatPrompt
from activation_beacon.row_ends import end_ids
from activation_beacon.training.needle_words import KINDS
from activation_beacon.training.needles import make_needle

# B prompts · T tokens of the longest

PASSAGE = (300, 900)  # characters of a document that a needle is hidden in
LEAST_CHARACTERS = 2000  # of a document that passages are cut from
MOST_DOCUMENTS = 250
RIGHT = 0.5  # token F1 from which on an answer counts as right
SORTED_BATCHES = 6  # batches whose prompts are sorted by length together

Progress = Callable[[int, int, str], None]


class Asked(NamedTuple):
    """A question, and what it counts as: "questions", or a kind of needle."""

    kind: str
    question: Question


@dataclass(frozen=True)
class Counts:
    """What became of the questions.

    Attributes:
        asked: all of them.
        kept: answered rightly, and ended.
        unended: answers that did not end within the tokens that they had.
        wrong: answers without what was expected.
        too_long: prompts that do not fit the base's positions with an answer, and were not asked.
        kinds: asked and kept of each kind.
    """

    asked: int
    kept: int
    unended: int
    wrong: int
    too_long: int
    kinds: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "kinds": {kind: list(counts) for kind, counts in self.kinds.items()}}


# --- what is asked -----------------------------------------------------------------------------------------------------


def needle_questions(texts: Iterable[str], count: int, *, kinds: Sequence[str] = KINDS, seed: int = 0) -> list[Asked]:
    """Questions on needles, each in a short passage of a document.

    Args:
        texts: documents; those of fewer than 2,000 characters are passed over, and 250 are enough.
        count: of questions.
        kinds: of needles, as `make_needle` knows them.
        seed: of passages and needles.

    Raises:
        ConfigError: for an unknown kind.
        InputError: if no document is long enough.
    """
    for kind in kinds:
        make_needle(kind, random.Random(0))
    long: list[str] = []
    for text in texts if count else ():
        if len(text) >= LEAST_CHARACTERS:
            long.append(text)
        if len(long) == MOST_DOCUMENTS:
            break
    if count and not long:
        raise InputError(f"No document has {LEAST_CHARACTERS:,} characters to hide needles in. Name longer texts.")
    return [_needle_question(number, long, kinds, random.Random(f"{seed} {number}")) for number in range(count)]


def _needle_question(number: int, texts: Sequence[str], kinds: Sequence[str], rng: random.Random) -> Asked:
    kind = rng.choice(kinds)
    needle = make_needle(kind, rng)
    passage = _passage(rng.choice(texts), rng)
    for statement in (needle.statement, *needle.others):
        passage = hide(passage, statement, rng.random())
    question = Question(f"needle-{number}", passage, needle.question, needle.answer, (needle.answer,))
    return Asked(f"needles: {kind}", question)


def _passage(text: str, rng: random.Random) -> str:
    """Some hundred characters of a text, whole words where it has such."""
    start = rng.randrange(len(text) - PASSAGE[1])
    start = text.find(" ", start, start + PASSAGE[0]) + 1 or start
    return text[start : start + rng.randint(*PASSAGE)].rsplit(" ", 1)[0].strip()


def short_questions(
    questions: Iterable[Question], *, max_words: int, limit: int | None = None, seed: int = 0
) -> list[Asked]:
    """Those on passages of `max_words` words at most (and on some passage), `limit` of them drawn at random."""
    found = [Asked("questions", each) for each in questions if 0 < len(each.context.split()) <= max_words]
    random.Random(seed).shuffle(found)
    return found[:limit]


# --- answers -----------------------------------------------------------------------------------------------------------


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer holds a reference, whole words of it, or has most words in common with one."""
    return bool(contains_whole(answer, references)) or token_f1(answer, references) >= RIGHT


class BaseAnswers:
    """The base's answers, greedily decoded in batches of prompts that are padded on their left.

    Args:
        model: the base, or one with beacons, which are not used.
        tokenizer: of it.
        batch_size: prompts answered together.
        max_new_tokens: of an answer.

    Raises:
        ConfigError: if nothing says what ends an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16, max_new_tokens: int = 48) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.ends = _end_ids(model, tokenizer)
        self._prompt = ChatPrompt(tokenizer)

    def prompt_ids(self, question: Question) -> list[int]:
        """Ids of the passage, the question and the opening of its answer, as chats with the model have them."""
        if not question.context:
            return self._prompt.message(question.question)
        return self._prompt.opening(question.context) + self._prompt.question(question.question)

    def fits(self, question: Question) -> bool:
        """Whether the base has positions for the prompt and its answer."""
        most = max_positions(self.model)
        return most is None or len(self.prompt_ids(question)) + self.max_new_tokens <= most

    def batch(self, questions: Sequence[Question]) -> list[str | None]:
        """The answer to each question, None where it does not end."""
        rows = [self.prompt_ids(question) for question in questions]
        width = max(map(len, rows))
        padding = min(self.ends)
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=self.model.device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        disabled = getattr(self.model, "beacon_disabled", contextlib.nullcontext)
        with disabled(), torch.inference_mode():
            made = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=self.max_new_tokens, do_sample=False,
                eos_token_id=sorted(self.ends), pad_token_id=padding,
            )  # fmt: skip
        return [self._text(row) for row in made[:, width:].tolist()]

    def _text(self, ids: list[int]) -> str | None:
        stop = next((place for place, each in enumerate(ids) if each in self.ends), None)
        return None if stop is None else self.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer."""
    ends = end_ids(getattr(model.generation_config, "eos_token_id", None)) | end_ids(tokenizer.eos_token_id)
    if not ends:
        raise ConfigError(
            "Neither the base model nor its tokenizer says which token ends an answer. Set eos_token_id in its "
            "generation_config.json."
        )
    return ends


# --- the file ----------------------------------------------------------------------------------------------------------


def write_own_words(
    answers: BaseAnswers,
    asked: Sequence[Asked],
    target: Path,
    *,
    group: Processes | None = None,
    progress: Progress | None = None,
) -> Counts:
    """Have all questions answered, and write those that are answered rightly: records for `training.questions`.

    What is answered is kept in files beside the target until all is; a call that was cut goes on where it stood.

    Args:
        answers: of the base.
        asked: questions on short passages.
        target: JSON Lines of "context", "question", "answer" (the base's), "answers" (with the references).
        group: the processes that answer together.
        progress: called with the questions answered, those there are for this process, and what is being done.

    Raises:
        InputError: without questions that fit, or if none is answered rightly; nothing is written or kept then.
        ConfigError: if the files beside the target are of other questions.
        StorageError: if something cannot be written.
    """
    fitting = [each for each in asked if answers.fits(each.question)]
    if not fitting:
        raise InputError(
            f"There are no questions to answer ({len(asked):,} do not fit the base's positions). Name some on short passages, "
            "or texts to hide needles in."
        )
    questions = [each.question for each in fitting]
    group = group or Processes()
    parts = _Parts(target, _digest(answers, questions))
    with group.first_before_others():
        done = parts.read()
    group.barrier()  # nobody writes while others read
    mine = [number for number in range(len(questions)) if group.takes(number)]
    left = [number for number in mine if number not in done]
    count = len(mine) - len(left)
    for numbers in _batches(left, answers, questions):
        if progress is not None:
            progress(count, len(mine), "answering")
        made = answers.batch([questions[number] for number in numbers])
        parts.add(group.rank, zip(numbers, made, strict=True))
        count += len(numbers)
    if progress is not None:
        progress(len(mine), len(mine), "answering")
    group.barrier()
    given = parts.read()
    group.barrier()  # nobody removes what others read
    counts, records = _judged(fitting, given, too_long=len(asked) - len(fitting))
    if group.is_first:
        if records:
            write_text(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        parts.remove()
    if not records:
        raise InputError(
            f"The base model answered none of {counts.asked:,} questions rightly ({counts.unended:,} answers did not end). "
            "Use shorter passages, other questions, or more tokens for an answer."
        )
    return counts


def _batches(numbers: Sequence[int], answers: BaseAnswers, questions: Sequence[Question]) -> Iterator[list[int]]:
    """Batches of prompts that are about as long; only neighbours are sorted, so that a call may be cut."""
    size = answers.batch_size
    for start in range(0, len(numbers), size * SORTED_BATCHES):
        block = numbers[start : start + size * SORTED_BATCHES]
        block = sorted(block, key=lambda number: len(answers.prompt_ids(questions[number])))
        yield from (block[first : first + size] for first in range(0, len(block), size))


def _judged(
    asked: Sequence[Asked], given: dict[int, str | None], *, too_long: int
) -> tuple[Counts, list[dict[str, Any]]]:
    """What became of the questions, and records of those that are kept."""
    counted, kept, records = Counter[str](), Counter[str](), []
    for number, (kind, question) in enumerate(asked):
        answer = given[number]
        counted[kind] += 1
        if answer and is_right(answer, question.answers):
            kept[kind] += 1
            records.append({
                "id": question.id, "context": question.context, "question": question.question, "answer": answer,
                "answers": list(dict.fromkeys((answer, *question.answers))),
            })  # fmt: skip
    unended = sum(answer is None for answer in given.values())
    kinds = {kind: (counted[kind], kept[kind]) for kind in counted}
    return Counts(len(asked), len(records), unended, len(asked) - len(records) - unended, too_long, kinds), records


def _digest(answers: BaseAnswers, questions: Sequence[Question]) -> str:
    """What a call that was cut must share with the one that goes on."""
    settings = (answers.model.config.name_or_path, answers.max_new_tokens, [asdict(each) for each in questions])
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


class _Parts:
    """Files beside the target, one for each process: a line that says of what, then lines of number and answer."""

    def __init__(self, target: Path, digest: str) -> None:
        self._target, self._digest = target, digest

    def _paths(self) -> list[Path]:
        return sorted(self._target.parent.glob(f"{self._target.name}.part-*"))

    def read(self) -> dict[int, str | None]:
        """What is answered so far, by any process."""
        found: dict[int, str | None] = {}
        for path in self._paths():
            head, *lines = read_lines(path) or [{"digest": self._digest}]
            if head["digest"] != self._digest:
                raise ConfigError(
                    f"{path} was begun with other questions or settings. Remove it, or choose another --output."
                )
            found.update((number, answer) for number, answer in lines)
        return found

    def add(self, rank: int, answers: Iterable[tuple[int, str | None]]) -> None:
        path = self._target.with_name(f"{self._target.name}.part-{rank}")
        head = [] if path.exists() and path.stat().st_size else [{"digest": self._digest}]
        append_lines(path, [*head, *map(list, answers)])

    def remove(self) -> None:
        for path in self._paths():
            path.unlink()
