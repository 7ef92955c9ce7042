"""The calls about scheduling: which policy is in force, and what it decided about each stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.requests import sendable
from streamfill.api.status_details import from_rpc_error
from streamfill.api.types import PolicyResult, ServerStreams, StreamDecision
from streamfill.errors import InvalidArgumentError

if TYPE_CHECKING:
    from streamfill.api.streamfill_pb2_grpc import StreamfillStub

REPLY_TIMEOUT_S = 10.0
"""On top of what the router waits for its servers; a loaded machine may take seconds."""


async def set_policy(
    stub: StreamfillStub,
    name: str,
    options: Mapping[str, str],
    server_id: str | None,
    timeout_s: float,
) -> dict[str, PolicyResult]:
    """As ``Client.set_policy``."""
    for option, value in options.items():
        if not isinstance(value, str):
            raise TypeError(f"the policy option {option} is {value!r}; write it as a string")
    with sendable("the policy"):
        request = pb.SetPolicyRequest(
            policy=name, options=options, server_id=server_id, timeout_s=timeout_s
        )
    try:
        reply = await stub.SetPolicy(request, timeout=timeout_s + REPLY_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    return {
        server: PolicyResult(ok=result.ok, policy=result.policy, reason=result.reason)
        for server, result in reply.results.items()
    }


async def describe_streams(
    stub: StreamfillStub, stream_id: int | None, timeout_s: float
) -> dict[str, ServerStreams]:
    """As ``Client.describe_streams``."""
    try:
        request = pb.DescribeStreamsRequest(stream_id=stream_id, timeout_s=timeout_s)
    except ValueError as error:
        raise InvalidArgumentError(f"stream_id is {stream_id}: {error}") from error
    try:
        reply = await stub.DescribeStreams(request, timeout=timeout_s + REPLY_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    return {server: _server_streams(message) for server, message in reply.servers.items()}


def _server_streams(message: pb.ServerStreams) -> ServerStreams:
    return ServerStreams(
        answered=message.answered,
        role=message.role,
        policy=message.policy,
        streams=tuple(_decision(one) for one in message.streams),
    )


def _decision(message: pb.StreamDecision) -> StreamDecision:
    return StreamDecision(
        stream_id=message.stream_id,
        state=message.state,
        num_known_tokens=message.num_known_tokens,
        num_computed_tokens=message.num_computed_tokens,
        num_shared_tokens=message.num_shared_tokens,
        priority=message.priority,
        idle_s=message.idle_s,
        expected_next_s=message.expected_next_s if message.HasField("expected_next_s") else None,
        decision=message.decision,
        reason=message.reason,
        victim_rank=message.victim_rank if message.HasField("victim_rank") else None,
    )
