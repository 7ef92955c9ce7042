"""Fetches pages of one site with manners: robots.txt, a pause between requests, and limits.

Only pages of the site's own scheme, host and port are asked for, also behind redirects.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final
from urllib.parse import urldefrag, urljoin, urlsplit
from urllib.robotparser import RobotFileParser

from streamfill.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp

USER_AGENT: Final = "streamfill-trace-collector/0.1 (collects a benchmark trace; obeys robots.txt)"
_PAGE_TIMEOUT_S: Final = 20.0
"""A page that takes longer is given up, as an agent would."""
_MAX_REDIRECTS: Final = 5
_ROBOTS_BYTES: Final = 500 << 10
"""What RFC 9309 asks a crawler to read at least."""
_READ_BYTES: Final = 1 << 16
_MAX_CRAWL_DELAY_S: Final = 60.0
"""A site that asks for a longer pause is not for this tool."""


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """What a crawl may use.

    Attributes:
        pause_s: between the starts of two requests; robots.txt can only make it longer.
        page_bytes: a larger page is left out.
        total_bytes: of all pages together.
        duration_s: since the start of the crawl.
    """

    pause_s: float
    page_bytes: int
    total_bytes: int
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class FetchedPage:
    """A page as it came over the wire; ``url`` is where redirects ended."""

    url: str
    body: bytes


class SiteFetcher:
    """Fetches pages of one site. Use it inside ``async with``.

    Attributes:
        skipped: why pages were not had, and how many.
        num_fetched: pages that were had.
    """

    def __init__(self, start_url: str, limits: FetchLimits) -> None:
        """
        Raises:
            ConfigError: this is no URL of a web page.
        """
        parts = urlsplit(start_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("--url", start_url, "must begin with http:// or https:// and a host")
        self._start_url = start_url
        self._site = (parts.scheme, parts.netloc)
        self._limits = limits
        self._pause_s = limits.pause_s
        self._robots = RobotFileParser()
        self._next_start_s = 0.0
        self._started_s = time.monotonic()
        self._num_bytes = 0
        self.skipped: Counter[str] = Counter()
        self.num_fetched = 0

    async def __aenter__(self) -> SiteFetcher:
        """
        Raises:
            ConfigError: the site cannot be reached, or its robots.txt forbids the first page.
        """
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=_PAGE_TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout, headers={"User-Agent": USER_AGENT})
        try:
            await self._read_robots()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    @property
    def is_exhausted(self) -> bool:
        """Whether a limit of the whole crawl is reached; nothing is fetched any more."""
        is_late = time.monotonic() - self._started_s >= self._limits.duration_s
        return is_late or self._num_bytes >= self._limits.total_bytes

    def is_wanted(self, url: str) -> bool:
        """Whether a page belongs to the site and robots.txt allows it."""
        parts = urlsplit(url)
        return (parts.scheme, parts.netloc) == self._site and self._robots.can_fetch(
            USER_AGENT, url
        )

    async def fetch(self, url: str) -> FetchedPage | None:
        """The HTML page, or None where it is not to be had; ``skipped`` counts why."""
        import aiohttp

        for _ in range(_MAX_REDIRECTS):
            if not self.is_wanted(url):
                return self._skip("another site, or forbidden by robots.txt")
            if self.is_exhausted:
                return self._skip("limit of the crawl reached")
            await self._wait_for_turn()
            try:
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urldefrag(urljoin(url, response.headers.get("Location", ""))).url
                        continue
                    if response.status != 200:
                        return self._skip(f"status {response.status}")
                    if response.content_type not in ("text/html", "application/xhtml+xml"):
                        return self._skip("no HTML")
                    body = await _read(response, self._limits.page_bytes)
            except (aiohttp.ClientError, TimeoutError) as error:
                return self._skip(type(error).__name__)
            self._num_bytes += len(body)
            if len(body) > self._limits.page_bytes:
                return self._skip("larger than the limit of a page")
            self.num_fetched += 1
            return FetchedPage(url=url, body=body)
        return self._skip("too many redirects")

    def _skip(self, reason: str) -> FetchedPage | None:
        self.skipped[reason] += 1
        return None

    async def _wait_for_turn(self) -> None:
        now_s = time.monotonic()
        start_s = max(now_s, self._next_start_s)
        self._next_start_s = start_s + self._pause_s
        if start_s > now_s:
            await asyncio.sleep(start_s - now_s)

    async def _read_robots(self) -> None:
        import aiohttp

        url = urljoin(self._start_url, "/robots.txt")
        try:
            async with self._session.get(url) as response:
                status = response.status
                body = await _read(response, _ROBOTS_BYTES)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConfigError(
                "--url", self._start_url, f"cannot be reached ({type(error).__name__}: {error})"
            ) from error
        if status == 200:
            self._robots.parse(body.decode("utf-8", "replace").splitlines())
        elif 400 <= status < 500 and status not in (401, 403):
            self._robots.parse([])
        else:
            # RFC 9309: rules that cannot be had forbid everything. 401 and 403: as Python has it.
            self._robots.parse(["User-agent: *", "Disallow: /"])
        if not self.is_wanted(self._start_url):
            raise ConfigError(
                "--url", self._start_url, f"robots.txt (status {status}) forbids it; name another"
            )
        crawl_delay_s = float(self._robots.crawl_delay(USER_AGENT) or 0)
        if crawl_delay_s > _MAX_CRAWL_DELAY_S:
            raise ConfigError(
                "--url",
                self._start_url,
                f"robots.txt asks for {crawl_delay_s:g} s between requests; name another site",
            )
        self._pause_s = max(self._pause_s, crawl_delay_s)


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body, or at least its first ``max_bytes + 1`` bytes where it is longer."""
    parts: list[bytes] = []
    num_bytes = 0
    async for part in response.content.iter_chunked(_READ_BYTES):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > max_bytes:
            break
    return b"".join(parts)
