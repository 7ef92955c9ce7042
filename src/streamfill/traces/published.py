"""The two workloads of Stream2LLM as far as their figures are published, as data.

Source: Stream2LLM (MLSys 2026, arXiv 2604.16395) and the result tables of its public repository.
Measured with Llama-3.1-8B-Instruct on two H200 with tensor parallelism 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from streamfill.messages.common import StreamMode

SOURCE: Final = "Stream2LLM, MLSys 2026, arXiv 2604.16395"

PREFILL_TOKENS_PER_S: Final = 5749 / 0.116
"""How fast that hardware prefills, about 49,600: the crawler's median prompt of 5,749 tokens has a
median TTFT of 0.116 s when it is sent in one piece at the lowest rate, 0.5 per second."""


class WorkloadName(StrEnum):
    """The two workloads."""

    CRAWL = "crawl"
    ANN = "ann"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is published of one quantity.

    Attributes:
        mean: of all samples.
        quantiles: value by probability, probabilities in (0, 1).
        maximum: None where it is not published.
    """

    mean: float
    quantiles: Mapping[float, float]
    maximum: float | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentCounts:
    """Segments of one query: mean, median, least and greatest number."""

    mean: float
    median: int
    least: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One workload.

    Attributes:
        num_queries: as many queries stand behind the figures.
        gap_ms: between two segments of a query.
        retrieval_s: from the query to the last segment.
        prompt_tokens: of the final prompt.
        highest_request_rate: of Poisson arrivals, per second.
    """

    name: WorkloadName
    mode: StreamMode
    num_queries: int
    segments: SegmentCounts
    gap_ms: Figures
    retrieval_s: Figures
    prompt_tokens: Figures
    highest_request_rate: float


CRAWL: Final = Workload(
    name=WorkloadName.CRAWL,
    mode=StreamMode.APPEND,
    num_queries=4322,
    segments=SegmentCounts(mean=7.86, median=8, least=1, most=17),
    gap_ms=Figures(
        mean=1053,
        quantiles={0.05: 82, 0.25: 387, 0.5: 701, 0.75: 1340, 0.95: 3078, 0.99: 5293},
        maximum=34947,
    ),
    retrieval_s=Figures(mean=9.22, quantiles={0.5: 8.67, 0.75: 11.06, 0.95: 16.40}),
    prompt_tokens=Figures(mean=8889, quantiles={0.5: 5749, 0.75: 11167, 0.95: 28372}),
    highest_request_rate=4.0,
)
"""A web crawler: each page goes behind the ones before, the question comes with the last one."""

ANN: Final = Workload(
    name=WorkloadName.ANN,
    mode=StreamMode.UPDATE,
    num_queries=4997,
    segments=SegmentCounts(mean=4.42, median=4, least=1, most=26),
    gap_ms=Figures(
        mean=157,
        quantiles={0.05: 1.4, 0.25: 11.3, 0.5: 36.7, 0.75: 124, 0.95: 699, 0.99: 2079},
        maximum=8917,
    ),
    retrieval_s=Figures(mean=4.47, quantiles={0.5: 3.90, 0.75: 5.33, 0.95: 8.51}),
    prompt_tokens=Figures(mean=13006, quantiles={0.5: 10126, 0.75: 14615, 0.95: 30618}),
    highest_request_rate=2.0,
)
"""A nearest-neighbour search: each change of the ranking replaces the context."""

WORKLOADS: Final[Mapping[WorkloadName, Workload]] = {
    WorkloadName.CRAWL: CRAWL,
    WorkloadName.ANN: ANN,
}
