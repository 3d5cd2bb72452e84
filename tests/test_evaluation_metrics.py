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


def turned(values):
    """Each beside the next one."""
    return [*values[1:], values[0]]


ESTIMATES = {
    "mean": metrics.mean,
    "difference": lambda values: metrics.mean_difference(values, turned(values)),
    "share": lambda values: metrics.share(values, [value + 1 for value in turned(values)]),
    "gap": lambda values: metrics.gap_closed([value + 2 for value in values], turned(values), values),
}


@pytest.mark.parametrize("values", [[0.3, 0.5, 1.7], [0.0, 1.0, 1.0]], ids=["real", "binary"])
@pytest.mark.parametrize("name", ESTIMATES)
def test_fewer_than_eight_samples_have_no_interval(name, values):
    for count in range(1, 12):
        found = ESTIMATES[name]((values * 4)[:count])
        assert found.count == count
        has_bounds = (found.low is not None, found.high is not None)
        assert has_bounds == (count >= metrics.MIN_SAMPLES == 8,) * 2
    assert str(metrics.mean([2.5])) == "2.500 (n=1)"


@pytest.mark.parametrize("count", [8, 10, 30, 100])
def test_the_bounds_of_scores_of_0_and_1_are_wilson_s(count):
    for ones in range(count + 1):
        found = metrics.mean([1.0] * ones + [0.0] * (count - ones))
        assert (found.value, found.count) == (ones / count, count)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.low < found.high
        for bound in (
            found.low,
            found.high,
        ):  # a share from which the observed one lies 1.96 of its own deviations away
            deviation = math.sqrt(bound * (1 - bound) / count)
            assert abs(found.value - bound) == pytest.approx(1.959964 * deviation, abs=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [8, 10, 30])
def test_wilson_s_interval_holds_the_share_in_some_95_of_100_cases(share, count):
    chances = [math.comb(count, ones) * share**ones * (1 - share) ** (count - ones) for ones in range(count + 1)]
    held = [metrics.mean([1.0] * ones + [0.0] * (count - ones)) for ones in range(count + 1)]
    assert sum(chance for chance, found in zip(chances, held, strict=True) if found.low <= share <= found.high) > 0.9


def test_samples_that_are_all_alike_have_no_interval_of_no_width():
    for value in (0.1, 1 / 3, 2.7):
        assert metrics.mean([value] * 9) == metrics.Estimate(pytest.approx(value), None, None, 9)
    assert metrics.mean_difference([0.3] * 9, [0.1] * 9).low is None
    assert metrics.share([1.0] * 9, [1.0] * 9).high is None


def test_one_score_between_0_and_1_makes_it_a_bootstrap():
    values = [0.0] * 7 + [0.5]
    found = metrics.mean(values)
    assert (found.low, found.high) == pytest.approx(slow_interval(values, average), abs=0.01)
    assert found.low == 0.0 < metrics.mean([0.0] * 7 + [1.0]).low  # which no bootstrap would give


def test_the_same_samples_give_the_same_interval():
    values = [0.0, 1.0, 1.0, 0.5, 1.0, 0.2, 0.4, 0.3]
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
