"""A description of a trace as lines of text: a table, and histograms made of bars. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Final

from streamfill.traces.describe import Description, Quantity
from streamfill.traces.sample import PERCENTS, Histogram, Summary

_BARS: Final = "▁▂▃▄▅▆▇█"
_LABELS: Final[Mapping[Quantity, str]] = {
    Quantity.INTER_ARRIVAL_MS: "between arrivals, ms",
    Quantity.FIRST_DELAY_MS: "first segment, ms",
    Quantity.GAP_MS: "gap, ms",
    Quantity.RETRIEVAL_MS: "retrieval, ms",
    Quantity.COMMIT_DELAY_MS: "commit delay, ms",
    Quantity.SEGMENTS: "segments",
    Quantity.PROMPT_TOKENS: "prompt, tokens",
    Quantity.PROMPT_CHARS: "prompt, characters",
    Quantity.OUTPUT_TOKENS: "answer, tokens",
    Quantity.UPDATE_KEPT_SHARE: "kept by an update",
}
_LABEL_WIDTH: Final = 21
_FIGURE_WIDTH: Final = 8
_LINE_WIDTH: Final = 100
_COLUMNS: Final = ("mean", *(f"P{percent}" for percent in PERCENTS), "max")


def lines_of(description: Description) -> Iterator[str]:
    """The whole description."""
    yield from _head(description)
    yield ""
    columns = "".join(f"{column:>{_FIGURE_WIDTH}}" for column in _COLUMNS)
    yield " " * _LABEL_WIDTH + columns
    for quantity, label in _LABELS.items():
        summary = description.summaries.get(quantity.value)
        if summary is not None:
            yield f"{label:<{_LABEL_WIDTH}}" + "".join(
                f"{figure(value):>{_FIGURE_WIDTH}}" for value in _values(summary)
            )
    if any(summary.is_sampled for summary in description.summaries.values()):
        yield "Percentiles of more than 200,000 values are those of a random sample."
    yield ""
    for quantity, label in _LABELS.items():
        bins = description.histograms.get(quantity.value)
        if bins is not None:
            yield f"{label:<{_LABEL_WIDTH}}{_bars(bins)}"
    yield ""
    yield from _tail(description)


def figure(value: float) -> str:
    """A number with three or more significant digits, in at most eight characters up to 10⁷."""
    if value == 0:
        return "0"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}" if abs(value) < 10_000_000 else f"{value:.2g}"
    return f"{value:.3g}"


def bars(shares: tuple[float, ...]) -> str:
    """One character for each share; a blank only where there is nothing."""
    greatest = max(shares, default=0.0)
    if not greatest:
        return " " * len(shares)
    top = len(_BARS) - 1
    return "".join(" " if not each else _BARS[round(each / greatest * top)] for each in shares)


def _head(description: Description) -> Iterator[str]:
    header = description.header
    yield from _wrapped(": ".join(part for part in (header.name, header.description) if part))
    if header.source:
        yield from _wrapped(f"Source: {header.source}")
    if header.drawn:
        yield "Drawn at random:"
        for field, text in header.drawn.items():
            yield from _wrapped(f"  {field}: {text}")
    yield (
        f"Scales: tokens times {header.token_scale:.4g}, durations times {header.time_scale:.4g}; "
        f"seed {header.seed}"
    )
    modes = ", ".join(f"{count:,} {mode}" for mode, count in description.num_requests.items())
    yield (
        f"{sum(description.num_requests.values()):,} requests ({modes or 'none'}), "
        f"{description.num_segments:,} segments, {description.num_documents:,} documents, "
        f"{description.num_sessions:,} sessions"
    )
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in description.content.items())
    if kinds:
        yield f"Content of segments: {kinds}; text is counted in {description.counted_in}"


def _tail(description: Description) -> Iterator[str]:
    load = description.load
    if description.prefix_shared is not None:
        bound = "at least " if description.prefix_is_lower_bound else ""
        yield (
            f"Shared between requests: {bound}{description.prefix_shared:.1%} of all prompts is "
            "the beginning of an earlier one"
        )
    yield f"Duration: {figure(load.duration_s)} s until the last context is complete"
    if load.requests_per_s is not None:
        yield f"Offered: {load.requests_per_s:.3g} requests/s" + _tokens(
            load.prompt_tokens_per_s, load.streamed_tokens_per_s
        )
    if load.prefill_utilisation is not None and load.streamed_utilisation is not None:
        yield (
            f"Prefill utilisation: {load.prefill_utilisation:.0%} with prompts in one piece, at "
            f"most {load.streamed_utilisation:.0%} streamed"
        )


def _tokens(prompt_rate: float | None, streamed_rate: float | None) -> str:
    if prompt_rate is None or streamed_rate is None:
        return ""
    text = f", {figure(prompt_rate)} prompt tokens/s"
    if streamed_rate > prompt_rate:
        text += f"; {figure(streamed_rate)} tokens/s if each update is computed to its end"
    return text


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _LINE_WIDTH, subsequent_indent="    ", drop_whitespace=True)


def _values(summary: Summary) -> list[float]:
    return [summary.mean, *summary.percentiles.values(), summary.maximum]


def _bars(bins: Histogram) -> str:
    scale = ", logarithmic" if bins.is_log else ""
    return f"{figure(bins.low):>{_FIGURE_WIDTH}} {bars(bins.shares)} {figure(bins.high)}{scale}"
