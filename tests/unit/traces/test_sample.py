"""Figures of many values need little memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.traces.sample import Sample


def sample_of(values: list[float], capacity: int = 1000) -> Sample:
    sample = Sample(capacity)
    for value in values:
        sample.add(value)
    return sample


def test_exact_while_there_is_room() -> None:
    """Percentiles of few values are theirs."""
    summary = sample_of([float(n) for n in range(101)]).summary()
    assert summary is not None
    assert summary.num_values == 101
    assert summary.mean == 50
    assert (summary.minimum, summary.maximum) == (0, 100)
    assert list(summary.percentiles.values()) == [5, 25, 50, 75, 95, 99]
    assert not summary.is_sampled


def test_sampled_where_there_is_none() -> None:
    """Of more values than there is room for, mean and ends stay exact, percentiles nearly."""
    values = [float(n) for n in range(20_000)]
    random.Random(1).shuffle(values)
    summary = sample_of(values).summary()
    assert summary is not None
    assert summary.is_sampled
    assert summary.mean == pytest.approx(9999.5)
    assert (summary.minimum, summary.maximum) == (0, 19_999)
    assert summary.percentiles["p50"] == pytest.approx(10_000, rel=0.1)
    assert summary.percentiles["p95"] == pytest.approx(19_000, rel=0.05)


def test_nothing_has_no_figures() -> None:
    """Without values there is neither a summary nor a histogram."""
    assert Sample().summary() is None
    assert Sample().histogram() is None
    assert sample_of([3.0, 3.0]).histogram() is None


def test_few_whole_numbers_have_a_bin_each() -> None:
    """Numbers of segments are not mixed in one bin."""
    histogram = sample_of([1, 1, 2, 4]).histogram()
    assert histogram is not None
    assert histogram.shares == (0.5, 0.25, 0, 0.25)


def test_heavy_tails_have_logarithmic_bins() -> None:
    """Values over several orders of magnitude are told apart; evenly spread ones stay linear."""
    heavy = sample_of([1.5 * 10 ** (n / 20) for n in range(100)]).histogram()
    even = sample_of([n + 0.5 for n in range(100)]).histogram()
    assert heavy is not None
    assert even is not None
    assert heavy.is_log
    assert not even.is_log
    for histogram in (heavy, even):
        assert max(histogram.shares) < 2.5 * min(histogram.shares)


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=200))
def test_every_value_is_in_a_bin(values: list[float]) -> None:
    """Shares sum up to 1 whatever the values."""
    histogram = sample_of(values).histogram()
    if histogram is not None:
        assert sum(histogram.shares) == pytest.approx(1)
