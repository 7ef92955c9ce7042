"""What the router says, as the client's plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.types import (
    ClusterInfo,
    Metadata,
    Progress,
    Result,
    Server,
    Timing,
    Token,
    Usage,
)
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent


@dataclass
class AnswerBuilder:
    """Collects one answer. Times are of ``time.monotonic``."""

    commit_sent_s: float
    last_segment_sent_s: float
    _tokens: list[Token] = field(default_factory=list, init=False)
    _arrivals_s: list[float] = field(default_factory=list, init=False)

    def add(self, message: pb.Token, arrival_s: float) -> Token:
        """Takes the next token and returns it."""
        one = token(message)
        self._tokens.append(one)
        self._arrivals_s.append(arrival_s)
        return one

    def finish(self, done: pb.Done, arrival_s: float) -> Result:
        """The whole answer."""
        first_s = self._arrivals_s[0] if self._arrivals_s else None
        which = done.WhichOneof("matched_stop")
        about = done.metadata
        return Result(
            text="".join(one.text for one in self._tokens) + done.text_tail,
            text_tail=done.text_tail,
            tokens=tuple(self._tokens),
            finish_reason=done.finish_reason,
            matched_stop=None if which is None else getattr(done, which),
            usage=Usage(
                num_prompt_tokens=done.usage.num_prompt_tokens,
                num_output_tokens=done.usage.num_output_tokens,
                num_cached_tokens=done.usage.num_cached_tokens,
                num_invalidated_tokens=done.usage.num_invalidated_tokens,
                num_computed_tokens=done.usage.num_computed_tokens,
                num_recomputed_tokens=done.usage.num_recomputed_tokens,
                num_reused_tokens=done.usage.num_reused_tokens,
            ),
            metadata=Metadata(
                stream_id=about.stream_id,
                prefill_server=about.prefill_server,
                decode_server=about.decode_server,
                decoded_by_prefill=about.decoded_by_prefill,
                handoff=about.handoff,
                num_attempts=about.num_attempts,
                handoff_bytes=about.handoff_bytes if about.HasField("handoff_bytes") else None,
                handoff_s=about.handoff_s if about.HasField("handoff_s") else None,
                kv_codec=about.kv_codec or "none",
            ),
            timing=Timing(
                ttft_s=None if first_s is None else first_s - self.commit_sent_s,
                ttft_from_last_segment_s=(
                    None if first_s is None else first_s - self.last_segment_sent_s
                ),
                total_s=arrival_s - self.commit_sent_s,
                token_times_s=tuple(time_s - self.commit_sent_s for time_s in self._arrivals_s),
                lifetime=tuple(
                    LifetimeEntry(
                        LifetimeEvent(entry.name),
                        entry.time_s,
                        entry.segment if entry.HasField("segment") else None,
                        entry.num_tokens if entry.HasField("num_tokens") else None,
                        entry.reason,
                        entry.predicted_s if entry.HasField("predicted_s") else None,
                        entry.actual_s if entry.HasField("actual_s") else None,
                    )
                    for entry in about.lifetime
                    if entry.name in LifetimeEvent.__members__  # a later router may know more
                ),
            ),
        )


def token(message: pb.Token) -> Token:
    """One token."""
    if not message.HasField("logprob"):
        return Token(index=message.index, token_id=message.token_id, text=message.text)
    return Token(
        index=message.index,
        token_id=message.token_id,
        text=message.text,
        logprob=message.logprob.logprob,
        top_logprobs=tuple((top.token_id, top.logprob) for top in message.logprob.top),
    )


def progress(message: pb.Acknowledged) -> Progress:
    """How far a prompt has come."""
    return Progress(
        seq=message.seq,
        num_received_tokens=message.num_received_tokens,
        num_computed_tokens=message.num_computed_tokens,
        num_invalidated_tokens=message.num_invalidated_tokens,
    )


def cluster_info(message: pb.ServerInfoResponse) -> ClusterInfo:
    """The cluster."""
    return ClusterInfo(
        model=message.model,
        vocab_size=message.vocab_size,
        context_tokens=message.context_tokens,
        pool_tokens=message.pool_tokens,
        ready=message.ready,
        decode_available=message.decode_available,
        num_open_streams=message.num_open_streams,
        num_streams_by_outcome=dict(message.num_streams_by_outcome),
        num_malformed_frames=message.num_malformed_frames,
        servers=tuple(server(one) for one in message.servers),
        ready_reason=message.ready_reason,
        num_moves=dict(message.num_moves),
        placement=message.placement,
    )


def server(message: pb.Server) -> Server:
    """One server."""
    return Server(
        server_id=message.server_id,
        role=message.role,
        state=message.state,
        pid=message.pid,
        num_assigned_streams=message.num_assigned_streams,
        heartbeat_age_s=message.heartbeat_age_s,
        loop_age_s=message.loop_age_s,
        controller_alive=message.controller_alive,
        counters=dict(message.counters),
        policy=message.policy,
        state_reason=message.state_reason,
        address=message.address,
        version=message.version,
        pool_tokens=message.pool_tokens,
        num_held_tokens=message.num_held_tokens,
    )
