"""Needle in a haystack: something hidden in background text, such as a number, asked for after the text has been read."""

import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from activation_beacon.data.hiding import hide
from activation_beacon.errors import InputError
from activation_beacon.evaluation.samples import Question, Sample, fitted
from activation_beacon.prompts import ChatPrompt

KINDS = ("sentence", "number", "uuid")  # by default
DEPTHS = 10
STRIDE = 7  # of ten depths it takes 0, 3, 6, 9, 2, 5, 8, 1, 4, 7
MAX_NEW_TOKENS = {"sentence": 40, "number": 24, "uuid": 48, "passkey": 24}  # of all kinds

CITIES = ("Lisbon", "Kyoto", "Oslo", "Quito", "Dakar", "Perth", "Riga", "Tunis", "Hanoi", "Lima", "Split", "Cork")
ACTS = ("eat a warm sandwich", "fly a paper kite", "read old letters", "paint small boats", "count the swallows")
PLACES = ("on the harbour wall", "in the botanical garden", "behind the clock tower", "by the stone bridge")
TIMES = ("at dawn", "on a rainy Monday", "just before midnight", "on the first day of spring")
THINGS = ("lantern", "orchard", "violin", "glacier", "compass", "saddle", "harvest", "pepper", "marble", "thimble")


@dataclass(frozen=True)
class Needle:
    """Something to be found again: what is hidden, what is asked, and what the answer has to contain."""

    statement: str
    question: Question


def make_needle(kind: str, rng: random.Random) -> Needle:
    """A needle of one kind.

    Raises:
        InputError: listing the kinds.
    """
    thing = rng.choice(THINGS)
    if kind == "sentence":
        city, act, place, time = (rng.choice(words) for words in (CITIES, ACTS, PLACES, TIMES))
        answer = f"{act} {place} {time}"
        statement, asked = f"The best thing to do in {city} is to {answer}.", f"What is the best thing to do in {city}?"
    elif kind == "number":
        answer = str(rng.randrange(10**6, 10**7))
        statement = f"The special magic number of the {thing} is {answer}."
        asked = f"What is the special magic number of the {thing}?"
    elif kind == "uuid":
        answer = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        statement, asked = f"The secret code of the {thing} is {answer}.", f"What is the secret code of the {thing}?"
    elif kind == "passkey":  # passkey retrieval (Mohtashami and Jaggi, 2023), in a background of real text
        answer = str(rng.randrange(10**4, 10**5))
        statement = f"The pass key is {answer}. Remember it. {answer} is the pass key."
        asked = "What is the pass key?"
    else:
        raise InputError(f"There is no needle of kind {kind!r}. Use some of {', '.join(MAX_NEW_TOKENS)}.")
    return Needle(statement, Question(asked, (answer,), max_new_tokens=MAX_NEW_TOKENS[kind]))


def needle_samples(
    prompt: ChatPrompt,
    background: Sequence[int],
    length: int,
    *,
    kinds: Sequence[str] = KINDS,
    depths: int = DEPTHS,
    repeats: int = 1,
    seed: int = 0,
) -> Iterator[Sample]:
    """One sample for each repeat, depth and kind; the first of them are spread over kinds and depths.

    Args:
        prompt: of the tokenizer.
        background: ids to hide needles in; taken up again from the start where they are too few.
        length: tokens of context, question and answer together.
        kinds: of needles.
        depths: how many, evenly from the text's beginning to its end.
        repeats: samples of each depth and kind, at other places of the background.
        seed: of needles and places.

    Raises:
        InputError: for an unknown kind, or an empty background.
    """
    for repeat in range(repeats):
        for step in sorted(range(depths), key=lambda step: step * STRIDE % depths):
            for kind in kinds:
                rng = random.Random(f"{seed} {length} {kind} {step} {repeat}")
                depth = step / (depths - 1) if depths > 1 else 0.5
                needle = make_needle(kind, rng)
                text = fitted(prompt, window(background, length, rng), length, [needle.question], needle.statement)
                facts = {"kind": kind, "depth": round(depth, 3)}
                name = f"{kind}-{step}-{repeat}"
                yield Sample(name, hide(text, needle.statement, depth), (needle.question,), facts=facts)


def window(background: Sequence[int], length: int, rng: random.Random) -> list[int]:
    """`length` tokens of the background from a random place on, going round at its end.

    Raises:
        InputError: if it is empty.
    """
    if not background:
        raise InputError("There is no background text to hide needles in. Give a file with some.")
    start = rng.randrange(len(background))
    return [background[(start + offset) % len(background)] for offset in range(length)]
