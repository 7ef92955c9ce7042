"""What one server did for one stream: the runs of its prompt, and what was lost and found.

The core tells it four things, each at the cost of what changed:

1. ``cut``       the client replaced what was behind these tokens;
2. ``observe``   so much of the prompt was just seen in the radix tree. Less than before: the
                 difference was evicted, and will be computed again;
3. ``ran``       the engine finished a run of the prompt;
4. ``answered``  the prompt is complete and computed.

After ``answered``, for a stream whose context only grew, each prompt token was either computed for
it first, or found in the tree:

    num_computed - num_recomputed + num_reused = num_prompt + what was computed for logits alone

The last term is at most a page: the last token's page is computed also where it is in the tree. An
update, or a piece whose seam is tokenised anew, makes the left side larger: what was computed
before it counts as well. It is never smaller.
"""

from __future__ import annotations

from typing import NamedTuple

from streamfill.messages.common import ComputeRun, Preemption, StreamAccount
from streamfill.messages.control import PreemptionAction

NUM_RUNS_KEPT = 256
"""A run is at most one step, so even long prompts have fewer; a stream may live for hours."""
NEGLIGIBLE_TOKENS = 16
"""Of a loss, at its end: host memory keeps whole blocks of this many, and the rest is computed with
what is new."""
NUM_PREEMPTIONS_KEPT = 64
"""Of the same order: one can follow each segment."""


class _Run(NamedTuple):
    start_s: float
    end_s: float
    num_tokens: int
    reason: str


class _Loss(NamedTuple):
    at_s: float
    num_tokens: int
    action: str = PreemptionAction.RECOMPUTE.value
    reason: str = ""
    predicted_s: float | None = None
    actual_s: float | None = None
    num_back: int = 0


class Recovery(NamedTuple):
    """KV that was taken from a stream is back."""

    action: PreemptionAction
    num_tokens: int
    predicted_s: float
    actual_s: float


class RunOutcome(NamedTuple):
    """What one run of the engine came to."""

    num_computed: int
    num_recomputed: int
    """Of them, computed before and evicted meanwhile."""


class WorkAccount:
    """Account of one stream on one server. Owned by the stream's record; times are of the server's
    clock."""

    def __init__(self, page_size: int = 1) -> None:
        """``page_size``: tokens are shared and evicted in pages of this many."""
        self.num_computed = 0
        """Prompt tokens that went through the model, each time counted."""
        self.num_recomputed = 0
        """Of them, computed here before and evicted meanwhile."""
        self.num_reused = 0
        """Prompt tokens found in the tree and never computed here; 0 before ``answered``."""
        self._page_size = page_size
        self._runs: list[_Run] = []
        self._losses: list[_Loss] = []
        self._own: list[tuple[int, int]] = []
        """Positions that were computed here and are still valid: half-open, ascending, apart."""
        self.num_losses = 0
        """How often the stream was preempted."""
        self._losing = False
        """Something was lost, and nothing has come back since."""
        self._num_resident = 0
        """Length of the prefix that was in the tree when it was last seen; whole pages."""

    @property
    def is_empty(self) -> bool:
        """Nothing happened that anybody has to be told."""
        return not self._runs and not self._losses and not self.num_reused

    def cut(self, keep_tokens: int) -> None:
        """The client replaced the prompt behind ``keep_tokens``. KV is kept in whole pages, so what
        goes with the cut page went to the client's change, not to eviction."""
        keep_tokens = self._whole_pages(keep_tokens)
        self._num_resident = min(self._num_resident, keep_tokens)
        while self._own and self._own[-1][1] > keep_tokens:
            start, _ = self._own.pop()
            if start < keep_tokens:
                self._own.append((start, keep_tokens))

    def observe(self, num_cached: int, num_looked_at: int, now_s: float) -> bool:
        """The tree holds the first ``num_cached`` of ``num_looked_at`` tokens. Returns whether KV
        was lost to eviction since the last look."""
        num_before = self._num_resident
        if num_cached >= min(num_before, self._whole_pages(num_looked_at)):
            self._num_resident = max(num_before, num_cached)
            self._losing &= num_cached <= num_before
            return False
        self._num_resident = num_cached
        num_lost = num_before - num_cached
        if self._losing:
            # Memory is taken in pieces, as it is needed: one loss, until the stream gets on.
            loss = self._losses[-1]
            self._losses[-1] = loss._replace(num_tokens=loss.num_tokens + num_lost)
            return True
        self._losing = True
        self.num_losses += 1
        self._losses.append(_Loss(now_s, num_lost))
        if len(self._losses) > NUM_PREEMPTIONS_KEPT:
            first, second = self._losses[:2]
            self._losses[:2] = [_Loss(second.at_s, first.num_tokens + second.num_tokens)]
        return True

    @property
    def num_lost_tokens(self) -> int:
        """Of the newest loss; 0 before the first."""
        return self._losses[-1].num_tokens if self._losses else 0

    def explain_loss(self, action: PreemptionAction, reason: str, predicted_s: float) -> None:
        """Of the loss that was just observed: how it comes back, why it was taken, and what getting
        it back is predicted to cost."""
        self._losses[-1] = self._losses[-1]._replace(
            action=action.value, reason=reason, predicted_s=predicted_s
        )

    def recovered(
        self, action: PreemptionAction, num_tokens: int, seconds: float
    ) -> list[Recovery]:
        """Lost KV came back, at the cost of ``seconds``. Returns losses that are now made good
        for."""
        self._losing = False
        done: list[Recovery] = []
        num_left = num_tokens
        for index, loss in enumerate(self._losses):
            if num_left <= 0 or loss.predicted_s is None or loss.num_back >= loss.num_tokens:
                continue
            share = min(num_left, loss.num_tokens - loss.num_back)
            num_left -= share
            actual_s = (loss.actual_s or 0.0) + seconds * share / num_tokens
            num_back = loss.num_back + share
            if loss.num_tokens - num_back < NEGLIGIBLE_TOKENS:
                num_back = loss.num_tokens
            way = action.value if 2 * share >= loss.num_tokens else loss.action
            self._losses[index] = loss._replace(action=way, actual_s=actual_s, num_back=num_back)
            if num_back >= loss.num_tokens:
                done.append(Recovery(action, loss.num_tokens, loss.predicted_s, actual_s))
        return done

    def ran(
        self,
        *,
        start_s: float,
        end_s: float,
        up_to: int,
        num_valid: int,
        num_in_tree: int,
        num_cached: int,
        reason: str = "",
    ) -> RunOutcome:
        """The engine finished a run of the prompt's first ``up_to`` tokens.

        Args:
            start_s: when it began to compute.
            end_s: when it was found to be over.
            up_to: tokens of the prompt in it.
            num_valid: of them, those that no update has replaced meanwhile.
            num_in_tree: tokens of the prompt that were in the tree when the run was decided on.
            num_cached: tokens that the engine found there when it began.
            reason: why it was started, for whoever reads the account.
        """
        if num_valid < up_to:
            num_valid = self._whole_pages(num_valid)
        num_computed = max(0, up_to - num_cached)
        if not num_computed:
            return RunOutcome(0, 0)
        # The engine computes at least the last token, and whole pages: that is no loss.
        reusable = self._whole_pages(min(num_in_tree, up_to - 1))
        self.observe(num_cached, reusable, start_s)
        lost_from = max(num_cached, num_in_tree) if num_cached >= reusable else num_cached
        self._losing = False
        num_recomputed = self._num_own(lost_from, num_valid)
        self._add_own(num_cached, num_valid)
        self._num_resident = max(self._num_resident, self._whole_pages(num_valid))
        self.num_computed += num_computed
        self.num_recomputed += num_recomputed
        self._runs.append(_Run(start_s, end_s, num_computed, reason))
        if len(self._runs) > NUM_RUNS_KEPT:
            self._merge_old_runs()
        return RunOutcome(num_computed, num_recomputed)

    def answered(self, num_prompt_tokens: int) -> None:
        """All of the prompt is computed. What was not computed for this stream was found."""
        self.num_reused = num_prompt_tokens - self._num_own(0, num_prompt_tokens)

    def message(self, now_s: float) -> StreamAccount:
        """The account for the router, its times as ages at ``now_s``."""
        return StreamAccount(
            num_computed_tokens=self.num_computed,
            num_recomputed_tokens=self.num_recomputed,
            num_reused_tokens=self.num_reused,
            runs=tuple(
                ComputeRun(
                    start_age_s=now_s - run.start_s,
                    end_age_s=now_s - run.end_s,
                    num_tokens=run.num_tokens,
                    reason=run.reason,
                )
                for run in self._runs
            ),
            preemptions=tuple(
                Preemption(
                    age_s=now_s - loss.at_s,
                    num_tokens=loss.num_tokens,
                    action=loss.action,
                    reason=loss.reason,
                    predicted_s=loss.predicted_s,
                    actual_s=loss.actual_s if loss.num_back >= loss.num_tokens else None,
                )
                for loss in self._losses
            ),
        )

    def _whole_pages(self, num_tokens: int) -> int:
        return num_tokens - num_tokens % self._page_size

    def _num_own(self, start: int, end: int) -> int:
        """Positions in [start, end) that were computed here."""
        num_own = 0
        for own_start, own_end in reversed(self._own):
            if own_end <= start:
                break
            num_own += max(0, min(own_end, end) - max(own_start, start))
        return num_own

    def _add_own(self, start: int, end: int) -> None:
        if start >= end:
            return
        behind: list[tuple[int, int]] = []
        while self._own and self._own[-1][1] >= start:
            own_start, own_end = self._own.pop()
            if own_start > end:
                behind.append((own_start, own_end))
            else:
                start, end = min(start, own_start), max(end, own_end)
        self._own.append((start, end))
        self._own.extend(reversed(behind))

    def _merge_old_runs(self) -> None:
        """Make one of every two runs in the older half. One that stands for two is as long as both
        together and ends with the second, so that tokens and times still add up."""
        num_old = NUM_RUNS_KEPT // 2
        old = self._runs[:num_old]
        self._runs[:num_old] = [
            _Run(
                second.end_s - (first.end_s - first.start_s) - (second.end_s - second.start_s),
                second.end_s,
                first.num_tokens + second.num_tokens,
                second.reason,
            )
            for first, second in zip(old[::2], old[1::2], strict=True)
        ]
