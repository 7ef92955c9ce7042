"""What a server knows about each of its streams."""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from streamfill.messages.common import (
    NO_SHARE,
    SHARED_NAMESPACE,
    Finish,
    HandoffTarget,
    Sampling,
    Share,
    StreamMode,
    TokenLogprob,
)
from streamfill.messages.control import Residency, StreamTelemetry
from streamfill.scheduling.plan import RunReason
from streamfill.scheduling.snapshot import expected_next_s
from streamfill.serving.account import WorkAccount

NUM_GAPS_KEPT = 8
"""Enough to see a stream's rhythm, few enough to send with every report."""


class Phase(enum.IntEnum):
    """Where a stream is on this server; it only ever moves forward.

    1. ``OPEN``       context arrives and is computed.
    2. ``WAITING_KV`` an answer was asked for whose KV is on its way (decode servers only).
    3. ``COMMITTED``  the prompt is complete; what is missing of it is computed.
    4. ``ANSWERING``  the engine has the request that samples.
    5. ``DONE``       the answer is complete here; kept so that lost output can be sent again.
    """

    OPEN = 1
    WAITING_KV = 2
    COMMITTED = 3
    ANSWERING = 4
    DONE = 5


@dataclass
class Answer:
    """The answer of one stream, as far as this server generates it."""

    sampling: Sampling
    """Of the whole answer."""
    num_brought: int
    """Answer tokens that were sampled elsewhere; they stand at the end of the record's ids."""
    handoff: HandoffTarget | None = None
    """Where the rest of the answer is generated; None: here."""
    transfer_id: int | None = None
    """KV that a decode server waits for."""
    wait_until_s: float = 0.0
    """When it stops waiting."""
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    """Sampled here; the first one has index ``num_brought``."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    num_cached_tokens: int = 0
    """Of the prompt, found in the tree when the answer was asked for."""


@dataclass
class InFlight:
    """A request of the stream that the engine has."""

    key: str
    up_to: int
    """Tokens of the stream that will be computed when it is over."""
    num_new_tokens: int
    keep_tokens: int
    """Smallest ``keep_tokens`` of the splices since it was started: what will still be of use."""
    num_in_tree: int = 0
    """Tokens of the stream that were in the tree when the request was decided on."""
    began_s: float = 0.0
    """When the engine took it out of its waiting queue; the latest turn that still saw it there."""
    reason: RunReason = RunReason.SEGMENT
    """Why it was started."""
    num_step_tokens: int = 0
    """Tokens of all runs that were started with it."""
    is_sampling: bool = False
    """The prompt is computed, tokens come out."""


class IllegalPhaseError(RuntimeError):
    """A stream was to move backwards: a bug of ours."""


@dataclass
class StreamRecord:
    """One stream on one server. Owned by the server's core, changed in the scheduler's thread
    only."""

    stream_id: int
    attempt: int
    mode: StreamMode
    priority: int
    opened_s: float
    ttft_slo_s: float | None = None
    """Time to first token that the client wants, from the commit."""
    namespace: str = SHARED_NAMESPACE
    """In which its KV is looked for and kept."""
    share: Share = NO_SHARE
    """On whose account it is computed."""
    ids: array[int] = field(default_factory=lambda: array("q"))
    """The token log as this server knows it, with the brought answer tokens behind the prompt."""
    seq: int = 0
    num_computed: int = 0
    """Believed to be in the tree; checked against it before it is relied upon."""
    num_reached: int = 0
    """Longest prefix that was ever computed and not invalidated since; more than ``num_computed``
    after an eviction."""
    num_shared: int = 0
    """Of the computed tokens, those whose KV other open streams use too, when it was last seen."""
    num_host: int = 0
    """Tokens right behind the computed ones whose KV is in host memory, when it was last seen."""
    num_saved: int = 0
    """Length of the prefix that host memory held a copy of, when it was last seen."""
    was_preempted: bool = False
    """It lost KV, and has not computed anything since."""
    num_invalidated: int = 0
    num_segments: int = 0
    """Splices that were applied."""
    _segment_ends: array[int] = field(default_factory=lambda: array("q"))
    """Where the tokens of each splice end that are still valid, ascending."""
    _segment_arrivals_s: array[float] = field(default_factory=lambda: array("d"))
    """When they arrived."""
    last_splice_s: float = 0.0
    last_computed_s: float = 0.0
    committed_s: float | None = None
    done_s: float | None = None
    keep_s: float = 0.0
    """For so long after its answer a prompt that begins with this one is to be expected."""
    hinted_next_s: float | None = None
    """When the next segment comes, as the client said with the newest one."""
    gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_GAPS_KEPT))
    commit_follows: bool = False
    """The newest splice said that its commit is right behind it."""
    phase: Phase = Phase.OPEN
    answer: Answer | None = None
    in_flight: InFlight | None = None
    account: WorkAccount = field(default_factory=WorkAccount)
    """Of the prompt, without the brought answer tokens."""

    def advance(self, phase: Phase) -> None:
        """Move on to a later phase.

        Raises:
            IllegalPhaseError: ``phase`` is not later than the present one.
        """
        if phase <= self.phase:
            raise IllegalPhaseError(
                f"stream {self.stream_id:x} cannot go from {self.phase.name} to {phase.name}"
            )
        self.phase = phase

    def splice(self, keep_tokens: int, new_ids: array[int], now_s: float) -> None:
        """Keep the first ``keep_tokens`` ids, put ``new_ids`` behind, and invalidate what was
        computed beyond.

        Raises:
            ValueError: more is to be kept than there is.
        """
        if not 0 <= keep_tokens <= len(self.ids):
            raise ValueError(f"cannot keep {keep_tokens} of {len(self.ids)} tokens")
        if keep_tokens < self.num_computed:
            self.num_invalidated += self.num_computed - keep_tokens
            self.num_computed = keep_tokens
        self.num_host = max(0, min(self.num_host, keep_tokens - self.num_computed))
        self.num_saved = min(self.num_saved, keep_tokens)
        self.num_reached = min(self.num_reached, keep_tokens)
        self.account.cut(keep_tokens)
        if self.in_flight is not None:
            self.in_flight.keep_tokens = min(self.in_flight.keep_tokens, keep_tokens)
        del self.ids[keep_tokens:]
        self.ids.extend(new_ids)
        self._note_segment(keep_tokens, now_s)
        if self.last_splice_s:
            self.gaps_s.append(now_s - self.last_splice_s)
        self.last_splice_s = now_s
        self.num_segments += 1

    def note_computed(self, num_tokens: int) -> None:
        """The first ``num_tokens`` were seen in the tree."""
        gained = max(0, num_tokens - self.num_computed)
        self.num_host = max(0, self.num_host - gained)
        self.num_computed += gained
        self.num_reached = max(self.num_reached, self.num_computed)

    def note_lost(self, num_cached: int, num_host: int) -> None:
        """Only the first ``num_cached`` tokens are in the tree; behind them ``num_host`` in host
        memory."""
        self.num_computed = num_cached
        self.num_host = num_host
        self.num_saved = max(self.num_saved, num_cached + num_host) if num_host else self.num_saved
        self.num_shared = min(self.num_shared, num_cached)

    def pending_since_s(self, page_size: int) -> float:
        """When the oldest splice arrived of which whole pages are not computed; of no meaning where
        there is none."""
        next_page_end = self.num_computed - self.num_computed % page_size + page_size
        index = bisect_left(self._segment_ends, next_page_end)
        if index == len(self._segment_ends):
            return self.last_splice_s
        return self._segment_arrivals_s[index]

    @property
    def awaits_commit(self) -> bool:
        """Computing may wait for the commit that is on its way, so that one step does both."""
        return self.commit_follows and self.phase is Phase.OPEN

    @property
    def num_prompt(self) -> int:
        """Known tokens of the prompt; the others are of the answer, sampled elsewhere."""
        return len(self.ids) - (0 if self.answer is None else self.answer.num_brought)

    @property
    def num_missing(self) -> int:
        """Known tokens that are not computed."""
        return len(self.ids) - self.num_computed

    def has_new_context(self, page_size: int) -> bool:
        """Whole pages are known that were never computed; what was merely evicted does not
        count."""
        return len(self.ids) // page_size > self.num_reached // page_size

    def _note_segment(self, keep_tokens: int, now_s: float) -> None:
        ends, arrivals_s = self._segment_ends, self._segment_arrivals_s
        cut_s: float | None = None
        while ends and ends[-1] > keep_tokens:
            ends.pop()
            cut_s = arrivals_s.pop()
        if cut_s is not None and keep_tokens > (ends[-1] if ends else 0):
            ends.append(keep_tokens)
            arrivals_s.append(cut_s)
        if len(self.ids) > keep_tokens:
            ends.append(len(self.ids))
            arrivals_s.append(now_s)

    def keep_until_s(self) -> float | None:
        """Until when its KV counts as that of an open stream, once it is done; None before."""
        return None if self.done_s is None or not self.keep_s else self.done_s + self.keep_s

    def expected_next_s(self) -> float | None:
        """When its next segment is expected: as the client said, else see
        ``snapshot.expected_next_s``."""
        if self.done_s is not None and self.keep_s:
            return self.done_s + self.keep_s / 2  # any time until then is as likely as another
        if self.committed_s is not None:
            return None
        if self.hinted_next_s is not None:
            return self.hinted_next_s
        return expected_next_s(self.last_splice_s, self.gaps_s)

    def telemetry(self, now_s: float, page_size: int) -> StreamTelemetry:
        """This stream for the preemption controller."""
        if self.num_computed:
            residency = Residency.DEVICE
        else:
            residency = Residency.HOST if self.num_host else Residency.NONE
        expected_s = self.expected_next_s()
        return StreamTelemetry(
            stream_id=self.stream_id,
            num_known_tokens=len(self.ids),
            num_computed_tokens=self.num_computed,
            residency=residency,
            num_shared_tokens=min(self.num_shared, self.num_computed),
            num_saved_tokens=min(self.num_saved, self.num_computed),
            num_host_tokens=self.num_host,
            committed=self.phase not in (Phase.OPEN, Phase.DONE),
            active=self.in_flight is not None
            or (self.phase is Phase.OPEN and self.has_new_context(page_size)),
            idle_s=max(0.0, now_s - max(self.last_splice_s, self.opened_s)),
            gaps_s=tuple(self.gaps_s),
            expected_next_s=None if expected_s is None else expected_s - now_s,
            was_preempted=self.was_preempted,
            priority=self.priority,
        )


class Streams(NamedTuple):
    """All streams of a server. Its core puts them in and takes them out."""

    records: dict[int, StreamRecord]
    """By stream id; of those that the router has not ended."""
    kept: dict[int, StreamRecord]
    """By stream id; done and forgotten by the router, but expected to come back."""
    by_key: dict[str, StreamRecord]
    """By the key of the request that the engine has of them."""

    def find(self, stream_id: int) -> StreamRecord | None:
        """One that is here, or is kept."""
        return self.records.get(stream_id) or self.kept.get(stream_id)
