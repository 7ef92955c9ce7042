"""Log lines about a stream name it, also where something of ours broke."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc
import httpx
import pytest
import zmq

from router.interface import CommitOptions, Segment
from router.session import Session
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.observability.logging import RateLimited
from tests.unit.router.cluster_for_tests import TestCluster, ids, until
from tests.unit.router.fake_manager import FakeManager, FakeStream, serve
from tests.unit.router.http.serving import http_client


def line_with(caplog: pytest.LogCaptureFixture, event: str) -> str:
    """The one line of an event."""
    (line,) = {each.getMessage() for each in caplog.records if event in each.getMessage()}
    return line


async def test_a_message_that_cannot_be_handled(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The line names the stream that the message is about."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async with TestCluster(tiny_model) as cluster:
        await cluster.prefill()
        handle = await cluster.open()
        monkeypatch.setattr(Session, "on_message", broken)
        await handle.append(ids(1, 2))
        await until(lambda: "message_handler_failed" in caplog.text)
    lines = [each.getMessage() for each in caplog.records if "message_handler" in each.getMessage()]
    assert all(
        line.startswith(f"message_handler_failed stream={handle.stream_id}") for line in lines
    )


async def test_a_server_that_does_not_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The line names the stream whose message was dropped."""

    class Full:
        """A socket whose queue is full."""

        def send_multipart(self, *_: object) -> None:
            raise zmq.Again

        def recv_multipart(self, *_: object) -> None:
            raise zmq.Again

    async with TestCluster(tiny_model) as cluster:
        await cluster.prefill()
        handle = await cluster.open()
        router_link = cluster.manager._cluster._link
        monkeypatch.setattr(router_link, "_log_full", RateLimited())
        with monkeypatch.context() as full:
            full.setattr(router_link, "_socket", Full())
            await handle.append(ids(1, 2))
            await until(lambda: "server_queue_full" in caplog.text)
    assert f"stream_ids=[{handle.stream_id}]" in line_with(caplog, "server_queue_full")


async def test_a_call_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """The line of a gRPC call names the stream that its request names."""
    manager = FakeManager()

    def broken(_: int) -> FakeStream:
        raise ZeroDivisionError

    manager.get = broken  # type: ignore[method-assign, assignment]
    async with serve(manager) as address, grpc.aio.insecure_channel(address) as channel:
        stub = StreamfillStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.AppendSegment(pb.AppendSegmentRequest(stream_id=77))
    assert line_with(caplog, "call_failed").startswith("call_failed stream=77 call=AppendSegment")


async def test_a_completion_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The line of an HTTP request names the stream that it became."""

    async def broken(self: FakeStream, segment: Segment | CommitOptions, seq: int = 0) -> None:
        raise ZeroDivisionError

    for name in ("append", "update", "commit"):
        monkeypatch.setattr(FakeStream, name, broken)
    manager = FakeManager()
    with caplog.at_level(logging.ERROR):
        async with http_client(manager) as client:
            reply: httpx.Response = await client.post("/v1/completions", json={"prompt": "a"})
    assert reply.status_code == 500
    (stream_id,) = manager.streams
    assert f"stream={stream_id}" in line_with(caplog, "choice_failed")
