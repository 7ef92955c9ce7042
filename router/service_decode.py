"""Reading requests off the wire so that a bad one is answered instead of breaking its call.

gRPC answers bytes that are no message with INTERNAL and no reason. The commonest cause is a
``string`` that is not UTF-8, so it is searched for and named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from streamfill.errors import InvalidArgumentError

M = TypeVar("M", bound=Message)

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True)
class Undecodable(Generic[M]):
    """A request that is no proper message."""

    error: InvalidArgumentError
    """What the client is told."""
    rest: M
    """The message with its bad text blanked out; empty when it cannot be read at all."""


def decoder(kind: type[M]) -> Callable[[bytes], M | Undecodable[M]]:
    """A request deserializer for gRPC that does not raise."""

    def decode(data: bytes) -> M | Undecodable[M]:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _explain(kind, data)

    return decode


def not_utf8(name: str, error: UnicodeDecodeError) -> InvalidArgumentError:
    """What a client is told about text that is not UTF-8."""
    byte = error.object[error.start]
    return InvalidArgumentError(
        f"{name} is not UTF-8: byte 0x{byte:02x} at offset {error.start} ({error.reason})",
        details={"field": name, "offset_bytes": error.start, "byte": f"0x{byte:02x}"},
    )


@dataclass(frozen=True)
class _BadText:
    """A ``string`` field that is not UTF-8."""

    path: str
    start: int
    """Offset of its content in the message."""
    end: int
    error: UnicodeDecodeError


def _explain(kind: type[M], data: bytes) -> Undecodable[M]:
    first: _BadText | None = None
    while True:
        try:
            bad = _find_bad_text(cast(Descriptor, kind.DESCRIPTOR), data, 0, len(data), "")
            if bad is None:
                rest = kind.FromString(data)
                break
        except (DecodeError, IndexError):
            message = f"{len(data)} bytes that are no {kind.DESCRIPTOR.full_name}"
            return Undecodable(InvalidArgumentError(message), kind())
        first = first or bad
        data = data[: bad.start] + b" " * (bad.end - bad.start) + data[bad.end :]
    if first is None:
        return Undecodable(InvalidArgumentError("the message cannot be read"), rest)
    return Undecodable(not_utf8(first.path, first.error), rest)


def _find_bad_text(
    kind: Descriptor, data: bytes, position: int, end: int, prefix: str
) -> _BadText | None:
    """The first text of the message in ``data[position:end]`` that is not UTF-8.

    The wire format is described at https://protobuf.dev/programming-guides/encoding/.

    Raises:
        IndexError: the bytes are no message.
    """
    while position < end:
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type in _FIXED_BYTES:
            position += _FIXED_BYTES[wire_type]
        elif wire_type == _LENGTH_DELIMITED:
            length, position = _varint(data, position)
            content_end = position + length
            if content_end > end:
                raise IndexError("a field is longer than its message")
            bad = _check_field(
                kind.fields_by_number.get(number), data, position, content_end, prefix
            )
            if bad is not None:
                return bad
            position = content_end
        else:
            raise IndexError(f"wire type {wire_type}")
    return None


def _check_field(
    field: FieldDescriptor | None, data: bytes, start: int, end: int, prefix: str
) -> _BadText | None:
    if field is None:
        return None
    path = f"{prefix}{field.name}"
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            data[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            return _BadText(path, start, end, error)
    elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
        return _find_bad_text(field.message_type, data, start, end, f"{path}.")
    return None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at ``position`` and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError("a number is longer than 10 bytes")
