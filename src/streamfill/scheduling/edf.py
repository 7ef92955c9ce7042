"""Least slack to the TTFT SLO first.

A committed stream is due ``ttft_slo_s`` after its commit; its slack is what is left of that when
the step that finishes its prompt is subtracted. An uncommitted stream is not waited for yet; it
goes by the slack that it would have, had it been committed when its newest segment came. What was
computed once and taken away is no reason to hurry (``turn_queue.Key`` says why). Higher priority
goes before slack.

Starvation: slack shrinks for all at the same pace. A stream that comes D seconds later goes before
an earlier one only while its slack is shorter by D, so nobody waits for streams that come later
than its own slack: at most its SLO.
"""

from __future__ import annotations

from streamfill.scheduling.policy import PolicyContext
from streamfill.scheduling.snapshot import Experience, StreamView
from streamfill.scheduling.step import num_new_tokens
from streamfill.scheduling.turn_policy import TurnPolicy
from streamfill.scheduling.turn_queue import Key

DEFAULT_SLO_S = 1.0
"""Of streams that name none."""


class EdfPolicy(TurnPolicy):
    """Earliest due first, the work that is left taken into account."""

    victim_reason = "most slack"

    def __init__(self, context: PolicyContext | None = None) -> None:
        slo_ms = (context or PolicyContext()).number("slo_ms", DEFAULT_SLO_S * 1e3, least=1.0)
        self._slo_s = slo_ms / 1e3
        super().__init__(context)

    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        committed_s = view.last_segment_s if view.committed_s is None else view.committed_s
        return -view.priority, committed_s + self._slack_s(view, experience)

    def context_key(self, view: StreamView, experience: Experience) -> Key:
        return -view.priority, view.last_segment_s + self._slack_s(view, experience)

    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        is_committed = view.committed_s is not None
        return is_committed, -self._slack_s(view, experience) + view.priority * 1e6

    def _slack_s(self, view: StreamView, experience: Experience) -> float:
        slo_s = self._slo_s if view.ttft_slo_s is None else view.ttft_slo_s
        return slo_s - experience.costs.step_s(num_new_tokens(view))
