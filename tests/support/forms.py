"""The forms of the API, a call for each stream, one for many and unary calls, behind one interface,
down at the generated stubs: nothing is checked or corrected on the client's side.

A refusal raises the ``StreamError`` that a client would see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TypeVar

import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.lanes import Lanes
from streamfill.api.resumption import Call
from streamfill.api.status_details import from_error_event, from_rpc_error
from streamfill.api.streamfill_pb2_grpc import StreamfillStub

T = TypeVar("T")

REPLY_S = 20.0
"""Far more than any reply of a tiny model takes on a busy machine."""

APPEND = pb.STREAM_MODE_APPEND
UPDATE = pb.STREAM_MODE_UPDATE


def text(content: str) -> pb.Segment:
    """A segment of text."""
    return pb.Segment(text=content)


def ids(token_ids: list[int]) -> pb.Segment:
    """A segment of token ids."""
    return pb.Segment(token_ids=pb.TokenIds(ids=token_ids))


def greedy(max_tokens: int) -> pb.Sampling:
    """Always the most likely token, and exactly so many of them."""
    return pb.Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


class Form(Protocol):
    """A stream. Used inside ``async with``; each method raises ``StreamError``."""

    stream_id: int

    def __init__(self, stub: StreamfillStub, mode: pb.StreamMode = APPEND) -> None: ...

    async def __aenter__(self) -> Form: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    async def append(self, segment: pb.Segment, seq: int | None = None) -> pb.Acknowledged: ...

    async def update(self, segment: pb.Segment, seq: int | None = None) -> pb.Acknowledged: ...

    async def commit(self, sampling: pb.Sampling, final: pb.Segment | None = None) -> None:
        """Returns when the commit was accepted."""
        ...

    async def answer(self) -> list[int]:
        """Token ids of the whole answer."""
        ...

    async def all_computed(self) -> None:
        """Returns when no more progress of the prompt will be told unasked."""
        ...


class Bidi:
    """One ``Stream`` call. Its operations are numbered from 1 on unless the test says otherwise."""

    def __init__(self, stub: StreamfillStub, mode: pb.StreamMode = APPEND) -> None:
        self._call = self._call_of(stub)
        self._mode = mode
        self._seq = 0
        self._token_ids: list[int] = []
        self._is_done = False
        self.stream_id = 0
        self.newest = pb.Acknowledged()

    def _call_of(self, stub: StreamfillStub) -> Call:
        return stub.Stream(None)

    async def __aenter__(self) -> Bidi:
        await self._write(pb.StreamRequest(open=pb.Open(mode=self._mode)))
        event = await self._read()
        assert event.WhichOneof("event") == "opened"
        self.stream_id = event.opened.stream_id
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call.cancel()

    async def append(self, segment: pb.Segment, seq: int | None = None) -> pb.Acknowledged:
        return await self.ask(pb.StreamRequest(append=pb.Append(segment=segment)), seq)

    async def update(self, segment: pb.Segment, seq: int | None = None) -> pb.Acknowledged:
        return await self.ask(pb.StreamRequest(update=pb.Update(segment=segment)), seq)

    async def commit(self, sampling: pb.Sampling, final: pb.Segment | None = None) -> None:
        commit = pb.Commit(sampling=sampling, final_segment=final)
        await self.ask(pb.StreamRequest(commit=commit))

    async def ask(self, request: pb.StreamRequest, seq: int | None = None) -> pb.Acknowledged:
        """Send an operation and wait for its answer. With a number of the test's own, wait for
        the next acknowledgement, whatever it acknowledges."""
        if seq is None:
            self._seq += 1
        request.seq = self._seq if seq is None else seq
        await self._write(request)
        while True:
            event = await self._read()
            match event.WhichOneof("event"):
                case "acknowledged" if seq is not None or event.acknowledged.seq >= self._seq:
                    return event.acknowledged
                case "error" if event.error.seq == request.seq:
                    raise from_error_event(event.error)

    async def answer(self) -> list[int]:
        while not self._is_done:
            event = await self._read()
            assert event.WhichOneof("event") != "error", event
        return self._token_ids

    async def all_computed(self) -> None:
        """Wait until the KV of all that was sent is there, and no more progress will be told."""
        while self.newest.num_computed_tokens < self.newest.num_received_tokens:
            await self._read()

    async def _write(self, request: pb.StreamRequest) -> None:
        with _translated():
            await asyncio.wait_for(self._call.write(request), REPLY_S)

    async def _read(self) -> pb.StreamEvent:
        with _translated():
            event = await asyncio.wait_for(self._call.read(), REPLY_S)
        assert isinstance(event, pb.StreamEvent), "the call is over"
        match event.WhichOneof("event"):
            case "acknowledged":
                self.newest = event.acknowledged
            case "token":
                assert event.token.index == len(self._token_ids), "a token twice or missing"
                self._token_ids.append(event.token.token_id)
            case "done":
                self._is_done = True
            case "failed":
                raise from_error_event(event.failed)
        return event


class Lane(Bidi):
    """A stream in a ``Streams`` call."""

    def _call_of(self, stub: StreamfillStub) -> Call:
        self._lanes = Lanes(stub)
        return self._lanes.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        await self._lanes.close()


class Unary:
    """A stream that lives without a call."""

    def __init__(self, stub: StreamfillStub, mode: pb.StreamMode = APPEND) -> None:
        self._stub = stub
        self._mode = mode
        self._seq = 0
        self._answer: grpc.aio.UnaryStreamCall[pb.CommitStreamRequest, pb.StreamEvent] | None = None
        self._first: pb.StreamEvent | None = None
        self.stream_id = 0

    async def __aenter__(self) -> Unary:
        request = pb.OpenStreamRequest(open=pb.Open(mode=self._mode))
        self.stream_id = (await reply_of(self._stub.OpenStream(request))).stream_id
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._answer is not None:
            self._answer.cancel()
        request = pb.CancelStreamRequest(stream_id=self.stream_id)
        await reply_of(self._stub.CancelStream(request))

    async def append(self, segment: pb.Segment, seq: int | None = None) -> pb.Acknowledged:
        request = pb.AppendSegmentRequest(
            stream_id=self.stream_id, seq=self._number(seq), segment=segment
        )
        return await reply_of(self._stub.AppendSegment(request))

    async def update(self, segment: pb.Segment, seq: int | None = None) -> pb.Acknowledged:
        request = pb.UpdateContextRequest(
            stream_id=self.stream_id, seq=self._number(seq), segment=segment
        )
        return await reply_of(self._stub.UpdateContext(request))

    async def commit(self, sampling: pb.Sampling, final: pb.Segment | None = None) -> None:
        commit = pb.Commit(sampling=sampling, final_segment=final)
        request = pb.CommitStreamRequest(
            stream_id=self.stream_id, seq=self._number(None), commit=commit
        )
        call = self._stub.CommitStream(request)
        with _translated():
            event = await asyncio.wait_for(call.read(), REPLY_S)
        assert isinstance(event, pb.StreamEvent), "the call is over"
        self._answer, self._first = call, event

    async def answer(self) -> list[int]:
        assert self._answer is not None
        assert self._first is not None
        token_ids: list[int] = []
        event: object = self._first
        while isinstance(event, pb.StreamEvent):
            if event.WhichOneof("event") == "token":
                assert event.token.index == len(token_ids), "a token twice or missing"
                token_ids.append(event.token.token_id)
            with _translated():
                event = await asyncio.wait_for(self._answer.read(), REPLY_S)
        return token_ids

    async def all_computed(self) -> None:
        """Nothing is told in this form unless it is asked for."""

    def _number(self, seq: int | None) -> int:
        if seq is not None:
            return seq
        self._seq += 1
        return self._seq


async def reply_of(call: Awaitable[T]) -> T:
    """The reply of a unary call. Raises ``StreamError``."""

    async def reply() -> T:
        return await call

    with _translated():
        return await asyncio.wait_for(reply(), REPLY_S)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
