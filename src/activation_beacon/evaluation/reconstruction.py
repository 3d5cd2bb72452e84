"""Reading back: the words that follow a place of the context, which the model is asked to repeat."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from activation_beacon.config import BeaconConfig
from activation_beacon.evaluation.needles import window
from activation_beacon.evaluation.samples import Question, Sample, fitted
from activation_beacon.layouts import chunks_closed
from activation_beacon.prompts import ChatPrompt

CUE_WORDS, WORDS = 12, 40
MAX_NEW_TOKENS = 96


def reconstruction_samples(
    prompt: ChatPrompt,
    background: Sequence[int],
    length: int,
    *,
    count: int = 10,
    seed: int = 0,
    config: BeaconConfig | None = None,
) -> Iterator[Sample]:
    """Contexts of background text; the words that follow a cue out of them are to be repeated (scored by ROUGE-L).

    Args:
        prompt: of the tokenizer.
        background: ids of the texts to be read back.
        length: tokens of context, question and answer together.
        count: samples.
        seed: of places.
        config: of the adapter; with it a sample's kind says where beacons hold the passage when the answer begins.
    """
    for number in range(count):
        rng = random.Random(f"{seed} {length} {number}")
        ids = window(background, length, rng)
        widest = " ".join(sorted(prompt.tokenizer.decode(ids).split(), key=len)[-CUE_WORDS:])
        text = fitted(prompt, ids, length, [_question(widest, "")], num_words=CUE_WORDS + WORDS)
        words = text.split()
        start = rng.randrange(max(1, len(words) - CUE_WORDS - WORDS))
        cue, rest = words[start : start + CUE_WORDS], words[start + CUE_WORDS : start + CUE_WORDS + WORDS]
        question = _question(" ".join(cue), " ".join(rest))
        facts: dict[str, Any] = {"depth": round(start / max(1, len(words)), 1)}
        if config is not None:
            asked_at = len(prompt.opening(text)) + len(prompt.question(question.text))
            facts["kind"] = _place(prompt, text, start + CUE_WORDS, _num_compressed(config, asked_at))
        yield Sample(f"{number}", text, (question,), facts=facts)


def _question(cue: str, answer: str) -> Question:
    asked = f'Repeat, word for word, what follows "{cue}" in the text.'
    return Question(asked, (answer,), "rouge_l", MAX_NEW_TOKENS)


def _num_compressed(config: BeaconConfig, num_tokens: int) -> int:
    """Tokens that stand in closed chunks once so many have been read."""
    return chunks_closed(num_tokens, config.chunk_size, config.local_tokens) * config.chunk_size


def _place(prompt: ChatPrompt, text: str, first: int, num_compressed: int) -> str:
    """Where the passage that begins with a text's word `first` (from 0) is held."""
    if _tokens_before(prompt, text, first) >= num_compressed:
        return "raw tail"
    return "compressed" if _tokens_before(prompt, text, first + WORDS) <= num_compressed else "both"


def _tokens_before(prompt: ChatPrompt, text: str, word: int) -> int:
    rest = "".join(text.split(maxsplit=word)[word:])
    return len(prompt.opening(text[: len(text) - len(rest)]))
