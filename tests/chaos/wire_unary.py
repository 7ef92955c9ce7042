"""Streams of the soak that live without a call, and those that are one ``Generate`` call."""

from __future__ import annotations

import asyncio
from typing import NoReturn, TypeAlias, assert_never

import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import from_rpc_error
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.stream.state import StreamState
from tests.chaos.history import Recorder, Source
from tests.chaos.wires import (
    Operation,
    RefusedError,
    StreamOverError,
    call_failed,
    end_of,
    take_down,
)

_POLL_S = 0.2

_Call: TypeAlias = (
    grpc.aio.UnaryStreamCall[pb.CommitStreamRequest, pb.StreamEvent]
    | grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.StreamEvent]
)


class UnaryWire:
    """Implements ``wires.Wire`` over ``OpenStream`` and what belongs to it."""

    def __init__(self, stub: StreamfillStub, recorder: Recorder) -> None:
        self._stub = stub
        self._recorder = recorder
        self._answer: _Call | None = None

    async def open(self, opening: pb.Open) -> None:
        try:
            reply = await self._stub.OpenStream(pb.OpenStreamRequest(open=opening))
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from error
        self._recorder.stream_id = reply.stream_id

    async def operate(self, operation: Operation, seq: int) -> pb.Acknowledged:
        stream_id = self._stream_id
        stub = self._stub
        try:
            match operation:
                case pb.Append(segment=segment):
                    append = pb.AppendSegmentRequest(stream_id=stream_id, seq=seq, segment=segment)
                    return await stub.AppendSegment(append)
                case pb.Update(segment=segment):
                    update = pb.UpdateContextRequest(stream_id=stream_id, seq=seq, segment=segment)
                    return await stub.UpdateContext(update)
                case pb.Commit():
                    commit = pb.CommitStreamRequest(stream_id=stream_id, seq=seq, commit=operation)
                    await stub.CommitStream(commit).read()
                    return pb.Acknowledged(seq=seq)
                case pb.Open():
                    raise AssertionError("there is no call to open a stream twice in")
                case _:
                    assert_never(operation)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from error

    async def repeat(self, operation: Operation, seq: int) -> pb.Acknowledged:
        return await self.operate(operation, seq)

    async def commit(self, commit: pb.Commit, seq: int) -> None:
        request = pb.CommitStreamRequest(stream_id=self._stream_id, seq=seq, commit=commit)
        self._answer = self._stub.CommitStream(request)

    async def read(self) -> bool:
        assert self._answer is not None
        return await read_answer(self._answer, self._recorder)

    async def cancel(self) -> None:
        try:
            await self._stub.CancelStream(pb.CancelStreamRequest(stream_id=self._stream_id))
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from error
        while self._answer is not None and await self.read():
            pass

    async def close_side(self) -> None:
        raise AssertionError("a stream without a call has no side")

    async def until_over(self) -> NoReturn:
        request = pb.GetStreamRequest(stream_id=self._stream_id)
        while True:
            try:
                state = StreamState((await self._stub.GetStream(request)).state)
            except grpc.aio.AioRpcError as error:
                raise self._failed(error) from error
            if state.is_terminal:
                self._recorder.ended(Source.STATUS, state)
                raise StreamOverError
            await asyncio.sleep(_POLL_S)

    def leave(self) -> None:
        if self._answer is not None:
            self._answer.cancel()

    @property
    def _stream_id(self) -> int:
        assert self._recorder.stream_id is not None
        return self._recorder.stream_id

    def _failed(self, error: grpc.aio.AioRpcError) -> Exception:
        translated = from_rpc_error(error)
        # What comes too late is refused, and does not keep anybody from reading the answer.
        if end_of(translated) in (None, StreamState.DONE):
            return RefusedError(translated)
        call_failed(self._recorder, error)
        return StreamOverError()


class OneShotWire:
    """A whole prompt at once. ``commit`` brings it; there is nothing else to do but to read."""

    def __init__(self, stub: StreamfillStub, recorder: Recorder, opening: pb.Open) -> None:
        self._stub = stub
        self._recorder = recorder
        self._opening = opening
        self._answer: _Call | None = None

    def start(self, commit: pb.Commit) -> None:
        """Send the prompt."""
        opening = self._opening
        self._answer = self._stub.Generate(
            pb.GenerateRequest(
                prompt=commit.final_segment,
                sampling=commit.sampling,
                priority=opening.priority,
                request_id=opening.request_id,
                deadline_s=opening.deadline_s if opening.HasField("deadline_s") else None,
            )
        )

    async def read(self) -> bool:
        """As ``wires.Wire.read``."""
        assert self._answer is not None
        return await read_answer(self._answer, self._recorder)

    def leave(self) -> None:
        """As ``wires.Wire.leave``."""
        if self._answer is not None:
            self._answer.cancel()


async def read_answer(call: _Call, recorder: Recorder) -> bool:
    """The next event of an answer that has a call of its own; False after its end."""
    try:
        event = await call.read()
    except grpc.aio.AioRpcError as error:
        translated = call_failed(recorder, error)
        if end_of(translated) is None:
            recorder.trouble(f"the answer's call failed: {translated}")
        raise StreamOverError from error
    if not isinstance(event, pb.StreamEvent):
        if not recorder.dones:
            recorder.trouble("the answer's call ended without Done and without an error")
            raise StreamOverError
        return False
    take_down(recorder, event)
    return True
