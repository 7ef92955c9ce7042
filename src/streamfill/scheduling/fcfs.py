"""First come, first served: committed streams before all others.

Turn: committed streams by the time of their commit; then the others, higher priority first, by the
arrival of their oldest segment that is not computed. Equals by id.

Bounds, with budget B, page size P, R requests per step, and memory that suffices:

* A committed stream's last run starts within ceil(W / (B - P + 1)) + ceil(n / R) steps, where W
  counts the tokens that it and the n - 1 streams committed before it lack at its commit. Nothing
  that comes later delays it, and no uncommitted stream ever does: a step that runs a committed
  stream runs no other ones, since all tokens of a step come out at its end.
* An uncommitted stream runs within the same bound, counted over the streams before it in turn;
  later segments of streams with the same or a lower priority do not delay it. Commits do, for as
  long as they come faster than they run.

Memory: a run needs its new tokens in whole pages, one page more, and its own prefix, which it
locks. A committed stream that waits for memory stops all uncommitted runs. An uncommitted run for
new context may make the engine evict other streams, once per segment that arrives; one that only
brings back evicted KV may not, or two streams too large for the pool would evict each other for
ever.
"""

from __future__ import annotations

from streamfill.scheduling.plan import Deferral, DeferReason, RunReason, StepPlan, StreamRun
from streamfill.scheduling.snapshot import Snapshot, StreamView


class FcfsPolicy:
    """The ``Policy`` described above."""

    def __init__(self, segment_tokens: int | None = None) -> None:
        """
        Args:
            segment_tokens: tokens of uncommitted streams in one step; a commit that comes meanwhile
                waits for them. At least a page runs in any case. None: the whole budget.
        """
        self._segment_tokens = segment_tokens

    def decide(self, snapshot: Snapshot) -> StepPlan:
        """The next step."""
        step = _Step(snapshot)
        committed = sorted(
            (stream.committed_s, stream.stream_id, stream)
            for stream in snapshot.streams
            if stream.committed_s is not None
        )
        for _, _, stream in committed:
            step.take_committed(stream)
        if step.runs:
            # In the same batch their tokens would come out of every first token's time.
            step.commits_only()
        if self._segment_tokens is not None:
            step.limit_uncommitted(self._segment_tokens)
        others = sorted(
            (-stream.priority, stream.pending_since_s, stream.stream_id, stream)
            for stream in snapshot.streams
            if stream.committed_s is None
        )
        for _, _, _, stream in others:
            step.take_uncommitted(stream)
        return StepPlan(tuple(step.runs), tuple(step.deferred))


class _Step:
    """A plan in the making, and what is left to give."""

    def __init__(self, snapshot: Snapshot) -> None:
        memory = snapshot.memory
        self.runs: list[StreamRun] = []
        self.deferred: list[Deferral] = []
        self._page = memory.page_size
        self._budget = snapshot.token_budget
        self._slots = snapshot.max_requests
        self._memory = memory.num_free_tokens + memory.num_evictable_tokens
        self._spare = self._memory - sum(s.num_evictable_tokens for s in snapshot.streams)
        """Memory that belongs to no stream: free, or cached for nobody who is here."""
        self._commit_waits = False
        """A committed stream waits for memory."""
        self._commits_only = False
        self._excess = 0
        self._first_commit = True

    def commits_only(self) -> None:
        """Nothing uncommitted runs in this step."""
        self._commits_only = True

    def limit_uncommitted(self, num_tokens: int) -> None:
        """Uncommitted streams get so many tokens, half as many again where that ends a context: a
        step for a small rest costs more than the rest."""
        whole = self._budget
        self._budget = min(whole, max(num_tokens, self._page))
        self._excess = min(self._budget // 2, whole - self._budget)

    def take_committed(self, stream: StreamView) -> None:
        """Run what is left of a committed prompt, or as much of it as there is room for."""
        if stream.in_flight:
            self._commit_waits |= stream.waiting_on_memory
            self._defer(stream, DeferReason.IN_FLIGHT)
            return
        is_first, self._first_commit = self._first_commit, False
        num_known = stream.num_known_tokens
        # The last token is computed in any case, for its logits; KV is reused in whole pages.
        start = self._whole_pages(min(stream.num_computed_tokens, num_known - 1))
        num_lacking = num_known - start
        room = self._memory - self._page - stream.num_evictable_tokens
        if self._slots < 1:
            self._defer(stream, DeferReason.NO_SLOT)
        elif num_lacking <= self._budget and self._in_pages(num_lacking) <= room:
            self._run(stream, start, num_known, RunReason.COMMIT)
        elif chunk := self._chunk(num_lacking, room):
            self._commit_waits |= room < self._in_pages(min(num_lacking, self._budget))
            self._run(stream, start, start + chunk, RunReason.COMMIT_CHUNK)
        elif self._budget < min(num_lacking, self._page):
            self._defer(stream, DeferReason.NO_BUDGET)
        elif is_first:
            self._commit_waits = True
            fits_step = num_lacking <= self._budget
            num_tokens = num_lacking if fits_step else self._whole_pages(self._budget)
            self._run(stream, start, start + num_tokens, RunReason.COMMIT_TRIED)
        else:
            self._commit_waits = True
            self._defer(stream, DeferReason.NO_MEMORY)

    def take_uncommitted(self, stream: StreamView) -> None:
        """Fill the cache with whole pages. What is less than a page is left for the commit."""
        start = self._whole_pages(stream.num_computed_tokens)
        num_lacking = self._whole_pages(stream.num_known_tokens) - start
        if num_lacking <= 0:
            return
        if stream.in_flight:
            self._defer(stream, DeferReason.IN_FLIGHT)
            return
        if self._commit_waits or self._commits_only:
            self._defer(stream, DeferReason.YIELDS)
            return
        reason = RunReason.SEGMENT
        room = self._memory - self._page - stream.num_evictable_tokens
        if self._whole_pages(stream.num_reached_tokens) >= start + num_lacking:
            reason = RunReason.RECOMPUTE
            room = min(room, self._spare - self._page)
        if self._budget < num_lacking <= self._budget + self._excess:
            self._budget, self._excess = num_lacking, 0
        if self._slots < 1:
            self._defer(stream, DeferReason.NO_SLOT)
        elif self._budget < self._page:
            self._defer(stream, DeferReason.NO_BUDGET)
        elif chunk := self._chunk(num_lacking, room):
            self._run(stream, start, start + chunk, reason)
        else:
            self._defer(stream, DeferReason.NO_MEMORY)

    def _chunk(self, num_lacking: int, room: int) -> int:
        """The most whole pages of what is lacking that fit budget and memory; 0: none."""
        return max(0, self._whole_pages(min(num_lacking, self._budget, room)))

    def _run(self, stream: StreamView, start: int, up_to: int, reason: RunReason) -> None:
        num_tokens = up_to - start
        is_commit = up_to == stream.num_known_tokens and stream.committed_s is not None
        self.runs.append(StreamRun(stream.stream_id, num_tokens, up_to, is_commit, reason))
        self._slots -= 1
        self._budget -= num_tokens
        num_new = self._in_pages(num_tokens) + self._page
        self._memory -= num_new + stream.num_evictable_tokens
        self._spare -= num_new

    def _defer(self, stream: StreamView, reason: DeferReason) -> None:
        self.deferred.append(Deferral(stream.stream_id, reason))

    def _whole_pages(self, num_tokens: int) -> int:
        """Tokens in the pages that ``num_tokens`` fill."""
        return num_tokens - num_tokens % self._page

    def _in_pages(self, num_tokens: int) -> int:
        """Tokens in the pages that ``num_tokens`` need."""
        return -(-num_tokens // self._page) * self._page
