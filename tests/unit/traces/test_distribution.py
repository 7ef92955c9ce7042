"""Distributions go through their quantiles and have their mean."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.traces.distribution import (
    QuantileCurve,
    bell_counts,
    curve_with_lower_half,
    empirical_score,
    normal_score,
    probability_of_score,
    skewed_counts,
)

PROBABILITIES = st.floats(1e-6, 1 - 1e-6)
STEPS = st.lists(st.floats(0.01, 2.0), min_size=5, max_size=5)


@given(steps=STEPS, first=PROBABILITIES, second=PROBABILITIES)
def test_curves_rise_through_their_points(steps: list[float], first: float, second: float) -> None:
    """A curve meets each given quantile, and a greater probability never gives a lower value."""
    values = [1.0]
    for step in steps[1:]:
        values.append(values[-1] * (1 + step))
    points = tuple(zip((0.05, 0.25, 0.5, 0.75, 0.95), values, strict=True))
    curve = QuantileCurve(points)
    for probability, value in points:
        assert curve.quantile(probability) == pytest.approx(value)
    low, high = sorted((first, second))
    assert curve.quantile(low) <= curve.quantile(high) * (1 + 1e-9)


def test_mean_in_closed_form() -> None:
    """The mean is that of many evenly spread quantiles."""
    curve = QuantileCurve(((0.01, 2.0), (0.5, 40.0), (0.9, 300.0), (0.999, 5000.0)))
    num = 20_000
    summed = sum(curve.quantile((n + 0.5) / num) for n in range(num)) / num
    assert curve.mean() == pytest.approx(summed, rel=0.01)


@pytest.mark.parametrize(
    "points",
    [((0.5, 1.0),), ((0.5, 1.0), (0.4, 2.0)), ((0.1, 2.0), (0.2, 1.0)), ((0.0, 1.0), (0.5, 2.0))],
)
def test_points_that_are_no_curve(points: tuple[tuple[float, float], ...]) -> None:
    """Points that fall, or lie outside (0, 1), are refused."""
    with pytest.raises(ValueError):
        QuantileCurve(points)


@given(mean=st.floats(8.0, 10.3))
def test_the_lower_half_gives_the_mean(mean: float) -> None:
    """The unpublished half is bent until the mean is right; the published quantiles stay."""
    quantiles = {0.5: 8.67, 0.75: 11.06, 0.95: 16.4}
    curve = curve_with_lower_half(quantiles, mean, maximum=40, num_samples=4000)
    assert curve.mean() == pytest.approx(mean, rel=1e-6)
    for probability, value in quantiles.items():
        assert curve.quantile(probability) == pytest.approx(value)


def test_a_mean_that_cannot_be() -> None:
    """No lower half makes up for a mean that lies above what the upper half allows."""
    with pytest.raises(ValueError, match="no lower half gives a mean of 50"):
        curve_with_lower_half({0.5: 8.0, 0.75: 11.0}, 50, maximum=40, num_samples=4000)


def test_counts_have_their_range_and_mean() -> None:
    """Counts stay between their ends and have the wanted mean, whatever their shape."""
    bell = bell_counts(mean=7.86, deviation=2.6, least=1, most=17)
    skewed = skewed_counts(mean=4.42, shape=2.0, least=1, most=26)
    assert bell.mean() == pytest.approx(7.86, rel=0.01)
    assert skewed.mean() == pytest.approx(4.42, rel=0.01)
    for counts, least, median, most in ((bell, 1, 8, 17), (skewed, 1, 4, 26)):
        assert counts.quantile(0.0) == least
        assert counts.quantile(0.5) == median
        assert counts.quantile(1.0) == most


@given(PROBABILITIES)
def test_scores_and_probabilities_are_inverse(probability: float) -> None:
    """A probability survives the way to its normal score and back."""
    assert probability_of_score(normal_score(probability)) == pytest.approx(probability, rel=1e-6)


def test_scores_of_samples_are_normal() -> None:
    """Values that occur many times are spread over all places that they take up."""
    ordered = [0.0] * 500 + [float(n) for n in range(1, 501)]
    generator = random.Random(1)
    scores = [empirical_score(ordered, value, generator.random()) for value in ordered]
    mean = sum(scores) / len(scores)
    assert mean == pytest.approx(0, abs=0.1)
    assert sum(score**2 for score in scores) / len(scores) == pytest.approx(1, abs=0.1)
