"""Whether a context that nobody has committed yet may grow on a server. No asyncio, no clock.

Nobody knows how long such a context stays, so each prefill server has a cap on the tokens of all of
them together. An operation that would take the server above its cap waits; room is made by streams
that are committed, end, shrink or move away.

1. *It fits*: nobody waits, and with it the server is within its cap. Admitted.
2. *Order*: the others wait, and are admitted as they came, the oldest first. Where they are of
   several tenants these take turns (`fair_waiting`).
3. *Progress*: when every stream that holds tokens is held back itself, nobody is left to make room.
   Then the oldest waiting operation is admitted above the cap, and its stream becomes the
   *favourite*: it does not wait any more until it is gone, or the server is within its cap again.
   So it comes to its commit, and all the others together never hold more than the cap.
4. *Bound*: an operation that would have to wait behind `max_waiting` others is refused; where a
   tenant has more of them waiting, it is the newest of those.
5. *Shares*: a tenant that holds less than its share of the cap, by weight among those that hold or
   want tokens, does not wait for others to make room. So nobody shuts others out by contexts that
   he never commits. All tenants together never hold more than twice the cap, and one alone never
   more than the cap, the favourite left aside.

A stream is *held back* from the moment when its operation has to wait until one is admitted: also
after that operation was refused, or its call was given up. Its client will come again; if it was
counted as free until then, clients that come again in turns would keep each other out for ever.

Only streams that come from other servers take a server above its cap by other ways than 3 and 5:
their context exists already.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto

from router.fair_waiting import FairWaiting
from streamfill.messages.common import NO_SHARE, Share
from streamfill.stream.ids import StreamId

DEFAULT_CAP_POOLS = 8
"""Times the KV pool. What the pool does not hold is evicted and computed again, so more uncommitted
contexts than a few pools are mostly computed twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    """What the cluster file says; see `config.RouterSection` and `config.ServerSection`."""

    cap_tokens: int | None = None
    """Per server. None: `DEFAULT_CAP_POOLS` times its KV pool."""
    max_waiting: int = 256
    """Per server, at least 1: the progress rule needs somebody who waits."""
    wait_s: float = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionCounters:
    """Of one server, by the names under which clients see them."""

    num_uncommitted_tokens: int
    """Of contexts that nobody has committed yet."""
    max_uncommitted_tokens: int
    """The cap on them."""
    num_waiting_segments: int
    """Operations that wait for room."""
    num_refused_segments: int
    """Operations refused for want of room. Since the server registered."""
    num_over_cap_segments: int
    """Operations admitted above the cap, so that somebody makes room. Since it registered."""


class Verdict(Enum):
    """What becomes of an operation."""

    ADMITTED = auto()
    WAITS = auto()
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to `ServerAdmission.ask`."""

    verdict: Verdict
    others: tuple[StreamId, ...]
    """Streams whose waiting operation is admitted by the same step, in this order."""
    displaced: StreamId | None = None
    """A stream whose waiting operation is refused in place of this one."""


class ServerAdmission:
    """The uncommitted contexts of one server. A stream has at most one operation at a time.

    Attributes:
        cap_tokens: on `held_tokens`.
        held_tokens: of all streams here, admitted operations included.
    """

    def __init__(self, cap_tokens: int, max_waiting: int) -> None:
        self.cap_tokens = cap_tokens
        self.held_tokens = 0
        self._max_waiting = max_waiting
        self._num_refused = 0
        self._num_over_cap = 0
        self._held: dict[StreamId, int] = {}
        self._queue = FairWaiting()
        self._share_of: dict[StreamId, Share] = {}
        self._held_by: Counter[str] = Counter()
        """Tokens by tenant; none is 0."""
        self._weights: dict[str, float] = {}
        """Of the newest stream of each tenant that holds or wants tokens."""
        self._held_back: set[StreamId] = set()
        self._free: set[StreamId] = set()
        """Those that hold tokens and are not held back: who may make room."""
        self._favourite: StreamId | None = None

    @property
    def num_waiting(self) -> int:
        """Operations that wait."""
        return len(self._queue)

    @property
    def spare_tokens(self) -> int:
        """By how much the contexts here may grow before an operation waits."""
        return 0 if self._queue else max(0, self.cap_tokens - self.held_tokens)

    @property
    def is_full(self) -> bool:
        """Whether any growth would wait."""
        return len(self._queue) > 0 or self.held_tokens >= self.cap_tokens

    def counters(self) -> AdmissionCounters:
        """As they are now."""
        return AdmissionCounters(
            num_uncommitted_tokens=self.held_tokens,
            max_uncommitted_tokens=self.cap_tokens,
            num_waiting_segments=len(self._queue),
            num_refused_segments=self._num_refused,
            num_over_cap_segments=self._num_over_cap,
        )

    def tokens_of(self, stream_id: StreamId) -> int:
        """What a stream holds; 0 for one that is not here."""
        return self._held.get(stream_id, 0)

    def hold(self, stream_id: StreamId, num_tokens: int, share: Share | None = None) -> None:
        """The stream is here with so many tokens, whether there is room or not.

        Args:
            share: on whose account; None: as it was said before.
        """
        if share is not None:
            self._share_of.setdefault(stream_id, share)
        growth_tokens = num_tokens - self._held.get(stream_id, 0)
        self.held_tokens += growth_tokens
        self._held[stream_id] = num_tokens
        self._count(stream_id, growth_tokens)
        self._changed(stream_id)

    def leave(self, stream_id: StreamId) -> None:
        """It is committed, has ended, or goes elsewhere. Does nothing for one that is not here."""
        num_tokens = self._held.pop(stream_id, 0)
        self.held_tokens -= num_tokens
        self._queue.discard(stream_id)
        self._count(stream_id, -num_tokens)
        self._held_back.discard(stream_id)
        self._changed(stream_id)
        self._share_of.pop(stream_id, None)

    def ask(self, stream_id: StreamId, num_tokens: int) -> Decision:
        """May the stream have so many tokens? When it is admitted, it has them from now on."""
        if num_tokens <= self.tokens_of(stream_id) or stream_id == self._favourite:
            self._admit(stream_id, num_tokens)
            return Decision(Verdict.ADMITTED, self.admit_waiting())
        share = self._share(stream_id)
        self._weights[share.tenant] = share.weight
        self._queue.put(stream_id, num_tokens, share)
        self._held_back.add(stream_id)
        self._changed(stream_id)
        admitted = self.admit_waiting()
        if stream_id in admitted:
            others = tuple(other for other in admitted if other != stream_id)
            return Decision(Verdict.ADMITTED, others)
        if len(self._queue) > self._max_waiting:
            displaced = self._queue.most_dispensable()
            self.withdraw(displaced, refused=True)
            if displaced != stream_id:
                return Decision(Verdict.WAITS, admitted, displaced)
            return Decision(Verdict.REFUSED, admitted)
        return Decision(Verdict.WAITS, admitted)

    def take(self, stream_id: StreamId, num_tokens: int) -> bool:
        """`ask` where nobody waits and there is room; False: nothing happened."""
        growth_tokens = num_tokens - self.tokens_of(stream_id)
        if len(self._queue) or self.held_tokens + growth_tokens > self.cap_tokens:
            return False
        self._admit(stream_id, num_tokens)
        return True

    def withdraw(self, stream_id: StreamId, *, refused: bool) -> None:
        """Its operation does not wait any more. Does nothing when it does not.

        Args:
            refused: it waited too long, or there were too many; else its call was given up.
        """
        if self._queue.discard(stream_id):
            self._num_refused += refused
            self._count(stream_id, 0)

    def admit_waiting(self) -> tuple[StreamId, ...]:
        """Admit whom there is room for now. To be called after `hold`, `leave` and `withdraw`.

        Returns:
            streams whose operation does not wait any more, in this order.
        """
        admitted: list[StreamId] = []
        while len(self._queue):
            stream_id = self._next()
            if stream_id is None:
                break
            num_tokens = self._queue.tokens_of(stream_id)
            self._queue.discard(stream_id)
            self._admit(stream_id, num_tokens)
            admitted.append(stream_id)
        return tuple(admitted)

    def _next(self) -> StreamId | None:
        """Whose operation is admitted now."""
        heads = self._queue.heads()
        if self.held_tokens + self._growth(heads[0]) <= self.cap_tokens:
            return heads[0]
        for stream_id in heads:
            if self._is_within_share(stream_id):
                return stream_id
        if self._free:
            return None
        self._favourite = heads[0]
        return heads[0]

    def _growth(self, stream_id: StreamId) -> int:
        return self._queue.tokens_of(stream_id) - self.tokens_of(stream_id)

    def _is_within_share(self, stream_id: StreamId) -> bool:
        weights, growth_tokens = self._weights, self._growth(stream_id)
        # Tenants that come and go may hold more than the shares that they have now.
        if len(weights) < 2 or self.held_tokens + growth_tokens > 2 * self.cap_tokens:
            return False
        tenant = self._share(stream_id).tenant
        share_tokens = self.cap_tokens * weights[tenant] / sum(weights.values())
        return self._held_by[tenant] + growth_tokens <= share_tokens

    def _share(self, stream_id: StreamId) -> Share:
        return self._share_of.get(stream_id, NO_SHARE)

    def _count(self, stream_id: StreamId, growth_tokens: int) -> None:
        """Keep the sums by tenant."""
        share = self._share(stream_id)
        tenant, held_by = share.tenant, self._held_by
        held_by[tenant] += growth_tokens
        if held_by[tenant]:
            self._weights[tenant] = share.weight
            return
        del held_by[tenant]
        if not self._queue.has(tenant):
            self._weights.pop(tenant, None)

    def _admit(self, stream_id: StreamId, num_tokens: int) -> None:
        grows = num_tokens > self.tokens_of(stream_id)
        if grows:
            growth_tokens = num_tokens - self.tokens_of(stream_id)
            self._queue.give(stream_id, growth_tokens, self._share(stream_id))
        self._held_back.discard(stream_id)
        self.hold(stream_id, num_tokens)
        self._num_over_cap += grows and self.held_tokens > self.cap_tokens

    def _changed(self, stream_id: StreamId) -> None:
        if self.tokens_of(stream_id) and stream_id not in self._held_back:
            self._free.add(stream_id)
        else:
            self._free.discard(stream_id)
        if self.held_tokens <= self.cap_tokens or self._favourite not in self._held:
            self._favourite = None
