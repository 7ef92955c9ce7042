"""Events and facts of the core, as protobuf messages."""

from __future__ import annotations

import dataclasses
from typing import assert_never

import msgspec

from router.call_messages import Opened
from router.interface import (
    Acknowledged,
    ClusterInfo,
    DoneEvent,
    ServerInfo,
    StreamEvent,
    StreamStatus,
    TokenEvent,
)
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import told
from streamfill.messages.common import StreamMode, TokenLogprob
from streamfill.observability.lifetime import Lifetime

_MODES = {
    StreamMode.APPEND: pb.STREAM_MODE_APPEND,
    StreamMode.UPDATE: pb.STREAM_MODE_UPDATE,
}


def stream_event(event: StreamEvent, stream_id: int) -> pb.StreamEvent:
    """What a client is told about ``event``."""
    match event:
        case Acknowledged():
            return pb.StreamEvent(acknowledged=acknowledged(event))
        case TokenEvent():
            return pb.StreamEvent(
                token=pb.Token(
                    index=event.index,
                    token_id=event.token_id,
                    text=event.text,
                    logprob=None if event.logprob is None else _logprob(event.logprob),
                )
            )
        case DoneEvent():
            return pb.StreamEvent(done=_done(event, stream_id))
        case _:
            assert_never(event)


def opened(event: Opened) -> pb.Opened:
    """The stream is open."""
    resumed = event.resumed
    return pb.Opened(
        stream_id=event.stream_id,
        is_resumable=event.is_resumable,
        acknowledged=None if resumed is None else acknowledged(resumed.acknowledged),
        is_committed=resumed is not None and resumed.is_committed,
        refused=[] if resumed is None else [told(error, seq) for seq, error in resumed.refused],
    )


def acknowledged(event: Acknowledged) -> pb.Acknowledged:
    """How far the prompt has come."""
    return pb.Acknowledged(
        seq=event.client_seq,
        num_received_tokens=event.num_received_tokens,
        num_computed_tokens=event.num_computed_tokens,
        num_invalidated_tokens=event.num_invalidated_tokens,
    )


def stream_status(status: StreamStatus) -> pb.GetStreamResponse:
    """How far a stream is."""
    return pb.GetStreamResponse(
        stream_id=status.stream_id,
        request_id=status.request_id,
        mode=_MODES[status.mode],
        priority=status.priority,
        state=str(status.state),
        acknowledged=acknowledged(status.acknowledged),
        num_output_tokens=status.num_output_tokens,
    )


def cluster_info(info: ClusterInfo) -> pb.ServerInfoResponse:
    """The cluster."""
    return pb.ServerInfoResponse(
        model=info.model,
        vocab_size=info.vocab_size,
        context_tokens=info.context_tokens,
        pool_tokens=info.pool_tokens,
        ready=info.ready,
        decode_available=info.decode_available,
        num_open_streams=info.num_open_streams,
        num_streams_by_outcome=info.num_streams_by_outcome,
        num_malformed_frames=info.num_malformed_frames,
        servers=[server_info(server) for server in info.servers],
        ready_reason=info.ready_reason,
        num_moves=info.num_moves,
        placement=info.placement,
    )


def server_info(server: ServerInfo) -> pb.Server:
    """One server."""
    admission = {} if server.admission is None else dataclasses.asdict(server.admission)
    return pb.Server(
        server_id=server.server_id,
        role=server.role.value,
        state=server.state,
        pid=server.pid,
        num_assigned_streams=server.num_assigned_streams,
        heartbeat_age_s=server.heartbeat_age_s,
        loop_age_s=server.loop_age_s,
        controller_alive=server.controller_alive,
        counters={**msgspec.structs.asdict(server.counters), **admission},
        policy=server.policy,
        state_reason=server.state_reason,
        address=server.address,
        version=server.version,
        pool_tokens=server.pool_tokens,
        num_held_tokens=server.num_held_tokens,
    )


def _logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return pb.TokenLogprob(logprob=logprob.logprob, top=top)


def _done(event: DoneEvent, stream_id: int) -> pb.Done:
    matched = event.matched_stop
    return pb.Done(
        finish_reason=event.finish_reason,
        matched_stop_string=matched if isinstance(matched, str) else None,
        matched_stop_token_id=matched if isinstance(matched, int) else None,
        text_tail=event.text_tail,
        usage=pb.Usage(
            num_prompt_tokens=event.usage.num_prompt_tokens,
            num_output_tokens=event.usage.num_output_tokens,
            num_cached_tokens=event.usage.num_cached_tokens,
            num_invalidated_tokens=event.usage.num_invalidated_tokens,
            num_computed_tokens=event.usage.num_computed_tokens,
            num_recomputed_tokens=event.usage.num_recomputed_tokens,
            num_reused_tokens=event.usage.num_reused_tokens,
        ),
        metadata=pb.AnswerMetadata(
            stream_id=stream_id,
            prefill_server=event.prefill_server,
            decode_server=event.decode_server,
            decoded_by_prefill=event.decoded_by_prefill,
            handoff=event.handoff,
            num_attempts=event.num_attempts,
            lifetime=_lifetime(event.lifetime),
            handoff_bytes=event.handoff_bytes,
            handoff_s=event.handoff_s,
            kv_codec=event.kv_codec,
        ),
    )


def _lifetime(lifetime: Lifetime) -> list[pb.LifetimeEvent]:
    """In order of time, from the first recorded event on: times of the monotonic clock mean nothing
    elsewhere."""
    start_s = lifetime.entries[0].at_s if lifetime.entries else 0.0
    # Stable: events of one moment stay in the order in which they were recorded.
    entries = sorted(lifetime.entries, key=lambda entry: entry.at_s)
    return [
        pb.LifetimeEvent(
            name=str(entry.event),
            time_s=entry.at_s - start_s,
            segment=entry.segment,
            num_tokens=entry.num_tokens,
            reason=entry.reason,
            predicted_s=entry.predicted_s,
            actual_s=entry.actual_s,
        )
        for entry in entries
    ]
