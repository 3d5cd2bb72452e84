"""Means and their intervals."""

import math
import random

import pytest

from activation_beacon.errors import InputError
from activation_beacon.evaluation import metrics


def slow_interval(samples, statistic, *, seed=1, resamples=4000):
    """The bootstrap as it is defined, one resample at a time."""
    rng = random.Random(seed)
    drawn = sorted(statistic([rng.choice(samples) for _ in samples]) for _ in range(resamples))
    return drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples)]


def drawn_samples(count=40, seed=3):
    """Losses of (alone, beacons, full), documents far apart and methods close together."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        hard = rng.gauss(3.0, 1.0)
        samples.append((hard + 0.4 + rng.gauss(0, 0.05), hard + 0.1 + rng.gauss(0, 0.05), hard))
    return samples


def average(values):
    return sum(values) / len(values)


def gap(samples):
    alone, beacons, full = (average(column) for column in zip(*samples, strict=True))
    return (alone - beacons) / (alone - full)


def test_the_interval_of_a_mean_is_that_of_a_slow_bootstrap():
    values = [alone for alone, _, _ in drawn_samples()]
    found = metrics.mean(values)
    low, high = slow_interval(values, average)
    assert found.value == pytest.approx(average(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)
    assert found.count == 40


def test_the_interval_of_the_gap_closed_is_that_of_a_slow_bootstrap_over_documents():
    samples = drawn_samples()
    found = metrics.gap_closed(*zip(*samples, strict=True))
    assert found.value == pytest.approx(gap(samples))
    assert (found.low, found.high) == pytest.approx(slow_interval(samples, gap), abs=0.02)


def test_what_is_hard_for_both_does_not_widen_a_paired_interval():
    alone, beacons, _ = zip(*drawn_samples(), strict=True)
    paired = metrics.mean_difference(alone, beacons)
    unpaired = metrics.mean(alone)
    assert paired.low > 0.2
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 5


@pytest.mark.parametrize(
    ("alone", "beacons", "full", "expected"),
    [
        ([3.0, 5.0], [3.0, 5.0], [2.0, 4.0], 0.0),
        ([3.0, 5.0], [2.0, 4.0], [2.0, 4.0], 1.0),
        ([3.0, 5.0], [2.5, 4.5], [2.0, 4.0], 0.5),
        ([3.0, 5.0], [4.0, 6.0], [2.0, 4.0], -1.0),
    ],
)
def test_gap_closed(alone, beacons, full, expected):
    assert metrics.gap_closed(alone, beacons, full).value == pytest.approx(expected)


def test_a_gap_of_nothing_has_no_value():
    found = metrics.gap_closed([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    assert math.isnan(found.value)
    assert (found.low, found.high) == (None, None)


def test_one_sample_has_no_interval():
    assert metrics.mean([2.5]) == metrics.Estimate(2.5, None, None, 1)
    assert str(metrics.mean([2.5])) == "2.500 (n=1)"


def test_the_same_samples_give_the_same_interval():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert metrics.mean(values) == metrics.mean(values)


def test_a_share_of_what_the_other_has():
    assert metrics.share([1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]).value == 0.5
    assert math.isnan(metrics.share([0.0], [0.0]).value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mean([]), "There are no samples to take a mean of. Finish at least one."),
        (
            lambda: metrics.mean_difference([1.0], [1.0, 2.0]),
            "Paired samples must be as many of each; got 1, 2.",
        ),
        (lambda: metrics.gap_closed([1.0], [1.0], []), "Paired samples must be as many of each; got 1, 1, 0."),
    ],
)
def test_samples_that_say_nothing_are_refused(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message
