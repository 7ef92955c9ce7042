"""The KV of a server's streams: what the radix tree holds of each, what was taken, what is in host
memory, and what having it back cost.

Nothing here holds KV. What is believed of a stream (`records.StreamRecord.num_computed`) is looked
up in the tree whenever it matters; what is found lost is priced at once, and what comes back or is
computed again is held against that price.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence

from streamfill.engine.interface import CopyReport, Engine
from streamfill.messages.control import PreemptionAction
from streamfill.observability.logging import log_event
from streamfill.serving.account import NEGLIGIBLE_TOKENS
from streamfill.serving.deciding import Decider
from streamfill.serving.records import InFlight, Phase, StreamRecord, Streams
from streamfill.stream.splice import lcp

logger = logging.getLogger(__name__)


class StreamKv:
    """Owned by the core. Counts what it sees, since the start."""

    def __init__(
        self, engine: Engine, decider: Decider, streams: Streams, clock: Callable[[], float]
    ) -> None:
        """
        Args:
            engine: radix tree and host memory of this rank.
            decider: is told which streams' views changed; knows what things cost.
            streams: of the core.
            clock: as the core's.
        """
        self.num_recomputed_tokens = 0
        self.num_preemptions = 0
        self.num_swap_outs = 0
        self.num_swap_ins = 0
        self.swap_out_bytes = 0
        self.swap_in_bytes = 0
        self._engine = engine
        self._decider = decider
        self._streams = streams
        self._clock = clock

    # What the tree holds.

    def look_again(self, record: StreamRecord) -> None:
        """Find out how much of the stream's tokens the tree holds: others may have computed or
        evicted it."""
        num_cached = self.cached_tokens(record, len(record.ids))
        was_lost = self._note_seen(record, num_cached, len(record.ids))
        record.note_lost(num_cached, self.host_tokens(record, num_cached))
        record.num_reached = max(record.num_reached, num_cached)
        if was_lost:
            self.price_loss(record)
        if record.answer is not None:
            record.answer.num_cached_tokens = record.num_computed
        self.tag(record)
        self._decider.touch(record)

    def find(self, record: StreamRecord) -> bool:
        """Look for the stream's computed tokens. Returns whether some were lost since the last
        look."""
        num_computed = record.num_computed
        cached = self.cached_tokens(record, num_computed)
        was_lost = self._note_seen(record, cached, num_computed)
        if cached >= num_computed:
            return False
        record.note_lost(cached, self.host_tokens(record, cached))
        if was_lost:
            self.price_loss(record)
        self._decider.touch(record)
        return True

    def computed(self, record: StreamRecord, num_tokens: int) -> None:
        """The engine has computed the stream's first tokens; their KV may be taken already."""
        num_cached = self.cached_tokens(record, num_tokens)
        self._note_seen(record, num_cached, num_tokens)
        record.note_computed(num_cached)
        # Computed it was, even if its KV was taken at once: it must not pass for new context again.
        record.num_reached = max(record.num_reached, num_tokens)
        self.tag(record)

    def cached_tokens(self, record: StreamRecord, num_tokens: int) -> int:
        """How many of the stream's first ``num_tokens`` tokens the tree holds."""
        return self._engine.cached_tokens(record.ids[:num_tokens], namespace=record.namespace)

    def host_tokens(self, record: StreamRecord, num_resident: int) -> int:
        """How many right behind the first ``num_resident`` are in host memory."""
        return self._engine.host_tokens(record.ids, num_resident, namespace=record.namespace)

    def tag(self, record: StreamRecord) -> None:
        """What is computed of the stream is its own, and maybe others'."""
        ids = record.ids[: record.num_computed]
        record.num_shared = self._engine.tag(record.stream_id, ids, namespace=record.namespace)

    # What was taken, and came back.

    def price_loss(self, record: StreamRecord) -> None:
        """Predict what it costs to have the tokens back that were just found lost."""
        record.was_preempted = True
        num_lost = record.account.num_lost_tokens
        pricing = self._decider.pricing()
        entry = self._decider.entry_of(record.stream_id)
        reason = "no ranking was in force" if entry is None else entry.reason
        costs = pricing.costs
        num_in_host = min(num_lost, record.num_host)
        if num_in_host:
            predicted_s = costs.swap_in.seconds(num_in_host * pricing.bytes_per_token)
            num_left = num_lost - num_in_host
            if num_left >= NEGLIGIBLE_TOKENS:
                num_before = record.num_computed + num_in_host
                predicted_s += costs.recompute.share_seconds(num_left, num_before)
            record.account.explain_loss(PreemptionAction.SWAP, reason, predicted_s)
        else:
            predicted_s = costs.recompute.seconds(num_lost, record.num_computed)
            record.account.explain_loss(PreemptionAction.RECOMPUTE, reason, predicted_s)

    def ran(self, record: StreamRecord, in_flight: InFlight, num_cached: int, end_s: float) -> None:
        """The engine computed what was lacking of a prefix of the stream.

        Args:
            num_cached: tokens of the prefix that it found in the tree.
            end_s: when its step ended.
        """
        num_prompt = record.num_prompt
        num_losses = record.account.num_losses
        outcome = record.account.ran(
            start_s=in_flight.began_s,
            end_s=end_s,
            up_to=min(in_flight.up_to, num_prompt),
            num_valid=min(in_flight.up_to, in_flight.keep_tokens, num_prompt),
            num_in_tree=min(in_flight.num_in_tree, num_prompt),
            num_cached=num_cached,
            reason=in_flight.reason.value,
        )
        self.num_recomputed_tokens += outcome.num_recomputed
        self.num_preemptions += record.account.num_losses - num_losses
        record.was_preempted = False
        if outcome.num_recomputed:
            seconds = self._clock() - in_flight.began_s
            seconds *= outcome.num_recomputed / max(1, in_flight.num_step_tokens)
            self._note_recovered(
                record, PreemptionAction.RECOMPUTE, outcome.num_recomputed, seconds
            )

    def bring_back(self, record: StreamRecord, up_to: int) -> None:
        """Bring back from host memory what is there of the stream's first ``up_to`` tokens."""
        num_before = record.num_computed
        num_cached = self._engine.restore(record.ids[:up_to], namespace=record.namespace)
        num_back = num_cached - num_before
        if num_back > 0:
            self._note_recovered(record, PreemptionAction.SWAP, num_back, self._engine.restore_s)
        self._note_seen(record, num_cached, num_cached)
        record.note_computed(num_cached)
        record.num_saved = max(record.num_saved, num_cached)
        self.tag(record)
        self._decider.touch(record)

    def note_copies(self, copies: Sequence[CopyReport]) -> None:
        """Copies to and from host memory, as rank 0 saw them end: what is learned of their cost
        decides who gives up memory, and has to be the same on every rank."""
        for copy in copies:
            self._decider.costs.observe_copy(
                out=copy.out, num_bytes=copy.num_bytes, observed_s=copy.seconds
            )
            if copy.out:
                self.num_swap_outs += 1
                self.swap_out_bytes += copy.num_bytes
            else:
                self.num_swap_ins += 1
                self.swap_in_bytes += copy.num_bytes

    def release_host(self, record: StreamRecord) -> None:
        """The stream is over: its copies in host memory may go, as soon as somebody needs room."""
        if any(True for _ in self._others(record)):
            self.release_tail(record, record.ids, 0)
        else:  # the last stream leaves nothing
            self._engine.release_host(None, 0, namespace=record.namespace)

    def release_tail(self, record: StreamRecord, token_ids: array[int], first_token: int) -> None:
        """The stream has no use any more for copies of these tokens from ``first_token`` on. Those
        of a prefix that others share stay, wherever its KV is."""
        if not self._engine.host_room().num_tokens:
            return
        first_token = max(first_token, record.num_shared)
        for other in self._others(record):
            if other.namespace == record.namespace:
                first_token = max(first_token, lcp(token_ids, other.ids))
        self._engine.release_host(token_ids, first_token, namespace=record.namespace)

    def _others(self, record: StreamRecord) -> Iterator[StreamRecord]:
        """Streams that are not over, or are expected back."""
        for other in (*self._streams.records.values(), *self._streams.kept.values()):
            if other is not record and (other.phase is not Phase.DONE or other.keep_s > 0):
                yield other

    def _note_seen(self, record: StreamRecord, num_cached: int, num_looked_at: int) -> bool:
        """A look at the tree for the first tokens of a stream. Returns whether it has lost some."""
        account = record.account
        num_before = account.num_losses
        was_lost = account.observe(num_cached, num_looked_at, self._clock())
        self.num_preemptions += account.num_losses - num_before
        return was_lost

    def _note_recovered(
        self, record: StreamRecord, action: PreemptionAction, num_tokens: int, seconds: float
    ) -> None:
        """KV that had been taken from the stream is back."""
        for recovery in record.account.recovered(action, num_tokens, seconds):
            log_event(
                logger,
                "preemption_ended",
                level=logging.DEBUG,
                stream_id=record.stream_id,
                action=recovery.action,
                num_tokens=recovery.num_tokens,
                predicted_s=recovery.predicted_s,
                actual_s=recovery.actual_s,
            )
