"""How an agent reads for one question: search, then fetch and filter page after page.

1. A search over the site gives the first pages.
2. A page is fetched anew, its text extracted, cut into passages and filtered by BM25.
3. When the found pages are read, the best one among their links is next.
4. Each page of which something is left is a segment, at the moment when it is ready.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from streamfill.traces.collect.extraction import extract_page
from streamfill.traces.collect.fetcher import SiteFetcher
from streamfill.traces.collect.passages import (
    first_words,
    passages_of,
    scaled,
    words_of_tokens,
)
from streamfill.traces.collect.questions import Question
from streamfill.traces.collect.ranking import filtered_passages
from streamfill.traces.collect.site import Site

_SCORE_FLOOR: Final = 0.3
"""A passage that matches less than this share of the page's best one is not worth its tokens."""
_MAX_TRIES_PER_PAGE: Final = 2
"""Pages of which nothing is left cost time too; an agent gives up."""


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """
    Attributes:
        max_pages: segments of a request, at most.
        passages_per_page: that a segment has, at most.
        concurrency: pages that are fetched at the same time.
        token_scale: each passage keeps this share of its words.
        max_segment_tokens: estimated, of the whole segment; None: no limit.
    """

    max_pages: int
    passages_per_page: int
    concurrency: int
    token_scale: float = 1.0
    max_segment_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadPage:
    """A page that was read for a question.

    Attributes:
        text: what is left of it; empty where no passage matches.
        ready_ms: since the question.
        compute_ms: of that, extraction and filtering.
    """

    url: str
    text: str
    ready_ms: float
    compute_ms: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read for one question, in the order in which it was ready.

    Attributes:
        search_ms: how long the search took, before the first page.
    """

    search_ms: float
    pages: tuple[ReadPage, ...]


async def read_for(
    question: Question, site: Site, fetcher: SiteFetcher, plan: ReadingPlan
) -> Reading:
    """Reads until there are enough pages, or nothing promising is left."""
    reader = _Reader(question, site, fetcher, plan)
    async with asyncio.TaskGroup() as workers:
        for _ in range(plan.concurrency):
            workers.create_task(reader.work())
    return Reading(search_ms=reader.search_ms, pages=tuple(reader.pages))


class _Reader:
    def __init__(
        self, question: Question, site: Site, fetcher: SiteFetcher, plan: ReadingPlan
    ) -> None:
        self._started_s = time.monotonic()
        self._terms = question.terms
        self._site = site
        self._fetcher = fetcher
        self._plan = plan
        self._found = deque(site.search(question.terms, -(-plan.max_pages // 2)))
        self._taken: set[str] = set()
        self._links: dict[str, None] = {}
        self._num_kept = 0
        self._num_under_way = 0
        self.search_ms = self._now_ms()
        self.pages: list[ReadPage] = []

    async def work(self) -> None:
        """Reads one page after the other; several of these run at the same time."""
        while self._num_kept + self._num_under_way < self._plan.max_pages:
            url = self._next_url()
            if url is None or len(self._taken) > _MAX_TRIES_PER_PAGE * self._plan.max_pages:
                return
            self._num_under_way += 1
            fetched = await self._fetcher.fetch(url)
            self._num_under_way -= 1
            if fetched is not None:
                self._read(fetched.url, fetched.body)

    def _next_url(self) -> str | None:
        url: str | None
        if self._found:
            url = self._found.popleft()
        else:
            unread = [link for link in self._links if link not in self._taken]
            url = self._site.best_of(unread, self._terms)
        if url is not None:
            self._taken.add(url)
        return url

    def _read(self, url: str, body: bytes) -> None:
        started_ms = self._now_ms()
        page = extract_page(url, body)
        passages = filtered_passages(
            passages_of(page.text),
            self._terms,
            most=self._plan.passages_per_page,
            floor=_SCORE_FLOOR,
        )
        ready_ms = self._now_ms()
        self._links.update(dict.fromkeys(page.links))
        text = _segment_text(page.title, passages, self._plan) if passages else ""
        self._num_kept += bool(text)
        self.pages.append(
            ReadPage(url=url, text=text, ready_ms=ready_ms, compute_ms=ready_ms - started_ms)
        )

    def _now_ms(self) -> float:
        return 1000.0 * (time.monotonic() - self._started_s)


def _segment_text(title: str, passages: list[str], plan: ReadingPlan) -> str:
    kept = [scaled(passage, plan.token_scale) for passage in passages]
    text = "\n".join((title, *kept))
    if plan.max_segment_tokens is not None:
        text = first_words(text, words_of_tokens(plan.max_segment_tokens))
    return f"{text}\n\n"
