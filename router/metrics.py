"""What the router counts, for its `/metrics` page.

1. What happens is counted where it happens (`RouterMetrics`): an increment or two per message.
2. How things are is published by the housekeeping once a second, as a frozen `RouterSnapshot`.
3. The waits of a stream are observed when it has ended, in a thread of their own (`ended_streams`).

The thread that answers a scrape looks at nothing else, so it never waits for the loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from router.interface import MoveReason, ServerInfo
from router.placement import ServerState
from router.placement.interface import PlacementReason
from router.placement.placer import Placement, PlacementOutcome
from router.recovery.log_writer import LogMetrics
from router.refusals import Api, Refusal
from streamfill.curve.gate import HandshakeFailure
from streamfill.messages.common import Role, StreamMode
from streamfill.observability.metric_values import MetricSet, Sample
from streamfill.observability.metrics import Metric
from streamfill.stream.state import StreamState

PUBLISH_INTERVAL_S = 1.0
"""Prometheus asks every few seconds; looking at ten thousand streams takes a millisecond."""

_LIVING_STATES = (StreamState.OPEN, StreamState.COMMITTED, StreamState.DECODING)
_ENDINGS = tuple(state for state in StreamState if state not in _LIVING_STATES)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSnapshot:
    """How things are at one moment. Never changed."""

    at_s: float
    """Of `time.monotonic`."""
    ready: bool
    num_open_by_state: Mapping[StreamState, int]
    servers: tuple[ServerInfo, ...]
    pending_tokens: Mapping[str, int]
    """By server id: placed there and not computed yet, as far as the router knows."""
    num_malformed_frames: int
    num_stale_messages: int
    placement: str
    """The placement policy with its options; empty before the first moment."""
    num_residency_gaps: int
    num_residency_asked: int
    num_residency_awaited: int
    """See `placement.follower`."""


class RouterMetrics:
    """Counted and published in the router's loop, read by the threads that answer scrapes."""

    def __init__(self) -> None:
        self.set = MetricSet("router", self._age_s)
        self._snapshot = RouterSnapshot(
            at_s=time.monotonic(),
            ready=False,
            num_open_by_state={},
            servers=(),
            pending_tokens={},
            num_malformed_frames=0,
            num_stale_messages=0,
            placement="",
            num_residency_gaps=0,
            num_residency_asked=0,
            num_residency_awaited=0,
        )
        opened = self.set.counter(Metric.STREAMS_OPENED)
        self.opened = {mode: opened.labels(mode.value) for mode in StreamMode}
        ended = self.set.counter(Metric.STREAMS_ENDED)
        self.ended = {state: ended.labels(state.value) for state in _ENDINGS}
        segments = self.set.counter(Metric.SEGMENTS)
        self.segments = {mode: segments.labels(mode.value) for mode in StreamMode}
        self.tokens_in = self.set.counter(Metric.TOKENS_IN)
        self.tokens_out = self.set.counter(Metric.TOKENS_OUT)
        handoffs = self.set.counter(Metric.HANDOFFS)
        self.handoffs_done = handoffs.labels("done")
        self.handoffs_failed = handoffs.labels("failed")
        self.attempts_failed = self.set.counter(Metric.ATTEMPTS_FAILED)
        self.retries = self.set.counter(Metric.RETRIES)
        self.resyncs = self.set.counter(Metric.RESYNCS)
        placements = self.set.counter(Metric.PLACEMENTS)
        self._placements = {
            outcome: placements.labels(Role.PREFILL.value, outcome.value)
            for outcome in PlacementOutcome
        }
        self._decode_placements = {
            is_found: placements.labels(Role.DECODE.value, outcome.value)
            for is_found, outcome in (
                (True, PlacementOutcome.CHOSEN),
                (False, PlacementOutcome.NOWHERE),
            )
        }
        choices = self.set.counter(Metric.PLACEMENT_CHOICES)
        self._choices = {reason: choices.labels(reason.value) for reason in PlacementReason}
        self._placed_tokens = self.set.counter(Metric.PLACEMENT_TOKENS)
        self._found_tokens = self.set.counter(Metric.PLACEMENT_FOUND)
        self.placed_anew = self.set.counter(Metric.STREAMS_PLACED_ANEW)
        self.log = LogMetrics(self.set)
        moves = self.set.counter(Metric.STREAMS_MOVED)
        self._moves = {reason: moves.labels(reason.value) for reason in MoveReason}
        self.num_moves: Counter[str] = Counter()
        """By reason."""
        refusals = self.set.counter(Metric.REFUSALS)
        self._refusals = {
            (api, reason): refusals.labels(api.value, reason.value)
            for api in Api
            for reason in Refusal
        }
        refused = self.set.counter(Metric.REFUSED_HANDSHAKES)
        self._refused_handshakes = {kind: refused.labels(kind.value) for kind in HandshakeFailure}
        self.spans_lost = self.set.counter(Metric.SPANS_LOST)
        self._admission_wait = self.set.histogram(Metric.ADMISSION_WAIT)
        for outcome in ("admitted", "refused"):
            self._admission_wait.labels(outcome)
        self.set.add_source(lambda: _samples(self._snapshot))

    def waited_for_room(self, seconds: float, *, refused: bool) -> None:
        """A segment had to wait for room, and does not any more."""
        self._admission_wait.labels("refused" if refused else "admitted").observe(seconds)

    def placed(self, placement: Placement) -> None:
        """A prefill server was to be chosen."""
        self._placements[placement.outcome].inc()
        choice = placement.choice
        if choice is not None:
            self._choices[choice.reason].inc()
            if placement.num_known_tokens:  # none when most streams are opened
                self._placed_tokens.inc(placement.num_known_tokens)
                self._found_tokens.inc(choice.found_tokens)

    def decode_chosen(self, *, is_found: bool) -> None:
        """A decode server was to be chosen."""
        self._decode_placements[is_found].inc()

    def moved(self, reason: MoveReason) -> None:
        """A stream goes from one living server to another."""
        self._moves[reason].inc()
        self.num_moves[reason.value] += 1

    def count_refusal(self, api: Api, refusal: Refusal) -> None:
        """A client was refused something."""
        self._refusals[api, refusal].inc()

    def count_refused_handshake(self, failure: HandshakeFailure) -> None:
        """Somebody was not let in to the socket for servers. For any thread."""
        self._refused_handshakes[failure].inc()

    def publish(self, snapshot: RouterSnapshot) -> None:
        """This is how things are now."""
        self._snapshot = snapshot

    def _age_s(self) -> float:
        return time.monotonic() - self._snapshot.at_s


def _samples(snapshot: RouterSnapshot) -> Iterator[Sample]:
    yield Sample(Metric.READY, snapshot.ready)
    for state in _LIVING_STATES:
        count = snapshot.num_open_by_state.get(state, 0)
        yield Sample(Metric.OPEN_STREAMS, count, (state.value,))
    yield Sample(Metric.ROUTER_MALFORMED, snapshot.num_malformed_frames)
    yield Sample(Metric.STALE_MESSAGES, snapshot.num_stale_messages)
    if snapshot.placement:
        yield Sample(Metric.PLACEMENT, 1, (snapshot.placement,))
    yield Sample(Metric.RESIDENCY_GAPS, snapshot.num_residency_gaps)
    yield Sample(Metric.RESIDENCY_ASKED, snapshot.num_residency_asked)
    yield Sample(Metric.RESIDENCY_AWAITED, snapshot.num_residency_awaited)
    for role in Role:
        states = [server.state for server in snapshot.servers if server.role is role]
        for known in ServerState:
            yield Sample(Metric.SERVERS, states.count(known.value), (role.value, known.value))
    for server in snapshot.servers:
        if server.state != ServerState.DEAD:
            yield from _of_server(server, snapshot.pending_tokens.get(server.server_id, 0))


def _of_server(server: ServerInfo, pending_tokens: int) -> Iterator[Sample]:
    labels = (server.server_id, server.role.value)
    yield Sample(Metric.ASSIGNED_STREAMS, server.num_assigned_streams, labels)
    yield Sample(Metric.ASSIGNED_PENDING, pending_tokens, labels)
    yield Sample(Metric.HEARTBEAT_AGE, server.heartbeat_age_s, labels)
    name = (server.server_id,)
    if server.policy:
        yield Sample(Metric.POLICY, 1, (*name, server.policy))
    admission = server.admission
    if admission is not None:
        yield Sample(Metric.UNCOMMITTED_TOKENS, admission.num_uncommitted_tokens, name)
        yield Sample(Metric.UNCOMMITTED_LIMIT, admission.max_uncommitted_tokens, name)
        yield Sample(Metric.WAITING_SEGMENTS, admission.num_waiting_segments, name)
        yield Sample(Metric.REFUSED_SEGMENTS, admission.num_refused_segments, name)
        yield Sample(Metric.OVER_CAP_SEGMENTS, admission.num_over_cap_segments, name)
