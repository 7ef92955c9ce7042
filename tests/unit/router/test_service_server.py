"""The gRPC server around the service: health, reflection, ports, limits."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.service_server import MAX_MESSAGE_BYTES, READINESS, GrpcServer
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.errors import ConfigError
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve

STATUS = health_pb2.HealthCheckResponse


async def check(stub: Any, service: str) -> int:
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(reply.status)


async def test_readiness_follows_the_prefill_servers_and_liveness_does_not() -> None:
    """A watcher of the service's name hears each change."""
    manager = FakeManager(ready=False)
    async with serve(manager) as target, grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert await check(stub, "") == STATUS.SERVING
        assert await check(stub, READINESS) == STATUS.NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="streamfill.v1.Streamfill"))
        assert (await watch.read()).status == STATUS.NOT_SERVING
        for ready, status in ((True, STATUS.SERVING), (False, STATUS.NOT_SERVING)):
            manager.set_ready(ready)
            assert (await asyncio.wait_for(watch.read(), STEP_S)).status == status
        assert await check(stub, "") == STATUS.SERVING
        watch.cancel()


async def test_readiness_ends_with_the_drain() -> None:
    """And does not come back when a server does."""
    manager = FakeManager()
    server = GrpcServer(manager, "127.0.0.1", 0)
    target = f"127.0.0.1:{await server.start()}"
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert await check(stub, READINESS) == STATUS.SERVING
        await server.begin_drain()
        manager.set_ready(True)
        assert await check(stub, READINESS) == STATUS.NOT_SERVING
        assert await check(stub, "") == STATUS.SERVING
    await server.stop(0.0)


async def test_reflection_lists_the_services() -> None:
    """So that grpcurl needs no file."""
    async with serve(FakeManager()) as target, grpc.aio.insecure_channel(target) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await asyncio.wait_for(call.read(), STEP_S)
        names = {service.name for service in reply.list_services_response.service}
        assert names == {
            *("streamfill.v1.Streamfill", "grpc.health.v1.Health"),
            "grpc.reflection.v1alpha.ServerReflection",
        }
        call.cancel()


async def test_a_port_in_use_stops_the_start() -> None:
    """Even when its user would share it, as another router's gRPC would by default."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        server = GrpcServer(FakeManager(), "127.0.0.1", port)
        with pytest.raises(ConfigError, match="choose a free port") as caught:
            await server.start()
        assert (caught.value.key, caught.value.value) == ("router.grpc_port", port)
        await server.stop(0.0)


async def test_a_document_of_many_megabytes_fits_into_one_message() -> None:
    """gRPC's default would refuse more than 4 MiB; the refusal here is the core's own."""
    options = (("grpc.max_send_message_length", MAX_MESSAGE_BYTES),)
    async with (
        serve(FakeManager()) as target,
        grpc.aio.insecure_channel(target, options=options) as channel,
    ):
        prompt = pb.Segment(text="x" * 8_000_000)
        call = StreamfillStub(channel).Generate(pb.GenerateRequest(prompt=prompt))
        assert "8000000 tokens" in await call.details()
