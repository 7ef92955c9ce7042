"""Which runs may be set beside each other: those that met the same load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from streamfill.loadgen.metrics import RunSummary
from streamfill.loadgen.ratios import labels
from streamfill.loadgen.records import RunResult


class Load(NamedTuple):
    """What the runs of a comparison have in common."""

    trace: str
    is_closed_loop: bool
    request_rate: float | None
    max_concurrency: int | None

    @property
    def name(self) -> str:
        """In words, without the trace: ``2 requests per second, at most 8 at the same time``."""
        if self.is_closed_loop:
            words = "each request begins when another one has ended"
        elif self.request_rate is None:
            words = "requests arrive as in the trace"
        else:
            words = f"{self.request_rate:g} requests per second"
        if self.max_concurrency is not None:
            words += f", at most {self.max_concurrency} at the same time"
        return words


@dataclass(frozen=True)
class Batch:
    """The runs of one load; ``results`` and ``summaries`` stand in the same order.

    ``name`` is that of the load, with the trace where there are several; no two are the same.
    """

    name: str
    load: Load
    results: tuple[RunResult, ...]
    summaries: tuple[RunSummary, ...]

    @property
    def labels(self) -> list[str]:
        """The modes, in the order of tables."""
        return labels(self.summaries)

    def of(self, label: str) -> list[RunResult]:
        """The runs of one mode."""
        return [result for result in self.results if result.label == label]

    def summaries_of(self, label: str) -> list[RunSummary]:
        """Their figures."""
        return [summary for summary in self.summaries if summary.label == label]


def batches(results: Sequence[RunResult], summaries: Sequence[RunSummary]) -> list[Batch]:
    """The runs by load, from the lowest rate to the highest."""
    by_load: dict[Load, list[tuple[RunResult, RunSummary]]] = {}
    for result, summary in zip(results, summaries, strict=True):
        by_load.setdefault(_load(result), []).append((result, summary))
    has_traces = len({load.trace for load in by_load}) > 1
    return [
        Batch(
            f"{load.trace}: {load.name}" if has_traces else load.name,
            load,
            tuple(result for result, _ in pairs),
            tuple(summary for _, summary in pairs),
        )
        for load, pairs in sorted(by_load.items(), key=lambda item: _order(item[0]))
    ]


def renumbered(results: Iterable[RunResult]) -> list[RunResult]:
    """The same runs with numbers that are there once only: a comparison that was made again, or
    stands in another file, begins at 0 again, and its runs are more repetitions of the first."""
    first_number: dict[Load, int] = {}
    seen: dict[Load, set[tuple[str, int]]] = {}
    numbered = []
    for result in results:
        load = _load(result)
        known = seen.setdefault(load, set())
        run = first_number.get(load, 0) + result.run
        if (result.label, run) in known:
            first_number[load] = 1 + max(number for _, number in known)
            run = first_number[load] + result.run
        known.add((result.label, run))
        numbered.append(msgspec.structs.replace(result, run=run))
    return numbered


def _load(result: RunResult) -> Load:
    return Load(result.trace, result.is_closed_loop, result.request_rate, result.max_concurrency)


def _order(load: Load) -> tuple[str, bool, float, int]:
    return (load.trace, load.is_closed_loop, load.request_rate or 0.0, load.max_concurrency or 0)
