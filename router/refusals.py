"""What the router does not do for somebody who asks, by why; counted by each of its services."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from streamfill.errors import ErrorCode, StreamError


class Api(enum.Enum):
    """By which it was asked."""

    GRPC = "grpc"
    HTTP = "http"
    WEBSOCKET = "websocket"


class Refusal(enum.Enum):
    """Why not."""

    UNAUTHENTICATED = "unauthenticated"
    """No API key, or none that is known."""
    FORBIDDEN = "forbidden"
    """This key, or this web page, may not."""
    LIMITED = "limited"
    """A limit of the key or of the cluster is reached."""
    TOO_LARGE = "too_large"
    """More bytes than are read."""
    MALFORMED = "malformed"
    """A value that can never be accepted."""
    TOO_SLOW = "too_slow"
    """It did not come to its end in time, or nobody touched it for too long."""


Note = Callable[[Api, Refusal], None]
"""Counts one. Called in the router's loop."""

_BY_CODE: Final[Mapping[ErrorCode, Refusal]] = MappingProxyType(
    {
        ErrorCode.UNAUTHENTICATED: Refusal.UNAUTHENTICATED,
        ErrorCode.PERMISSION_DENIED: Refusal.FORBIDDEN,
        ErrorCode.RESOURCE_EXHAUSTED: Refusal.LIMITED,
        ErrorCode.INVALID_ARGUMENT: Refusal.MALFORMED,
        ErrorCode.OUT_OF_RANGE: Refusal.MALFORMED,
        ErrorCode.ABORTED: Refusal.TOO_SLOW,
    }
)
_BY_STATUS: Final[Mapping[int, Refusal]] = MappingProxyType(
    {
        400: Refusal.MALFORMED,
        401: Refusal.UNAUTHENTICATED,
        403: Refusal.FORBIDDEN,
        408: Refusal.TOO_SLOW,
        413: Refusal.TOO_LARGE,
        429: Refusal.LIMITED,
    }
)
"""HTTP's."""


def not_counted(api: Api, refusal: Refusal) -> None:
    """Where there is nobody to count."""


def note_error(note: Note, api: Api, error: StreamError) -> None:
    """Count what an operation ended with, if it was refused."""
    if (refusal := _BY_CODE.get(error.code)) is not None:
        note(api, refusal)


def note_status(note: Note, api: Api, status: int) -> None:
    """Count what a request was answered with, if it was refused."""
    if (refusal := _BY_STATUS.get(status)) is not None:
        note(api, refusal)
