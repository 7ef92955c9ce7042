"""One API key in use: whose it is, and how much of its limits is used up.

- *Streams*: a place is taken before the stream is opened and given back when it has ended.
- *Requests*: a token bucket that holds one second's worth. A request that finds none is refused.
- *Tokens*: how many a segment has is known only once it was tokenised, and an answer is not cut
  short. So they are paid afterwards, and what would bring in more is refused while more was used
  than there is: new streams, and segments. Commits are not: the context is here, and was paid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

from router.access.bucket import Bucket
from router.access.standing import Standing
from streamfill.access.keys import KeyEntry
from streamfill.errors import ResourceExhaustedError, StreamError, UnauthenticatedError

SECONDS_PER_MIN = 60.0
STREAM_RETRY_S = 1.0
"""When a stream of the key will end is not known."""


class KeyAccount:
    """Of one key, from its first appearance in the file to its removal."""

    def __init__(self, entry: KeyEntry, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_removed = False
        """It is in the file no more."""
        self.standing = Standing()
        """Of its streams among those of other tenants; kept by the ring."""
        self._clock = clock
        self._num_streams = 0
        self._entry = entry
        self._requests, self._tokens = _buckets(entry, clock)

    @property
    def entry(self) -> KeyEntry:
        """As the file has it now."""
        return self._entry

    def replace_entry(self, entry: KeyEntry) -> None:
        """The file says something else of the key. What is open goes on; new limits begin full."""
        if entry.limits != self._entry.limits:
            self._requests, self._tokens = _buckets(entry, self._clock)
        self._entry = entry

    def check(self) -> None:
        """Before anything is done with the key.

        Raises:
            UnauthenticatedError: it was removed.
        """
        if self.is_removed:
            raise UnauthenticatedError("this API key was removed")

    def take_request(self) -> None:
        """A call, an HTTP request or a WebSocket begins.

        Raises:
            ResourceExhaustedError: there were too many.
        """
        wait_s = 0.0 if self._requests is None else self._requests.take(1.0)
        if wait_s > 0:
            raise self._exceeded("requests_per_s", wait_s)

    def check_tokens(self) -> None:
        """Before more tokens come in.

        Raises:
            ResourceExhaustedError: more were used than may be.
        """
        wait_s = 0.0 if self._tokens is None else self._tokens.wait_s()
        if wait_s > 0:
            raise self._exceeded("tokens_per_min", wait_s)

    def take_stream(self) -> StreamPlace:
        """A place for one more open stream.

        Raises:
            ResourceExhaustedError: all are taken.
        """
        limit = self._entry.limits.max_streams
        if limit is not None and self._num_streams >= limit:
            raise self._exceeded("max_streams", STREAM_RETRY_S)
        return self.take_stream_back()

    def take_stream_back(self) -> StreamPlace:
        """A place for a stream that had one with an earlier router process, also beyond the
        limit."""
        self._num_streams += 1
        return StreamPlace(self)

    def use_tokens(self, num_tokens: int) -> None:
        """So many came in or were generated."""
        if self._tokens is not None:
            self._tokens.owe(num_tokens)

    def give_stream_back(self) -> None:
        """A place is free."""
        self._num_streams -= 1

    def _exceeded(self, limit: str, wait_s: float) -> StreamError:
        value = getattr(self._entry.limits, limit)
        return ResourceExhaustedError(
            f"the API key {self._entry.name} is at its limit {limit} = {value:g}; "
            f"come again in {wait_s:.3g} s",
            details={"limit": limit, "limit_value": value, "retry_after_s": round(wait_s, 3)},
        )


class StreamPlace:
    """One open stream of a key. Implements ``interface.Payer``."""

    def __init__(self, account: KeyAccount) -> None:
        self._account = account
        self._is_taken = True

    def used(self, num_tokens: int) -> None:
        """See ``interface.Payer``."""
        self._account.use_tokens(num_tokens)

    def ended(self) -> None:
        """See ``interface.Payer``. Idempotent: the opening may fail behind the stream's end."""
        if self._is_taken:
            self._is_taken = False
            self._account.give_stream_back()


CALLER: ContextVar[KeyAccount | None] = ContextVar("CALLER", default=None)
"""Whose call is being served. Set by whoever takes the call in, in the task that serves it."""


def _buckets(entry: KeyEntry, clock: Callable[[], float]) -> tuple[Bucket | None, Bucket | None]:
    requests, tokens = None, None
    per_s, per_min = entry.limits.requests_per_s, entry.limits.tokens_per_min
    if per_s is not None:
        # A rate below one a second still lets one through.
        requests = Bucket(per_s=per_s, capacity=max(1.0, per_s), clock=clock)
    if per_min is not None:
        tokens = Bucket(per_s=per_min / SECONDS_PER_MIN, capacity=per_min, clock=clock)
    return requests, tokens
