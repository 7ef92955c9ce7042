"""Collecting a crawl trace from a tiny site on localhost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from streamfill.errors import ConfigError
from streamfill.messages.common import StreamMode
from streamfill.models.progress import Progress, no_progress
from streamfill.traces.collect.crawl import CrawlPlan, collect_crawl
from streamfill.traces.collect.fetcher import USER_AGENT, FetchLimits, SiteFetcher
from streamfill.traces.collect.reading import ReadingPlan
from streamfill.traces.collect.tree_server import served_tree
from streamfill.traces.files import TraceReader
from streamfill.traces.format import Request, TraceHeader
from tests.unit.traces.collect_site import make_site

LIMITS = FetchLimits(pause_s=0.0, page_bytes=1 << 20, total_bytes=1 << 24, duration_s=60.0)


def make_plan(url: str, **changes: object) -> CrawlPlan:
    """A small collection with drawn latency."""
    plan = CrawlPlan(
        name="tiny",
        start_url=url,
        origin="a tiny site",
        num_queries=4,
        max_site_pages=20,
        seed=5,
        draws_latency=True,
        request_rate=2.0,
        time_scale=1.0,
        max_output_tokens=3,
        reading=ReadingPlan(max_pages=3, passages_per_page=2, concurrency=1),
        limits=LIMITS,
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


@contextmanager
def silent(title: str) -> Iterator[Progress]:
    """Shows nothing."""
    yield no_progress


def collect(plan: CrawlPlan, output: Path) -> tuple[TraceHeader, list[Request]]:
    """Runs a collection and reads its file."""
    asyncio.run(collect_crawl(plan, output, silent))
    with TraceReader(output) as reader:
        return reader.header, list(reader)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder of the tiny site."""
    return make_site(tmp_path / "site")


def test_pages_that_answer_a_question_become_segments(site: Path, tmp_path: Path) -> None:
    """Each request asks about a page, and the first segment is that page or one of its topic."""
    with served_tree(site) as url:
        header, requests = collect(make_plan(url), tmp_path / "trace.jsonl")
    assert len(requests) == 4
    assert set(header.drawn) == {"arrival_ms", "segments.delay_ms"}
    for request in requests:
        assert request.mode is StreamMode.APPEND
        assert 1 <= len(request.segments) <= 3
        assert request.max_output_tokens == 3
        first = request.segments[0].text or ""
        title = first.splitlines()[0]
        assert any(word in request.suffix.lower() for word in title.lower().split())
        # One draw for the search and one for the page, none below the lowest published quantile.
        assert request.segments[0].delay_ms >= 2 * 82
        assert all(segment.delay_ms >= 82 for segment in request.segments[1:])


def test_a_seed_repeats_everything_but_measured_times(site: Path, tmp_path: Path) -> None:
    """Two collections have the same questions, pages, texts and arrivals."""
    kept = []
    for number in range(2):
        with served_tree(site) as url:
            _, requests = collect(make_plan(url), tmp_path / f"{number}.jsonl")
        kept.append(
            [(r.id, r.arrival_ms, r.suffix, [s.text for s in r.segments]) for r in requests]
        )
    assert kept[0] == kept[1]


def test_measured_times_are_not_drawn(site: Path, tmp_path: Path) -> None:
    """With several fetches at a time nothing but the arrivals is drawn, and delays are short."""
    reading = ReadingPlan(max_pages=3, passages_per_page=2, concurrency=2)
    with served_tree(site) as url:
        plan = make_plan(url, draws_latency=False, reading=reading)
        header, requests = collect(plan, tmp_path / "trace.jsonl")
    assert set(header.drawn) == {"arrival_ms"}
    total_ms = sum(segment.delay_ms for request in requests for segment in request.segments)
    assert 0 < total_ms < 30_000


def test_token_limits_shorten_segments(site: Path, tmp_path: Path) -> None:
    """A limit of 20 tokens leaves at most 15 words of a page."""
    reading = ReadingPlan(
        max_pages=2, passages_per_page=2, concurrency=1, token_scale=0.5, max_segment_tokens=20
    )
    with served_tree(site) as url:
        header, requests = collect(make_plan(url, reading=reading), tmp_path / "trace.jsonl")
    assert header.token_scale == 0.5
    texts = [segment.text or "" for request in requests for segment in request.segments]
    assert max(len(text.split()) for text in texts) <= 15


def test_a_forbidden_site_is_refused(site: Path, tmp_path: Path) -> None:
    """robots.txt that forbids the start stops the command with one line, and no file is left."""
    (site / "robots.txt").write_text("User-agent: *\nDisallow: /\n")
    with served_tree(site) as url, pytest.raises(ConfigError, match=r"robots\.txt"):
        collect(make_plan(url), tmp_path / "trace.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


async def test_fetcher_keeps_to_site_rules_and_limits(site: Path) -> None:
    """Other hosts, forbidden folders, other files, missing and large pages are skipped, counted."""
    agent = USER_AGENT.partition("/")[0]
    (site / "robots.txt").write_text(f"User-agent: {agent}\nDisallow: /pears.html\n")
    (site / "notes.txt").write_text("no page")
    (site / "large.html").write_text("<p>" + "word " * 4000)
    limits = replace(LIMITS, page_bytes=5000)
    with served_tree(site) as url:
        async with SiteFetcher(url, limits) as fetcher:
            assert await fetcher.fetch(f"{url}apples.html") is not None
            for name in ("pears.html", "notes.txt", "missing.html", "large.html"):
                assert await fetcher.fetch(url + name) is None
            assert await fetcher.fetch("http://localhost:1/") is None
    assert fetcher.num_fetched == 1
    assert fetcher.skipped == {
        "another site, or forbidden by robots.txt": 2,
        "no HTML": 1,
        "status 404": 1,
        "larger than the limit of a page": 1,
    }


async def test_fetcher_pauses_between_requests(site: Path) -> None:
    """Three fetches with a pause of 50 ms take at least 100 ms."""
    loop = asyncio.get_running_loop()
    with served_tree(site) as url:
        async with SiteFetcher(url, replace(LIMITS, pause_s=0.05)) as fetcher:
            started_s = loop.time()
            for _ in range(3):
                await fetcher.fetch(url)
            assert loop.time() - started_s >= 0.099


async def test_an_unreachable_site_is_one_error() -> None:
    """A closed port and a wrong scheme are errors that name the option."""
    with pytest.raises(ConfigError, match="--url"):
        SiteFetcher("ftp://orchard.example/", LIMITS)
    with pytest.raises(ConfigError, match="cannot be reached"):
        async with SiteFetcher("http://127.0.0.1:1/", LIMITS):
            pass
