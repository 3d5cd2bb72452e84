"""Questions on long contexts: many passages packed into one document, asked about in several turns at its end."""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_beacon.data.data_files import Source
from activation_beacon.data.sources import OnError, Question, ReadReport, questions
from activation_beacon.errors import ConfigError, InputError
from activation_beacon.training.conversations import Conversations, Turn
from activation_beacon.training.sampling import LEAST_CHUNKS, Sample, check_sizes, drawn_length, random_of

GAP = "\n\n"
MOST_TURNS = 4
MEAN_TURNS = 2.5
GAP_TOKENS = 3  # at most, beside a part's own
SLACK = 16  # for what parts have more as a whole
REFERENCE_WORDS = 8
REFERENCE_CHARACTERS = 80
REFERENCE_SHARE = 0.25
TRIES = 200  # passages that are looked at to fill a document up


@dataclass(frozen=True)
class QuestionGroup:
    """A context ("" for none) and the questions on it."""

    context: str
    questions: tuple[Turn, ...]


def read_groups(
    sources: Source | Sequence[Source],
    *,
    exclude: Collection[str] = (),
    on_error: OnError = "skip",
    report: ReadReport | None = None,
) -> list[QuestionGroup]:
    """Read questions; neighbours with the same context are one group, a question without context is one by itself.

    Raises:
        As `sources.questions`.
    """
    found = questions(sources, exclude=exclude, on_error=on_error, report=report)
    numbered = enumerate(found)  # no two questions without context are neighbours
    groups = itertools.groupby(numbered, key=lambda pair: (pair[1].context, 0 if pair[1].context else pair[0]))
    return [_group(context, (question for _, question in members)) for (context, _), members in groups]


def without(groups: Sequence[QuestionGroup], others: Sequence[QuestionGroup]) -> list[QuestionGroup]:
    """Groups but for the questions that the others ask on the same context, whatever the answer; a group needs one at least."""
    asked = {(other.context, turn.question) for other in others for turn in other.questions}
    found = [
        QuestionGroup(group.context, tuple(t for t in group.questions if (group.context, t.question) not in asked))
        for group in groups
    ]
    return [group for group in found if group.questions]


def digest_of(groups: Sequence[QuestionGroup]) -> str:
    """Sixteen hexadecimal digits for all contexts, questions and answers, and their order."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(json.dumps([group.context, *group.questions]).encode())
    return digest.hexdigest()[:16]


def _group(context: str, members: Iterable[Question]) -> QuestionGroup:
    answers: dict[str, str] = {}
    for member in members:
        answers.setdefault(member.question.strip(), member.answer.strip())
    return QuestionGroup(context.strip(), tuple(itertools.starmap(Turn, answers.items())))


@dataclass
class _Pack:
    """What a sample holds: groups whose contexts stand in it, and numbers of the questions that are asked."""

    passages: list[int]
    asked: list[int]


class PackedQuestions:
    """Conversations on packed contexts; an epoch asks every question once.

    A conversation is on one group, of one to four turns; passages of others fill the document up, in random order, and
    questions on them may join in. Where a question is asked of several contexts it names its own by its first words.

    Args:
        groups: contexts and their questions.
        tokenizer: of the base model.
        length: tokens that a sample has at most, in whole chunks.
        chunk_size: of the adapter.
        seed: of all choices.
        standalone_share: conversations at most that are on no passage at all, of questions without context.

    Attributes:
        left_out: number of questions that do not fit the length with their context.

    Raises:
        ConfigError: if the length is no multiple of the chunk or less than two, or the share is out of range.
        InputError: if no context with a question fits, or all together are shorter than two chunks.
    """

    def __init__(
        self,
        groups: Sequence[QuestionGroup],
        tokenizer: Any,
        *,
        length: int,
        chunk_size: int,
        seed: int,
        standalone_share: float = 0.05,
    ) -> None:
        check_sizes(length, chunk_size)
        if not 0 <= standalone_share < 1:
            raise ConfigError(f"standalone_share must be at least 0 and below 1; got {standalone_share}.")
        self.length, self.chunk_size, self.seed = length, chunk_size, seed
        self._conversations = Conversations(tokenizer)
        self._room = length - self._conversations.overhead - SLACK
        self._measure(groups)
        self._choose(groups)
        on_context = sum(map(_num_runs, map(len, self._members)))
        self._num_standalone = min(
            _num_runs(len(self._standalone)), int(on_context * standalone_share / (1 - standalone_share))
        )
        self.epoch_size = on_context + self._num_standalone
        self._asks: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.epoch_size

    def sample(self, index: int) -> Sample:
        """The sample of a number from 0; it goes on beyond an epoch, packed otherwise."""
        epoch, place = divmod(index, self.epoch_size)
        if epoch not in self._asks:
            self._asks = {epoch: self._draw_asks(epoch)}
        generator = random_of(self.seed, epoch, 1, place)
        pack = self._pack(self._asks[epoch][place], index, generator)
        turns = [self._turn(number, refers=generator.random() < REFERENCE_SHARE) for number in pack.asked]
        return self._written(pack, turns)

    # --- once, from the data

    def _measure(self, groups: Sequence[QuestionGroup]) -> None:
        """Count the tokens of contexts and turns, so that samples can be planned in integers."""
        lengths = self._conversations.lengths
        self._contexts = [group.context for group in groups]
        self._turns = [turn for group in groups for turn in group.questions]
        self._group_of = [number for number, group in enumerate(groups) for _ in group.questions]
        self._passage_costs = [cost + GAP_TOKENS for cost in lengths(self._contexts)]
        references = lengths([_reference(context) for context in self._contexts])
        asked = zip(
            lengths([turn.question for turn in self._turns]),
            lengths([turn.answer for turn in self._turns]),
            self._group_of,
            strict=True,
        )
        overhead = self._conversations.turn_overhead + GAP_TOKENS
        self._turn_costs = [question + answer + references[group] + overhead for question, answer, group in asked]
        askers = {(turn.question, group) for turn, group in zip(self._turns, self._group_of, strict=True)}
        spread = Counter(question for question, _ in askers)
        self._is_ambiguous = [spread[turn.question] > 1 for turn in self._turns]

    def _choose(self, groups: Sequence[QuestionGroup]) -> None:
        """Sort out what fits: questions of each context, questions without one, contexts to fill up with."""
        members: list[list[int]] = [[] for _ in groups]
        self._standalone: list[int] = []
        self.left_out = 0
        for number, group in enumerate(self._group_of):
            passage = self._passage_costs[group] if self._contexts[group] else 0
            if passage + self._turn_costs[number] > self._room:
                self.left_out += 1
            else:
                (members[group] if passage else self._standalone).append(number)
        self._members = members
        costs = self._passage_costs
        self._fillers = [n for n, context in enumerate(self._contexts) if context and costs[n] < self._room]
        total = sum(costs[number] for number in self._fillers)
        if not any(members) or total < LEAST_CHUNKS * self.chunk_size:
            raise InputError(
                f"Questions need contexts of {LEAST_CHUNKS * self.chunk_size:,} tokens or more together (two chunks), each with "
                f"its question within {self.length:,}; {len(self._fillers):,} contexts of {total:,} tokens together and "
                f"{sum(map(len, members)):,} of {len(self._turns):,} questions are left. Name more, or raise the length."
            )
        self._smallest = min(costs[number] for number in self._fillers)

    # --- once an epoch

    def _draw_asks(self, epoch: int) -> list[list[int]]:
        """The questions of each conversation of an epoch, in its order."""
        generator = random_of(self.seed, epoch, 0)
        asks = [run for members in self._members for run in _runs(members, generator)]
        if self._num_standalone:
            num_asked = min(len(self._standalone), int(MEAN_TURNS * self._num_standalone))
            asks += _runs(generator.permutation(self._standalone)[:num_asked].tolist(), generator)
        return [asks[place] for place in generator.permutation(len(asks))]

    # --- once a sample

    def _pack(self, asked: Sequence[int], index: int, generator: np.random.Generator) -> _Pack:
        """Choose passages and further questions until the length that this sample is to have is reached."""
        own = self._group_of[asked[0]]
        pack = _Pack([own] if self._contexts[own] else [], list(asked))
        spent = sum(self._passage_costs[group] for group in pack.passages)
        while len(pack.asked) > 1 and spent + sum(self._turn_costs[n] for n in pack.asked) > self._room:
            pack.asked.pop()
        spent += sum(self._turn_costs[number] for number in pack.asked)
        num_turns = int(generator.integers(len(pack.asked), MOST_TURNS + 1))
        for length in (drawn_length(self.length, self.chunk_size, seed=self.seed, index=index), self.length):
            spent += self._fill(pack, self._room - (self.length - length) - spent, num_turns, generator)
            if sum(self._passage_costs[group] - GAP_TOKENS for group in pack.passages) > LEAST_CHUNKS * self.chunk_size:
                break
        generator.shuffle(pack.passages)
        generator.shuffle(pack.asked)
        return pack

    def _fill(self, pack: _Pack, room: int, num_turns: int, generator: np.random.Generator) -> int:
        """Put passages into a pack as long as there is room, and questions on them until there are enough.

        Returns:
            Tokens spent.
        """
        spent = 0
        for place in generator.permutation(len(self._fillers))[:TRIES].tolist():
            if room - spent < self._smallest:
                break
            spent += self._add(pack, self._fillers[place], room - spent, num_turns, generator)
        return spent

    def _add(self, pack: _Pack, group: int, room: int, num_turns: int, generator: np.random.Generator) -> int:
        """Put a passage into a pack, and a question on it where one is due.

        Returns:
            Tokens spent, 0 if it does not fit.
        """
        cost = self._passage_costs[group]
        if group in pack.passages or cost > room:
            return 0
        pack.passages.append(group)
        members = self._members[group]
        if members and len(pack.asked) < num_turns:
            number = members[int(generator.integers(len(members)))]
            if cost + self._turn_costs[number] <= room:
                pack.asked.append(number)
                cost += self._turn_costs[number]
        return cost

    def _turn(self, number: int, *, refers: bool) -> Turn:
        turn, context = self._turns[number], self._contexts[self._group_of[number]]
        if context and (refers or self._is_ambiguous[number]):
            return Turn(_reference(context) + turn.question, turn.answer)
        return turn

    def _written(self, pack: _Pack, turns: Sequence[Turn]) -> Sample:
        """Write a pack; passages that nobody asks about make way if the whole is longer than the sum of its parts."""
        needed = {self._group_of[number] for number in pack.asked}
        spare = [group for group in pack.passages if group not in needed]
        while True:
            document = GAP.join(self._contexts[group] for group in pack.passages)
            sample = self._conversations.sample(document, turns)
            if len(sample.ids) <= self.length:
                return sample
            assert spare, "parts that fit, with slack, make a whole that fits"
            pack.passages.remove(spare.pop())


def _num_runs(num_questions: int) -> int:
    return math.ceil(num_questions / MEAN_TURNS)


def _runs(members: Sequence[int], generator: np.random.Generator) -> list[list[int]]:
    """Cut questions, in random order, into `_num_runs` conversations of one to four."""
    number = _num_runs(len(members))
    if len(members) <= number:
        return [[member] for member in members]
    more = generator.choice(number * (MOST_TURNS - 1), len(members) - number, replace=False) // (MOST_TURNS - 1)
    stops = np.cumsum(1 + np.bincount(more, minlength=number))[:-1]
    return [run.tolist() for run in np.split(generator.permutation(members), stops)]


def _reference(context: str) -> str:
    """Words that tell a passage from others."""
    start = " ".join(context.split()[:REFERENCE_WORDS])[:REFERENCE_CHARACTERS]
    return f'About the passage that begins "{start}": ' if context else ""
