"""The calls under one stream of the soak, down at the generated stubs, where anything can be said.

Whatever comes is taken down by the recorder. ``RefusedError``: an operation was refused, the stream
goes on.
``StreamOverError``: the stream has ended, and the recorder knows how.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import from_rpc_error
from streamfill.errors import ErrorCode, StreamError
from streamfill.stream.state import StreamState
from tests.chaos.history import STATE_OF_CODE, DoneSeen, Recorder, Source, Token

Operation: TypeAlias = pb.Open | pb.Append | pb.Update | pb.Commit


class StreamOverError(Exception):
    """Nothing more can be done with the stream."""


class RefusedError(Exception):
    """An operation was refused, the stream is unharmed.

    Attributes:
        code: why.
    """

    def __init__(self, error: StreamError) -> None:
        super().__init__(str(error))
        self.code: ErrorCode = error.code


class Wire(Protocol):
    """Used by one actor, in this order. Each method raises the two errors above. None has a limit
    of its own: the actor has one for a whole life."""

    async def open(self, opening: pb.Open) -> None:
        """Returns when the router has minted an id."""
        ...

    async def operate(self, operation: Operation, seq: int) -> pb.Acknowledged:
        """Returns when the operation, whose number is new, is acknowledged."""
        ...

    async def repeat(self, operation: Operation, seq: int) -> pb.Acknowledged:
        """As ``operate``, with a number that is not to be applied."""
        ...

    async def commit(self, commit: pb.Commit, seq: int) -> None:
        """Returns when the commit is sent."""
        ...

    async def read(self) -> bool:
        """Take the next event of the answer down; False after its end."""
        ...

    async def cancel(self) -> None:
        """Ask the router to end the stream."""
        ...

    async def close_side(self) -> None:
        """Say no more, and wait for the end of the call; only where there is one."""
        ...

    async def until_over(self) -> None:
        """Wait for the end that comes by itself. Always raises."""
        ...

    def leave(self) -> None:
        """Drop what is open, without a word. Idempotent."""
        ...


def take_down(recorder: Recorder, event: pb.StreamEvent) -> bool:
    """Record a token or the end of an answer; True: it was the end."""
    match event.WhichOneof("event"):
        case "token":
            token = Token(index=event.token.index, token_id=event.token.token_id)
            recorder.tokens.append(token)
        case "done":
            usage = event.done.usage
            recorder.dones.append(
                DoneSeen(
                    finish_reason=event.done.finish_reason,
                    num_prompt_tokens=usage.num_prompt_tokens,
                    num_output_tokens=usage.num_output_tokens,
                    num_recomputed_tokens=usage.num_recomputed_tokens,
                )
            )
            recorder.stream_id = event.done.metadata.stream_id
            recorder.ended(Source.DONE, StreamState.DONE)
            return True
    return False


def call_failed(
    recorder: Recorder, error: grpc.aio.AioRpcError, told: StreamError | None = None
) -> StreamError:
    """The error of a call, whose stream has ended if that is what it says; ``told`` is what its
    last event said."""
    translated = told or from_rpc_error(error)
    state = end_of(translated)
    if state is not None:
        recorder.ended(Source.ERROR, state)
        recorder.note(str(translated))
    return translated


def end_of(error: StreamError) -> StreamState | None:
    """How the stream ended, going by an error; None: it did not."""
    state = error.details.get("state")
    if isinstance(state, str) and StreamState(state).is_terminal:
        return StreamState(state)
    return STATE_OF_CODE.get(error.code)
