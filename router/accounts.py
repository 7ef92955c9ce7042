"""What servers said of their work for one stream, put together.

Each server that computes part of the prompt sends one account per attempt, with the first token
that it samples. What an attempt did that ended before its first token is not known.
"""

from __future__ import annotations

from streamfill.messages.common import StreamAccount
from streamfill.messages.control import PreemptionAction
from streamfill.observability.lifetime import Lifetime, LifetimeEvent


class WorkRecord:
    """Sums of one stream's accounts. Writes what they tell into its lifetime."""

    def __init__(self, lifetime: Lifetime, opened_s: float) -> None:
        """
        Args:
            lifetime: of the stream; must not have ended when an account is added.
            opened_s: when the router opened it, on the lifetime's clock.
        """
        self.num_computed_tokens = 0
        self.num_recomputed_tokens = 0
        self.num_reused_tokens = 0
        self._lifetime = lifetime
        self._opened_s = opened_s
        self._known: set[tuple[str, int]] = set()

    def add(self, server_id: str, attempt: int, account: StreamAccount, now_s: float) -> bool:
        """Take an account in that arrived now; False for one that was sent again, which is dropped.

        A server tells how long ago things were, so they are placed too late by the time that the
        message was under way.
        """
        if (server_id, attempt) in self._known:
            return False
        self._known.add((server_id, attempt))
        self.num_computed_tokens += account.num_computed_tokens
        self.num_recomputed_tokens += account.num_recomputed_tokens
        self.num_reused_tokens += account.num_reused_tokens
        for run in account.runs:
            start_s = self._moment(run.start_age_s, now_s)
            end_s = max(start_s, self._moment(run.end_age_s, now_s))
            self._lifetime.record(LifetimeEvent.COMPUTE_STARTED, at_s=start_s, reason=run.reason)
            self._lifetime.record(
                LifetimeEvent.COMPUTE_DONE,
                at_s=end_s,
                num_tokens=run.num_tokens,
                reason=run.reason,
            )
        for loss in account.preemptions:
            is_swap = loss.action == PreemptionAction.SWAP.value
            self._lifetime.record(
                LifetimeEvent.PREEMPTED_SWAP if is_swap else LifetimeEvent.PREEMPTED_RECOMPUTE,
                at_s=self._moment(loss.age_s, now_s),
                num_tokens=loss.num_tokens,
                reason=loss.reason,
                predicted_s=loss.predicted_s,
                actual_s=loss.actual_s,
            )
        return True

    def _moment(self, age_s: float, now_s: float) -> float:
        """Never before the stream was opened, nor in the future, whatever a server says."""
        if not age_s >= 0:  # NaN too
            return now_s
        return max(self._opened_s, now_s - age_s)
