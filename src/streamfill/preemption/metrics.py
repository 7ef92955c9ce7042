"""The controller's `/metrics`: published by its loop after each round, read by other threads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from streamfill.curve.gate import HandshakeFailure
from streamfill.messages.control import ControllerStatus
from streamfill.observability.metric_values import MetricSet, Sample
from streamfill.observability.metrics import Metric
from streamfill.preemption.state import ControllerState


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSnapshot:
    """The controller at one moment. Never changed."""

    at_s: float
    """Of `time.monotonic`."""
    status: ControllerStatus
    num_reports: int
    num_stale_reports: int
    num_victims_ranked: int
    num_plans_sent: int
    standing: Mapping[str, tuple[int, int]]
    """Of each server's plan: its version, and the streams in it."""


def snapshot_of(state: ControllerState, status: ControllerStatus) -> ControllerSnapshot:
    """As it is now; for the thread that owns the state."""
    return ControllerSnapshot(
        at_s=time.monotonic(),
        status=status,
        num_reports=state.num_reports,
        num_stale_reports=state.num_stale_reports,
        num_victims_ranked=state.num_victims_ranked,
        num_plans_sent=state.num_plans_sent,
        standing={plan.server_id: (plan.version, len(plan.victims)) for plan in state.plans()},
    )


class ControllerMetrics:
    """Published by the controller's thread, read by the threads that answer scrapes."""

    def __init__(self) -> None:
        self._snapshot: ControllerSnapshot | None = None
        self._made_s = time.monotonic()
        self.set = MetricSet("controller", self._age_s)
        refused = self.set.counter(Metric.CONTROLLER_REFUSED_HANDSHAKES)
        self._refused_handshakes = {kind: refused.labels(kind.value) for kind in HandshakeFailure}
        self.set.add_source(self._samples)

    def count_refused_handshake(self, failure: HandshakeFailure) -> None:
        """Somebody was not let in. For any thread."""
        self._refused_handshakes[failure].inc()

    def publish(self, snapshot: ControllerSnapshot) -> None:
        """This is how the controller is now."""
        self._snapshot = snapshot

    def _age_s(self) -> float:
        snapshot = self._snapshot
        return time.monotonic() - (self._made_s if snapshot is None else snapshot.at_s)

    def _samples(self) -> Iterator[Sample]:
        snapshot = self._snapshot
        if snapshot is None:  # its loop has not begun
            return
        status = snapshot.status
        yield Sample(Metric.PLANS, status.num_plans)
        yield Sample(Metric.PLANS_SENT, snapshot.num_plans_sent)
        yield Sample(Metric.REPORTS, snapshot.num_reports)
        yield Sample(Metric.STALE_REPORTS, snapshot.num_stale_reports)
        yield Sample(Metric.VICTIMS_RANKED, snapshot.num_victims_ranked)
        yield Sample(Metric.CONTROLLER_MALFORMED, status.num_malformed_frames)
        yield Sample(Metric.KNOWN_SERVERS, status.num_servers)
        yield Sample(Metric.KNOWN_STREAMS, status.num_streams)
        for server_id, (version, num_victims) in snapshot.standing.items():
            yield Sample(Metric.STANDING_VERSION, version, (server_id,))
            yield Sample(Metric.STANDING_VICTIMS, num_victims, (server_id,))
