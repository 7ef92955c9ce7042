"""Collects a crawl trace: reads a site, asks questions, and records what an agent would read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from streamfill.errors import TraceError
from streamfill.messages.common import StreamMode
from streamfill.models.progress import Progress
from streamfill.traces.collect.delays import DrawnGaps, RequestGaps, poisson_arrivals_ms
from streamfill.traces.collect.fetcher import FetchLimits, SiteFetcher
from streamfill.traces.collect.questions import questions_of
from streamfill.traces.collect.reading import Reading, ReadingPlan, read_for
from streamfill.traces.collect.site import read_site
from streamfill.traces.collect.summary import CollectionSummary, write_collection
from streamfill.traces.format import SCHEMA_VERSION, Request, Segment, TraceHeader
from streamfill.traces.published import CRAWL

PREFIX: Final = "Answer the question at the end from these pages.\n\n"
SUFFIX: Final = "Question: {question}\nAnswer:"
_ROUND_MS: Final = 3
"""Digits of a millisecond that are kept."""

ShowProgress: TypeAlias = Callable[[str], AbstractContextManager[Progress]]
"""Shows how far a piece of work with this title is, while the block runs."""


@dataclass(frozen=True, kw_only=True)
class CrawlPlan:
    """
    Attributes:
        origin: what site this is, for the header.
        max_site_pages: that the first pass reads.
        draws_latency: whether the time to fetch a page is drawn instead of measured.
        request_rate: Poisson arrivals per second.
        time_scale: delays are multiplied by this; arrivals are not.
    """

    name: str
    start_url: str
    origin: str
    num_queries: int
    max_site_pages: int
    seed: int
    draws_latency: bool
    request_rate: float
    time_scale: float
    max_output_tokens: int
    reading: ReadingPlan
    limits: FetchLimits


async def collect_crawl(plan: CrawlPlan, output: Path, show: ShowProgress) -> CollectionSummary:
    """Writes the trace.

    Raises:
        ConfigError: the site cannot be read.
        TraceError: nothing can be asked about it, or the file cannot be written.
    """
    gaps = DrawnGaps(CRAWL, seed=plan.seed) if plan.draws_latency else None
    async with SiteFetcher(plan.start_url, plan.limits) as fetcher:
        with show("Reading the site") as progress:
            site = await read_site(
                fetcher,
                plan.start_url,
                max_pages=plan.max_site_pages,
                seed=plan.seed,
                progress=progress,
            )
        questions = questions_of(
            [(page.title, page.headings) for page in site.pages],
            seed=plan.seed,
            num_questions=plan.num_queries,
        )
        arrivals_ms = poisson_arrivals_ms(
            len(questions), rate_per_s=plan.request_rate, seed=plan.seed
        )
        requests: list[Request] = []
        with show("Asking") as progress:
            for number, question in enumerate(questions):
                if fetcher.is_exhausted:
                    break
                reading = await read_for(question, site, fetcher, plan.reading)
                request_gaps = gaps.of_request(number) if gaps else None
                segments = _segments(reading, request_gaps, plan.time_scale)
                if segments:
                    requests.append(
                        Request(
                            id=f"q{number}",
                            arrival_ms=arrivals_ms[len(requests)],
                            mode=StreamMode.APPEND,
                            segments=segments,
                            prefix=PREFIX,
                            suffix=SUFFIX.format(question=question.text),
                            max_output_tokens=plan.max_output_tokens,
                        )
                    )
                progress(number + 1, len(questions))
    if not requests:
        raise TraceError(f"{plan.origin}: none of its pages answers a question about it")
    skipped = {f"pages skipped, {reason}": n for reason, n in fetcher.skipped.items()}
    if len(requests) < len(questions):
        skipped["questions left out"] = len(questions) - len(requests)
    header = _header(plan, gaps)
    return write_collection(
        output, header, requests, {}, num_sources=len(site.pages), left_out=skipped
    )


def _segments(reading: Reading, gaps: RequestGaps | None, time_scale: float) -> tuple[Segment, ...]:
    """A page of which nothing is left only delays the next one."""
    segments: list[Segment] = []
    # The search is one more fetch before the first page.
    due_ms = reading.search_ms + (gaps.next_ms() if gaps else 0.0)
    last_ms = 0.0
    for page in reading.pages:
        due_ms = due_ms + gaps.next_ms() + page.compute_ms if gaps else page.ready_ms
        if page.text:
            delay_ms = round((due_ms - last_ms) * time_scale, _ROUND_MS)
            segments.append(Segment(delay_ms=delay_ms, text=page.text))
            last_ms = due_ms
    return tuple(segments)


def _header(plan: CrawlPlan, gaps: DrawnGaps | None) -> TraceHeader:
    drawn = {"arrival_ms": f"Poisson, {plan.request_rate:g} per second; not scaled"}
    if gaps:
        drawn["segments.delay_ms"] = (
            "the network's share only: one draw for the search and one for each page, from the "
            f"{gaps.description}; extraction and ranking are measured and added"
        )
        times = "Extraction and ranking times are measured; the network's are drawn."
    else:
        times = (
            f"All times within a request are measured, with at least {plan.limits.pause_s:g} s "
            f"between two fetches and {plan.reading.concurrency} of them at a time."
        )
    return TraceHeader(
        schema=SCHEMA_VERSION,
        name=plan.name,
        description="Collected: for each question a search, then page after page fetched, "
        f"extracted and filtered by BM25. {times}",
        source=plan.origin,
        drawn=drawn,
        token_scale=plan.reading.token_scale,
        time_scale=plan.time_scale,
        seed=plan.seed,
    )
