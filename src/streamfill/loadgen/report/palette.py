"""Colours and marks of the report, the same for a mode wherever it appears.

The colours are those of Okabe and Ito (modes) and of Paul Tol's muted scheme (stages), both made to
be told apart by people with colour-blindness. Modes differ by mark and line too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple


class Style(NamedTuple):
    """How a mode is drawn: a colour, a line (``dash`` of plotly.js), a mark (``symbol``)."""

    colour: str
    dash: str
    symbol: str


_KNOWN: Final = {
    "oneshot": Style("#D55E00", "solid", "circle"),
    "warmup": Style("#E69F00", "dash", "square"),
    "stream": Style("#0072B2", "solid", "diamond"),
    "sglang-pd:oneshot": Style("#CC79A7", "solid", "circle-open"),
    "sglang-pd:warmup": Style("#CC79A7", "dash", "square-open"),
    "vllm:oneshot": Style("#009E73", "solid", "circle-open"),
    "vllm:warmup": Style("#009E73", "dash", "square-open"),
    "vllm:stream": Style("#56B4E9", "dot", "diamond-open"),
}
_OTHERS: Final = tuple(
    Style(colour, dash, symbol)
    for dash, symbol in (("dashdot", "cross"), ("longdash", "x"), ("dot", "triangle-up"))
    for colour in ("#56B4E9", "#009E73", "#CC79A7", "#E69F00")
)
NEUTRAL: Final = "#8a8f98"
"""Readable on a light and on a dark page."""


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label; no two of the same look, as long as there are fewer than twenty."""
    others = [label for label in labels if label not in _KNOWN]
    return {
        label: _KNOWN[label] if label in _KNOWN else _OTHERS[others.index(label) % len(_OTHERS)]
        for label in labels
    }


class StageColour:
    """Colours of what happens to a stream, in the chart of stages and in the timelines."""

    TOKENISE: Final = "#44AA99"
    QUEUE: Final = "#DDCC77"
    COMPUTE: Final = "#117733"
    HANDOFF: Final = "#AA4499"
    DECODE_QUEUE: Final = "#88CCEE"
    UNKNOWN: Final = "#b4b8bf"
