"""Several messages in one frame, on the links between the router and the servers.

A message alone is a frame as it is; more than one are a msgpack array of them. So what a process
says before anything else, its registration, is read by every version of the protocol.

What a frame costs, ZeroMQ's hand-over to its thread, a system call and the wake-up of a reader,
does not depend on what is in it. Under load many messages wait for each other, and share that.
"""

from __future__ import annotations

from typing import Annotated, Final, Generic, TypeVar

import msgspec

from streamfill.messages.codec import FrameDecoder

MAX_MESSAGES: Final = 256
"""Of one frame: a reader gets to its other work in between."""
MAX_BATCH_BYTES: Final = 256 * 1024
"""Nothing is put behind so many bytes, so a frame stays far below its limit unless one message
alone is larger."""

MAX_LOGGED_IDS: Final = 8

M = TypeVar("M")


class MessageBatch:
    """Encoded messages to one receiver, until they are sent."""

    __slots__ = ("_messages", "_num_bytes")

    def __init__(self) -> None:
        self._messages: list[bytes] = []
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: bytes) -> None:
        """Put one, as ``codec.encode`` gives it, behind the others. Not while the batch is full."""
        self._messages.append(message)
        self._num_bytes += len(message)

    def has_room_for(self, message: bytes) -> bool:
        """Whether it may be added. A batch with nothing in it has room for any message."""
        messages = self._messages
        return not messages or (
            len(messages) < MAX_MESSAGES and self._num_bytes + len(message) <= MAX_BATCH_BYTES
        )

    def take(self) -> bytes:
        """The frame of all of them, at least one; the batch is empty then."""
        messages = self._messages
        self._messages, self._num_bytes = [], 0
        if len(messages) == 1:
            return messages[0]
        return _array_head(len(messages)) + b"".join(messages)

    def clear(self) -> None:
        """Drop them."""
        self._messages, self._num_bytes = [], 0


class BatchDecoder(Generic[M]):
    """Decoder of one socket whose frames are batches."""

    def __init__(self, union: object) -> None:
        """Args:
        union: of the messages that may be in a frame.
        """
        bounds = msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)
        self._single: FrameDecoder[M] = FrameDecoder(union)
        self._several: FrameDecoder[list[M]] = FrameDecoder(Annotated[list[union], bounds])  # type: ignore[valid-type]

    def decode(self, frame: bytes) -> list[M]:
        """The messages in ``frame``, in order, at least one.

        Raises:
            ProtocolError: the frame is oversized or truncated, or anything in it is no message of
                the union.
        """
        if frame[:1] and _is_array(frame[0]):
            return self._several.decode(frame)
        return [self._single.decode(frame)]


def some_stream_ids(frame: bytes) -> list[int]:
    """Of which streams an encoded batch speaks, a few of them, for the log of one that is lost."""
    found = msgspec.msgpack.decode(frame)
    messages = found if isinstance(found, list) else [found]
    ids = {message["stream_id"] for message in messages if "stream_id" in message}
    return sorted(ids)[:MAX_LOGGED_IDS]


def _array_head(length: int) -> bytes:
    """How an array of so many values, at most 65,535, begins in msgpack."""
    return bytes((0x90 | length,)) if length < 16 else b"\xdc" + length.to_bytes(2, "big")


def _is_array(first: int) -> bool:
    """Whether a value that begins with this byte is an array, in msgpack."""
    return 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)
