"""Reading requests off the wire so that a bad one is answered instead of breaking its call.

gRPC answers bytes that are no message with INTERNAL and no reason. The commonest cause is a
``string`` that is not UTF-8, so it is searched for and named: in one pass, and only so far, since
the router's loop stands still meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from streamfill.errors import InvalidArgumentError

M = TypeVar("M", bound=Message)

MAX_SEARCHED_FIELDS = 20_000
"""Some 30 ms. A message with more is refused without a place; a real one has a few dozen, token ids
being packed into one."""

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
    error: UnicodeDecodeError


class _TooManyFieldsError(Exception):
    """The search was given up."""


def _explain(kind: type[M], data: bytes) -> Undecodable[M]:
    search = _Search(data)
    try:
        search.look_through(cast(Descriptor, kind.DESCRIPTOR), 0, len(data), "")
        rest = kind.FromString(bytes(search.mended))
    except (DecodeError, IndexError):
        message = f"{len(data)} bytes that are no {kind.DESCRIPTOR.full_name}"
        return Undecodable(InvalidArgumentError(message), kind())
    except _TooManyFieldsError:
        message = (
            f"{len(data)} bytes that are no {kind.DESCRIPTOR.full_name}, or in which a text is not "
            f"UTF-8; the first {MAX_SEARCHED_FIELDS} fields were looked at"
        )
        return Undecodable(InvalidArgumentError(message), kind())
    if search.first is None:
        return Undecodable(InvalidArgumentError("the message cannot be read"), rest)
    return Undecodable(not_utf8(search.first.path, search.first.error), rest)


class _Search:
    """Looks for texts that are not UTF-8, and blanks them out.

    The wire format is described at https://protobuf.dev/programming-guides/encoding/.
    """

    def __init__(self, data: bytes) -> None:
        self.mended = bytearray(data)
        self.first: _BadText | None = None
        self._data = data
        self._num_fields = 0

    def look_through(self, kind: Descriptor, position: int, end: int, prefix: str) -> None:
        """The message in ``data[position:end]``.

        Raises:
            IndexError: the bytes are no message.
            _TooManyFieldsError: there are more fields than are looked at.
        """
        data = self._data
        while position < end:
            self._num_fields += 1
            if self._num_fields > MAX_SEARCHED_FIELDS:
                raise _TooManyFieldsError
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
                field = kind.fields_by_number.get(number)
                if field is not None:
                    self._check(field, position, content_end, prefix)
                position = content_end
            else:
                raise IndexError(f"wire type {wire_type}")

    def _check(self, field: FieldDescriptor, start: int, end: int, prefix: str) -> None:
        path = f"{prefix}{field.name}"
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                self._data[start:end].decode("utf-8")
            except UnicodeDecodeError as error:
                self.first = self.first or _BadText(path, error)
                self.mended[start:end] = b" " * (end - start)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            self.look_through(field.message_type, start, end, f"{path}.")


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
