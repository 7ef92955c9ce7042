"""Frames: messages survive them, and whatever else comes in is a ProtocolError."""

from __future__ import annotations

import enum
import types
from array import array
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.errors import ProtocolError
from streamfill.messages import control, router_to_server, server_to_router
from streamfill.messages.codec import (
    MAX_FRAME_BYTES,
    FrameDecoder,
    encode,
    pack_ids,
    unpack_ids,
)
from tests.unit.messages.samples import CONTROL, ROUTER_TO_SERVER, SERVER_TO_ROUTER

UNIONS: list[object] = [
    router_to_server.RouterToServer,
    server_to_router.ServerToRouter,
    control.ServerToController,
    control.ControllerToServer,
]
DECODERS: list[FrameDecoder[msgspec.Struct]] = [FrameDecoder(union) for union in UNIONS]
FRAMES = [encode(message) for message in (*ROUTER_TO_SERVER, *SERVER_TO_ROUTER, *CONTROL)]
MESSAGES = [message for union in UNIONS for message in get_args(union)]

_SCALARS: dict[object, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(),
    bytes: st.binary(),
    bool: st.booleans(),
    type(None): st.none(),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _bounded(*arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is dict:
        return st.dictionaries(*map(values_of, arguments), max_size=3)
    if origin is tuple:
        if arguments[-1] is not ...:
            return st.tuples(*map(values_of, arguments))
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    fields = msgspec.structs.fields(kind)
    return st.builds(kind, **{field.name: values_of(field.type) for field in fields})


def _bounded(kind: type, bound: msgspec.Meta) -> st.SearchStrategy[Any]:
    if kind is str:
        return st.text(max_size=bound.max_length)
    return st.floats(min_value=bound.gt, exclude_min=True, allow_nan=False)


def decode_all(frame: bytes) -> int:
    """How many of the decoders read ``frame``; anything but a ProtocolError comes out."""
    num_read = 0
    for decoder in DECODERS:
        try:
            decoder.decode(frame)
        except ProtocolError:
            continue
        num_read += 1
    return num_read


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_round_trip(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    """Any message survives the wire unchanged, in its own direction and in no other."""
    message = data.draw(values_of(kind))
    frame = encode(message)
    (union,) = [number for number, each in enumerate(UNIONS) if kind in get_args(each)]
    assert DECODERS[union].decode(frame) == message
    assert decode_all(frame) == 1


@given(st.binary(max_size=200))
def test_random_bytes_raise_protocol_errors_only(frame: bytes) -> None:
    """Random bytes are refused, never with another exception."""
    assert decode_all(frame) == 0


@given(st.sampled_from(FRAMES), st.data())
def test_truncated_frames_raise_protocol_errors_only(frame: bytes, data: st.DataObject) -> None:
    """A frame that ends early is refused at whatever byte it ends."""
    assert decode_all(frame[: data.draw(st.integers(0, len(frame) - 1))]) == 0


@given(st.sampled_from(FRAMES), st.binary(min_size=1, max_size=5))
def test_trailing_bytes_are_refused(frame: bytes, rest: bytes) -> None:
    """A frame is one message and nothing behind it."""
    assert decode_all(frame + rest) == 0


@settings(max_examples=300)
@given(st.sampled_from(FRAMES), st.data())
def test_damaged_frames_raise_protocol_errors_only(frame: bytes, data: st.DataObject) -> None:
    """A frame with wrong bytes in it is read as a message or refused, nothing else."""
    damaged = bytearray(frame)
    places = st.integers(0, len(frame) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    decode_all(bytes(damaged))


@pytest.mark.parametrize(
    "frame",
    [
        b"\x91" * 100_000,
        b"\x81\xa4type" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa4type\xa2\xff\xfe",
        encode(router_to_server.Malformed(reason="ab")).replace(b"ab", b"\xff\xfe"),
    ],
    ids=["deep lists", "deep maps", "huge list", "huge map", "huge bytes", "bad tag", "bad text"],
)
def test_hostile_frames_raise_protocol_errors_only(frame: bytes) -> None:
    """Deep nesting, lengths without content and broken UTF-8 are refused without harm."""
    assert decode_all(frame) == 0


def test_oversized_frame_is_refused_unread() -> None:
    """A frame over the limit is refused for its size, one of the limit for its content."""
    with pytest.raises(ProtocolError, match="over the limit"):
        DECODERS[0].decode(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(ProtocolError, match="no valid message"):
        DECODERS[0].decode(bytes(MAX_FRAME_BYTES))


@pytest.mark.parametrize("message", [*ROUTER_TO_SERVER, *SERVER_TO_ROUTER, *CONTROL], ids=type)
def test_unknown_and_missing_fields_are_refused(message: msgspec.Struct) -> None:
    """A message with a field too many, or with a required one missing, is no message."""
    fields: dict[str, object] = msgspec.msgpack.decode(encode(message))
    assert decode_all(msgspec.msgpack.encode({**fields, "surplus": 1})) == 0
    for field in msgspec.structs.fields(message):
        if field.required:
            rest = {key: value for key, value in fields.items() if key != field.name}
            assert decode_all(msgspec.msgpack.encode(rest)) == 0


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_round_trip(token_ids: list[int]) -> None:
    """Token ids take four bytes each, little-endian, and come back as they were."""
    packed = pack_ids(token_ids)
    assert packed == b"".join(each.to_bytes(4, "little", signed=True) for each in token_ids)
    assert unpack_ids(packed) == array("i", token_ids)
    assert pack_ids(array("i", token_ids)) == packed


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 5])
def test_broken_token_ids_are_refused(num_bytes: int) -> None:
    """Bytes that are not whole 32-bit integers are a ProtocolError."""
    with pytest.raises(ProtocolError, match=f"of {num_bytes} bytes"):
        unpack_ids(bytes(num_bytes))


def test_token_id_too_large() -> None:
    """An id over 32 bits cannot be packed."""
    with pytest.raises(OverflowError):
        pack_ids([2**31])
