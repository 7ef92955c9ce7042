"""The first pass over a site: which pages there are, and a search over them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import urlsplit

from streamfill.errors import ConfigError
from streamfill.models.progress import Progress, no_progress
from streamfill.traces.collect.extraction import ExtractedPage, extract_page
from streamfill.traces.collect.fetcher import SiteFetcher
from streamfill.traces.collect.ranking import TextRanker

MIN_PAGE_WORDS: Final = 100
_MIN_LINE_WORDS: Final = 4
"""In the mean. A page with less of either is a list of links: it is read for its links only."""
_MAX_TRIES_PER_PAGE: Final = 3
"""A site of which most pages cannot be used is given up after so many requests per wanted page."""
_OTHER_FILES: Final = re.compile(
    r"\.(7z|bz2|css|csv|epub|gif|gz|ico|jpe?g|js|json|mp[34]|pdf|png|svg|tar|txt|xml|xz|zip)$",
    re.IGNORECASE,
)
_TITLE_WEIGHT: Final = 3
"""A word in a title counts as often as so many in the text."""
_SCORE_FLOOR: Final = 0.25
"""A page that matches less than this share of the best one is no find."""


class Site:
    """Pages of a site and a BM25 index over their titles and texts."""

    def __init__(self, pages: Sequence[ExtractedPage]) -> None:
        self.pages = tuple(pages)
        self._numbers = {page.url: number for number, page in enumerate(self.pages)}
        self._ranker = TextRanker(
            [f"{(page.title + ' ') * _TITLE_WEIGHT}{page.text}" for page in self.pages]
        )

    def search(self, terms: str, most: int) -> list[str]:
        """URLs of the pages that match well, best first."""
        scores = self._ranker.scores(terms)
        found = self._ranker.best(terms, most)
        return [self.pages[n].url for n in found if scores[n] >= _SCORE_FLOOR * scores.max()]

    def best_of(self, urls: Iterable[str], terms: str) -> str | None:
        """The one of these pages that matches best, None where none does well."""
        scores = self._ranker.scores(terms)
        known = sorted({self._numbers[url] for url in urls if url in self._numbers})
        best = max(known, key=lambda number: float(scores[number]), default=None)
        if best is None or scores[best] <= 0 or scores[best] < _SCORE_FLOOR * scores.max():
            return None
        return self.pages[best].url


async def read_site(
    fetcher: SiteFetcher,
    start_url: str,
    *,
    max_pages: int,
    seed: int,
    progress: Progress = no_progress,
) -> Site:
    """Follows links from a page, in a random order that the seed decides.

    Args:
        max_pages: at most so many are kept.

    Raises:
        ConfigError: no page with text was found.
    """
    generator = random.Random(f"site/{seed}")
    frontier, seen = [start_url], {start_url}
    pages: dict[str, ExtractedPage] = {}
    for _ in range(_MAX_TRIES_PER_PAGE * max_pages):
        if not frontier or len(pages) >= max_pages or fetcher.is_exhausted:
            break
        fetched = await fetcher.fetch(frontier.pop(generator.randrange(len(frontier))))
        if fetched is None:
            continue
        page = extract_page(fetched.url, fetched.body)
        for url in page.links:
            if url not in seen and _may_be_page(url) and fetcher.is_wanted(url):
                frontier.append(url)
            seen.add(url)
        if _is_prose(page.text):
            pages[page.url] = page
            progress(len(pages), max_pages)
    if not pages:
        reasons = ", ".join(f"{each}: {n}" for each, n in fetcher.skipped.items()) or "no text"
        raise ConfigError(
            "--url", start_url, f"no page with text was found ({reasons}); name another start"
        )
    return Site(list(pages.values()))


def _may_be_page(url: str) -> bool:
    return not _OTHER_FILES.search(urlsplit(url).path)


def _is_prose(text: str) -> bool:
    num_words, num_lines = len(text.split()), len(text.splitlines())
    return num_words >= MIN_PAGE_WORDS and num_words >= _MIN_LINE_WORDS * num_lines
