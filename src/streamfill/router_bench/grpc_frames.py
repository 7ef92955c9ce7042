"""As much of HTTP/2 (RFC 9113) as a gRPC client needs that trusts its server. Pure: bytes only."""

from __future__ import annotations

import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8

ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4

HEAD_BYTES: Final = 9
PREFIX_BYTES: Final = 5
"""Of a gRPC message."""
MAX_FRAME_BYTES: Final = 16 * 1024
INITIAL_WINDOW_BYTES: Final = 65_535
LARGEST_WINDOW_BYTES: Final = 2**31 - 1

SETTING_PUSH: Final = 2
SETTING_WINDOW: Final = 4

_PREFIX = struct.Struct(">BI")
_SETTING = struct.Struct(">HI")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A frame, which must not be longer than ``MAX_FRAME_BYTES``."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big")
    return head + payload


def hello() -> bytes:
    """What a client says first. It takes whatever the server sends and never holds it back."""
    settings = _SETTING.pack(SETTING_PUSH, 0) + _SETTING.pack(SETTING_WINDOW, LARGEST_WINDOW_BYTES)
    more = (LARGEST_WINDOW_BYTES - INITIAL_WINDOW_BYTES).to_bytes(4, "big")
    return PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, more)


def call_headers(authority: str, path: str) -> bytes:
    """The headers of a gRPC call, in HPACK (RFC 7541) without its dynamic table, so that the bytes
    are the same for each call."""
    return b"".join(
        (
            b"\x83\x86",  # :method POST, :scheme http
            b"\x01" + _text(authority),
            b"\x04" + _text(path),
            b"\x0f\x10" + _text("application/grpc"),  # content-type
            b"\x00" + _text("te") + _text("trailers"),
        )
    )


def message(body: bytes) -> bytes:
    """A gRPC message as it stands in DATA frames: not compressed, its length, itself."""
    return _PREFIX.pack(0, len(body)) + body


def settings_of(payload: bytes) -> dict[int, int]:
    """The values of a SETTINGS frame by their number."""
    return dict(_SETTING.iter_unpack(payload))


def _text(value: str) -> bytes:
    raw = value.encode("ascii")
    if len(raw) > 126:
        raise ValueError(f"a header of {len(raw)} bytes needs a length of several bytes: {value}")
    return bytes((len(raw),)) + raw
