"""A server's `/metrics`: the counters that go to the router with each heartbeat, and the steps.

The scheduler's loop publishes a `ServerSnapshot` a few times a second, between two turns. Whoever
asks meanwhile gets the newest one, also in the middle of a step of seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from streamfill.messages.common import Role, ServerCounters
from streamfill.observability.metric_values import MetricSet, Sample
from streamfill.observability.metrics import Metric
from streamfill.scheduling.plan import RunReason
from streamfill.serving.core import StepCounts

COUNTER_METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {
        "num_streams": Metric.STREAMS,
        "num_waiting": Metric.WAITING,
        "num_running": Metric.RUNNING,
        "num_pending_tokens": Metric.PENDING_TOKENS,
        "num_used_tokens": Metric.KV_USED,
        "num_cached_tokens": Metric.KV_CACHED,
        "num_free_tokens": Metric.KV_FREE,
        "num_total_tokens": Metric.KV_TOTAL,
        "num_free_slots": Metric.FREE_SLOTS,
        "num_total_slots": Metric.TOTAL_SLOTS,
        "num_transfers": Metric.TRANSFERS,
        "staging_bytes": Metric.STAGING_BYTES,
        "num_malformed_frames": Metric.SERVER_MALFORMED,
        "num_evicted_tokens": Metric.EVICTED,
        "num_computed_tokens": Metric.COMPUTED,
        "num_recomputed_tokens": Metric.RECOMPUTED,
        "num_preemptions": Metric.PREEMPTIONS,
        "num_interruptions": Metric.INTERRUPTIONS,
        "num_handoff_bytes": Metric.HANDOFF_BYTES,
        "num_early_bytes": Metric.EARLY_BYTES,
        "num_swap_outs": Metric.SWAP_OUTS,
        "num_swap_ins": Metric.SWAP_INS,
        "swap_out_bytes": Metric.SWAP_OUT_BYTES,
        "swap_in_bytes": Metric.SWAP_IN_BYTES,
        "num_host_tokens": Metric.HOST_TOKENS,
        "plan_version": Metric.PLAN_VERSION,
    }
)
"""Of every field of `ServerCounters`; a test sees to that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSnapshot:
    """A server between two turns of its loop. Never changed."""

    at_s: float
    """Of `time.monotonic`."""
    counters: ServerCounters
    steps: StepCounts
    controller_alive: bool
    registered: bool
    """The router knows this server."""
    num_refused_handshakes: int = 0
    """Connections to its ZeroMQ socket that had no admitted key."""


class ServerMetrics:
    """Published by the scheduler's thread, read by the threads that answer scrapes."""

    def __init__(self, server_id: str, role: Role) -> None:
        self._labels = (server_id, role.value)
        self._snapshot = ServerSnapshot(
            at_s=time.monotonic(),
            counters=ServerCounters(),
            steps=StepCounts(),
            controller_alive=False,
            registered=False,
        )
        self.set = MetricSet(server_id, self._age_s)
        self.set.add_source(self._samples)

    def publish(self, snapshot: ServerSnapshot) -> None:
        """This is how the server is now."""
        self._snapshot = snapshot

    def _age_s(self) -> float:
        return time.monotonic() - self._snapshot.at_s

    def _samples(self) -> Iterator[Sample]:
        snapshot, labels = self._snapshot, self._labels
        for field, metric in COUNTER_METRICS.items():
            yield Sample(metric, getattr(snapshot.counters, field), labels)
        yield Sample(Metric.CONTROLLER_ALIVE, snapshot.controller_alive, labels)
        yield Sample(Metric.REGISTERED, snapshot.registered, labels)
        yield Sample(Metric.SERVER_REFUSED_HANDSHAKES, snapshot.num_refused_handshakes, labels)
        yield Sample(Metric.TURNS, snapshot.steps.num_turns, labels)
        yield Sample(Metric.STEPS, snapshot.steps.num_steps, labels)
        for reason in RunReason:
            count = snapshot.steps.num_runs.get(reason, 0)
            yield Sample(Metric.RUNS, count, (*labels, reason.value))
