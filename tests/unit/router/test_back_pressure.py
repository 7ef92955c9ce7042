"""Room for uncommitted contexts, as clients on a real gRPC channel meet it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router import handle, service_requests
from router.interface import Segment
from router.service_server import GrpcServer
from router.stream_call import MAX_UNDER_WAY
from streamfill.api import Client
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.errors import ResourceExhaustedError
from tests.unit.router.cluster_for_tests import PATIENCE_S, TestCluster, until

Call = grpc.aio.StreamStreamCall[pb.StreamRequest, pb.StreamEvent]

CAP_TOKENS = 6000
NUM_UPDATES = 400
UPDATE_BYTES = 4096
MAX_BUFFERED_BYTES = 256 * 1024
"""What gRPC takes from a client whose call is not read: 64 KiB, and what is between the two."""


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[TestCluster]:
    """Its one server is full, with a context that nobody commits."""
    async with TestCluster(tiny_model, max_uncommitted_tokens=CAP_TOKENS) as started:
        await started.prefill(pool_tokens=8000)
        holder = await started.open()
        await holder.append(Segment(token_ids=[20] * CAP_TOKENS))
        yield started


async def make_room(cluster: TestCluster) -> None:
    """The first stream goes."""
    holder = next(iter(cluster.manager._handles.values()))
    await holder.cancel("room")


@asynccontextmanager
async def serve(cluster: TestCluster) -> AsyncIterator[str]:
    server = GrpcServer(cluster.manager, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{await server.start()}"
    finally:
        await server.stop(0.0)


@asynccontextmanager
async def opened(cluster: TestCluster, mode: pb.StreamMode) -> AsyncIterator[Call]:
    async with serve(cluster) as target, grpc.aio.insecure_channel(target) as channel:
        call = StreamfillStub(channel).Stream(None)
        await call.write(pb.StreamRequest(open=pb.Open(mode=mode)))
        await read(call, "opened")
        yield call
        call.cancel()


async def read(call: Call, kind: str) -> pb.StreamEvent:
    """The next event of this kind, passing over acknowledgements."""
    while True:
        event = await asyncio.wait_for(call.read(), PATIENCE_S)
        assert isinstance(event, pb.StreamEvent), "the call ended"
        if event.WhichOneof("event") == kind:
            return event
        assert event.WhichOneof("event") == "acknowledged", event


async def read_to_the_end(call: Call) -> None:
    while await asyncio.wait_for(call.read(), PATIENCE_S):
        pass


def append(seq: int, text: str) -> pb.StreamRequest:
    return pb.StreamRequest(seq=seq, append=pb.Append(segment=pb.Segment(text=text)))


def num_waiting(cluster: TestCluster) -> int:
    (server,) = cluster.manager.info().servers
    assert server.admission is not None
    return server.admission.num_waiting_segments


async def test_a_client_cannot_write_on_while_its_segment_waits(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router reads two operations, gRPC takes some more, and then the writes stand still. With
    room for the context all of them are applied, in their order."""
    num_written = 0
    texts_read = set()
    segment = service_requests.segment

    def note(message: pb.Segment, *args: Any) -> Segment:
        texts_read.add(message.text)
        return segment(message, *args)

    monkeypatch.setattr(service_requests, "segment", note)

    async def write(call: Call) -> None:
        nonlocal num_written
        for seq in range(1, NUM_UPDATES + 1):
            text = (f"{seq:04} " * UPDATE_BYTES)[:UPDATE_BYTES]
            update = pb.Update(segment=pb.Segment(text=text))
            await call.write(pb.StreamRequest(seq=seq, update=update))
            num_written += 1

    async with opened(cluster, pb.STREAM_MODE_UPDATE) as call:
        writer = asyncio.create_task(write(call))
        await until(lambda: num_waiting(cluster))
        await until(lambda: num_written and len(texts_read) == MAX_UNDER_WAY)
        before = -1
        while before < num_written:
            before = num_written
            await asyncio.sleep(0.3)
        assert len(texts_read) == MAX_UNDER_WAY
        assert 0 < num_written * UPDATE_BYTES < MAX_BUFFERED_BYTES < NUM_UPDATES * UPDATE_BYTES
        await make_room(cluster)
        while (await read(call, "acknowledged")).acknowledged.seq < NUM_UPDATES:
            pass
        await writer
        (session,) = cluster.manager._sessions.values()
        text = (f"{NUM_UPDATES:04} " * UPDATE_BYTES)[:UPDATE_BYTES]
        assert session.prompt.log.ids.tolist() == cluster.encode(text)


async def test_a_commit_right_behind_a_waiting_segment_ends_the_wait(cluster: TestCluster) -> None:
    """A client need not wait for acknowledgements to get its answer at once."""
    async with opened(cluster, pb.STREAM_MODE_APPEND) as call:
        await call.write(append(1, "Once upon"))
        await until(lambda: num_waiting(cluster))
        commit = pb.Commit(sampling=pb.Sampling(max_tokens=1))
        await call.write(pb.StreamRequest(seq=2, commit=commit))
        assert (await read(call, "token")).token.index == 0
        done = (await read(call, "done")).done
        assert done.usage.num_prompt_tokens == len(cluster.encode("Once upon"))


async def test_operations_that_were_not_waited_for_keep_their_order(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first is tokenised in a thread and the second is there at the same moment."""
    monkeypatch.setattr(handle, "INLINE_CHARS", 100)
    await make_room(cluster)
    long = "word " * 1000
    stream = await cluster.open()
    await asyncio.gather(stream.append(Segment(text=long)), stream.append(Segment(text="short")))
    (session,) = cluster.manager._sessions.values()
    assert session.prompt.log.ids.tolist() == cluster.encode(long + "short")


async def test_a_refusal_is_told_before_what_is_applied_behind_it(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the client would take the acknowledgement for that of the refused operation too, which was
    in the tokenizer's thread when the next one came."""
    monkeypatch.setattr(handle, "INLINE_CHARS", 100)
    await make_room(cluster)
    async with opened(cluster, pb.STREAM_MODE_APPEND) as call:
        await call.write(append(1, "word " * 20_000))
        await call.write(append(2, "short"))
        event = await asyncio.wait_for(call.read(), PATIENCE_S)
        assert isinstance(event, pb.StreamEvent)
        assert event.error.seq == 1, event
        assert (await read(call, "acknowledged")).acknowledged.seq == 2


async def test_an_operation_that_the_service_refuses_behind_a_waiting_one_is_no_gap(
    cluster: TestCluster,
) -> None:
    """It is refused at once; the next number is welcome when the waiting one is through."""
    async with opened(cluster, pb.STREAM_MODE_APPEND) as call:
        await call.write(append(1, "Once upon"))
        await until(lambda: num_waiting(cluster))
        await call.write(pb.StreamRequest(seq=2, append=pb.Append()))
        assert (await read(call, "error")).error.seq == 2
        await call.write(append(3, " a time"))
        await make_room(cluster)
        while (event := await read(call, "acknowledged")).acknowledged.seq < 3:
            pass
        num_tokens = len(cluster.encode("Once upon a time"))
        assert event.acknowledged.num_received_tokens == num_tokens


async def test_a_cancellation_right_behind_a_waiting_segment_is_heard(
    cluster: TestCluster,
) -> None:
    """The call ends with it, and the queue is empty."""
    async with opened(cluster, pb.STREAM_MODE_APPEND) as call:
        await call.write(append(1, "Once upon"))
        await until(lambda: num_waiting(cluster))
        await call.write(pb.StreamRequest(cancel=pb.Cancel(reason="enough")))
        with pytest.raises(grpc.aio.AioRpcError, match="enough"):
            await read_to_the_end(call)
        await until(lambda: not num_waiting(cluster))


async def test_a_client_that_goes_away_leaves_the_queue(cluster: TestCluster) -> None:
    """Its stream ends, and nobody has to wait behind it."""
    async with opened(cluster, pb.STREAM_MODE_APPEND) as call:
        await call.write(append(1, "Once upon"))
        await until(lambda: num_waiting(cluster))
        call.cancel()
        await until(lambda: cluster.outcomes() == {"ABORTED": 1})
        await until(lambda: not num_waiting(cluster))


async def test_the_python_client_gets_the_error_and_may_send_the_segment_again(
    tiny_model: Path,
) -> None:
    """With all numbers in `details`; the answer is that of everything that was accepted."""
    limits = {"max_uncommitted_tokens": 10, "admission_wait_s": 0.05}
    async with TestCluster(tiny_model, **limits) as cluster:
        await cluster.prefill()
        holder = await cluster.open()
        await holder.append(Segment(token_ids=[20] * 10))
        async with serve(cluster) as target, Client(target) as client, client.stream() as stream:
            with pytest.raises(ResourceExhaustedError, match="waited") as caught:
                await stream.append("Once upon")
            assert caught.value.details["limit_tokens"] == "10"
            await holder.cancel("room")
            await stream.append("Once upon")
            result = await stream.commit(" a time", max_tokens=1).read()
            assert result.usage.num_prompt_tokens == len(cluster.encode("Once upon a time"))
