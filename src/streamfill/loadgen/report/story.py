"""The sentences on top of the page: what came out, and what to be careful about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

from streamfill.loadgen.figures import Figure
from streamfill.loadgen.identity import compare_outputs
from streamfill.loadgen.metrics import LATE_S
from streamfill.loadgen.outcome import median_of
from streamfill.loadgen.ratios import ModeRatios, Spread, baseline_label, ratios
from streamfill.loadgen.report.loads import Batch
from streamfill.loadgen.report.palette import styles
from streamfill.loadgen.report.wording import (
    NOTHING,
    duration,
    listed,
    milliseconds,
    plural,
    sooner,
    times,
)
from streamfill.loadgen.table import identity_lines

_LATE_MS: Final = 1000 * LATE_S


class Remark(NamedTuple):
    """One line above the figures: good to know, or a warning; ``more`` are details."""

    kind: Literal["good", "warning"]
    text: str
    more: tuple[str, ...] = ()


class Story(NamedTuple):
    """The sentence on top, and what else is to be said of the modes."""

    main: str
    more: tuple[str, ...]


class Tile(NamedTuple):
    """One mode at a glance."""

    label: str
    colour: str
    value: str
    unit: str
    details: tuple[str, ...]


def subject(batches: Sequence[Batch]) -> str:
    """What was compared, on what."""
    known = list(dict.fromkeys(label for batch in batches for label in batch.labels))
    traces = list(dict.fromkeys(batch.load.trace for batch in batches if batch.load.trace))
    return listed(known) + (f" on {listed(traces)}" if traces else "")


def settings(batches: Sequence[Batch]) -> list[str]:
    """How much was run at which load, in as few lines as possible."""
    names: dict[str, list[str]] = {}
    for batch in batches:
        names.setdefault(_amount(batch), []).append(batch.name)
    return [f"{amount}: {listed(each)}" for amount, each in names.items()]


def _amount(batch: Batch) -> str:
    runs = {label: len(batch.of(label)) for label in batch.labels}
    num_runs = sorted(set(runs.values()))
    num_requests = sorted({summary.num_requests for summary in batch.summaries})
    requests = f"{_range(num_requests)} request{'' if num_requests == [1] else 's'} in each run"
    per_mode = f"{_range(num_runs)} run{'' if num_runs == [1] else 's'} of each mode"
    return f"{requests}, {per_mode}"


def story(batch: Batch) -> Story:
    """The ratios of each mode in words, the streaming mode first; plain figures where nothing is to
    be compared."""
    base = baseline_label(batch.summaries)
    by_label = ratios(batch.summaries)
    compared = [
        (main, _aside(label, by_label[label]))
        for label in sorted(batch.labels, key=lambda label: label != "stream")
        if base is not None and label != base
        if (main := _ratio_sentence(label, base, by_label[label])) is not None
    ]
    if compared:
        (main, aside), *others = compared
        more = [aside, *(" ".join(part for part in each if part) for each in others)]
        return Story(main, tuple(line for line in more if line))
    plain = []
    for label in batch.labels:
        ms = median_of(batch.summaries_of(label), Figure.TTFT_LAST_SEGMENT, 50)
        if ms is not None:
            wait = duration(ms / 1000)
            plain.append(f"{label} gives its first token {wait} after the last segment (P50).")
    main, *rest = plain or ["No request has an answer."]
    return Story(main, tuple(rest))


def _ratio_sentence(label: str, base: str, mode: ModeRatios) -> str | None:
    last = mode.latency[Figure.TTFT_LAST_SEGMENT.value]
    p50, p95 = last["p50"], last["p95"]
    if p50 is None:
        return None
    text = f"{label} gives its first token {sooner(p50.median)} {base} at the median"
    if p95 is not None:
        text += f" and {_short_sooner(p95)} at P95"
    return text + ", counted from the last segment."


def _aside(label: str, mode: ModeRatios) -> str:
    whole = mode.latency[Figure.TTFT_QUERY.value]["p50"]
    if whole is None:
        return ""
    text = f"Counted from the query, retrieval included, {label} is {_short_sooner(whole)}"
    if mode.throughput is not None:
        text += f"; it has {times(mode.throughput.median)} the output throughput"
    return f"{text}."


def _short_sooner(found: Spread) -> str:
    words = sooner(found.median)
    return words.removesuffix(" than") if words.endswith("than") else "equally soon"


def tiles(batch: Batch) -> list[Tile]:
    """The median wait of each mode, in large figures."""
    look = styles(batch.labels)
    base = baseline_label(batch.summaries)
    by_label = ratios(batch.summaries)
    made = []
    for label in batch.labels:
        runs = batch.summaries_of(label)
        p50 = median_of(runs, Figure.TTFT_LAST_SEGMENT, 50)
        p95 = median_of(runs, Figure.TTFT_LAST_SEGMENT, 95)
        in_s = p50 is not None and p50 >= 10_000
        value = NOTHING if p50 is None else f"{p50 / 1000:,.1f}" if in_s else milliseconds(p50)
        details = [f"P95 {duration(None if p95 is None else p95 / 1000)}"]
        ratio = by_label[label].latency[Figure.TTFT_LAST_SEGMENT.value]["p50"] if base else None
        if label == base:
            details.append("what others are compared with")
        elif ratio is not None and base is not None:
            details.append(f"{sooner(ratio.median)} {base}")
        made.append(Tile(label, look[label].colour, value, "s" if in_s else "ms", tuple(details)))
    return made


def all_remarks(batches: Sequence[Batch], skipped: Mapping[str, str]) -> list[Remark]:
    """Everything that a reader must know before believing a figure."""
    found = [
        Remark("warning", f"{label} did not run: {reason}.") for label, reason in skipped.items()
    ]
    of_loads: dict[Remark, list[str]] = {}
    for batch in batches:
        for remark in _batch_remarks(batch):
            of_loads.setdefault(remark, []).append(batch.name)
    for remark, names in of_loads.items():
        prefix = "" if len(names) == len(batches) else f"{listed(names)}: "
        if not prefix and len(batches) > 1:
            prefix = "At each load: "
        found.append(remark._replace(text=prefix + remark.text))
    return sorted(found, key=lambda each: each.kind == "good")


def _batch_remarks(batch: Batch) -> list[Remark]:
    found: list[Remark] = []
    for label in batch.labels:
        runs = batch.summaries_of(label)
        num_failed = sum(run.num_failed for run in runs)
        if num_failed:
            codes: dict[str, int] = {}
            for run in runs:
                for code, num in run.failures.items():
                    codes[code] = codes.get(code, 0) + num
            num_requests = sum(run.num_requests for run in runs)
            text = f"{label}: {num_failed:,} of {plural(num_requests, 'request')} failed"
            text += "; figures are about the others."
            words = (f"{code}: {num:,}" for code, num in sorted(codes.items()))
            found.append(Remark("warning", text, tuple(words)))
        lags = [lag.p99 for run in runs if (lag := run.figure(Figure.LAG)) is not None]
        if lags and max(lags) > _LATE_MS:
            found.append(
                Remark(
                    "warning",
                    f"{label}: the load generator was late, P99 {milliseconds(max(lags))} ms in "
                    f"the worst run; above {milliseconds(_LATE_MS)} ms it measures itself.",
                )
            )
    if len(batch.results) > 1:
        identity = compare_outputs(batch.results)
        first, *more = identity_lines(identity)
        kind: Literal["good", "warning"] = "good" if identity.is_identical else "warning"
        found.append(Remark(kind, first, tuple(line.strip() for line in more)))
    return found


def _range(numbers: Sequence[int]) -> str:
    if numbers[0] == numbers[-1]:
        return f"{numbers[0]:,}"
    return f"{numbers[0]:,} to {numbers[-1]:,}"
