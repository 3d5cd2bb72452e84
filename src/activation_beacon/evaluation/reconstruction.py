"""Reading back: the words that follow a place of the context, which the model is asked to repeat."""

import random
from collections.abc import Iterator, Sequence

from activation_beacon.evaluation.needles import window
from activation_beacon.evaluation.samples import Question, Sample, fitted
from activation_beacon.prompts import ChatPrompt

CUE_WORDS, WORDS = 12, 40
MAX_NEW_TOKENS = 96


def reconstruction_samples(
    prompt: ChatPrompt, background: Sequence[int], length: int, *, count: int = 10, seed: int = 0
) -> Iterator[Sample]:
    """Contexts of background text; the words that follow a cue out of them are to be repeated (scored by ROUGE-L).

    Args:
        prompt: of the tokenizer.
        background: ids of the texts to be read back.
        length: tokens of context, question and answer together.
        count: samples.
        seed: of places.
    """
    for number in range(count):
        rng = random.Random(f"{seed} {length} {number}")
        ids = window(background, length, rng)
        widest = " ".join(sorted(prompt.tokenizer.decode(ids).split(), key=len)[-CUE_WORDS:])
        text = fitted(prompt, ids, length, [_question(widest, "")])
        words = text.split()
        start = rng.randrange(max(1, len(words) - CUE_WORDS - WORDS))
        cue, rest = words[start : start + CUE_WORDS], words[start + CUE_WORDS : start + CUE_WORDS + WORDS]
        question = _question(" ".join(cue), " ".join(rest))
        yield Sample(f"{number}", text, (question,), facts={"depth": round(start / max(1, len(words)), 1)})


def _question(cue: str, answer: str) -> Question:
    asked = f'Repeat, word for word, what follows "{cue}" in the text.'
    return Question(asked, (answer,), "rouge_l", MAX_NEW_TOKENS)
