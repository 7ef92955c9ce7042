"""Which streams somebody sees, and in which order. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any, Final

from router.watch.frames import StreamFacts
from router.watch.wish import Show, Sort, WatchWish
from streamfill.stream.state import StreamState

_LIVE: Final = frozenset({StreamState.OPEN, StreamState.COMMITTED, StreamState.DECODING})
_ENDED: Final = frozenset(StreamState) - _LIVE
_STATES: Final[dict[Show, frozenset[StreamState]]] = {
    Show.ALL: _LIVE | _ENDED,
    Show.LIVE: _LIVE,
    Show.OPEN: frozenset({StreamState.OPEN}),
    Show.COMMITTED: frozenset({StreamState.COMMITTED}),
    Show.DECODING: frozenset({StreamState.DECODING}),
    Show.ENDED: _ENDED,
    Show.FAILED: _ENDED - {StreamState.DONE, StreamState.ABORTED},
}

Key = Callable[[StreamFacts], Any]
_KEYS: Final[dict[Sort, Key]] = {
    Sort.NEWEST: lambda facts: (-facts.opened_ms, -int(facts.id)),
    Sort.OLDEST: lambda facts: (facts.opened_ms, int(facts.id)),
    Sort.WAITING: lambda facts: (
        facts.ended_ms is not None,
        facts.num_computed_tokens - facts.num_known_tokens,
        facts.id,
    ),
    Sort.LARGEST: lambda facts: (-facts.num_known_tokens, facts.id),
    Sort.TROUBLED: lambda facts: (
        -facts.num_attempts,
        -facts.num_invalidated_tokens,
        facts.id,
    ),
    Sort.ID: lambda facts: (len(facts.id), facts.id),
}


def matching(streams: Iterable[StreamFacts], wish: WatchWish) -> list[StreamFacts]:
    """Those that the filter lets through, of those that the viewer may see."""
    states = _STATES[wish.show]
    needle = wish.search.casefold()
    return [
        facts
        for facts in streams
        if facts.state in states and (not needle or _mentions(facts, needle))
    ]


def first(streams: Iterable[StreamFacts], wish: WatchWish) -> list[StreamFacts]:
    """As many as are shown, in the order of the view."""
    return heapq.nsmallest(wish.limit, streams, key=_KEYS[wish.sort])


def may_see(streams: Iterable[StreamFacts], tenant: str | None) -> list[StreamFacts]:
    """Those of one tenant; all for None."""
    return [facts for facts in streams if tenant is None or facts.tenant == tenant]


def _mentions(facts: StreamFacts, needle: str) -> bool:
    words = (
        facts.id,
        facts.request_id,
        facts.tenant,
        facts.prefill_server,
        facts.decode_server,
    )
    return any(needle in word.casefold() for word in words)
