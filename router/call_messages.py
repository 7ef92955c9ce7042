"""What client and router say to each other in a ``stream_call``, whatever carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from router.interface import (
    CommitOptions,
    OpenOptions,
    Resumed,
    ResumePoint,
    Segment,
    StreamEvent,
)
from streamfill.errors import StreamError


@dataclass(frozen=True)
class Open:
    """Open the stream. ``read`` raises ``InvalidArgumentError``, as in the classes below."""

    read: Callable[[], OpenOptions]


@dataclass(frozen=True)
class Resume:
    """Go on with a stream that exists. ``read`` returns its id too."""

    read: Callable[[], tuple[int, ResumePoint]]


@dataclass(frozen=True)
class Append:
    """Put a segment behind the context."""

    read: Callable[[], Segment]


@dataclass(frozen=True)
class Update:
    """Replace the context."""

    read: Callable[[], Segment]


@dataclass(frozen=True)
class Commit:
    """The prompt is complete."""

    read: Callable[[], CommitOptions]


@dataclass(frozen=True)
class Cancel:
    """Give the stream up."""

    reason: str


@dataclass(frozen=True)
class Unreadable:
    """Something that is no message."""

    error: StreamError


Operation: TypeAlias = Open | Resume | Append | Update | Commit | Cancel | Unreadable


@dataclass(frozen=True)
class ClientMessage:
    """One message of the client."""

    seq: int | None
    """The client's number for it."""
    operation: Operation


@dataclass(frozen=True)
class Opened:
    """The stream is open."""

    stream_id: int
    is_resumable: bool = False
    """It outlives the router process."""
    resumed: Resumed | None = None
    """How far it is, when it existed before."""


@dataclass(frozen=True)
class Refused:
    """An operation changed nothing; the stream goes on."""

    seq: int
    """The operation's number, 0 if it had none."""
    error: StreamError


@dataclass(frozen=True)
class Failed:
    """The last event of a call that ends badly."""

    error: StreamError


CallEvent: TypeAlias = StreamEvent | Opened | Refused | Failed
