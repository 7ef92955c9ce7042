"""API keys on gRPC, through the real server and the Python client, over a core without servers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.interface import ServerStreams
from router.service_server import SERVICE
from streamfill.api import Client, SyncClient
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from streamfill.messages.common import Role, StreamDecision
from streamfill.stream.ids import ServerId
from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve


@asynccontextmanager
async def served(
    keys: TestKeys, manager: FakeManager | None = None
) -> AsyncIterator[tuple[str, FakeManager]]:
    manager = manager or FakeManager()
    async with serve(manager, keys.ring) as target:
        yield target, manager


WRONG = (
    (),
    (("authorization", ""),),
    (("authorization", "Bearer"),),
    (("authorization", "Bearer "),),
    (("authorization", "Basic dTpw"),),
    (("authorization", "Bearer none"),),
    (("authorization", "Bearer sf-000000000000-" + "A" * 43),),
    (("authorization", "Bearer " + "x" * 5000),),
)


@pytest.mark.parametrize("metadata", WRONG)
async def test_a_call_without_a_known_key_is_refused(
    keys: TestKeys, metadata: tuple[tuple[str, str], ...]
) -> None:
    """With UNAUTHENTICATED, and nothing of it comes to the core."""
    key = await keys.add("a")
    almost = key[:-1] + ("A" if key[-1] != "A" else "B")
    async with served(keys) as (target, manager):
        for given in (metadata, (("authorization", f"Bearer {almost}"),)):
            async with grpc.aio.insecure_channel(target) as channel:
                call = StreamfillStub(channel).OpenStream(pb.OpenStreamRequest(), metadata=given)
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "key" in await call.details() or "authorization" in await call.details()
        assert not manager.streams


async def test_each_stream_of_a_shared_call_counts_as_a_request(keys: TestKeys) -> None:
    """Or a limit of requests could be gone around."""
    key = await keys.add("a", requests_per_s=0.01)
    async with (
        served(keys) as (target, manager),
        Client(target, api_key=key, one_call=True) as client,
        client.stream(),
    ):
        with pytest.raises(ResourceExhaustedError, match="requests_per_s"):
            async with client.stream():
                pass
        assert len(manager.streams) == 1


async def test_two_keys_in_one_call_are_refused(keys: TestKeys) -> None:
    """Also when both are good: which one is meant nobody can say."""
    value = f"Bearer {await keys.add('a')}"
    async with served(keys) as (target, _), grpc.aio.insecure_channel(target) as channel:
        metadata = (("authorization", value), ("authorization", value))
        call = StreamfillStub(channel).ServerInfo(pb.ServerInfoRequest(), metadata=metadata)
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_every_method_asks_for_a_key(keys: TestKeys) -> None:
    """Each one of the service, and names that it does not have, before any message is sent."""
    async with served(keys) as (target, _), grpc.aio.insecure_channel(target) as channel:
        for name in [method.name for method in SERVICE.methods] + ["Nothing"]:
            call = channel.stream_stream(f"/{SERVICE.full_name}/{name}", bytes, bytes)(None)
            assert await asyncio.wait_for(call.code(), STEP_S) is grpc.StatusCode.UNAUTHENTICATED


async def test_health_and_reflection_ask_for_none(keys: TestKeys) -> None:
    """They tell nothing that is secret, and probes have no keys."""
    async with served(keys) as (target, _), grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE.full_name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await asyncio.wait_for(call.read(), STEP_S)).list_services_response.service
        call.cancel()


async def test_clients_with_a_key_are_served(
    keys: TestKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given to the client, to its synchronous twin, or by the environment; streamed and at once."""
    key = await keys.add("a")
    async with served(keys) as (target, manager):
        async with Client(target, api_key=key) as client:
            async with client.stream() as stream:
                await stream.append("abc")
                assert (await stream.commit("?").read()).text == "Hello world!"
            assert (await client.complete("x")).text == "Hello world!"
            assert (await client.wait_ready(STEP_S)).ready

        def synchronous() -> str:
            with SyncClient(target, api_key=key) as client:
                return client.complete("x").text

        assert await asyncio.to_thread(synchronous) == "Hello world!"
        monkeypatch.setenv("STREAMFILL_API_KEY", key)
        async with Client(target) as client:
            assert (await client.server_info()).ready
        async with Client(target, api_key="") as client:
            with pytest.raises(UnauthenticatedError):
                await client.wait_ready(STEP_S)
        assert all(stream.tenant == "a" for stream in manager.streams.values())


def test_a_key_that_cannot_be_sent_is_refused_by_the_client_and_not_shown() -> None:
    """Such as one that was read with its line end."""
    with pytest.raises(InvalidArgumentError, match="at place 9") as caught:
        Client(api_key="sf-SECRET\n")
    assert "SECRET" not in str(caught.value)


async def test_streams_belong_to_their_tenant(keys: TestKeys) -> None:
    """Whatever another one does with the id, there is no such stream; another key of the tenant and
    an operator's find it."""
    mine, other = await keys.add("a"), await keys.add("b")
    same, operator = await keys.add("a2", tenant="a"), await keys.add("o", is_operator=True)
    async with served(keys) as (target, manager):
        async with Client(target, api_key=mine) as client:
            opened = await client.stub.OpenStream(pb.OpenStreamRequest())
        number = opened.stream_id
        segment = pb.Segment(text="x")
        async with Client(target, api_key=other) as client:
            stub = client.stub
            missing = await code_and_details(stub.GetStream(pb.GetStreamRequest(stream_id=5)))
            assert missing[0] is grpc.StatusCode.NOT_FOUND
            for call in (
                stub.GetStream(pb.GetStreamRequest(stream_id=number)),
                stub.AppendSegment(pb.AppendSegmentRequest(stream_id=number, segment=segment)),
                stub.UpdateContext(pb.UpdateContextRequest(stream_id=number, segment=segment)),
                stub.CommitStream(pb.CommitStreamRequest(stream_id=number)),
                stub.CancelStream(pb.CancelStreamRequest(stream_id=number)),
                stub.DescribeStreams(pb.DescribeStreamsRequest(stream_id=number)),
            ):
                code, details = await code_and_details(call)
                assert code is grpc.StatusCode.NOT_FOUND
                assert details.startswith(f"there is no stream {number}")
        assert manager.streams[number].cancelled_because is None
        assert not manager.streams[number].tokens
        for key in (same, operator, mine):
            async with Client(target, api_key=key) as client:
                request = pb.AppendSegmentRequest(stream_id=number, segment=segment)
                await client.stub.AppendSegment(request)
        assert len(manager.streams[number].tokens) == 3


async def code_and_details(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    return await call.code(), await call.details()


async def test_what_servers_say_of_streams_is_told_to_their_tenant(keys: TestKeys) -> None:
    """Others see theirs; operators see all."""
    manager = FakeManager()
    tokens = {name: await keys.add(name, is_operator=name == "o") for name in ("a", "b", "o")}
    async with served(keys, manager) as (target, _):
        numbers = {}
        for name in ("a", "b"):
            async with Client(target, api_key=tokens[name]) as client:
                opened = await client.stub.OpenStream(pb.OpenStreamRequest())
                numbers[name] = opened.stream_id
        decided = [_decision(number) for number in (*numbers.values(), 99)]
        told = ServerStreams(answered=True, role=Role.PREFILL, policy="fcfs", streams=decided)
        manager.described = {ServerId("prefill-0"): told}
        seen = {}
        for name, key in tokens.items():
            async with Client(target, api_key=key) as client:
                (server,) = (await client.describe_streams()).values()
                seen[name] = [stream.stream_id for stream in server.streams]
    assert seen["a"] == [numbers["a"]]
    assert seen["b"] == [numbers["b"]]
    assert seen["o"] == list(numbers.values())


def _decision(stream_id: int) -> StreamDecision:
    return StreamDecision(
        stream_id=stream_id,
        state="open",
        num_known_tokens=1,
        num_computed_tokens=1,
        num_shared_tokens=0,
        priority=0,
        idle_s=0.0,
        expected_next_s=None,
        decision="idle",
        reason="",
        victim_rank=None,
    )


async def test_only_operators_change_the_cluster(keys: TestKeys) -> None:
    """Policies, caches and servers are everybody's."""
    plain, operator = await keys.add("a"), await keys.add("o", is_operator=True)
    async with served(keys) as (target, manager):
        async with Client(target, api_key=plain) as client:
            with pytest.raises(PermissionDeniedError, match="the API key a may not"):
                await client.set_policy("lcas")
            with pytest.raises(PermissionDeniedError):
                await client.flush_caches()
            with pytest.raises(PermissionDeniedError, match="DrainServer"):
                await client.drain_server("prefill-0", force=True)
            with pytest.raises(PermissionDeniedError, match="ResumeServer"):
                await client.resume_server("prefill-0")
        assert not manager.policy_calls
        assert not manager.drain_calls
        assert not manager.resume_calls
        async with Client(target, api_key=operator) as client:
            assert (await client.set_policy("lcas"))["prefill-0"].ok
            assert await client.flush_caches() == {"prefill-0": True}
            drained = await client.drain_server("prefill-0", move_answers_after_s=2.5)
            assert (drained.state, drained.state_reason) == ("draining", "an operator")
            assert (await client.resume_server("prefill-0")).state == "alive"
        assert manager.drain_calls == [("prefill-0", 2.5, False)]


async def test_a_removed_key_stops_working_without_a_restart(keys: TestKeys) -> None:
    """New calls are refused, and so is all that a call still open brings; an answer that was
    committed before comes to its end."""
    key = await keys.add("a")
    manager = FakeManager(hold_answer=True)
    async with (
        served(keys, manager) as (target, _),
        Client(target, api_key=key) as client,
        client.stream() as committed,
        client.stream() as growing,
    ):
        await committed.append("abc")
        reading = asyncio.create_task(committed.commit("?").read())
        await manager.any_commit.wait()
        await keys.remove("a")
        with pytest.raises(UnauthenticatedError, match="was removed"):
            await growing.append("more")
        with pytest.raises(UnauthenticatedError):
            await client.server_info()
        manager.hold_answer = False
        for stream in manager.streams.values():
            stream.compute()
        assert (await asyncio.wait_for(reading, STEP_S)).text == "Hello world!"


async def test_keys_are_never_logged(keys: TestKeys, caplog: pytest.LogCaptureFixture) -> None:
    """Neither good nor bad ones, nor a part of them, whatever goes wrong; refusals are logged."""
    caplog.set_level(logging.DEBUG)
    good = await keys.add("a")
    gone = await keys.add("gone")
    await keys.remove("gone")
    bad = good[:-4] + "zzzz"
    errors = []
    async with served(keys, FakeManager(open_error=RuntimeError("a bug"))) as (target, _):
        for key in (good, gone, bad, "not-even-a-key"):
            async with Client(target, api_key=key) as client:
                for call in (client.complete("x"), client.complete(token_ids=[10**6])):
                    with pytest.raises(Exception) as caught:
                        await call
                    errors.append(repr(caught.value) + repr(caught.value.__cause__))
    everything = caplog.text + "".join(errors)
    assert "unauthenticated" in caplog.text
    for key in (good, gone, bad, "not-even-a-key"):
        assert key not in everything
        assert key[-20:] not in everything
