"""A stream of the soak that is one bidirectional call."""

from __future__ import annotations

import asyncio
from typing import NoReturn, assert_never

import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import from_error_event
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.errors import StreamError
from tests.chaos.history import Recorder
from tests.chaos.wires import (
    Operation,
    RefusedError,
    StreamOverError,
    call_failed,
    end_of,
    take_down,
)

_BROKEN_BY_A_WRITE = "Internal error from Core"
"""What gRPC's client makes of a call whose end arrives just while it writes: the true status, and
what was not read yet, are lost. How the stream ended is then known from its status and the log."""


class BidiWire:
    """Implements ``wires.Wire`` over ``Stream``."""

    def __init__(self, stub: StreamfillStub, recorder: Recorder) -> None:
        self._call = stub.Stream(None)
        self._recorder = recorder
        self._acknowledged = pb.Acknowledged()
        self._num_acknowledged = 0
        self._refusals: dict[int, StreamError] = {}
        self._told_end: StreamError | None = None

    async def open(self, opening: pb.Open) -> None:
        await self._write(pb.StreamRequest(open=opening))
        while self._recorder.stream_id is None:
            await self._next()

    async def operate(self, operation: Operation, seq: int) -> pb.Acknowledged:
        await self._write(_request(operation, seq))
        while True:
            if seq in self._refusals:
                raise RefusedError(self._refusals.pop(seq))
            if self._acknowledged.seq >= seq:
                return self._acknowledged
            await self._next()

    async def repeat(self, operation: Operation, seq: int) -> pb.Acknowledged:
        before = self._num_acknowledged
        await self._write(_request(operation, seq))
        while self._num_acknowledged == before:
            if seq in self._refusals:
                raise RefusedError(self._refusals.pop(seq))
            await self._next()
        return self._acknowledged

    async def commit(self, commit: pb.Commit, seq: int) -> None:
        await self._write(_request(commit, seq))

    async def read(self) -> bool:
        try:
            await self._next()
        except StreamOverError:
            if not self._recorder.dones:
                raise
            return False
        for seq, error in self._refusals.items():
            self._recorder.trouble(f"operation {seq} was refused: {error}")
        self._refusals.clear()
        return True

    async def cancel(self) -> None:
        await self._write(pb.StreamRequest(cancel=pb.Cancel(reason="by the soak")))
        await self.until_over()

    async def close_side(self) -> None:
        await self._call.done_writing()
        await self.until_over()

    async def until_over(self) -> NoReturn:
        while True:
            await self._next()

    def leave(self) -> None:
        self._call.cancel()

    async def _write(self, request: pb.StreamRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self.until_over()  # what ended it is still to be read

    async def _next(self) -> None:
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as error:
            translated = call_failed(self._recorder, error, self._told_end)
            if error.details() == _BROKEN_BY_A_WRITE and self._told_end is None:
                self._recorder.lost_status = True
                self._recorder.note("gRPC lost the status of the call")
            elif end_of(translated) is None:
                self._recorder.trouble(f"the call failed: {translated}")
            raise StreamOverError from error
        if not isinstance(event, pb.StreamEvent):
            if not self._recorder.dones:
                self._recorder.trouble("the call ended without Done and without an error")
            raise StreamOverError
        match event.WhichOneof("event"):
            case "opened":
                self._recorder.stream_id = event.opened.stream_id
            case "acknowledged":
                self._acknowledged = event.acknowledged
                self._num_acknowledged += 1
            case "error":
                error_seen = from_error_event(event.error)
                # The stream ended before the operation came; the call says so next.
                if end_of(error_seen) is None:
                    self._refusals[event.error.seq] = error_seen
            case "failed":
                self._told_end = from_error_event(event.failed)
            case _:
                take_down(self._recorder, event)


def _request(operation: Operation, seq: int) -> pb.StreamRequest:
    match operation:
        case pb.Open():
            return pb.StreamRequest(seq=seq, open=operation)
        case pb.Append():
            return pb.StreamRequest(seq=seq, append=operation)
        case pb.Update():
            return pb.StreamRequest(seq=seq, update=operation)
        case pb.Commit():
            return pb.StreamRequest(seq=seq, commit=operation)
        case _:
            assert_never(operation)
