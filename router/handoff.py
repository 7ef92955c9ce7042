"""The hand-off of one stream's KV to a decode server: where to, and what became of it.

1. `aim_ahead`: while context still arrives a decode server is chosen, to which KV may go already.
2. `aim`: the commit names one, the same one unless another is far better.
3. `take_target`: the first token is out, and the answer goes on there. The target is the answer's
   leg from then on.
4. `reported`: whether the KV has arrived, which may be heard before or behind 3, and otherwise once
   more: where the decode server had lost what it goes on behind, it is sent again or given up.
5. `aim_again`: the answer goes on at another decode server, which gets the KV as well.

A decode server that waits for KV which will not come is told so by `decoding`, not from here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from router.cluster import Cluster
from router.servers import Assignment, Server
from streamfill.messages import server_to_router as s
from streamfill.messages.common import HandoffTarget, KvPeer
from streamfill.observability.lifetime import Lifetime, LifetimeEvent
from streamfill.observability.logging import log_event
from streamfill.stream.ids import ServerId, StreamId, TransferId

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Target:
    """The decode server that the answer is to go on at, and its reserved share of load."""

    load: Assignment
    transfer_id: TransferId | None = None
    """Of the hand-off, once the stream is committed."""
    transfer_failed: bool = False


class Handoff:
    """Owned by `decoding`. Owns the target's share of load."""

    __slots__ = ("_cluster", "_heard", "_lifetime", "_stream_id", "outcome", "report", "target")

    def __init__(self, cluster: Cluster, stream_id: StreamId, lifetime: Lifetime) -> None:
        self.target: Target | None = None
        """None: not chosen, or taken."""
        self.outcome = "none"
        """Of the newest hand-off: ``none`` as long as it is not known, ``done``, or why not."""
        self.report: s.HandoffReport | None = None
        """Of the newest hand-off, if it went well."""
        self._cluster = cluster
        self._stream_id = stream_id
        self._lifetime = lifetime
        self._heard: s.HandoffReport | None = None
        """The newest report of the newest hand-off."""

    def aim_ahead(self, num_tokens: int, avoid: Collection[ServerId]) -> KvPeer | None:
        """Where KV may go ahead of the commit. None: no decode server can take it.

        Args:
            num_tokens: of the prompt so far.
            avoid: taken only when there is no other.
        """
        if self.target is None:
            decode = self._cluster.choose_decode(need_tokens=num_tokens + 1, avoid=avoid)
            if decode is None:
                return None
            self.target = _target_with(decode, num_tokens)
        return _kv_peer(self.target.load.server)

    def aim(
        self, num_tokens: int, max_new_tokens: int, avoid: Collection[ServerId]
    ) -> HandoffTarget | None:
        """Where the answer goes on behind its first token. None: where that was made.

        Args:
            num_tokens: of the prompt.
            max_new_tokens: of the answer.
            avoid: taken only when there is no other.
        """
        prefer = None if self.target is None else self.target.load.server.server_id
        self.release_target()
        self._begin()
        if max_new_tokens <= 1:
            return None
        need_tokens = num_tokens + max_new_tokens
        decode = self._cluster.choose_decode(need_tokens=need_tokens, avoid=avoid, prefer=prefer)
        if decode is None:
            return None
        transfer_id = self._cluster.new_transfer_id()
        self.target = _target_with(decode, num_tokens, transfer_id)
        return _handoff_target(decode, transfer_id)

    def aim_again(self, server: Server) -> HandoffTarget:
        """One more hand-off, to this decode server."""
        self._begin()
        return _handoff_target(server, self._cluster.new_transfer_id())

    def take_target(self) -> Target | None:
        """The answer begins there. None: the decode server is gone."""
        target = self.target
        if target is None or target.load.server.is_dead:
            self.release_target()
            return None
        self.target = None
        return target

    def release_target(self) -> None:
        """The answer will not go on there. Idempotent."""
        if self.target is not None:
            self.target.load.release()
            self.target = None

    def reported(self, report: s.HandoffReport, taken: int | None) -> bool:
        """Whether the report says something new of the newest hand-off; if so, `note` is to follow.

        Args:
            taken: of the transfer that the answer's leg waits for.
        """
        if self.target is not None and self.target.transfer_id == report.transfer_id:
            self.target.transfer_failed = not report.ok
        elif taken != report.transfer_id:
            return False
        if report == self._heard:
            return False  # its frame came twice
        self._heard = report
        self.report = report if report.ok else None
        return True

    def note(self, outcome: str) -> None:
        """What became of the newest hand-off: ``done``, or why it failed."""
        self.outcome = outcome
        if outcome == "done":
            self._lifetime.record(LifetimeEvent.HANDOFF_DONE)
        else:
            log_event(logger, "handoff_failed", stream_id=self._stream_id, outcome=outcome)

    def overtaken(self, *, found_prompt: bool) -> None:
        """A short answer overtakes the report, and tells as well whether the KV was there."""
        if found_prompt:
            self.outcome = "done"
        else:
            self.outcome = "failed: not reported before the end of the answer"

    def end(self) -> None:
        """The stream has ended."""
        self.release_target()
        self._count()

    def _begin(self) -> None:
        self._count()
        self.outcome = "none"
        self.report = self._heard = None

    def _count(self) -> None:
        """How the newest hand-off ended, if there was one: once, when nothing more comes of it."""
        metrics = self._cluster.metrics
        if self.outcome != "none":
            (metrics.handoffs_done if self.outcome == "done" else metrics.handoffs_failed).inc()


def _target_with(server: Server, num_tokens: int, transfer_id: TransferId | None = None) -> Target:
    target = Target(Assignment(server), transfer_id)
    target.load.set(pending_tokens=0, held_tokens=num_tokens)
    return target


def _kv_peer(server: Server) -> KvPeer:
    facts = server.facts
    return KvPeer(
        server_id=facts.server_id, host=facts.kv_host, control_ports=facts.kv_control_ports
    )


def _handoff_target(server: Server, transfer_id: TransferId) -> HandoffTarget:
    peer = _kv_peer(server)
    return HandoffTarget(
        transfer_id=transfer_id,
        server_id=peer.server_id,
        host=peer.host,
        control_ports=peer.control_ports,
    )
