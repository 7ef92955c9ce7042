"""The one border between gRPC's errors and ``streamfill.errors``, for both sides of the wire.

A failed call carries a google.rpc.Status with one google.rpc.ErrorInfo in its trailing metadata, as
the rich error model of gRPC has it; inside a ``Stream`` call the same facts travel as ``Error``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import ErrorCode, StreamError

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "streamfill"
_INFO_URL = "type.googleapis.com/google.rpc.ErrorInfo"

MAX_MESSAGE_CHARS = 2048
"""HTTP/2 headers are limited to 8 KiB by most peers, and the message is in them twice."""

_BROKEN_BY_A_WRITE = "Internal error from Core"
"""How gRPC's client for asyncio ends such a call; in its ``cygrpc``."""


def status_code(code: ErrorCode) -> grpc.StatusCode:
    """gRPC's own enum has the same names."""
    return grpc.StatusCode[code.value]


def trailing_metadata(error: StreamError) -> tuple[tuple[str, bytes], ...]:
    """What a failing call sends besides code and message."""
    info = pb.RpcErrorInfo(reason=str(error.code), domain=DOMAIN, metadata=_details(error))
    status = pb.RpcStatus(
        code=pb.Code.Value(f"CODE_{error.code}"),
        message=short_message(error),
        details=[Any(type_url=_INFO_URL, value=info.SerializeToString())],
    )
    return ((DETAILS_KEY, status.SerializeToString()),)


def short_message(error: StreamError) -> str:
    """The error's message, cut to what fits into headers."""
    text = error.message
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[: MAX_MESSAGE_CHARS - 1]}…"


def error_event(error: StreamError, seq: int) -> pb.StreamEvent:
    """The answer to an operation that was refused inside a call."""
    return pb.StreamEvent(error=told(error, seq))


def failed_event(error: StreamError) -> pb.StreamEvent:
    """The last event of a call that ends badly."""
    return pb.StreamEvent(failed=told(error, 0))


def told(error: StreamError, seq: int) -> pb.Error:
    """An error inside a call, of the operation with this number."""
    return pb.Error(
        seq=seq,
        code=pb.Code.Name(pb.Code.Value(f"CODE_{error.code}")),
        message=error.message,
        details=_details(error),
    )


def from_error_event(event: pb.Error) -> StreamError:
    """The error that ``error_event`` or ``failed_event`` was made of."""
    return StreamError.from_code(
        _error_code(event.code), event.message, details=dict(event.details)
    )


def from_rpc_error(error: grpc.aio.AioRpcError) -> StreamError:
    """The error of a call that failed. Raise it ``from`` the gRPC error.

    A failure of gRPC itself, such as no router listening, has no details. One of them is told as
    what it is: a call whose end comes just while it writes gets INTERNAL, whatever its end was.
    """
    code = ErrorCode(error.code().name)
    message = error.details() or "no message"
    if code is ErrorCode.INTERNAL and message == _BROKEN_BY_A_WRITE:
        code, message = ErrorCode.UNAVAILABLE, "the call broke while a message was written"
    details: dict[str, str] = {}
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            details.update(_info_of(value))
    return StreamError.from_code(code, message, details=details)


def _info_of(data: bytes) -> dict[str, str]:
    """The fields of our ErrorInfo in a google.rpc.Status; those of others are not ours to read."""
    try:
        for detail in pb.RpcStatus.FromString(data).details:
            if detail.type_url == _INFO_URL:
                return dict(pb.RpcErrorInfo.FromString(detail.value).metadata)
    except DecodeError:
        return {"undecodable_status_details_bytes": str(len(data))}
    return {}


def _details(error: StreamError) -> dict[str, str]:
    return {key: str(value) for key, value in error.details.items()}


def _error_code(number: int) -> ErrorCode:
    try:
        return ErrorCode(pb.Code.Name(number).removeprefix("CODE_"))
    except ValueError:
        return ErrorCode.UNKNOWN
