"""What has to be found again in a long document, or repeated from it: needles of many kinds, and the document itself."""

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from activation_beacon.data.hiding import hide
from activation_beacon.errors import ConfigError
from activation_beacon.training.conversations import Conversations, Turn
from activation_beacon.training.needle_words import (
    ACTS,
    ADJECTIVES,
    CITIES,
    COLOURS,
    DISHES,
    FACT_FORMS,
    JOBS,
    KINDS,
    MONTHS,
    NAMES,
    NOUNS,
    PETS,
    PLACES,
    REPEAT_FORMS,
    SENTENCE_FORMS,
    SUBJECTS,
    SURNAMES,
    TIMES,
    VALUE_FORMS,
)
from activation_beacon.training.sampling import DocumentSampler, Sample, drawn_length
from activation_beacon.training.token_store import TokenStore

VALUE_KINDS = ("word", "number", "uuid")
MOST_TURNS = 4
MULTI_KEYS = (3, 8)
WHOLE = 0.5  # of the answers to facts say all of it, as chat models do
ANSWER_TOKENS = (100, 300)
MOST_CHARACTERS = 16  # of a token, in prose
CUE = re.compile(r"(?<!\S)\S++(?:\s++\S++){11}")
CUE_CHARACTERS = 40  # where there are no words
CUE_TOKENS = 60  # about, with the instruction
LAST_CUE = 0.9  # of the text: something has to follow
LAST_WORD = re.compile(r"\S+\Z")
TRIES = 20


@dataclass(frozen=True)
class Needle:
    """Something to be found again: what is hidden, what is asked, and the answer; `others` are hidden too, not asked."""

    statement: str
    question: str
    answer: str
    others: tuple[str, ...] = ()


def make_needle(kind: str, rng: random.Random) -> Needle:
    """A needle of one kind.

    A "word", "number" or "uuid" that belongs to a key, a "sentence", several keys ("multi"), or a "fact": a date, an amount, a
    telephone number, a name, as people write them.

    Raises:
        ConfigError: listing the kinds.
    """
    if kind == "multi":
        return _multi_needle(rng.choice(VALUE_KINDS), rng)
    if kind == "sentence":
        return _sentence_needle(rng)
    if kind == "fact":
        return _fact_needle(rng)
    if kind in VALUE_KINDS:
        statement, question = rng.choice(VALUE_FORMS)
        return _value_needle(kind, statement, question, _key(rng), rng.choice(SUBJECTS[kind]), rng)
    raise ConfigError(f"There is no needle of kind {kind!r}. Use some of {', '.join(KINDS)}.")


def find_cue(text: str, rng: random.Random) -> tuple[str, int]:
    """Twelve words of a text that stand in it once, if such are found, and where it goes on after them.

    Where there are no words, some characters take their place.
    """
    cue, stop = text, len(text)
    for _ in range(TRIES):
        place = int(rng.random() * LAST_CUE * len(text))
        match = CUE.search(text, place)
        cue = match.group() if match else text[place : place + CUE_CHARACTERS].strip()
        stop = match.end() if match else place + CUE_CHARACTERS
        if cue and text[stop:].strip() and text.count(cue) == 1:
            break
    return cue, len(text) - len(text[stop:].lstrip())


def _value_needle(kind: str, statement: str, question: str, key: str, what: str, rng: random.Random) -> Needle:
    value = _value(kind, rng)
    return Needle(statement.format(what=what, key=key, value=value), question.format(what=what, key=key), value)


def _multi_needle(kind: str, rng: random.Random) -> Needle:
    """Several keys that all have values of one kind; one of them is asked."""
    form, what = rng.choice(VALUE_FORMS), rng.choice(SUBJECTS[kind])
    keys = {_key(rng): None for _ in range(rng.randint(*MULTI_KEYS))}
    asked, *others = [_value_needle(kind, *form, key, what, rng) for key in keys]
    return Needle(asked.statement, asked.question, asked.answer, tuple(other.statement for other in others))


def _sentence_needle(rng: random.Random) -> Needle:
    statement, question = rng.choice(SENTENCE_FORMS)
    who = {"name": rng.choice(NAMES), "city": rng.choice(CITIES)}
    answer = " ".join(map(rng.choice, (ACTS, PLACES, TIMES)))
    return Needle(statement.format(answer=answer, **who), question.format(**who), answer)


def _fact_needle(rng: random.Random) -> Needle:
    statement, question, answer = rng.choice(FACT_FORMS)
    values = _fact_values(rng)
    statement = statement.format(**values)
    return Needle(statement, question.format(**values), statement if rng.random() < WHOLE else answer.format(**values))


def _fact_values(rng: random.Random) -> dict[str, str]:
    """What the places of `FACT_FORMS` are filled with."""
    city, other = rng.sample(CITIES, 2)
    name, other_name = rng.sample(NAMES, 2)
    noun, thing = rng.sample(NOUNS, 2)
    day, month, year = rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1700, 2050)
    letters = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=3))
    values: dict[str, Any] = {
        "city": city, "other": other, "name": name, "other_name": other_name, "noun": noun, "thing": thing,
        "adjective": rng.choice(ADJECTIVES), "surname": rng.choice(SURNAMES), "job": rng.choice(JOBS),
        "colour": rng.choice(COLOURS), "dish": rng.choice(DISHES), "pet": rng.choice(PETS), "word": rng.choice(NOUNS),
        "clock": f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}", "year": year, "day": f"{month} {day}",
        "date": rng.choice((f"{day} {month} {year}", f"{month} {day}, {year}", f"{year}-{MONTHS.index(month) + 1:02d}-{day:02d}")),
        "money": f"{rng.randint(1000, 99999):,}", "price": f"{rng.randint(2, 99)}.{rng.randint(0, 99):02d}",
        "two": rng.randint(10, 99), "three": rng.randint(100, 999), "four": rng.randint(1000, 9999),
        "five": rng.randint(10000, 99999), "long": rng.randint(10**7, 10**9), "seat": f"{rng.randint(1, 40)}{letters[0]}",
        "decimal": f"{rng.randint(2, 60)}.{rng.randint(1, 9)}", "code": f"{letters[:2]}-{rng.randint(1000, 99999)}",
        "plate": f"{letters} {rng.randint(100, 999)}", "telephone": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def _key(rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _value(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


# --- samples -----------------------------------------------------------------------------------------------------------


class _Haystack:
    """Documents' windows as texts that something is asked of.

    Args:
        store: the documents' tokens.
        tokenizer: of the base model.
        length: tokens that a sample has at most, in whole chunks.
        chunk_size: of the adapter.
        seed: of all choices.
        name: what the texts are for; other purposes choose otherwise.

    Raises:
        As `DocumentSampler`.
    """

    def __init__(
        self, store: TokenStore, tokenizer: Any, *, length: int, chunk_size: int, seed: int, name: str
    ) -> None:
        self.windows = DocumentSampler(store, length=length, chunk_size=chunk_size, seed=seed)
        self.conversations = Conversations(tokenizer)
        self.name = name

    def rng(self, index: int) -> random.Random:
        """All choices of one sample, the same for the same seed and index."""
        return random.Random(f"{self.name} {self.windows.seed} {index}")

    def sample(self, index: int, write: Callable[[str], Sample], *, beside: int) -> Sample:
        """Write a sample of as much of a document as fits the length that this sample is to have.

        Where that has no room for what is asked, the sample is as long as samples may be.

        Args:
            index: of the sample.
            write: makes a sample of a text.
            beside: about as many tokens come to those of the text.
        """
        windows = self.windows
        document, start, stop = windows.window(index)
        window = windows.store.document(document)[start:stop].tolist()
        for most in (drawn_length(windows.length, windows.chunk_size, seed=windows.seed, index=index), windows.length):
            tokens = window[: max(most - beside, 1)]
            while tokens:
                sample = write(self._text(tokens))
                if len(sample.ids) <= most:
                    return sample
                del tokens[most - len(sample.ids) :]
        raise ConfigError(f"Samples of {windows.length} tokens have no room for a question. Use longer ones.")

    def _text(self, tokens: Sequence[int]) -> str:
        text = self.conversations.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text.strip("\ufffd")  # halves of a character that a window's edges cut


class Needles:
    """Conversations about needles in documents: one to four are asked for, in any order.

    Args:
        store: the documents' tokens.
        tokenizer: of the base model.
        length: tokens that a sample has at most, in whole chunks.
        chunk_size: of the adapter.
        seed: of all choices.
        kinds: of needles, as `make_needle` knows them.

    Raises:
        ConfigError: for an unknown kind, or a length that is no multiple of the chunk.
        InputError: if no document is long enough.
    """

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Any,
        *,
        length: int,
        chunk_size: int,
        seed: int,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        if not kinds:
            raise ConfigError(f"kinds names no needle. Use some of {', '.join(KINDS)}.")
        for kind in kinds:
            make_needle(kind, random.Random(0))
        self.kinds = tuple(kinds)
        self._haystack = _Haystack(store, tokenizer, length=length, chunk_size=chunk_size, seed=seed, name="needles")

    def sample(self, index: int) -> Sample:
        """The sample of a number from 0."""
        rng = self._haystack.rng(index)
        needles = self._needles(rng)
        statements = [text for needle in needles for text in (needle.statement, *needle.others)]
        depths = [rng.random() for _ in statements]
        rng.shuffle(needles)
        turns = [Turn(needle.question, needle.answer) for needle in needles]

        def write(text: str) -> Sample:
            for statement, depth in zip(statements, depths, strict=True):
                text = hide(text, statement, depth)
            return self._haystack.conversations.sample(text, turns)

        conversations = self._haystack.conversations
        parts = sum(conversations.lengths([*statements, *(text for turn in turns for text in turn)]))
        beside = conversations.overhead + parts + len(turns) * conversations.turn_overhead
        return self._haystack.sample(index, write, beside=beside)

    def _needles(self, rng: random.Random) -> list[Needle]:
        """Needles whose questions differ."""
        made: dict[str, Needle] = {}
        for _ in range(rng.randint(1, MOST_TURNS)):
            needle = make_needle(rng.choice(self.kinds), rng)
            made.setdefault(needle.question, needle)
        return list(made.values())


class Reconstruction:
    """Documents, and a passage of each to be repeated word for word: what a chunk's beacons have to hold.

    Args:
        store: the documents' tokens.
        tokenizer: of the base model.
        length: tokens that a sample has at most, in whole chunks.
        chunk_size: of the adapter.
        seed: of all choices.

    Raises:
        ConfigError: if the length is no multiple of the chunk.
        InputError: if no document is long enough.
    """

    def __init__(self, store: TokenStore, tokenizer: Any, *, length: int, chunk_size: int, seed: int) -> None:
        self._haystack = _Haystack(
            store, tokenizer, length=length, chunk_size=chunk_size, seed=seed, name="reconstruction"
        )

    def sample(self, index: int) -> Sample:
        """The sample of a number from 0."""
        rng, conversations = self._haystack.rng(index), self._haystack.conversations
        form, num_tokens, seed = rng.choice(REPEAT_FORMS), rng.randint(*ANSWER_TOKENS), rng.random()

        def write(text: str) -> Sample:
            cue, start = find_cue(text, random.Random(seed))
            answer = self._first_words(text[start:], num_tokens)
            return conversations.sample(text, [Turn(form.format(cue=" ".join(cue.split())), answer)])

        return self._haystack.sample(index, write, beside=conversations.overhead + CUE_TOKENS + num_tokens)

    def _first_words(self, text: str, num_tokens: int) -> str:
        """The whole words among a text's first tokens."""
        conversations = self._haystack.conversations
        text = text[: num_tokens * MOST_CHARACTERS]
        ids = conversations.ids(text)
        if len(ids) <= num_tokens:
            return text.rstrip()
        start = conversations.tokenizer.decode(ids[:num_tokens], clean_up_tokenization_spaces=False)
        words = LAST_WORD.sub("", start)  # it may be half a word
        return words.rstrip() or start.strip("\ufffd")
