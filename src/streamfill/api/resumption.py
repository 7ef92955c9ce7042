"""How a stream finds its router again that vanished: one that was restarted and kept a log.

A call that broke without a word of the router is looked into for a bounded time. Whatever the
router says itself ends the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, Protocol, TypeAlias, cast

import grpc
import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import DETAILS_KEY, from_error_event, from_rpc_error
from streamfill.errors import (
    CancelledStreamError,
    ErrorCode,
    InternalError,
    StreamError,
    StreamNotFoundError,
    UnavailableError,
)

RECONNECT_S: Final = 30.0
"""A router is back within seconds; a restarted one keeps streams without a client for a minute."""
PAUSE_S: Final = 0.1
"""Between two looks for the router. gRPC itself connects at most so often."""
_GONE: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
)
"""INTERNAL is what gRPC itself makes of a call that was just writing when its connection broke."""


class Call(Protocol):
    """What a stream needs of its call: one of gRPC's, or a lane of one that it shares."""

    def write(self, request: pb.StreamRequest) -> Coroutine[Any, Any, None]:
        """As of ``grpc.aio.StreamStreamCall``."""

    def read(self) -> Coroutine[Any, Any, object]:
        """The next event; anything else behind the last one."""

    def cancel(self) -> bool:
        """As of ``grpc.aio.StreamStreamCall``."""


OpenCall: TypeAlias = Callable[[], Call]


def is_gone(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call broke without a word of the router: what it says has details."""
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return error.code() in _GONE and all(key != DETAILS_KEY for key, _ in metadata)


def without_log(error: StreamError) -> StreamError:
    """The error of a stream whose router vanished, and that is in no log."""
    return StreamError.from_code(
        error.code,
        f"{error.message}; the router had no log of the stream (router.log), so it is lost",
        details=error.details,
    )


async def resume_call(
    open_call: OpenCall,
    resume: pb.Resume,
    *,
    reconnect_s: float,
    is_given_up: Callable[[], bool],
) -> tuple[Call, pb.Opened]:
    """A call that goes on with a stream, and how far it is.

    Args:
        open_call: for each try.
        resume: which stream, and from where.
        reconnect_s: how long to look for the router.
        is_given_up: asked in between; then nobody wants it any more.

    Raises:
        StreamError: the router says why it does not go on, or is not to be found.
    """
    end_s = time.monotonic() + reconnect_s
    while not is_given_up():
        call = open_call()
        try:
            async with asyncio.timeout(max(PAUSE_S, end_s - time.monotonic())):
                opened = await _opened(call, resume)
        except grpc.aio.AioRpcError as error:
            if not is_gone(error):
                raise _explained(from_rpc_error(error), resume) from error
            why = from_rpc_error(error).message
        except StreamError as error:
            raise _explained(error, resume) from error
        except TimeoutError:
            why = "it did not answer"
        except asyncio.CancelledError:
            call.cancel()  # a lane lives on when the task that reads from it is cancelled
            raise
        else:
            if not is_given_up():
                return call, opened
            call.cancel()
            break
        call.cancel()
        if time.monotonic() + PAUSE_S > end_s:
            raise UnavailableError(
                f"the router vanished and was not back within {reconnect_s:g} s, so stream "
                f"{resume.stream_id} cannot go on: {why}"
            )
        await asyncio.sleep(PAUSE_S)
    raise CancelledStreamError("this client gave the stream up")


async def _opened(call: Call, resume: pb.Resume) -> pb.Opened:
    with contextlib.suppress(asyncio.InvalidStateError):  # it is over already; reading tells why
        await call.write(pb.StreamRequest(resume=resume))
    event = await call.read()
    if isinstance(event, pb.StreamEvent):
        match event.WhichOneof("event"):
            case "opened":
                return event.opened
            case "failed":
                raise from_error_event(event.failed)
    raise InternalError("a call that was to go on with a stream began with something else")


def _explained(error: StreamError, resume: pb.Resume) -> StreamError:
    if error.code is not ErrorCode.NOT_FOUND:
        return error
    return StreamNotFoundError(
        f"the router was restarted and does not know stream {resume.stream_id} any more; it keeps "
        "streams beyond its end only with a log (router.log) that works, for a limited time"
    )
