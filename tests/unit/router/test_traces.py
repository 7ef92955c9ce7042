"""Streams of the router's core become traces, through a fake exporter."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import grpc.aio
import pytest

from router.ended_streams import EndedStream
from router.service_server import GrpcServer
from router.traces import TRACE_PARENT, StreamTraces, span_of, start_traces
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.errors import ConfigError
from streamfill.observability.lifetime import LifetimeEvent
from streamfill.observability.spans import Span
from streamfill.stream.ids import StreamId
from tests.unit.router.cluster_for_tests import (
    PATIENCE_S,
    TestCluster,
    answer_of,
    commit_of,
    text,
    until,
)
from tests.unit.router.test_metrics import ENTRIES, ended_stream

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class FakeExporter:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.exported: list[tuple[Span, str]] = []
        self.is_closed = False

    def export(self, root: Span, trace_parent: str) -> None:
        self.exported.append((root, trace_parent))

    def close(self, timeout_s: float) -> None:
        assert timeout_s > 0
        self.is_closed = True


@pytest.fixture
def exporter() -> FakeExporter:
    return FakeExporter()


@pytest.fixture
async def cluster(tiny_model: Path, exporter: FakeExporter) -> AsyncIterator[TestCluster]:
    async with TestCluster(tiny_model) as started:
        traces = StreamTraces(exporter)
        started.manager.ended_streams.then = traces.add
        started.manager._traces = traces
        yield started


async def test_a_stream_becomes_a_trace(cluster: TestCluster, exporter: FakeExporter) -> None:
    """With a span for each segment, for the hand-off and the answer, and who did the work."""
    await cluster.prefill()
    decode = await cluster.decode()
    decode.output_limit = 3  # a short answer may overtake the report of the hand-off
    handle = await cluster.open(request_id="mine")
    await handle.append(text("The quick brown fox"))
    await handle.append(text(" jumps"))
    await handle.commit(commit_of(4, final_segment=text(" over.")))
    entries = cluster.manager._sessions[StreamId(handle.stream_id)].lifetime.entries
    await until(lambda: any(each.event is LifetimeEvent.HANDOFF_DONE for each in entries))
    decode.output_limit = 100
    _, done = await answer_of(handle)
    await until(lambda: exporter.exported)
    ((root, parent),) = exporter.exported
    assert parent == ""
    names = [child.name for child in root.children]
    assert names.count("segment") == 3
    assert names.count("decode") == names.count("hand-off") == 1
    assert root.error == ""
    assert root.attributes == {
        "streamfill.stream_id": str(handle.stream_id),
        "streamfill.request_id": "mine",
        "streamfill.mode": "append",
        "streamfill.outcome": "DONE",
        "streamfill.prefill_server": "prefill-0",
        "streamfill.decode_server": "decode-0",
        "streamfill.handoff": "done",
        "streamfill.num_attempts": 1,
        "gen_ai.usage.input_tokens": done.usage.num_prompt_tokens,
        "gen_ai.usage.output_tokens": 4,
    }


async def test_a_stream_that_its_client_gave_up(
    cluster: TestCluster, exporter: FakeExporter
) -> None:
    """Is a trace without an error: it is what the client wished."""
    await cluster.prefill()
    handle = await cluster.open()
    await handle.cancel("enough")
    await until(lambda: exporter.exported)
    root, _ = exporter.exported[0]
    assert (root.attributes["streamfill.outcome"], root.error) == ("ABORTED", "")


async def _opening() -> AsyncIterator[pb.StreamRequest]:
    """A client that opens a stream and says no more."""
    yield pb.StreamRequest(open=pb.Open())
    await asyncio.sleep(PATIENCE_S)


def _has_exported(exporter: FakeExporter, num_traces: int) -> bool:
    return len(exporter.exported) == num_traces


async def test_the_clients_trace_goes_on(cluster: TestCluster, exporter: FakeExporter) -> None:
    """Whoever sends a ``traceparent`` with its call gets the stream below its own span, and the
    next call without one does not."""
    await cluster.prefill()
    server = GrpcServer(cluster.manager, "127.0.0.1", 0)
    target = f"127.0.0.1:{await server.start()}"
    request = pb.GenerateRequest(
        prompt=pb.Segment(text="hello there"), sampling=pb.Sampling(max_tokens=2)
    )
    sent: list[str] = []
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            stub = StreamfillStub(channel)
            for parent in (PARENT, ""):
                metadata = (("traceparent", parent),) if parent else ()
                async for _ in stub.Generate(request, metadata=metadata):
                    pass
                opened = await stub.OpenStream(pb.OpenStreamRequest(), metadata=metadata)
                await stub.CancelStream(pb.CancelStreamRequest(stream_id=opened.stream_id))
                call = stub.Stream(_opening(), metadata=metadata)
                await call.read()
                call.cancel()
                sent += [parent] * 3
                await until(partial(_has_exported, exporter, len(sent)))
    finally:
        await server.stop(0.0)
    assert [parent for _, parent in exporter.exported] == sent
    assert TRACE_PARENT.get() == ""


async def test_the_end_of_the_router_sends_what_is_left(
    tiny_model: Path, exporter: FakeExporter
) -> None:
    """Streams that the end itself ends are among it."""
    async with TestCluster(tiny_model) as cluster:
        traces = StreamTraces(exporter)
        cluster.manager.ended_streams.then = traces.add
        cluster.manager._traces = traces
        await cluster.prefill()
        await cluster.open()
    assert [root.attributes["streamfill.outcome"] for root, _ in exporter.exported] == ["ABORTED"]
    assert exporter.is_closed


def test_a_stream_that_failed_says_why() -> None:
    """The error stands in the root."""
    fields = {name: getattr(ended_stream(ENTRIES), name) for name in EndedStream.__slots__}
    root = span_of(EndedStream(**{**fields, "outcome": "FAILED", "error": "UNAVAILABLE: gone"}))
    assert root is not None
    assert root.error == "UNAVAILABLE: gone"


def hide_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "streamfill.observability.otel", None)


def test_our_own_key_needs_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the start stops, with the key and what to install."""
    hide_opentelemetry(monkeypatch)
    with pytest.raises(ConfigError, match="streamfill\\[otel\\]") as caught:
        start_traces("http://127.0.0.1:4318", {}, lambda _: None)
    assert caught.value.key == "router.otlp_endpoint"


def test_variables_without_the_packages_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are often set for all of a machine, so nothing stops."""
    hide_opentelemetry(monkeypatch)
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    with caplog.at_level(logging.WARNING):
        assert start_traces(None, environment, lambda _: None) is None
    assert "traces_off" in caplog.text
    assert "streamfill[otel]" in caplog.text


def test_nobody_asks_and_nothing_is_imported() -> None:
    """The router's start brings none of OpenTelemetry with it."""
    program = (
        "import sys, router.__main__\n"
        "from router.traces import start_traces\n"
        "assert start_traces(None, {}, lambda n: None) is None\n"
        "print([name for name in sys.modules if 'opentelemetry' in name or name.endswith('.otel')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout == "[]\n"
