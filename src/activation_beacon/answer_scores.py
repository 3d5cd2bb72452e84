"""Scores of answers against references, from 0 to 1. Knows nothing of models."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from activation_beacon.errors import InputError

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Thai, Lao, Burmese, Khmer, kana and Chinese characters: between words of these scripts stands no blank.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
# A comma belongs to a number only where it sets off thousands: 27,28 is a list. A point does where a digit follows.
NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)*")

STEMMED = 3  # letters that a word has more of, if rouge-score stems it

Score = Callable[[str, Sequence[str]], float]


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and surplus blanks, as SQuAD compares answers."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the normalised answer is one of the references."""
    return float(normalized(answer) in {normalized(reference) for reference in references})


def contains(answer: str, references: Sequence[str]) -> float:
    """1 where a reference stands in the answer, whatever its case and line breaks. For numbers, names and needles."""
    folded = _folded(answer)
    return float(any(_folded(reference) in folded for reference in references))


def contains_whole(answer: str, references: Sequence[str]) -> float:
    """1 where a reference stands in the answer as no part of a longer word or number: 28 is not in 128, 28.5 or 28,000.

    Scripts without blanks have no such bounds.
    """
    folded = _folded(answer)
    inside = {place for number in NUMBER.finditer(folded) for place in range(number.start() + 1, number.end())}
    bounded = (rf"(?<![a-z0-9]){re.escape(_folded(reference))}(?![a-z0-9])" for reference in references)
    found = (match for pattern in bounded for match in re.finditer(pattern, folded))
    return float(any(inside.isdisjoint(match.span()) for match in found))


def contains_share(answer: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the answer: for several needles at once."""
    folded = _folded(answer)
    return sum(_folded(reference) in folded for reference in references) / len(references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, for the best reference (SQuAD)."""
    return max(_f1(normalized(answer).split(), normalized(reference).split()) for reference in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L of the best reference, over the words of any script; English ones are stemmed.

    Raises:
        InputError: if rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)


SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "contains": contains,
    "contains_whole": contains_whole,
    "contains_share": contains_share,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    common = sum((Counter(words) & Counter(reference)).values())
    return 2 * common / (len(words) + len(reference))


def _rouge_scorer() -> Any:
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError('ROUGE needs rouge-score: pip install "activation-beacon[eval]".') from error
    return RougeScorer(["rougeL"], tokenizer=_Words(PorterStemmer()))


class _Words:
    """Cuts a text into words as rouge-score's own tokenizer does, but keeps those that are not of the letters a to z, too."""

    def __init__(self, stemmer: Any) -> None:
        self._stemmer = stemmer

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case; characters by themselves in scripts without blanks."""
        folded = unicodedata.normalize("NFC", text.lower())
        return [
            self._stemmer.stem(word) if word.isascii() and len(word) > STEMMED else word
            for word in WORD.findall("".join(char if _is_of_word(char) else " " for char in folded))
        ]


def _is_of_word(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char).startswith("M")  # M: marks, such as the vowels of Hindi
