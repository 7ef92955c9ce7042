"""What somebody who looks wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 500
"""Streams in a view: what a browser draws twice a second without effort."""
MAX_SEARCH_CHARS: Final = 100


class Show(StrEnum):
    """Streams in which states."""

    ALL = "all"
    LIVE = "live"
    """Not ended."""
    OPEN = "open"
    COMMITTED = "committed"
    DECODING = "decoding"
    ENDED = "ended"
    FAILED = "failed"
    """Ended, and neither done nor given up by the client."""


class Sort(StrEnum):
    """What comes first."""

    NEWEST = "newest"
    OLDEST = "oldest"
    WAITING = "waiting"
    """The most tokens that are not computed."""
    LARGEST = "largest"
    TROUBLED = "troubled"
    """The most attempts, then the most invalidated tokens."""
    ID = "id"


@dataclass(frozen=True, kw_only=True)
class WatchWish:
    """The arguments of ``StreamManager.watch``."""

    show: Show = Show.ALL
    sort: Sort = Sort.NEWEST
    search: str = ""
    """In ids, request ids and names of tenants and servers; case does not matter."""
    limit: int = DEFAULT_LIMIT
    """From 1 to `MAX_LIMIT`."""
    tenant: str | None = None
    """Only this one's streams. None: everybody's."""
