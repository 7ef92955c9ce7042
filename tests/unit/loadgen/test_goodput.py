"""Objectives of the option ``--goodput``."""

from __future__ import annotations

import pytest

from streamfill.errors import ConfigError
from streamfill.loadgen.figures import Figure
from streamfill.loadgen.goodput import Goodput, parse_goodput


def test_words_are_limits() -> None:
    """Each word is a figure and its limit in milliseconds; ttft means from the last segment."""
    parsed = parse_goodput(["ttft:500", "tpot:50.5", "e2e:1e4", "ttft_query:9"])
    assert parsed == Goodput(
        objectives_ms={
            "ttft_last_segment_ms": 500,
            "tpot_ms": 50.5,
            "e2e_ms": 10_000,
            "ttft_query_ms": 9,
        }
    )
    assert parse_goodput(None) is None
    assert parse_goodput([]) is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["ttft"], "write NAME:MILLISECONDS"),
        (["speed:3"], "no figure 'speed'; known: ttft"),
        (["ttft:fast"], "number of milliseconds"),
        (["ttft:"], "number of milliseconds"),
        (["ttft:nan"], "number of milliseconds"),
        (["ttft:inf"], "number of milliseconds"),
        (["ttft:0"], "above 0"),
        (["ttft:-1"], "above 0"),
        (["ttft:1", "ttft:2"], "twice"),
    ],
)
def test_wrong_words(words: list[str], part: str) -> None:
    """The error names the option, the word and what would be right."""
    with pytest.raises(ConfigError, match="--goodput") as caught:
        parse_goodput(words)
    assert part in str(caught.value)
    assert repr(words[-1]) in str(caught.value)


def test_a_limit_is_still_good() -> None:
    """A request at its limit is good; one above it in any figure is not."""
    goodput = Goodput(objectives_ms={"ttft_last_segment_ms": 500, "tpot_ms": 50})
    assert goodput.is_met({Figure.TTFT_LAST_SEGMENT: 500, Figure.TPOT: 50})
    assert not goodput.is_met({Figure.TTFT_LAST_SEGMENT: 500.1, Figure.TPOT: 1})
    assert not goodput.is_met({Figure.TTFT_LAST_SEGMENT: 1, Figure.TPOT: 51})


def test_figures_that_a_request_does_not_have() -> None:
    """An answer of one token cannot miss the time per further token; one without a first token
    is not good."""
    goodput = Goodput(objectives_ms={"ttft_last_segment_ms": 500, "tpot_ms": 50})
    assert goodput.is_met({Figure.TTFT_LAST_SEGMENT: 1, Figure.TPOT: None})
    assert not goodput.is_met({Figure.TPOT: 1})
