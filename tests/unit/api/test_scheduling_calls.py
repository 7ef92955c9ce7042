"""Setting a policy and asking why streams wait, through the clients and the real gRPC service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import pytest

from router.interface import PolicyOutcome
from router.interface import ServerStreams as RouterServerStreams
from streamfill.api import Client, PolicyResult, ServerStreams, StreamDecision, SyncClient
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import (
    ErrorCode,
    FailedPreconditionError,
    InvalidArgumentError,
    StreamError,
    StreamNotFoundError,
)
from streamfill.messages import common
from streamfill.stream.ids import ServerId
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve

WAITING: Mapping[str, Any] = {
    "stream_id": 2**63 + 1,
    "state": "open",
    "num_known_tokens": 40,
    "num_computed_tokens": 30,
    "num_shared_tokens": 20,
    "priority": -3,
    "idle_s": 1.5,
    "expected_next_s": 0.25,
    "decision": "no_budget",
    "reason": "the step's tokens went to others",
    "victim_rank": 0,
}
IDLE: Mapping[str, Any] = {**WAITING, "expected_next_s": None, "victim_rank": None}


@pytest.fixture
def manager() -> FakeManager:
    described = RouterServerStreams(
        answered=True,
        role=common.Role.PREFILL,
        policy="lcas(order=newest)",
        streams=[common.StreamDecision(**WAITING), common.StreamDecision(**IDLE)],
    )
    return FakeManager(described={ServerId("prefill-0"): described})


@pytest.fixture
async def client(manager: FakeManager) -> AsyncIterator[Client]:
    async with serve(manager) as target, Client(target) as client:
        yield client


async def test_a_policy_is_set(client: Client, manager: FakeManager) -> None:
    """Name, options, server and time reach the core; the result and the status tell the rest."""
    result = await client.set_policy(
        "lcas", {"order": "newest"}, server_id="prefill-0", timeout_s=2.5
    )
    assert result == {"prefill-0": PolicyResult(ok=True, policy="lcas", reason="")}
    await client.set_policy("edf")
    assert manager.policy_calls == [
        ("lcas", {"order": "newest"}, "prefill-0", 2.5),
        ("edf", {}, None, 10.0),
    ]
    assert (await client.server_info()).servers[0].policy == "edf"


async def test_an_option_that_is_no_text_is_named(client: Client, manager: FakeManager) -> None:
    """Options are words, also where they stand for numbers; the router is not asked."""
    number: Any = 3
    with pytest.raises(TypeError, match="the policy option ageing is 3; write it as a string"):
        await client.set_policy("adaptive", {"ageing": number})
    assert manager.policy_calls == []


async def test_a_server_that_keeps_its_policy_says_why(
    client: Client, manager: FakeManager
) -> None:
    """Where others took it, as a result; else the core's error is raised."""
    manager.policy_outcome = PolicyOutcome(ok=False, policy="fcfs", reason="no such order")
    result = await client.set_policy("lcas")
    assert result == {"prefill-0": PolicyResult(ok=False, policy="fcfs", reason="no such order")}
    manager.policy_outcome = InvalidArgumentError("there is no policy 'x'")
    with pytest.raises(InvalidArgumentError, match="no policy 'x'"):
        await client.set_policy("x")
    manager.policy_outcome = StreamError("no server 'y'", code=ErrorCode.NOT_FOUND)
    with pytest.raises(StreamNotFoundError, match="no server 'y'"):
        await client.set_policy("fcfs", server_id="y")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.SetPolicyRequest(), "policy is ''; it must be a name"),
        (pb.SetPolicyRequest(policy="x" * 2000), "of 2000 characters; it must be at most 1024"),
        (pb.SetPolicyRequest(policy="x", options={"": "1"}), "name of an option is ''"),
        (pb.SetPolicyRequest(policy="x", options={"a": "y" * 2000}), "of 2000 characters"),
        (
            pb.SetPolicyRequest(policy="x", options={str(n): "1" for n in range(65)}),
            "options is 65 entries; it must be at most 64",
        ),
        (pb.SetPolicyRequest(policy="x", timeout_s=0.0), "timeout_s is 0.0"),
        (pb.SetPolicyRequest(policy="x", timeout_s=61.0), "timeout_s is 61.0; it must be in"),
    ],
)
async def test_a_wrong_wish_is_named(
    client: Client, manager: FakeManager, request_: pb.SetPolicyRequest, words: str
) -> None:
    """INVALID_ARGUMENT with the value and what it must be; no server is asked."""
    call = client.stub.SetPolicy(request_)
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in await call.details()
    assert not manager.policy_calls


async def test_streams_are_described(client: Client, manager: FakeManager) -> None:
    """Every field arrives, an absent one as None."""
    described = await client.describe_streams(timeout_s=2.5)
    assert described == {
        "prefill-0": ServerStreams(
            answered=True,
            role="prefill",
            policy="lcas(order=newest)",
            streams=(StreamDecision(**WAITING), StreamDecision(**IDLE)),
        )
    }
    assert manager.describe_calls == [(None, 2.5)]


async def test_one_stream_is_described(client: Client, manager: FakeManager) -> None:
    """By its id; one that there is not is NOT_FOUND."""
    async with client.stream() as stream:
        await client.describe_streams(stream.stream_id)
        assert manager.describe_calls == [(stream.stream_id, 10.0)]
    with pytest.raises(StreamNotFoundError, match="no stream 5"):
        await client.describe_streams(5)
    with pytest.raises(InvalidArgumentError, match="stream_id is -1"):
        await client.describe_streams(-1)
    with pytest.raises(InvalidArgumentError, match=r"timeout_s is -1\.0"):
        await client.describe_streams(timeout_s=-1.0)


async def test_the_synchronous_client_does_the_same(manager: FakeManager) -> None:
    """Policy, description and the wished time to the first token."""

    def program(target: str) -> None:
        with SyncClient(target) as client:
            assert client.set_policy("lcas", {"order": "newest"})["prefill-0"].ok
            assert client.describe_streams()["prefill-0"].streams[0].victim_rank == 0
            with client.stream(ttft_slo_ms=250.0, priority=1) as stream:
                assert manager.streams[stream.stream_id].options.ttft_slo_s == 0.25
            client.complete("abc", ttft_slo_ms=125.0)
            assert list(manager.streams.values())[-1].options.ttft_slo_s == 0.125

    async with serve(manager) as target:
        await asyncio.wait_for(asyncio.to_thread(program, target), STEP_S)
    assert manager.policy_calls == [("lcas", {"order": "newest"}, None, 10.0)]


def test_a_closed_synchronous_client_says_so() -> None:
    """And leaves no call behind."""
    client = SyncClient()
    with pytest.raises(FailedPreconditionError, match="inside `with`"):
        client.set_policy("fcfs")
    with pytest.raises(FailedPreconditionError, match="inside `with`"):
        client.describe_streams()
