"""What a policy decides on: streams and memory at one moment.

A server keeps one ``StreamTable`` and puts a stream's new view into it whenever something about the
stream changed. ``StreamTable.snapshot`` then costs the same for ten streams and for ten thousand,
and carries the log of changes with it, from which a policy brings its own order up to date
(``turns.TurnIndex``). A decision therefore costs what changed.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from streamfill.scheduling.shares import NOTHING_SERVED, Served
from streamfill.stream.ids import StreamId


class ContextMode(enum.IntEnum):
    """How a stream's context grows."""

    APPEND = 0
    UPDATE = 1
    """What is computed may be replaced before it is of use."""


class StreamView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One stream that is not over. Times are seconds of one monotonic clock, any origin."""

    stream_id: StreamId
    mode: ContextMode = ContextMode.APPEND
    arrival_s: float
    """When it was opened."""
    last_segment_s: float
    """When its newest segment arrived."""
    pending_since_s: float
    """When the oldest segment arrived that is not wholly computed; of no meaning when everything
    is."""
    committed_s: float | None = None
    """When it was committed. None: its prompt may still grow."""
    num_known_tokens: int
    """At least 1 once it is committed."""
    num_computed_tokens: int
    """Length of the prefix whose KV is there now: computed and resident."""
    num_reached_tokens: int = 0
    """Length of the prefix that was ever computed and not invalidated since. More than
    ``num_computed_tokens``: KV was taken from the stream. An uncommitted stream that lacks no more
    than that gets it back only where no other stream has to pay for it."""
    num_evictable_tokens: int = 0
    """Of its computed tokens, those that ``MemoryView.num_evictable_tokens`` counts. Running the
    stream locks them, so they make room for nothing. An estimate will do; 0 where nobody knows."""
    num_host_tokens: int = 0
    """Right behind the computed ones, those whose KV is in host memory: they take room when they
    come back, but need not be computed. Whole pages."""
    num_shared_tokens: int = 0
    """Of its computed tokens, those whose KV other open streams use too: taking them from this one
    frees nothing."""
    priority: int = 0
    """Higher is more urgent; what that means is the policy's."""
    tenant: int = 0
    """On whose account it is computed. 0: nobody's in particular."""
    weight: float = 1.0
    """Of the stream: its tokens count that much less."""
    ttft_slo_s: float | None = None
    """Time to first token that the client wants, from the commit. None: it did not say."""
    num_segments: int = 0
    """That have arrived."""
    gaps_s: tuple[float, ...] = ()
    """The last few times between its segments, oldest first."""
    in_flight: bool = False
    """A run of it is with the engine already, so it gets no other."""
    waiting_on_memory: bool = False
    """That run found no memory yet. Of a committed stream: nobody may take what it waits for."""
    awaits_commit: bool = False
    """Its commit is on its way: computing may wait, so that one step does both."""

    @property
    def num_kept_tokens(self) -> int:
        """Length of the prefix that need not be computed: resident, or in host memory behind it."""
        return self.num_computed_tokens + self.num_host_tokens

    def expected_next_s(self) -> float | None:
        """When its next segment is expected: the median of its last gaps behind the newest one.
        None: fewer than two gaps were seen, or it is committed."""
        if self.committed_s is not None:
            return None
        return expected_next_s(self.last_segment_s, self.gaps_s)


def expected_next_s(last_segment_s: float, gaps_s: Collection[float]) -> float | None:
    """The median of some gaps behind the newest segment. None: fewer than two were seen."""
    if len(gaps_s) < 2:
        return None
    ordered = sorted(gaps_s)
    middle = len(ordered) // 2
    return last_segment_s + (ordered[middle] + ordered[-middle - 1]) / 2


class MemoryView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The KV pool, in tokens."""

    num_free_tokens: int
    num_evictable_tokens: int
    """Cached, and nobody runs on it."""
    num_total_tokens: int
    page_size: int = 1
    """Tokens are allocated, shared and evicted in pages of this many."""


class StepCosts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How long a step of the engine takes: ``fixed_s + tokens * per_token_s``."""

    fixed_s: float
    per_token_s: float

    def step_s(self, num_tokens: int) -> float:
        """Duration of a step of so many tokens."""
        return self.fixed_s + num_tokens * self.per_token_s


UNIT_COSTS = StepCosts(fixed_s=0.05, per_token_s=0.0025)
"""SmolLM2-135M on one CPU core; what holds until a server has seen its own steps."""


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """What streams of one mode do, going by those that were committed lately."""

    expected_more: tuple[float, ...] = (1.0,)
    """By number of segments so far: how many more are to be expected, the one with the commit
    included. The last entry holds for longer streams too."""
    gap_s: float = 1.0
    """Usual time between two segments."""

    def expected_commit_s(self, view: StreamView) -> float:
        """When the stream's commit is to be expected, on the clock of its times. May have
        passed."""
        more = self.expected_more[min(view.num_segments, len(self.expected_more) - 1)]
        gaps_s = view.gaps_s
        # The usual gap counts as one of the stream's own.
        return view.last_segment_s + more * (sum(gaps_s) + self.gap_s) / (len(gaps_s) + 1)


class Experience(msgspec.Struct, frozen=True, kw_only=True):
    """What a server has learned so far; see ``learning``. The same object for as long as nothing
    about it changed: whatever depends on it has to be made anew afterwards."""

    costs: StepCosts = UNIT_COSTS
    habits: tuple[Habits, ...] = (Habits(), Habits())
    """By ``ContextMode``."""


NO_EXPERIENCE = Experience()


@dataclass(eq=False, slots=True)
class ChangeLog:
    """Ids of streams whose view changed, in order, some of them often. Shared by all snapshots of a
    table."""

    first: int = 0
    """Number of the oldest entry that is kept."""
    entries: list[StreamId] = field(default_factory=list)

    def since(self, position: int) -> list[StreamId] | None:
        """Ids of the entries from number ``position`` on. None: they are not all kept any more."""
        return None if position < self.first else self.entries[position - self.first :]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Everything that a decision may depend on. Valid until its table changes.

    ``token_budget`` has to be at least a page on the whole: less can never compute one.
    """

    streams: Mapping[StreamId, StreamView]
    """All that are not over."""
    memory: MemoryView
    token_budget: int
    """Tokens that may be computed in this step."""
    long_token_budget: int = 0
    """Likewise, if it can be interrupted; 0: it cannot."""
    max_requests: int
    """Runs that may start in this step: free request slots."""
    now_s: float
    """On the clock of the streams' times."""
    experience: Experience = NO_EXPERIENCE
    served: Served = NOTHING_SERVED
    """What tenants had so far, where there are several."""
    standing_order: Sequence[StreamId] = ()
    """The preemption plan in force: who gives up memory first; who is to be kept stands last.
    Empty while memory is plenty."""
    under_way: Sequence[StreamId] | None = None
    """Committed streams of the step that is interrupted by what is decided: only commits run, and
    only those that are to go before these. None: nothing is interrupted."""
    under_way_s: float = 0.0
    """How long that step has been computed."""
    num_streams_evictable_tokens: int = 0
    """``num_evictable_tokens`` of all streams together."""
    log: ChangeLog
    position: int
    """In the log: all changes before it are in ``streams``."""


class StreamTable:
    """The streams of one server, and what changed about them."""

    def __init__(self, streams: Iterable[StreamView] = ()) -> None:
        self._streams: dict[StreamId, StreamView] = {}
        self._log = ChangeLog()
        self._num_evictable = 0
        for view in streams:
            self.put(view)

    @property
    def streams(self) -> Mapping[StreamId, StreamView]:
        """All views, by id."""
        return self._streams

    def put(self, view: StreamView) -> None:
        """A stream is new, or something about it changed."""
        old = self._streams.get(view.stream_id)
        if old is not None:
            self._num_evictable -= old.num_evictable_tokens
        self._num_evictable += view.num_evictable_tokens
        self._streams[view.stream_id] = view
        self._note(view.stream_id)

    def remove(self, stream_id: StreamId) -> None:
        """A stream is over. Unknown ones are passed over."""
        old = self._streams.pop(stream_id, None)
        if old is not None:
            self._num_evictable -= old.num_evictable_tokens
            self._note(stream_id)

    def snapshot(
        self,
        *,
        memory: MemoryView,
        token_budget: int,
        max_requests: int,
        now_s: float,
        experience: Experience = NO_EXPERIENCE,
        standing_order: Sequence[StreamId] = (),
        long_token_budget: int = 0,
        under_way: Sequence[StreamId] | None = None,
        under_way_s: float = 0.0,
        served: Served = NOTHING_SERVED,
    ) -> Snapshot:
        """The table as it is now; see ``Snapshot`` for the arguments."""
        log = self._log
        return Snapshot(
            streams=self._streams,
            memory=memory,
            token_budget=token_budget,
            long_token_budget=long_token_budget,
            max_requests=max_requests,
            now_s=now_s,
            experience=experience,
            standing_order=standing_order,
            under_way=under_way,
            under_way_s=under_way_s,
            served=served,
            num_streams_evictable_tokens=self._num_evictable,
            log=log,
            position=log.first + len(log.entries),
        )

    def _note(self, stream_id: StreamId) -> None:
        entries = self._log.entries
        entries.append(stream_id)
        if len(entries) > 1024 + 4 * len(self._streams):
            # Whoever is further behind than this is faster with a fresh start.
            num_dropped = len(entries) // 2
            del entries[:num_dropped]
            self._log.first += num_dropped
