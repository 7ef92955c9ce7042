"""A plan in the making: who still fits into the step. Shared by all policies.

Memory is counted against the whole pool, since what does not run can be evicted: a run needs its
new tokens in whole pages, one page more, what has to come back from host memory, and its own
prefix, which it locks. Nothing is changed here. The engine acquires memory when the runs are
started, and may find less.
"""

from __future__ import annotations

from streamfill.scheduling.plan import Deferral, DeferReason, RunReason, StreamRun
from streamfill.scheduling.snapshot import Snapshot, StreamView


class Step:
    """What is left to give in this step, and what was given."""

    __slots__ = (
        "_excess",
        "_first_commit",
        "_memory",
        "_page",
        "_spare",
        "budget",
        "commit_waits",
        "deferred",
        "num_locked_tokens",
        "num_new_tokens",
        "runs",
        "slots",
    )

    def __init__(self, snapshot: Snapshot) -> None:
        memory = snapshot.memory
        self.runs: list[StreamRun] = []
        self.deferred: list[Deferral] = []
        self.commit_waits = False
        """A committed stream waits for memory: nobody uncommitted may take any."""
        self.budget = snapshot.token_budget
        self.slots = snapshot.max_requests
        self.num_new_tokens = 0
        """That the runs allocate, in whole pages."""
        self.num_locked_tokens = 0
        """Evictable ones that the runs lock."""
        self._page = memory.page_size
        self._memory = memory.num_free_tokens + memory.num_evictable_tokens
        self._spare = self._memory - snapshot.num_streams_evictable_tokens
        """Memory that belongs to no stream: free, or cached for nobody who is here."""
        self._excess = 0
        self._first_commit = True

    @property
    def is_full(self) -> bool:
        """Nobody can run any more, whoever it is."""
        return self.slots < 1 or self.budget < self._page

    @property
    def full_reason(self) -> DeferReason:
        """Why."""
        return DeferReason.NO_SLOT if self.slots < 1 else DeferReason.NO_BUDGET

    @property
    def has_spare_page(self) -> bool:
        """There is memory that belongs to no stream, enough for a page and the one beside it."""
        return self._spare >= 2 * self._page

    def limit(self, num_tokens: int) -> None:
        """From now on at most so many tokens, half as many again where that ends a context: a step
        for a small rest costs more than the rest."""
        whole = self.budget
        self.budget = min(whole, max(num_tokens, self._page))
        self._excess = min(self.budget // 2, whole - self.budget)

    def take_committed(self, stream: StreamView) -> None:
        """Run what is left of a committed prompt, or as much of it as there is room for."""
        if stream.in_flight:
            self.commit_waits |= stream.waiting_on_memory
            self.defer(stream, DeferReason.IN_FLIGHT)
            return
        is_first, self._first_commit = self._first_commit, False
        num_known = stream.num_known_tokens
        # The last token is computed in any case, for its logits; KV is reused in whole pages.
        resident = self._whole_pages(min(stream.num_computed_tokens, num_known - 1))
        start = self._whole_pages(min(stream.num_kept_tokens, num_known - 1))
        num_restored = start - resident
        num_lacking = num_known - start
        room = self._memory - self._page - stream.num_evictable_tokens - num_restored
        if self.slots < 1:
            self.defer(stream, DeferReason.NO_SLOT)
        elif num_lacking <= self.budget and self._in_pages(num_lacking) <= room:
            self._run(stream, start, num_known, RunReason.COMMIT, num_restored)
        elif chunk := self._chunk(num_lacking, room):
            self.commit_waits |= room < self._in_pages(min(num_lacking, self.budget))
            self._run(stream, start, start + chunk, RunReason.COMMIT_CHUNK, num_restored)
        elif self.budget < min(num_lacking, self._page):
            self.defer(stream, DeferReason.NO_BUDGET)
        elif is_first and not self.runs:
            self.commit_waits = True
            fits_step = num_lacking <= self.budget
            num_tokens = num_lacking if fits_step else self._whole_pages(self.budget)
            self._run(stream, start, start + num_tokens, RunReason.COMMIT_TRIED, num_restored)
        else:
            self.commit_waits = True
            self.defer(stream, DeferReason.NO_MEMORY)

    def take_uncommitted(self, stream: StreamView) -> None:
        """Fill the cache with whole pages. What is less than a page is left for the commit."""
        start = self._whole_pages(stream.num_kept_tokens)
        num_restored = start - self._whole_pages(stream.num_computed_tokens)
        num_lacking = self._whole_pages(stream.num_known_tokens) - start
        if num_lacking <= 0:
            return
        if self.commit_waits:
            self.defer(stream, DeferReason.YIELDS)
            return
        reason = RunReason.SEGMENT
        room = self._memory - self._page - stream.num_evictable_tokens - num_restored
        if self._whole_pages(stream.num_reached_tokens) >= start + num_lacking:
            reason = RunReason.RECOMPUTE
            room = min(room, self._spare - self._page - num_restored)
        if self.budget < num_lacking <= self.budget + self._excess:
            self.budget, self._excess = num_lacking, 0
        if self.slots < 1:
            self.defer(stream, DeferReason.NO_SLOT)
        elif self.budget < self._page:
            self.defer(stream, DeferReason.NO_BUDGET)
        elif chunk := self._chunk(num_lacking, room):
            self._run(stream, start, start + chunk, reason, num_restored)
        else:
            self.defer(stream, DeferReason.NO_MEMORY)

    def defer(self, stream: StreamView, reason: DeferReason) -> None:
        """It was looked at and has to wait."""
        self.deferred.append(Deferral(stream.stream_id, reason))

    def _chunk(self, num_lacking: int, room: int) -> int:
        """The most whole pages of what is lacking that fit budget and memory; 0: none."""
        return max(0, self._whole_pages(min(num_lacking, self.budget, room)))

    def _run(
        self, stream: StreamView, start: int, up_to: int, reason: RunReason, num_restored: int
    ) -> None:
        num_tokens = up_to - start
        is_commit = up_to == stream.num_known_tokens and stream.committed_s is not None
        self.runs.append(
            StreamRun(stream.stream_id, num_tokens, up_to, is_commit, reason, num_restored)
        )
        self.slots -= 1
        self.budget -= num_tokens
        num_new = self._in_pages(num_tokens) + self._page + num_restored
        self.num_new_tokens += num_new
        self.num_locked_tokens += stream.num_evictable_tokens
        self._memory -= num_new + stream.num_evictable_tokens
        self._spare -= num_new

    def _whole_pages(self, num_tokens: int) -> int:
        """Tokens in the pages that ``num_tokens`` fill."""
        return num_tokens - num_tokens % self._page

    def _in_pages(self, num_tokens: int) -> int:
        """Tokens in the pages that ``num_tokens`` need."""
        return -(-num_tokens // self._page) * self._page


def num_lacking_tokens(stream: StreamView) -> int:
    """Tokens that are left to compute; of a committed stream at least its last one."""
    num_lacking = stream.num_known_tokens - stream.num_kept_tokens
    return num_lacking if num_lacking > 0 or stream.committed_s is None else 1


def num_new_tokens(stream: StreamView) -> int:
    """Those of them that were never computed: what was taken from the stream is left out."""
    num_lost = stream.num_reached_tokens - stream.num_kept_tokens
    return num_lacking_tokens(stream) - max(0, num_lost)
