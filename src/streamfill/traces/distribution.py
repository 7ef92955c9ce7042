"""Distributions that go through given quantiles, and of counts with a given mean. Pure.

A value is drawn by putting a probability into ``quantile``, so that one seed gives the same values
on every machine, and two quantities are made to depend on each other by drawing their
probabilities together: as correlated normal scores.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Final

_NORMAL: Final = NormalDist()
_NUM_BISECTIONS: Final = 60
"""Halve the range of a shape parameter to below the precision of a float."""
_STEEPEST_LOWER_HALF: Final = 8.0


def normal_score(probability: float) -> float:
    """Where the standard normal distribution has this probability below it."""
    return _NORMAL.inv_cdf(probability)


def probability_of_score(score: float) -> float:
    """The inverse of ``normal_score``."""
    return _NORMAL.cdf(score)


@dataclass(frozen=True)
class QuantileCurve:
    """A distribution of positive values, given by some of its quantiles.

    Between two quantiles the logarithm of the value is linear in the normal score of the
    probability: each stretch is a piece of a log-normal distribution. Outside it is constant.

    Attributes:
        points: (probability, value), both strictly increasing; at least two.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the points do not increase, or leave the range.
        """
        if len(self.points) < 2:
            raise ValueError("a curve needs two points")
        for (low_p, low), (high_p, high) in itertools.pairwise(self.points):
            if not (0 < low_p < high_p < 1 and 0 < low < high):
                raise ValueError(f"no increasing points: {(low_p, low)}, {(high_p, high)}")

    def quantile(self, probability: float) -> float:
        """The value that this share of the samples does not exceed."""
        if probability <= self.points[0][0]:
            return self.points[0][1]
        if probability >= self.points[-1][0]:
            return self.points[-1][1]
        score = normal_score(probability)
        index = bisect.bisect_right(self._scores, score) - 1
        intercept, slope = self._stretches[min(index, len(self._stretches) - 1)]
        return math.exp(intercept + slope * score)

    def mean(self) -> float:
        """The expected value, in closed form."""
        total = self.points[0][0] * self.points[0][1]
        total += (1 - self.points[-1][0]) * self.points[-1][1]
        ends = itertools.pairwise(self._scores)
        for (low, high), (intercept, slope) in zip(ends, self._stretches, strict=True):
            share = _NORMAL.cdf(high - slope) - _NORMAL.cdf(low - slope)
            total += math.exp(intercept + slope * slope / 2) * share
        return total

    @cached_property
    def _scores(self) -> list[float]:
        return [normal_score(probability) for probability, _ in self.points]

    @cached_property
    def _stretches(self) -> list[tuple[float, float]]:
        logs = [math.log(value) for _, value in self.points]
        stretches = []
        for index in range(len(logs) - 1):
            rise = logs[index + 1] - logs[index]
            slope = rise / (self._scores[index + 1] - self._scores[index])
            stretches.append((logs[index] - slope * self._scores[index], slope))
        return stretches


def curve_with_lower_half(
    quantiles: Mapping[float, float], mean: float, *, maximum: float, num_samples: int
) -> QuantileCurve:
    """A curve through quantiles from the median upwards, with the lower half that gives ``mean``.

    The lower half mirrors the upper one on the logarithmic scale, stretched by one factor.

    Args:
        quantiles: value by probability; the median and at least one above it.
        maximum: of ``num_samples`` samples.

    Raises:
        ValueError: no lower half gives this mean.
    """
    median = quantiles[0.5]
    upper = sorted((*quantiles.items(), (1 - 1 / num_samples, maximum)))

    def curve(factor: float) -> QuantileCurve:
        mirrored = [
            (1 - probability, median * (median / value) ** factor)
            for probability, value in reversed(upper)
            if probability > 0.5
        ]
        return QuantileCurve((*mirrored, *upper))

    low, high = 1e-3, _STEEPEST_LOWER_HALF
    if not curve(high).mean() <= mean <= curve(low).mean():
        raise ValueError(f"no lower half gives a mean of {mean:g}")
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        if curve(middle).mean() > mean:
            low = middle
        else:
            high = middle
    return curve(high)


@dataclass(frozen=True)
class CountDistribution:
    """A distribution of whole numbers.

    Attributes:
        least: the smallest of them.
        weights: relative frequency of ``least``, ``least + 1``, …
    """

    least: int
    weights: tuple[float, ...]

    def quantile(self, probability: float) -> int:
        """The smallest number that this share of the samples does not exceed."""
        place = bisect.bisect_left(self._cumulated, probability * self._cumulated[-1])
        return self.least + min(place, len(self.weights) - 1)

    def mean(self) -> float:
        """The expected value."""
        total = sum(self.weights)
        return sum((self.least + n) * weight for n, weight in enumerate(self.weights)) / total

    @cached_property
    def _cumulated(self) -> list[float]:
        return list(itertools.accumulate(self.weights))


def bell_counts(*, mean: float, deviation: float, least: int, most: int) -> CountDistribution:
    """Counts from ``least`` to ``most`` in the shape of a normal distribution.

    Args:
        mean: of that normal distribution before it is cut at both ends.
        deviation: its standard deviation.
    """
    normal = NormalDist(mean, deviation)
    weights = tuple(normal.cdf(n + 0.5) - normal.cdf(n - 0.5) for n in range(least, most + 1))
    return CountDistribution(least, weights)


def skewed_counts(*, mean: float, shape: float, least: int, most: int) -> CountDistribution:
    """Counts from ``least`` to ``most`` with a long tail: ``least`` plus a negative binomial.

    Args:
        mean: of the counts, before they are cut at ``most``.
        shape: of the negative binomial (its number of successes); less means a longer tail.
    """
    chance = shape / (shape + mean - least)
    weights = tuple(
        math.exp(
            math.lgamma(n + shape)
            - math.lgamma(shape)
            - math.lgamma(n + 1)
            + shape * math.log(chance)
            + n * math.log1p(-chance)
        )
        for n in range(most - least + 1)
    )
    return CountDistribution(least, weights)


def empirical_score(ordered: Sequence[float], value: float, tie_breaker: float) -> float:
    """The normal score of ``value`` among samples of its own distribution.

    Args:
        ordered: samples, in increasing order.
        tie_breaker: in 0..1; chooses a place among samples that equal ``value``.
    """
    low = bisect.bisect_left(ordered, value)
    high = bisect.bisect_right(ordered, value)
    place = (low + (high - low) * tie_breaker + 0.5) / (len(ordered) + 1)
    return normal_score(place)
