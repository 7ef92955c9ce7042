"""A ``Stream`` call for tests, as a lane of a ``Streams`` call."""

from __future__ import annotations

import asyncio
from collections import deque

import grpc
import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from tests.unit.router.fake_manager import STEP_S


def request_of(lane: int, *requests: pb.StreamRequest) -> pb.StreamsRequest:
    """Messages of one stream."""
    return pb.StreamsRequest(
        requests=[pb.LaneRequest(lane=lane, request=request) for request in requests]
    )


class LaneCall:
    """The only stream of its call."""

    LANE = 7

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.shared = StreamfillStub(channel).Streams(None)
        self._events: deque[pb.StreamEvent] = deque()
        self._last: pb.StreamEvent | None = None
        self._hang_up: asyncio.Task[None] | None = None

    async def write(self, request: pb.StreamRequest) -> None:
        await self.shared.write(request_of(self.LANE, request))

    async def read(self) -> object:
        if self._is_over:
            return None
        while not self._events:
            reply = await self.shared.read()
            assert isinstance(reply, pb.StreamsReply), "the call ended before the stream"
            assert all(each.lane == self.LANE for each in reply.replies)
            self._events.extend(each.event for each in reply.replies)
        self._last = self._events.popleft()
        return self._last

    async def done_writing(self) -> None:
        await self.shared.done_writing()

    def cancel(self) -> bool:
        request = pb.StreamsRequest(requests=[pb.LaneRequest(lane=self.LANE, hang_up=pb.HangUp())])

        async def send() -> None:
            await self.shared.write(request)

        self._hang_up = asyncio.create_task(send())
        return True

    async def code(self) -> grpc.StatusCode:
        """Of the stream's end."""
        while not self._is_over:
            await asyncio.wait_for(self.read(), STEP_S)
        assert self._last is not None
        if self._last.HasField("done"):
            return grpc.StatusCode.OK
        return grpc.StatusCode[pb.Code.Name(self._last.failed.code).removeprefix("CODE_")]

    async def details(self) -> str:
        assert self._last is not None
        return self._last.failed.message

    @property
    def _is_over(self) -> bool:
        last = self._last
        return last is not None and last.WhichOneof("event") in ("done", "failed")
