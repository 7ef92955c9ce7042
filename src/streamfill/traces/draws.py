"""Draws requests of a published workload: when they come, in how many segments, how long.

All published marginals hold together because what belongs together is drawn together:

1. The number of segments, then the gaps between them, each from its own distribution.
2. The retrieval time, so that a request whose gaps sum up to much also has a long one. What the
   gaps leave of it is the delay of the first segment, or of the last one.
3. The tokens of the prompt, more for more segments. They are divided over the segments unevenly.

Every request has a random generator of its own: the first N requests of a seed are the same
whatever the number of requests.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from streamfill.traces.distribution import (
    CountDistribution,
    QuantileCurve,
    bell_counts,
    curve_with_lower_half,
    empirical_score,
    normal_score,
    probability_of_score,
    skewed_counts,
)
from streamfill.traces.published import WORKLOADS, Figures, Workload, WorkloadName

MIN_SEGMENT_TOKENS: Final = 4
"""Scaling down leaves each segment at least so many."""
_LEAST_PROBABILITY: Final = 1e-9
_NUM_SUM_SAMPLES: Final = 4000
"""Sums of gaps from which is read how great a sum is among all."""
_SIZE_SPREAD: Final = 0.7
"""Standard deviation of the logarithm of the size of one part of a prompt."""
_COUNT_TO_TOKENS: Final = 0.4
"""Correlation of the number of segments with the length of the prompt."""


@dataclass(frozen=True, kw_only=True)
class _Assumed:
    """What no figure is published for; `assumptions` says it to the reader of a trace.

    Attributes:
        max_retrieval_s, max_prompt_tokens: of as many queries as were measured.
        least_gap_ms: of as many gaps.
        gaps_to_retrieval: correlation of the normal scores of the two.
        least_rest_ms: of what the gaps leave of the retrieval time.
        rest_is_last: that rest is the delay of the last segment, not of the first one.
    """

    max_retrieval_s: float
    max_prompt_tokens: float
    least_gap_ms: float
    gaps_to_retrieval: float
    least_rest_ms: float
    rest_is_last: bool


_ASSUMED: Final = {
    WorkloadName.CRAWL: _Assumed(
        max_retrieval_s=40.0,
        max_prompt_tokens=96_000,
        least_gap_ms=2.0,
        gaps_to_retrieval=0.97,
        least_rest_ms=100.0,
        rest_is_last=False,
    ),
    WorkloadName.ANN: _Assumed(
        max_retrieval_s=20.0,
        max_prompt_tokens=96_000,
        least_gap_ms=0.1,
        gaps_to_retrieval=0.5,
        least_rest_ms=50.0,
        # The published gaps lie between the starts of windows with the same ranking, and the replay
        # sends a ranking when its window ends: the last one lasts until the search is over
        # (stream2llm, scripts/utils/analysis/chunk_arrival_characterization.py and
        # experiments/anns/replay_anns_queries.py).
        rest_is_last=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class DrawnRequest:
    """One request before it has any content.

    Attributes:
        arrival_ms: since the start of the trace.
        delays_ms: of each segment since the one before it; of the first one since the arrival.
        prompt_tokens: of the final prompt, question included.
        weights: how the tokens are divided over segments (or documents); sum up to 1.
    """

    number: int
    arrival_ms: float
    delays_ms: tuple[float, ...]
    prompt_tokens: int
    weights: tuple[float, ...]


class Draws:
    """The requests of one workload, seed and scale."""

    def __init__(
        self,
        workload: Workload,
        *,
        seed: int,
        token_scale: float = 1.0,
        time_scale: float = 1.0,
        num_parts: int | None = None,
    ) -> None:
        """
        Args:
            token_scale: token counts are the published ones, times this.
            time_scale: times are the published ones, times this.
            num_parts: how many parts a prompt has; None means as many as it has segments.
        """
        self._workload = workload
        self._assumed = _ASSUMED[workload.name]
        self._seed = seed
        self._token_scale = token_scale
        self._time_scale = time_scale
        self._num_parts = num_parts
        self._shape = _shape(workload.name)

    def __iter__(self) -> Iterator[DrawnRequest]:
        """All requests, without an end."""
        arrivals = self.generator("arrivals")
        mean_ms = 1000.0 * self._time_scale / self._workload.highest_request_rate
        arrival_ms, number = 0.0, 0
        while True:
            yield self._request(number, arrival_ms)
            arrival_ms += -math.log(1.0 - arrivals.random()) * mean_ms
            number += 1

    def generator(self, purpose: str) -> random.Random:
        """A random generator for one purpose; the same one for the same seed."""
        return random.Random(f"{self._workload.name}/{self._seed}/{purpose}")

    def _request(self, number: int, arrival_ms: float) -> DrawnRequest:
        generator = self.generator(f"request {number}")
        shape = self._shape
        count_score = normal_score(_probability(generator))
        num_segments = shape.segments.quantile(probability_of_score(count_score))
        gaps_ms = [shape.gap_ms.quantile(_probability(generator)) for _ in range(num_segments - 1)]
        gap_sum_ms = sum(gaps_ms)
        sum_score = empirical_score(shape.gap_sums_ms, gap_sum_ms, generator.random())
        score = _together(sum_score, self._assumed.gaps_to_retrieval, generator)
        retrieval_ms = 1000.0 * shape.retrieval_s.quantile(probability_of_score(score))
        rest_ms = max(retrieval_ms - gap_sum_ms, self._assumed.least_rest_ms)
        delays_ms = (*gaps_ms, rest_ms) if self._assumed.rest_is_last else (rest_ms, *gaps_ms)
        score = _together(count_score, _COUNT_TO_TOKENS, generator)
        num_tokens = shape.prompt_tokens.quantile(probability_of_score(score))
        num_parts = self._num_parts or num_segments
        sizes = [
            math.exp(_SIZE_SPREAD * normal_score(_probability(generator))) for _ in range(num_parts)
        ]
        return DrawnRequest(
            number=number,
            arrival_ms=arrival_ms,
            delays_ms=tuple(each * self._time_scale for each in delays_ms),
            prompt_tokens=max(round(num_tokens * self._token_scale), MIN_SEGMENT_TOKENS),
            weights=tuple(size / sum(sizes) for size in sizes),
        )


def divide_tokens(num_tokens: int, weights: tuple[float, ...]) -> list[int]:
    """Tokens for each weight, at least ``MIN_SEGMENT_TOKENS``; the sum is ``num_tokens`` unless
    that is too little for all."""
    spare = max(num_tokens - MIN_SEGMENT_TOKENS * len(weights), 0)
    ends, total = [], 0.0
    for weight in weights:
        total += weight
        ends.append(round(total * spare))
    ends[-1] = spare
    starts = [0, *ends[:-1]]
    return [MIN_SEGMENT_TOKENS + end - start for start, end in zip(starts, ends, strict=True)]


def assumptions(workload: Workload) -> dict[str, str]:
    """What is drawn from which distribution, by field of a trace, for ``TraceHeader.drawn``."""
    assumed = _ASSUMED[workload.name]
    segments = workload.segments
    shape = "bell-shaped" if workload.name is WorkloadName.CRAWL else "negative binomial"
    return {
        "arrival_ms": f"Poisson, {workload.highest_request_rate:g} per second before scaling",
        "segments": f"{shape} between {segments.least} and {segments.most} with the published mean "
        f"{segments.mean:g} and median {segments.median}; the shape is an assumption",
        "segments.delay_ms": "gaps between the published quantiles; what they leave of the "
        f"retrieval time is the delay of the {'last' if assumed.rest_is_last else 'first'} "
        "segment. Assumptions: log-normal between published quantiles, below the median of the "
        f"retrieval time too; it is at most {assumed.max_retrieval_s:g} s before scaling; its "
        f"correlation with the sum of the gaps is {assumed.gaps_to_retrieval:g}; the rest is at "
        f"least {assumed.least_rest_ms:g} ms before scaling",
        "prompt_tokens": "between the published quantiles. Assumptions: log-normal between them "
        f"and below the median; at most {assumed.max_prompt_tokens:,.0f} before scaling; "
        f"correlation with the number of segments {_COUNT_TO_TOKENS:g}; sizes of the parts of a "
        f"prompt are log-normal with a spread of {_SIZE_SPREAD:g}",
    }


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The unscaled distributions of a workload, and samples of the sum of a request's gaps."""

    segments: CountDistribution
    gap_ms: QuantileCurve
    retrieval_s: QuantileCurve
    prompt_tokens: QuantileCurve
    gap_sums_ms: tuple[float, ...]


@functools.cache
def _shape(name: WorkloadName) -> _Shape:
    workload, assumed = WORKLOADS[name], _ASSUMED[name]
    counts = workload.segments
    if name is WorkloadName.CRAWL:
        # 1 and 17 are the extremes of some 4,000 draws with this deviation.
        segments = bell_counts(
            mean=counts.mean, deviation=2.6, least=counts.least, most=counts.most
        )
    else:
        # 26 is about the greatest of some 5,000 draws with this shape.
        segments = skewed_counts(mean=counts.mean, shape=2.0, least=counts.least, most=counts.most)
    gap_ms = _gap_curve(workload, assumed)
    generator = random.Random(f"{name}/sums of gaps")
    sums = []
    for _ in range(_NUM_SUM_SAMPLES):
        num_gaps = segments.quantile(_probability(generator)) - 1
        sums.append(sum(gap_ms.quantile(_probability(generator)) for _ in range(num_gaps)))
    return _Shape(
        segments=segments,
        gap_ms=gap_ms,
        retrieval_s=_upper_curve(workload.retrieval_s, assumed.max_retrieval_s, workload),
        prompt_tokens=_upper_curve(workload.prompt_tokens, assumed.max_prompt_tokens, workload),
        gap_sums_ms=tuple(sorted(sums)),
    )


def _gap_curve(workload: Workload, assumed: _Assumed) -> QuantileCurve:
    num_gaps = workload.num_queries * (workload.segments.mean - 1)
    ends = [(1 / num_gaps, assumed.least_gap_ms)]
    if workload.gap_ms.maximum is not None:
        ends.append((1 - 1 / num_gaps, workload.gap_ms.maximum))
    return QuantileCurve(tuple(sorted((*ends, *workload.gap_ms.quantiles.items()))))


def _upper_curve(figures: Figures, maximum: float, workload: Workload) -> QuantileCurve:
    return curve_with_lower_half(
        figures.quantiles, figures.mean, maximum=maximum, num_samples=workload.num_queries
    )


def _together(score: float, correlation: float, generator: random.Random) -> float:
    """A normal score that is correlated with ``score``."""
    own = normal_score(_probability(generator))
    return correlation * score + math.sqrt(1 - correlation**2) * own


def _probability(generator: random.Random) -> float:
    """Uniform in (0, 1), both ends excluded."""
    return max(generator.random(), _LEAST_PROBABILITY)
