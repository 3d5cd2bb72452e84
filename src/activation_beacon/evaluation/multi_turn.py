"""Three questions on one context, which is read once: answers and seconds of each turn (the paper's Table 2)."""

import random
from collections.abc import Iterator, Sequence

from activation_beacon.data.hiding import hide
from activation_beacon.evaluation.needles import KINDS, make_needle, window
from activation_beacon.evaluation.samples import Sample, fitted
from activation_beacon.prompts import ChatPrompt

TURNS = 3


def multi_turn_samples(
    prompt: ChatPrompt, background: Sequence[int], length: int, *, count: int = 10, seed: int = 0
) -> Iterator[Sample]:
    """Contexts with a needle of each kind at random depths; each turn asks for one, in random order.

    Args:
        prompt: of the tokenizer.
        background: ids to hide needles in.
        length: tokens of context, questions and answers together.
        count: samples.
        seed: of needles and places.

    Raises:
        InputError: for an empty background, or a length that has no room for any of it.
    """
    for number in range(count):
        rng = random.Random(f"{seed} {length} {number}")
        needles = [make_needle(kind, rng) for kind in rng.sample(KINDS, TURNS)]
        questions = tuple(needle.question for needle in needles)
        statements = " ".join(needle.statement for needle in needles)
        text = fitted(prompt, window(background, length, rng), length, questions, statements)
        for needle in needles:
            text = hide(text, needle.statement, rng.random())
        yield Sample(f"{number}", text, questions, is_conversation=True)
