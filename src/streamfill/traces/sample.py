"""Percentiles of any number of values in bounded memory. Pure."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from streamfill.observability.lifetime import percentiles

PERCENTS: Final = (5, 25, 50, 75, 95, 99)
MOST_BINS: Final = 32
_FEWEST_BINS: Final = 8
_LOG_RANGE: Final = 10.0
"""Between the least and the greatest value, below which bins are never logarithmic."""
_HEAVY_TAIL: Final = 1.25
"""A mean so many times the median has a heavy tail."""
_CAPACITY: Final = 200_000
"""Values that are kept, of 8 bytes each; with more of them percentiles come from a sample."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is known of some values.

    Attributes:
        num_values: of how many.
        percentiles: by percent, as "p50".
        is_sampled: whether the percentiles are those of a random sample.
    """

    num_values: int
    mean: float
    minimum: float
    maximum: float
    percentiles: dict[str, float]
    is_sampled: bool


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Relative frequencies.

    Attributes:
        low, high: where the first bin begins and the last one ends.
        is_log: whether the bins are equally wide on the logarithmic scale.
        shares: of the values, by bin.
    """

    low: float
    high: float
    is_log: bool
    shares: tuple[float, ...]


class Sample:
    """Values of one quantity, as they come."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._kept = array("d")
        self._count = 0
        self._sum = 0.0
        self._least = math.inf
        self._greatest = -math.inf
        self._generator = random.Random(0)

    def add(self, value: float) -> None:
        """Takes a value in."""
        self._count += 1
        self._sum += value
        self._least = min(self._least, value)
        self._greatest = max(self._greatest, value)
        if len(self._kept) < self._capacity:
            self._kept.append(value)
            return
        # Each of the values so far is kept with the same chance.
        place = self._generator.randrange(self._count)
        if place < self._capacity:
            self._kept[place] = value

    @property
    def total(self) -> float:
        """The sum of all values."""
        return self._sum

    def summary(self) -> Summary | None:
        """None of nothing."""
        if not self._count:
            return None
        found = percentiles(self._kept, PERCENTS)
        return Summary(
            num_values=self._count,
            mean=self._sum / self._count,
            minimum=self._least,
            maximum=self._greatest,
            percentiles={f"p{percent:g}": value or 0.0 for percent, value in found.items()},
            is_sampled=self._count > self._capacity,
        )

    def histogram(self) -> Histogram | None:
        """None where all values are the same."""
        if not self._count or self._least == self._greatest:
            return None
        return histogram(self._kept, self._least, self._greatest)


def histogram(values: Sequence[float], least: float, greatest: float) -> Histogram:
    """The histogram of at least one value between ``least`` and ``greatest``, which differ.

    Few whole numbers get a bin each. Otherwise bins are logarithmic where the values are positive
    and their tail is heavy, and there are more of them for more values.
    """
    if greatest - least < MOST_BINS and all(value == int(value) for value in values):
        num_bins = int(greatest - least) + 1
        counts = [0] * num_bins
        for value in values:
            counts[int(value - least)] += 1
        return _histogram(counts, least, greatest, is_log=False)
    num_bins = min(MOST_BINS, max(_FEWEST_BINS, round(2 * math.sqrt(len(values)))))
    counts = [0] * num_bins
    is_log, low = _log_start(values, least, greatest)
    start, end = (math.log(low), math.log(greatest)) if is_log else (low, greatest)
    for value in values:
        place = math.log(max(value, low)) if is_log else value
        counts[min(int((place - start) / (end - start) * num_bins), num_bins - 1)] += 1
    return _histogram(counts, low, greatest, is_log=is_log)


def _log_start(values: Sequence[float], least: float, greatest: float) -> tuple[bool, float]:
    """Whether the bins are logarithmic, and where the first one begins."""
    positive = sorted(value for value in values if value > 0)
    if not positive or least < 0 or greatest < _LOG_RANGE * positive[0]:
        return False, least
    median = positive[len(positive) // 2]
    if sum(positive) / len(positive) < _HEAVY_TAIL * median:
        return False, least
    return True, positive[0]


def _histogram(counts: list[int], low: float, high: float, *, is_log: bool) -> Histogram:
    total = sum(counts)
    return Histogram(
        low=low, high=high, is_log=is_log, shares=tuple(count / total for count in counts)
    )
