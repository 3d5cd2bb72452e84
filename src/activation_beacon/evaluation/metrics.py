"""Scores of answers, and what may be said of a mean: how many samples it comes from, and between which bounds it lies.

Knows nothing of models. Intervals are bootstrap percentiles; samples are drawn in pairs where two methods have answered the
same questions, so that what is hard for both does not widen the interval of their difference.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_beacon.errors import InputError

# n samples · R resamples

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

Score = Callable[[str, Sequence[str]], float]


# --- intervals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number that comes from samples.

    Attributes:
        value: of all samples.
        low, high: bounds of its 95% interval; None where one sample, or none that counts, says nothing of the spread.
        count: samples.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        bounds = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{bounds} (n={self.count})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


def mean(values: Sequence[float]) -> Estimate:
    """The mean and its interval over samples.

    Raises:
        InputError: without values.
    """
    return _bootstrap(_columns(values), lambda means: means[0])


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """How much `ours` lies above `theirs` in the mean, over paired samples.

    Raises:
        InputError: without values, or if they are not as many.
    """
    return _bootstrap(_columns(ours, theirs), lambda means: means[0] - means[1])


def share(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of `ours` over mean of `theirs`, such as a recall in proportion to the uncompressed model's own; paired.

    Raises:
        InputError: without values, or if they are not as many.
    """
    return _bootstrap(_columns(ours, theirs), lambda means: _divided(means[0], means[1]))


def gap_closed(alone: Sequence[float], beacons: Sequence[float], full: Sequence[float]) -> Estimate:
    """(alone - beacons) / (alone - full): 0 where beacons help no more than nothing, 1 where they are as good as all.

    Args:
        alone, beacons, full: losses of the same documents, read in each way.

    Raises:
        InputError: without values, or if they are not as many.
    """
    return _bootstrap(_columns(alone, beacons, full), lambda means: _divided(means[0] - means[1], means[0] - means[2]))


def _columns(*columns: Sequence[float]) -> np.ndarray[Any, Any]:
    """Samples (k, n) of k paired columns."""
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise InputError(f"Paired samples must be as many of each; got {', '.join(str(len(c)) for c in columns)}.")
    if lengths == {0}:
        raise InputError("There are no samples to take a mean of. Finish at least one.")
    return np.asarray(columns, dtype=np.float64)


def _bootstrap(
    columns: np.ndarray[Any, Any], statistic: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> Estimate:
    """A statistic of the columns' means (k, 1) and its percentiles over means of resamples (k, R)."""
    count = columns.shape[1]
    value = float(statistic(columns.mean(axis=1, keepdims=True))[0])
    if count == 1:
        return Estimate(value, None, None, count)
    chosen = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))
    drawn = statistic(np.stack([column[chosen].mean(axis=1) for column in columns]))
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size or not np.isfinite(value):
        return Estimate(value, None, None, count)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), count)


def _divided(numerator: np.ndarray[Any, Any], denominator: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The quotient, NaN where nothing is divided by."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


# --- answers ---------------------------------------------------------------------------------------------------------


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


def contains_share(answer: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the answer: for several needles at once."""
    folded = _folded(answer)
    return sum(_folded(reference) in folded for reference in references) / len(references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, for the best reference (SQuAD)."""
    return max(_f1(normalized(answer).split(), normalized(reference).split()) for reference in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L of the best reference, with stemming.

    Raises:
        InputError: if rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)


SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "contains": contains,
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
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError('ROUGE needs rouge-score: pip install "activation-beacon[eval]".') from error
    return RougeScorer(["rougeL"], use_stemmer=True)
