"""What the charts have in common: their form as data for plotly.js, axes, and fewer points.

Colours of text, grid and background are set by the page, which knows whether it is light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

Drawing: TypeAlias = dict[str, Any]
"""``data`` and ``layout`` of a plotly.js figure, and nothing else."""
Trace: TypeAlias = dict[str, Any]

LEAST_MS: Final = 0.01
"""What is drawn of shorter times, which have no place on a logarithmic axis."""

_FEW_DECADES: Final = 2.8
"""A logarithmic axis of fewer has room for ticks at 2 and 5 as well."""
_ONE_DECADE: Final = 0.9
"""On one that is shorter, ticks at even distances are the better ones."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One place for a drawing on the page.

    Attributes:
        id: of its element.
        title: its heading.
        note: how to read it, in a sentence or two.
        views: drawings between which the reader chooses, by name; at least one.
        shown: name of the one that is there at first.
    """

    id: str
    title: str
    note: str
    views: dict[str, Drawing]
    shown: str


def layout(*, height: int, **parts: Any) -> dict[str, Any]:
    """A layout with the margins and the legend that all charts have."""
    return {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 12, "b": 48},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left"},
        "hovermode": "closest",
        "dragmode": "zoom",
        **parts,
    }


def log_ms_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis for times in ms that holds all ``values``; ticks with their units."""
    least, most = (min(values), max(values)) if values else (1.0, 1e4)
    low, high = math.log10(max(least, LEAST_MS)), math.log10(max(most, LEAST_MS))
    pad = 0.06 * max(0.8, high - low)
    low, high = low - pad, high + pad
    ticks = _ticks(low, high)
    return {
        "type": "log",
        "title": {"text": title, "standoff": 12},
        "automargin": True,
        "tickvals": ticks,
        "ticktext": [_tick(value_ms) for value_ms in ticks],
        "range": [round(low, 3), round(high, 3)],
    }


def on_log_axis(value_ms: float) -> float:
    """The value as it is drawn."""
    return short(max(value_ms, LEAST_MS))


def short(value: float) -> float:
    """Four significant digits: more cannot be seen, and each costs space in the page."""
    return float(f"{value:.4g}")


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(number * step)] for number in range(most)]


def plain(text: str, most: int = 60) -> str:
    """A foreign text for a label or a hover text: plotly.js reads a little HTML in them."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return html.escape(cut)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10 to the power of ``low`` to that of ``high``."""
    if high - low > _ONE_DECADE:
        steps = (1, 2, 5) if high - low < _FEW_DECADES else (1,)
        return [step * 10.0**e for e in range(math.floor(low), math.ceil(high)) for step in steps]
    least, most = 10.0**low, 10.0**high
    rough = (most - least) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(n for n in (1, 2, 5, 10) if n * power >= rough)
    first = math.ceil(least / step)
    return [short(step * n) for n in range(first, math.floor(most / step) + 1)]


def _tick(value_ms: float) -> str:
    return f"{value_ms:g} ms" if value_ms < 1000 else f"{value_ms / 1000:g} s"
