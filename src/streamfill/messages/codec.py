"""Frames to messages and back. A frame is one msgpack map with a ``type`` tag.

A frame that is too large or does not decode raises ``ProtocolError``; the caller counts and
logs it, answers where there is a sender, and goes on.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from streamfill.errors import ProtocolError

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""A million token ids take 4 MiB; 32 MiB leaves room for eight and stops a hostile length before it
is parsed."""

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


class FrameDecoder(Generic[M]):
    """Decoder of one socket: frames of the union it was made for, nothing else."""

    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)

    def decode(self, frame: bytes | memoryview) -> M:
        """The message in ``frame``.

        Raises:
            ProtocolError: the frame is oversized, truncated, or no message of this union.
        """
        if len(frame) > MAX_FRAME_BYTES:
            raise ProtocolError(
                f"frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}"
            )
        try:
            return self._decoder.decode(frame)
        except msgspec.MsgspecError as error:
            raise ProtocolError(
                f"frame of {len(frame)} bytes is no valid message: {error}"
            ) from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"frame of {len(frame)} bytes is malformed: {error}") from error


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32, four bytes each.

    Raises:
        OverflowError: an id does not fit 32 bits.
    """
    packed = (
        token_ids
        if isinstance(token_ids, array) and token_ids.typecode == "i"
        else array("i", token_ids)
    )
    if sys.byteorder == "big":
        packed = array("i", packed)
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> array[int]:
    """The token ids that ``pack_ids`` wrote, as ``array('i')``.

    Raises:
        ProtocolError: the length is not a multiple of four bytes.
    """
    if len(data) % 4:
        raise ProtocolError(f"token ids of {len(data)} bytes are not whole 32-bit integers")
    ids = array("i")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
