"""Numbers as people read them."""

from __future__ import annotations

from typing import Final

from streamfill.loadgen.ratios import Spread

NOTHING: Final = "\N{EN DASH}"
_TIMES: Final = "\N{MULTIPLICATION SIGN}"
_GLUE: Final = "\N{NO-BREAK SPACE}"
_SAME: Final = 1.005
"""Ratios nearer to 1 than this are shown as the same."""


def milliseconds(value_ms: float | None) -> str:
    """``0.42``, ``8.3``, ``812``, ``12,400``; no unit."""
    if value_ms is None:
        return NOTHING
    if value_ms < 1:
        return f"{value_ms:.2f}"
    return f"{value_ms:.1f}" if value_ms < 10 else f"{value_ms:,.0f}"


def duration(value_s: float | None) -> str:
    """``42 ms``, ``8.13 s``, ``62 s``; never broken into two lines."""
    if value_s is None:
        return NOTHING
    if value_s < 1:
        return f"{milliseconds(1000 * value_s)}{_GLUE}ms"
    return f"{value_s:.2f}{_GLUE}s" if value_s < 10 else f"{value_s:,.0f}{_GLUE}s"


def number(value: float | None, digits: int = 1) -> str:
    """With so many digits behind the point."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def times(ratio: float) -> str:
    """With the sign: 0.97, 8.3, 11 times."""
    if ratio < 2:
        return f"{ratio:.2f}{_TIMES}"
    return f"{ratio:.1f}{_TIMES}" if ratio < 10 else f"{ratio:.0f}{_TIMES}"


def ratio_with_spread(found: Spread | None) -> str:
    """The median over runs, and the least and greatest where they differ."""
    if found is None:
        return NOTHING
    if times(found.min) == times(found.max):
        return times(found.median)
    return f"{times(found.median)} ({times(found.min)} to {times(found.max)})"


def sooner(ratio: float) -> str:
    """So many times ``sooner than``, ``later than``, or ``as soon as``."""
    if 1 / _SAME < ratio < _SAME:
        return "as soon as"
    return f"{times(ratio)} sooner than" if ratio > 1 else f"{times(1 / ratio)} later than"


def plural(amount: int, noun: str) -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
