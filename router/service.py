"""The operations of the gRPC API, on top of the router's core. Knows messages, but not gRPC.

A refused request raises ``StreamError``. A call whose client goes away is cancelled by whoever runs
it; its stream then ends on every server. The bidirectional calls are in ``stream_call.py`` and
``service_lanes.py``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from router import service_replies as replies
from router import service_requests as requests
from router import service_scheduling as scheduling
from router.access.account import CALLER
from router.call_messages import CallEvent, ClientMessage, Refused
from router.interface import Acknowledged, ResumePoint, StreamHandle, StreamManager
from router.refusals import Api, Note, not_counted, note_error
from router.service_decode import Undecodable
from router.service_lanes import Lane, Lanes
from router.service_servers import drain_wish, server_id_of
from router.service_stream import call_event, client_messages
from router.stream_call import StreamCall, refusals_noted
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import FailedPreconditionError, StreamError
from streamfill.observability.logging import log_event
from streamfill.stream.state import StreamState

logger = logging.getLogger(__name__)

CLIENT_GONE = "the client went away"


class EventWriter(Protocol):
    """The reply side of a call. Waits while the client is slow, so nothing piles up here."""

    async def write(self, event: pb.StreamEvent) -> None: ...


class StreamsWriter(Protocol):
    """The same of a ``Streams`` call."""

    async def write(self, reply: pb.StreamsReply) -> None: ...


class StreamfillService:
    """One method for each call of ``streamfill.proto``, with its name in snake case."""

    def __init__(self, manager: StreamManager, on_refused: Note = not_counted) -> None:
        self._manager = manager
        self._on_refused = on_refused
        self._vocab_size = manager.info().vocab_size  # of the model, so it never changes
        self._cancellations: set[asyncio.Task[None]] = set()
        self._lanes: set[Lanes] = set()
        self._is_stopping = False

    def begin_stop(self) -> None:
        """Calls that are there for further streams end with those that they have."""
        self._is_stopping = True
        for lanes in self._lanes:
            lanes.stop()

    async def stream(
        self,
        operations: AsyncIterator[pb.StreamRequest | Undecodable[pb.StreamRequest]],
        writer: EventWriter,
    ) -> None:
        """``Stream``"""

        async def write(event: CallEvent) -> None:
            stream_id = 0 if call.handle is None else call.handle.stream_id
            await writer.write(call_event(event, stream_id))

        call = self._stream_call(client_messages(operations, self._vocab_size), write)
        await self._run_call(call)

    async def streams(
        self,
        requests: AsyncIterator[pb.StreamsRequest | Undecodable[pb.StreamsRequest]],
        writer: StreamsWriter,
    ) -> None:
        """``Streams``"""
        note_refused = partial(note_error, self._on_refused, Api.GRPC)
        lanes = Lanes(self._run_lane, writer.write, self._vocab_size, _take_request, note_refused)
        self._lanes.add(lanes)
        if self._is_stopping:
            lanes.stop()
        try:
            await lanes.run(requests)
        finally:
            self._lanes.discard(lanes)

    async def _run_lane(self, lane: Lane) -> None:
        lane.call = self._stream_call(lane.messages(), lane.write, lane.acknowledge)
        try:
            await self._run_call(lane.call)
        except StreamError as error:
            note_error(self._on_refused, Api.GRPC, error)
        except Exception as error:  # noqa: BLE001 - the edge of a stream, whose client was told
            log_event(logger, "call_failed", level=logging.ERROR, call="Streams", error=error)

    def _stream_call(
        self,
        messages: AsyncIterator[ClientMessage],
        write: Callable[[CallEvent], Awaitable[None]],
        acknowledge: Callable[[bool], bool] | None = None,
    ) -> StreamCall:
        async def write_counted(event: CallEvent) -> None:
            if isinstance(event, Refused):
                note_error(self._on_refused, Api.GRPC, event.error)
            await write(event)

        return StreamCall(self._manager, messages, write_counted, acknowledge)

    async def _run_call(self, call: StreamCall) -> None:
        try:
            await call.run()
        finally:
            if call.handle is not None and not call.is_over:
                self._cancel_later(call.handle)

    async def open_stream(self, request: pb.OpenStreamRequest) -> pb.OpenStreamResponse:
        """``OpenStream``"""
        options = replace(requests.open_options(request.open), is_resumable=True)
        handle = await self._manager.open(options)
        return pb.OpenStreamResponse(stream_id=handle.stream_id, is_resumable=handle.is_resumable)

    async def append_segment(self, request: pb.AppendSegmentRequest) -> pb.Acknowledged:
        """``AppendSegment``"""
        handle = self._manager.get(request.stream_id)
        seq = request.seq if request.HasField("seq") else None
        with refusals_noted(handle, seq):
            segment = requests.segment(request.segment, self._vocab_size)
            return replies.acknowledged(await handle.append(segment, seq))

    async def update_context(self, request: pb.UpdateContextRequest) -> pb.Acknowledged:
        """``UpdateContext``"""
        handle = self._manager.get(request.stream_id)
        seq = request.seq if request.HasField("seq") else None
        with refusals_noted(handle, seq):
            segment = requests.segment(request.segment, self._vocab_size)
            return replies.acknowledged(await handle.update(segment, seq))

    async def commit_stream(self, request: pb.CommitStreamRequest, writer: EventWriter) -> None:
        """``CommitStream``"""
        handle = self._manager.get(request.stream_id)
        seq = request.seq if request.HasField("seq") else None
        with refusals_noted(handle, seq):
            options = requests.commit_options(request.commit, self._vocab_size)
            try:
                await handle.commit(options, seq)
            except asyncio.CancelledError:  # it may be applied all the same, and nobody listens
                self._cancel_later(handle)
                raise
        if handle.status().state is StreamState.OPEN:
            message = f"the commit's number {seq} leaves a gap or belongs to another operation"
            raise FailedPreconditionError(message)
        if request.HasField("next_token_index"):
            handle.resume(ResumePoint(next_token_index=request.next_token_index))
        await self._answer(handle, writer)

    async def cancel_stream(self, request: pb.CancelStreamRequest) -> pb.CancelStreamResponse:
        """``CancelStream``"""
        await self._manager.get(request.stream_id).cancel(request.reason or "asked by the client")
        return pb.CancelStreamResponse()

    async def get_stream(self, request: pb.GetStreamRequest) -> pb.GetStreamResponse:
        """``GetStream``"""
        return replies.stream_status(self._manager.get(request.stream_id).status())

    async def generate(self, request: pb.GenerateRequest, writer: EventWriter) -> None:
        """``Generate``"""
        opening, commit = requests.generate_options(request, self._vocab_size)
        handle = await self._manager.open(opening)
        try:
            await handle.commit(commit)
        except BaseException:  # nobody else knows of this stream
            self._cancel_later(handle)
            raise
        await self._answer(handle, writer)

    async def server_info(self, request: pb.ServerInfoRequest) -> pb.ServerInfoResponse:
        """``ServerInfo``"""
        return replies.cluster_info(self._manager.info())

    async def flush_caches(self, request: pb.FlushCachesRequest) -> pb.FlushCachesResponse:
        """``FlushCaches``"""
        flushed = await self._manager.flush_caches(requests.server_timeout_s(request))
        return pb.FlushCachesResponse(flushed={str(name): done for name, done in flushed.items()})

    async def set_policy(self, request: pb.SetPolicyRequest) -> pb.SetPolicyResponse:
        """``SetPolicy``"""
        outcomes = await self._manager.set_policy(*scheduling.policy_wish(request))
        return scheduling.policy_results(outcomes)

    async def describe_streams(
        self, request: pb.DescribeStreamsRequest
    ) -> pb.DescribeStreamsResponse:
        """``DescribeStreams``"""
        stream_id = request.stream_id if request.HasField("stream_id") else None
        timeout_s = requests.server_timeout_s(request)
        described = await self._manager.describe_streams(stream_id, timeout_s)
        return scheduling.streams_described(described)

    async def drain_server(self, request: pb.DrainServerRequest) -> pb.Server:
        """``DrainServer``"""
        wish = drain_wish(request)
        info = await self._manager.drain_server(wish.server_id, wish.answers_s, force=wish.force)
        return replies.server_info(info)

    async def resume_server(self, request: pb.ResumeServerRequest) -> pb.Server:
        """``ResumeServer``"""
        return replies.server_info(await self._manager.resume_server(server_id_of(request)))

    async def close(self) -> None:
        """Wait for the cancellations that are under way."""
        await asyncio.gather(*self._cancellations)

    async def _answer(self, handle: StreamHandle, writer: EventWriter) -> None:
        num_resumptions = handle.num_resumptions
        try:
            async for event in handle.events():
                if not isinstance(event, Acknowledged):
                    await writer.write(replies.stream_event(event, handle.stream_id))
        except StreamError:  # the stream is over, or another call took it over
            raise
        except BaseException:
            if handle.num_resumptions == num_resumptions:  # else it is another call's by now
                self._cancel_later(handle)
            raise

    def _cancel_later(self, handle: StreamHandle) -> None:
        """In a task of its own: the caller is being cancelled and may be so again."""
        task = asyncio.create_task(_cancel(handle))
        self._cancellations.add(task)
        task.add_done_callback(self._cancellations.discard)


def _take_request() -> None:
    """A further stream of a call counts as a request of its caller's."""
    account = CALLER.get()
    if account is not None:
        account.take_request()


async def _cancel(handle: StreamHandle) -> None:
    try:
        await handle.cancel(CLIENT_GONE)
    except StreamError as error:
        stream_id = handle.stream_id
        log_event(logger, "cancel_failed", stream_id=stream_id, level=logging.WARNING, error=error)
