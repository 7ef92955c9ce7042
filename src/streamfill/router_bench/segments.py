"""Requests of the load as bytes, made ahead. A segment says in its token ids when it was sent.

The time is the machine's monotonic clock in microseconds, the same for all processes, in digits of
eight bits, one per token id. So the fake server knows how long a segment was under way, without a
word between the two beside the router.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Final

from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import ConfigError
from streamfill.router_bench.grpc_frames import message

STAMP_TOKENS: Final = 6
_DIGIT_BITS: Final = 8
_DIGITS: Final = 1 << _DIGIT_BITS
_SHIFTS: Final = tuple(range(0, STAMP_TOKENS * _DIGIT_BITS, _DIGIT_BITS))
_WRAP_US: Final = 1 << (STAMP_TOKENS * _DIGIT_BITS)

SMALLEST_VOCABULARY: Final = _DIGITS


def now_us() -> int:
    """Of the machine's monotonic clock, in what a stamp can say: it wraps after nine years."""
    return time.monotonic_ns() // 1000 % _WRAP_US


def age_us(token_ids: Sequence[int]) -> int:
    """Microseconds since the segment with these ids was sent."""
    sent_us = sum(token_ids[place] << shift for place, shift in enumerate(_SHIFTS))
    return (now_us() - sent_us) % _WRAP_US


class TextMaker:
    """Segments of one text, as gRPC messages. Nothing in them says when they were sent."""

    def __init__(self, text: str) -> None:
        append = pb.StreamRequest(append=pb.Append(segment=pb.Segment(text=text)))
        self._rest = append.SerializeToString()

    def segment(self, seq: int) -> bytes:
        """The operation with this number."""
        return message(b"".join((b"\x08", _varint(seq), self._rest)))


class SegmentMaker:
    """Segments of so many token ids, as gRPC messages."""

    def __init__(self, num_tokens: int, vocab_size: int, seed: int = 0) -> None:
        """Raises:
        ConfigError: a time does not fit into a segment, or the vocabulary is too small for its
            digits.
        """
        if num_tokens <= STAMP_TOKENS:
            raise ConfigError("--segment-tokens", num_tokens, f"must be above {STAMP_TOKENS}")
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                "--model", f"{vocab_size} tokens", f"needs {SMALLEST_VOCABULARY} tokens or more"
            )
        self.num_tokens = num_tokens
        draw = random.Random(seed)
        rest = [draw.randrange(vocab_size) for _ in range(num_tokens - STAMP_TOKENS)]
        self._rest = b"".join(map(_varint, rest))
        ids = field(1, b"\0" * (STAMP_TOKENS * 2) + self._rest)
        append = field(3, field(1, field(3, ids)))
        self._before = append[: -(STAMP_TOKENS * 2 + len(self._rest))]

    def segment(self, seq: int) -> bytes:
        """The operation with this number, stamped with the present moment."""
        at_us = now_us()
        stamp = bytearray()
        for shift in _SHIFTS:
            digit = at_us >> shift & (_DIGITS - 1)
            stamp += bytes((digit & 0x7F | 0x80, digit >> 7))  # two bytes whatever the value
        return message(b"".join((b"\x08", _varint(seq), self._before, stamp, self._rest)))


def open_message(request_id: str) -> bytes:
    """Opens a stream in append mode."""
    request = pb.StreamRequest(open=pb.Open(mode=pb.STREAM_MODE_APPEND, request_id=request_id))
    return message(request.SerializeToString())


def commit_message(seq: int) -> bytes:
    """Asks for an answer of one token."""
    sampling = pb.Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    request = pb.StreamRequest(seq=seq, commit=pb.Commit(sampling=sampling))
    return message(request.SerializeToString())


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, by https://protobuf.dev/programming-guides/encoding/."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """A field that is a number."""
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
