"""What may be said of a mean: how many samples it comes from, and between which bounds it lies.

Knows nothing of models. The interval of a mean of samples that are all 0 or 1 is Wilson's; others are bootstrap percentiles: samples
are drawn in pairs where two methods have answered the same questions, so that what is hard for both does not widen the interval of
their difference. Of few samples neither is given: a bootstrap of two or three holds what it is to hold hardly more than half of the
time, and of samples that are all alike it has no width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from activation_beacon.errors import InputError

# n samples · R resamples

LEVEL = 0.95
MIN_SAMPLES = 8  # of fewer, what is called 95% and comes of a bootstrap holds the mean in less than 0.87 of all cases
RESAMPLES = 2000
ROUNDING = 1e-12
FEW = (
    f"Of fewer than {MIN_SAMPLES} samples no interval is given: they say too little of their spread, and a bootstrap over them would "
    "be far narrower than its 95% promise."
)
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A number that comes from samples.

    Attributes:
        value: of all samples.
        low, high: bounds of its 95% interval; None where samples say too little of the spread: fewer than `MIN_SAMPLES`, or all alike
            (but all 0 or all 1).
        count: samples.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        bounds = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{bounds} (n={self.count})"

    def beside(self, count: int) -> str:
        """In words; without its samples where they are as many as stand beside it."""
        return str(self).removesuffix(f" (n={count})")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


def mean(values: Sequence[float]) -> Estimate:
    """The mean and its interval over samples.

    Raises:
        InputError: without values.
    """
    columns = _columns(values)
    return _wilson(columns[0]) if np.isin(columns, (0, 1)).all() else _bootstrap(columns, lambda means: means[0])


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


def _wilson(values: np.ndarray[Any, Any]) -> Estimate:
    """The share of ones and Wilson's score interval."""
    count, value = len(values), float(values.mean())
    if count < MIN_SAMPLES:
        return Estimate(value, None, None, count)
    z2 = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    middle = (value + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (value * (1 - value) + z2 / (4 * count)) / count) ** 0.5 / (1 + z2 / count)
    return Estimate(value, max(0.0, middle - half), min(1.0, middle + half), count)


def _bootstrap(
    columns: np.ndarray[Any, Any], statistic: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> Estimate:
    """A statistic of the columns' means (k, 1) and its percentiles over means of resamples (k, R)."""
    count = columns.shape[1]
    value = float(statistic(columns.mean(axis=1, keepdims=True))[0])
    if count < MIN_SAMPLES:
        return Estimate(value, None, None, count)
    chosen = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))
    drawn = statistic(np.stack([column[chosen].mean(axis=1) for column in columns]))
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size or not np.isfinite(value) or np.ptp(drawn) < ROUNDING * max(1.0, abs(value)):
        return Estimate(value, None, None, count)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), count)


def _divided(numerator: np.ndarray[Any, Any], denominator: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The quotient, NaN where nothing is divided by."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)
