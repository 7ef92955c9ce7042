"""When a router is ready: by which servers, and what it says where it is not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.placement import ServerState
from router.readiness import Readiness, readiness
from router.service_server import READINESS, GrpcServer
from streamfill.messages.common import Role
from streamfill.stream.ids import ServerId
from tests.unit.router.cluster_for_tests import TestCluster, fast_timing, until

PREFILL, DECODE = Role.PREFILL, Role.DECODE
ALIVE, SUSPECT = ServerState.ALIVE, ServerState.SUSPECT
DRAINING, DEAD = ServerState.DRAINING, ServerState.DEAD


def of(
    *servers: tuple[Role, ServerState], stopping: bool = False, without_decode: bool = True
) -> Readiness:
    return readiness(servers, stopping=stopping, without_decode=without_decode)


@pytest.mark.parametrize("without_decode", [True, False])
def test_a_pair_is_ready(without_decode: bool) -> None:
    """One of each is enough, whatever the others are."""
    pair = ((PREFILL, ALIVE), (DECODE, ALIVE))
    assert of(*pair, without_decode=without_decode) == Readiness(True, "")
    others = ((PREFILL, DEAD), (DECODE, DRAINING), (PREFILL, SUSPECT))
    assert of(*others, *pair, without_decode=without_decode) == Readiness(True, "")


@pytest.mark.parametrize(
    ("servers", "reason"),
    [
        ((), "no prefill server is there"),
        (((DECODE, ALIVE),), "no prefill server is there"),
        (
            ((PREFILL, DRAINING), (DECODE, ALIVE)),
            "no prefill server takes new streams (1 draining)",
        ),
        (
            ((PREFILL, DEAD), (PREFILL, SUSPECT), (PREFILL, DEAD)),
            "no prefill server takes new streams (1 suspect, 2 dead)",
        ),
    ],
)
def test_without_a_prefill_server_it_is_not(
    servers: tuple[tuple[Role, ServerState], ...], reason: str
) -> None:
    """Those that drain, are suspect or dead are as good as none, and are named."""
    assert of(*servers) == Readiness(False, reason)


@pytest.mark.parametrize("state", [SUSPECT, DRAINING, DEAD, None])
def test_without_a_decode_server_it_depends(state: ServerState | None) -> None:
    """Ready by prefill servers alone where that is wanted, which is said in both cases."""
    servers = ((PREFILL, ALIVE), *(((DECODE, state),) if state is not None else ()))
    seen = "is there" if state is None else f"takes new streams (1 {state})"
    alone = f"prefill servers answer by themselves: no decode server {seen}"
    assert of(*servers) == Readiness(True, alone)
    assert of(*servers, without_decode=False) == Readiness(False, f"no decode server {seen}")


def test_a_router_that_stops_is_not_ready() -> None:
    """With whatever servers."""
    both = ((PREFILL, ALIVE), (DECODE, ALIVE))
    assert of(*both, stopping=True) == Readiness(False, "the router is shutting down")


@pytest.mark.parametrize("without_decode", [True, False])
async def test_health_follows_pairs(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, without_decode: bool
) -> None:
    """gRPC's health service says so as servers come, drain and die."""
    fast_timing(monkeypatch)
    async with TestCluster(tiny_model, ready_without_decode=without_decode) as cluster:
        server = GrpcServer(cluster.manager, "127.0.0.1", 0)
        port = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def is_serving(wanted: bool) -> None:
                status = health_pb2.HealthCheckResponse
                expected = status.SERVING if wanted else status.NOT_SERVING
                for _ in range(500):
                    reply = await stub.Check(health_pb2.HealthCheckRequest(service=READINESS))
                    if reply.status == expected:
                        break
                    await asyncio.sleep(0.01)
                assert reply.status == expected
                assert cluster.manager.info().ready is wanted

            await is_serving(False)
            await cluster.prefill(0)
            await is_serving(without_decode)
            decode = await cluster.decode(0)
            await is_serving(True)
            await cluster.manager.drain_server(ServerId("decode-0"), None, force=False)
            await is_serving(without_decode)
            await cluster.manager.resume_server(ServerId("decode-0"))
            await is_serving(True)
            await cluster.kill(decode)
            await until(lambda: cluster.state_of(decode) == "dead")
            await is_serving(without_decode)
            await cluster.decode(0)
            await is_serving(True)
            await cluster.manager.drain_server(ServerId("prefill-0"), None, force=True)
            await is_serving(False)
        await server.stop(0.1)
