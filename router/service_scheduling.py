"""`SetPolicy` and `DescribeStreams`: their requests as checked plain data, and what is answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from router.interface import PolicyOutcome, ServerStreams
from router.request_checks import wrong
from router.service_requests import server_timeout_s
from streamfill.api import streamfill_pb2 as pb
from streamfill.messages.common import StreamDecision
from streamfill.stream.ids import ServerId

MAX_POLICY_OPTIONS = 64
"""No policy has nearly as many; a request may be as large as a document."""
MAX_POLICY_WORD_CHARS = 1024
"""Of a policy's name, an option's name or its value."""


class PolicyWish(NamedTuple):
    """What a client asks for; the arguments of ``StreamManager.set_policy`` in their order."""

    policy: str
    options: Mapping[str, str]
    server_id: ServerId | None
    timeout_s: float


def policy_wish(message: pb.SetPolicyRequest) -> PolicyWish:
    """Which policy, and where.

    Raises:
        InvalidArgumentError: a value that no policy can have; others are judged by the servers.
    """
    options = dict(message.options)
    if not message.policy:
        raise wrong("policy", "", "a name that `streamfill policy list` shows")
    if len(options) > MAX_POLICY_OPTIONS:
        raise wrong("options", f"{len(options)} entries", f"at most {MAX_POLICY_OPTIONS}")
    if "" in options:
        raise wrong("the name of an option", "", "one that `streamfill policy list` shows")
    for word in (message.policy, *options, *options.values()):
        if len(word) > MAX_POLICY_WORD_CHARS:
            shown = f"{word[:20]}… of {len(word)} characters"
            raise wrong("policy or options", shown, f"at most {MAX_POLICY_WORD_CHARS} characters")
    server_id = ServerId(message.server_id) if message.HasField("server_id") else None
    return PolicyWish(message.policy, options, server_id, server_timeout_s(message))


def policy_results(outcomes: Mapping[ServerId, PolicyOutcome]) -> pb.SetPolicyResponse:
    """What each server made of it."""
    return pb.SetPolicyResponse(
        results={
            str(name): pb.PolicyResult(ok=each.ok, policy=each.policy, reason=each.reason)
            for name, each in outcomes.items()
        }
    )


def streams_described(servers: Mapping[ServerId, ServerStreams]) -> pb.DescribeStreamsResponse:
    """What each server's scheduler thinks."""
    return pb.DescribeStreamsResponse(
        servers={
            str(name): pb.ServerStreams(
                answered=each.answered,
                role=each.role.value,
                policy=each.policy,
                streams=[_decision(one) for one in each.streams],
            )
            for name, each in servers.items()
        }
    )


def _decision(decision: StreamDecision) -> pb.StreamDecision:
    """The fields have the same names on both sides; None is an absent one."""
    return pb.StreamDecision(**msgspec.structs.asdict(decision))
