"""What may be said of a mean: how many samples it comes from, and between which bounds it lies.

Knows nothing of models. Intervals are bootstrap percentiles; samples are drawn in pairs where two methods have answered the
same questions, so that what is hard for both does not widen the interval of their difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_beacon.errors import InputError

# n samples · R resamples

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0


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
