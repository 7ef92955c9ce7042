"""The source of an answer that needs no stream: one server-streaming call."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import from_rpc_error
from streamfill.api.types import Result
from streamfill.errors import CancelledStreamError, InternalError

if TYPE_CHECKING:
    from streamfill.api.streamfill_pb2_grpc import StreamfillStub


class GenerateSource:
    """An ``AnswerSource`` over a ``Generate`` call. Made and read in one event loop.

    A task that is cancelled while it waits for a token cancels the call, as gRPC has it.
    """

    def __init__(self, stub: StreamfillStub, request: pb.GenerateRequest) -> None:
        self._stub = stub
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.StreamEvent] | None = None
        self._abandoned = False

    async def start(self) -> tuple[float, float]:
        sent_s = time.monotonic()
        self._call = self._stub.Generate(self._request)
        return sent_s, sent_s

    async def next_event(self) -> tuple[pb.Token | pb.Done, float]:
        if self._call is None:
            raise InternalError("the answer was read before its call was started")
        if self._abandoned:
            raise CancelledStreamError("this client gave the answer up")
        while True:
            try:
                event = await self._call.read()
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            except asyncio.CancelledError:
                self._abandoned = True
                raise
            arrival_s = time.monotonic()
            if not isinstance(event, pb.StreamEvent):
                raise InternalError("the call ended without the end of the answer")
            match event.WhichOneof("event"):
                case "token":
                    return event.token, arrival_s
                case "done":
                    return event.done, arrival_s
                case _:  # progress of the prompt, or an event of a later version
                    continue

    def finish(self, result: Result) -> None:
        """Nothing is waiting for it here."""

    def abandon(self) -> None:
        """The last reference may go in any thread, but only the loop's own may touch the call."""
        self._abandoned = True
        if self._call is not None and not self._call.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)
