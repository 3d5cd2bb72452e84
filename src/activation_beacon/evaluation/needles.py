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
SCORE = "contains_whole"  # 28 does not stand in 128
MAX_NEW_TOKENS = {"sentence": 40, "number": 24, "uuid": 48, "passkey": 24, "fact": 40}  # of all kinds

CITIES = ("Lisbon", "Kyoto", "Oslo", "Quito", "Dakar", "Perth", "Riga", "Tunis", "Hanoi", "Lima", "Split", "Cork")
ACTS = ("eat a warm sandwich", "fly a paper kite", "read old letters", "paint small boats", "count the swallows")
PLACES = ("on the harbour wall", "in the botanical garden", "behind the clock tower", "by the stone bridge")
TIMES = ("at dawn", "on a rainy Monday", "just before midnight", "on the first day of spring")
THINGS = ("lantern", "orchard", "violin", "glacier", "compass", "saddle", "harvest", "pepper", "marble", "thimble")
# Facts as people write them: a statement, what is asked, and the answer.
FACTS = (
    ("The {shade} warehouse has the invoice number {number}.", "What is the invoice number of the {shade} warehouse?", "{number}"),
    ("{name}'s phone number is 555-0{three}.", "What is {name}'s phone number?", "555-0{three}"),
    ("The {thing} fair was moved to {day} March {year}.", "To which date was the {thing} fair moved?", "{day} March {year}"),
    ("The rent for the cellar is 1,{three} euros a month.", "How much is the rent for the cellar?", "1,{three}"),
    ("The access code of the {shade} garage is {five}.", "What is the access code of the {shade} garage?", "{five}"),
    ("The train to {city} leaves from platform {day}.", "From which platform does the train to {city} leave?", "{day}"),
    ("The serial number of the {shade} pump is KX-{five}.", "What is the serial number of the {shade} pump?", "KX-{five}"),
    ("Doctor {surname} was born in {year}.", "In which year was Doctor {surname} born?", "{year}"),
    ("The bridge over the river Lorn is {three} metres long.", "How long is the bridge over the river Lorn?", "{three}"),
    ("The order of Mr. {surname} has the number {five}.", "What is the number of Mr. {surname}'s order?", "{five}"),
    ("The new password for the printer is {thing}{day}.", "What is the new password for the printer?", "{thing}{day}"),
    ("The parcel for {name} holds {day} {thing}s.", "How many {thing}s does the parcel for {name} hold?", "{day}"),
    ("Room {three} belongs to Professor {surname}.", "Which room belongs to Professor {surname}?", "{three}"),
    ("The flight to {city} departs at {day}:45.", "At what time does the flight to {city} depart?", "{day}:45"),
    ("The secret ingredient of the soup is {spice}.", "What is the secret ingredient of the soup?", "{spice}"),
    ("The captain of the ship Aurora is {name} {surname}.", "Who is the captain of the ship Aurora?", "{name} {surname}"),
)  # fmt: skip
NAMES = ("Alma", "Bruno", "Clara", "Edgar", "Fiona", "Gustav", "Helga", "Ivan", "Jutta", "Karim")
SURNAMES = ("Adler", "Henley", "Kowalski", "Lindqvist", "Marchetti", "Nakamura", "Osborne", "Petrov")
SPICES = ("saffron", "cumin", "nutmeg", "ginger", "cardamom", "tarragon")
SHADES = ("blue", "green", "northern", "old", "second", "upper")


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
    elif kind == "fact":
        values = _fact_values(rng, thing)
        statement, asked, answer = (form.format(**values) for form in rng.choice(FACTS))
    else:
        raise InputError(f"There is no needle of kind {kind!r}. Use some of {', '.join(MAX_NEW_TOKENS)}.")
    return Needle(statement, Question(asked, (answer,), SCORE, MAX_NEW_TOKENS[kind]))


def _fact_values(rng: random.Random, thing: str) -> dict[str, str]:
    """What the places of `FACTS` are filled with."""
    words = {"name": NAMES, "surname": SURNAMES, "city": CITIES, "spice": SPICES, "shade": SHADES}
    numbers = {
        "day": (10, 28),
        "three": (100, 999),
        "five": (10**4, 10**5 - 1),
        "number": (10**6, 10**7 - 1),
        "year": (1700, 2050),
    }
    values = {"thing": thing} | {place: rng.choice(known) for place, known in words.items()}
    return values | {place: str(rng.randint(*limits)) for place, limits in numbers.items()}


def needle_samples(
    prompt: ChatPrompt,
    background: Sequence[int],
    length: int,
    *,
    kinds: Sequence[str] = KINDS,
    depths: int | Sequence[float] = DEPTHS,
    repeats: int = 1,
    seed: int = 0,
) -> Iterator[Sample]:
    """One sample for each repeat, depth and kind; the first of them are spread over kinds and depths.

    Args:
        prompt: of the tokenizer.
        background: ids to hide needles in; taken up again from the start where they are too few.
        length: tokens of context, question and answer together.
        kinds: of needles.
        depths: how many, evenly from the text's beginning (0) to its end (1); or each of them.
        repeats: samples of each depth and kind, at other places of the background.
        seed: of needles and places.

    Raises:
        InputError: for an unknown kind, an empty background, or a length that has no room for any of it.
    """
    places = even_depths(depths) if isinstance(depths, int) else tuple(depths)
    for repeat in range(repeats):
        for step in sorted(range(len(places)), key=lambda step: step * STRIDE % len(places)):
            for kind in kinds:
                rng = random.Random(f"{seed} {length} {kind} {step} {repeat}")
                needle = make_needle(kind, rng)
                text = fitted(prompt, window(background, length, rng), length, [needle.question], needle.statement)
                facts = {"kind": kind, "depth": round(places[step], 3)}
                name = f"{kind}-{step}-{repeat}"
                yield Sample(name, hide(text, needle.statement, places[step]), (needle.question,), facts=facts)


def even_depths(count: int) -> tuple[float, ...]:
    """So many depths, evenly from the text's beginning (0) to its end (1); one is in the middle."""
    return tuple(step / (count - 1) if count > 1 else 0.5 for step in range(count))


def window(background: Sequence[int], length: int, rng: random.Random) -> list[int]:
    """`length` tokens of the background from a random place on, going round at its end.

    Raises:
        InputError: if it is empty.
    """
    if not background:
        raise InputError("There is no background text to hide needles in. Give a file with some.")
    start = rng.randrange(len(background))
    return [background[(start + offset) % len(background)] for offset in range(length)]
