"""The figures of a run: a pure function of its records. Times in ms, rates per second.

Warm-up requests are left out of everything but the servers' counters, which know no requests.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from streamfill.loadgen.figures import (
    PERCENTS,
    Distribution,
    Figure,
    distribution,
    request_figures,
)
from streamfill.loadgen.goodput import Goodput
from streamfill.loadgen.records import RequestRecord, RunResult
from streamfill.loadgen.runner import wall_s
from streamfill.observability.lifetime import LifetimeEvent

LATE_S: Final = 0.005
"""A generator that is later than this measures itself; its own limit is a P99 below it."""
_PREEMPTION_PREFIX: Final = "PREEMPTED_"
_FLAT_NAMES: Final = {Figure.TTFT_LAST_SEGMENT: "ttft_ms"}
"""Where load generators have a customary name for a figure: without a suffix, the time to the
first token runs from the moment at which a one-shot client would send its prompt."""


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TokenTotals(_Struct, frozen=True, kw_only=True):
    """Prompt tokens of a run; None: the target does not say."""

    num_prompt: int | None = None
    num_computed: int | None = None
    """Went through the model, each time counted: the sum of what requests report."""
    num_reused: int | None = None
    """Found in the cache, left there by other requests."""
    num_invalidated: int | None = None
    """Computed, then thrown away by an update."""
    num_recomputed: int | None = None
    """Computed again because memory pressure had dropped them."""
    num_computed_by_servers: int | None = None
    """The servers' counters, after minus before: warm-ups and broken requests too."""
    num_evicted_by_servers: int | None = None
    """Likewise: KV slots that were taken from the cache."""


class RunSummary(_Struct, frozen=True, kw_only=True):
    """The figures of one run."""

    run: int
    label: str
    mode: str
    target: str
    policy: str = ""
    trace: str = ""
    request_rate: float | None = None
    max_concurrency: int | None = None
    is_closed_loop: bool = False
    wall_s: float
    """From the first arrival to the end of the last answer, warm-up left out; of the rates."""
    num_requests: int
    num_completed: int
    failures: dict[str, int]
    """Requests that failed, by their error code."""
    figures: dict[str, Distribution]
    """By the names of ``Figure``; a figure without a value is not in it."""
    requests_per_s: float | None
    """Completed requests."""
    output_tokens_per_s: float | None
    input_tokens_per_s: float | None
    """Prompt tokens of completed requests, cached ones included."""
    num_output_tokens: int
    objectives_ms: dict[str, float] = {}
    goodput_per_s: float | None = None
    """Requests per second that met all objectives; None: there are none."""
    goodput_ratio: float | None = None
    """Their share in all requests."""
    tokens: TokenTotals = TokenTotals()
    num_preemptions: dict[str, int] = {}
    """By kind: ``recompute`` dropped the KV, ``swap`` copied it to host memory."""
    num_preempted_tokens: dict[str, int] = {}
    """Likewise: tokens that had to be brought back."""
    num_priced_preemptions: int = 0
    """Of them, those whose cost was predicted and is known, since all of the KV came back."""
    preemption_cost_error: float | None = None
    """Of those, the median of ``|predicted - actual| / actual``."""
    preemption_costs_s: dict[str, tuple[float, float]] = {}
    """Of those, by kind: sums of predicted and of actual costs, in seconds."""
    num_handoffs: int = 0
    """Requests whose KV went to a decode server."""
    handoffs: dict[str, int] = {}
    """How they went: ``done``, ``none``, or ``failed`` for all that say why."""
    handoff_bytes: int | None = None
    num_late: int = 0
    """Things that the generator sent more than ``LATE_S`` late."""

    @property
    def num_failed(self) -> int:
        """Requests without an answer."""
        return self.num_requests - self.num_completed

    def figure(self, figure: Figure) -> Distribution | None:
        """The distribution of a figure; None: nothing is known of it."""
        return self.figures.get(figure.value)


def summarise(result: RunResult, goodput: Goodput | None = None) -> RunSummary:
    """The figures of a run.

    Args:
        result: what is known of its requests.
        goodput: the objectives that a good request meets, if any.
    """
    records = [record for record in result.records if not record.is_warm_up]
    has_warm_up = len(records) < len(result.records)
    run_s = wall_s(records) if has_warm_up else result.wall_s
    completed = [record for record in records if record.error_code is None]
    values = [request_figures(record) for record in completed]
    lags_s = [lag_s for record in records for lag_s in record.lag_s]
    all_values = {figure: [ms for each in values for ms in each[figure]] for figure in Figure}
    all_values[Figure.LAG] = [1000.0 * lag_s for lag_s in lags_s]
    figures = {figure: distribution(found) for figure, found in all_values.items()}
    num_good = _num_good(values, goodput)
    num_output_tokens = sum(record.num_output_tokens for record in completed)
    handoffs = Counter(_handoff(record.handoff) for record in records if record.handoff)
    num_preemptions, num_preempted_tokens = _preemptions(records)
    priced = priced_preemptions(records)
    return RunSummary(
        run=result.run,
        label=result.label,
        mode=result.mode.value,
        target=result.target,
        policy=result.policy,
        trace=result.trace,
        request_rate=result.request_rate,
        max_concurrency=result.max_concurrency,
        is_closed_loop=result.is_closed_loop,
        wall_s=run_s,
        num_requests=len(records),
        num_completed=len(completed),
        failures=dict(sorted(Counter(r.error_code for r in records if r.error_code).items())),
        figures={figure.value: found for figure, found in figures.items() if found is not None},
        requests_per_s=_per_s(len(completed), run_s),
        output_tokens_per_s=_per_s(num_output_tokens, run_s),
        input_tokens_per_s=_per_s(_sum(completed, "num_prompt_tokens"), run_s),
        num_output_tokens=num_output_tokens,
        objectives_ms={} if goodput is None else goodput.objectives_ms,
        goodput_per_s=_per_s(num_good, run_s),
        goodput_ratio=None if num_good is None or not records else num_good / len(records),
        tokens=_tokens(result, records),
        num_preemptions=num_preemptions,
        num_preempted_tokens=num_preempted_tokens,
        num_priced_preemptions=len(priced),
        preemption_cost_error=_cost_error(priced),
        preemption_costs_s=_cost_sums(priced),
        num_handoffs=handoffs["done"],
        handoffs=dict(sorted(handoffs.items())),
        handoff_bytes=_sum(records, "handoff_bytes"),
        num_late=sum(lag_s > LATE_S for lag_s in lags_s),
    )


def flat(summary: RunSummary) -> dict[str, Any]:
    """The summary with the keys that load generators share, such as ``p99_ttft_ms``, one level
    deep but for what is counted by kind."""
    facts: dict[str, Any] = msgspec.to_builtins(summary)
    del facts["figures"], facts["tokens"]
    facts["num_failed"] = summary.num_failed
    facts |= {f"{name}_tokens": n for name, n in msgspec.to_builtins(summary.tokens).items()}
    for figure in Figure:
        name = _FLAT_NAMES.get(figure, figure.value)
        found = summary.figure(figure)
        facts[f"mean_{name}"] = None if found is None else round(found.mean, 3)
        for percent in PERCENTS:
            facts[f"p{percent}_{name}"] = None if found is None else round(found.at(percent), 3)
        facts[f"max_{name}"] = None if found is None else round(found.max, 3)
    return facts


def _num_good(
    values: Sequence[Mapping[Figure, Sequence[float]]], goodput: Goodput | None
) -> int | None:
    if goodput is None:
        return None
    first = [{figure: next(iter(found), None) for figure, found in v.items()} for v in values]
    return sum(goodput.is_met(each) for each in first)


def _tokens(result: RunResult, records: Sequence[RequestRecord]) -> TokenTotals:
    return TokenTotals(
        num_prompt=_sum(records, "num_prompt_tokens"),
        num_computed=_sum(records, "num_computed_tokens"),
        num_reused=_sum(records, "num_reused_tokens"),
        num_invalidated=_sum(records, "num_invalidated_tokens"),
        num_recomputed=_sum(records, "num_recomputed_tokens"),
        num_computed_by_servers=_grown(result, "num_computed_tokens"),
        num_evicted_by_servers=_grown(result, "num_evicted_tokens"),
    )


def _preemptions(records: Sequence[RequestRecord]) -> tuple[dict[str, int], dict[str, int]]:
    num, num_tokens = Counter[str](), Counter[str]()
    for record in records:
        for event, _, _, tokens in record.server_events:
            if event.startswith(_PREEMPTION_PREFIX):
                kind = LifetimeEvent(event).value.removeprefix(_PREEMPTION_PREFIX).lower()
                num[kind] += 1
                num_tokens[kind] += tokens or 0
    return dict(sorted(num.items())), dict(sorted(num_tokens.items()))


class PricedPreemption(NamedTuple):
    """A preemption whose predicted and actual cost are known; seconds."""

    kind: str
    num_tokens: int
    predicted_s: float
    actual_s: float


def priced_preemptions(records: Sequence[RequestRecord]) -> list[PricedPreemption]:
    """Those of some requests, in order."""
    return [
        PricedPreemption(kind, num_tokens, predicted_s, actual_s)
        for record in records
        for kind, num_tokens, predicted_s, actual_s in record.preemptions
        if predicted_s is not None and actual_s is not None and actual_s > 0.0
    ]


def _cost_error(priced: Sequence[PricedPreemption]) -> float | None:
    errors = [abs(each.predicted_s - each.actual_s) / each.actual_s for each in priced]
    return statistics.median(errors) if errors else None


def _cost_sums(priced: Sequence[PricedPreemption]) -> dict[str, tuple[float, float]]:
    sums: dict[str, tuple[float, float]] = {}
    for each in priced:
        predicted_s, actual_s = sums.get(each.kind, (0.0, 0.0))
        sums[each.kind] = (predicted_s + each.predicted_s, actual_s + each.actual_s)
    return sums


def _handoff(outcome: str) -> str:
    """The outcome without the reason that may follow it."""
    return outcome.partition(":")[0].strip()


def _grown(result: RunResult, counter: str) -> int | None:
    """By how much a counter grew; None: it is not there, or a server began anew in between."""
    before = result.counters_before.get(counter)
    after = result.counters_after.get(counter)
    return None if before is None or after is None or after < before else after - before


def _sum(records: Sequence[RequestRecord], field: str) -> int | None:
    known = [value for record in records if (value := getattr(record, field)) is not None]
    return sum(known) if known else None


def _per_s(amount: float | None, wall_s: float) -> float | None:
    return None if amount is None or wall_s <= 0 else amount / wall_s
