"""The cluster at one moment, for all who look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.interface import ClusterInfo, ServerInfo, ServerStreams
from router.watch.frames import ServerView, StreamFacts, Verdict
from streamfill.messages.common import Role, StreamDecision
from streamfill.stream.ids import ServerId
from streamfill.stream.state import StreamState


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Never changed."""

    now_ms: int
    info: ClusterInfo
    servers: Sequence[ServerView]
    streams: Mapping[str, StreamFacts]
    """By id; those that ended lately too."""
    described: Described


@dataclass(frozen=True)
class Described:
    """What schedulers said of their streams."""

    verdicts: Mapping[str, Mapping[Role, Verdict]] = field(default_factory=dict)
    """By id. A stream that was handed off may be on two servers."""
    decisions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By server, how many of its streams have each decision. Missing: it did not answer in time."""

    def verdict(self, facts: StreamFacts) -> Verdict | None:
        """Of the server that the stream's next token depends on; None: nobody knows of it."""
        found = self.verdicts.get(facts.id)
        if found is None or facts.ended_ms is not None:
            return None
        decodes = facts.state == StreamState.DECODING
        role, other = (Role.DECODE, Role.PREFILL) if decodes else (Role.PREFILL, Role.DECODE)
        return found.get(role) or found.get(other)


def described(answers: Mapping[ServerId, ServerStreams]) -> Described:
    """The answers of all servers, by stream."""
    verdicts: dict[str, dict[Role, Verdict]] = {}
    decisions: dict[str, dict[str, int]] = {}
    for server_id, answer in answers.items():
        if not answer.answered:
            continue
        decisions[server_id] = dict(Counter(each.decision for each in answer.streams))
        for each in answer.streams:
            of_stream = verdicts.setdefault(str(each.stream_id), {})
            of_stream[answer.role] = _verdict(server_id, each)
    return Described(verdicts, decisions)


def server_view(server: ServerInfo, said: Described) -> ServerView:
    """One server, with what its scheduler said last."""
    counters, admission = server.counters, server.admission
    decisions = said.decisions.get(server.server_id)
    return ServerView(
        id=server.server_id,
        role=server.role.value,
        state=server.state,
        policy=server.policy,
        pid=server.pid,
        num_streams=server.num_assigned_streams,
        num_running=counters.num_running,
        num_pending_tokens=counters.num_pending_tokens,
        num_used_tokens=counters.num_used_tokens,
        num_cached_tokens=counters.num_cached_tokens,
        num_free_tokens=counters.num_free_tokens,
        num_total_tokens=counters.num_total_tokens,
        num_host_tokens=counters.num_host_tokens,
        num_computed_tokens=counters.num_computed_tokens,
        num_preemptions=counters.num_preemptions,
        num_uncommitted_tokens=None if admission is None else admission.num_uncommitted_tokens,
        max_uncommitted_tokens=None if admission is None else admission.max_uncommitted_tokens,
        heartbeat_age_ms=round(1000 * server.heartbeat_age_s),
        loop_age_ms=round(1000 * server.loop_age_s),
        controller_alive=server.controller_alive,
        decisions=dict(decisions or {}),
        answered=decisions is not None,
    )


def _verdict(server_id: str, decision: StreamDecision) -> Verdict:
    return Verdict(
        server=server_id,
        decision=decision.decision,
        reason=decision.reason,
        num_resident_tokens=decision.num_computed_tokens,
        num_shared_tokens=decision.num_shared_tokens,
        victim_rank=decision.victim_rank,
    )
