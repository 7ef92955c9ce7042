"""The printable alphabet in which byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`).

Bytes that are printable in Latin-1 stand for themselves; the 68 others are numbered from U+0100.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_SELF = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _SELF)

CHAR_OF_BYTE: Mapping[int, str] = MappingProxyType(
    {byte: chr(byte) for byte in _SELF} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
)
BYTE_OF_CHAR: Mapping[str, int] = MappingProxyType({c: b for b, c in CHAR_OF_BYTE.items()})


def bytes_of(token: str) -> bytes:
    """The bytes that a token stands for; a text outside the alphabet stands for its own UTF-8."""
    if all(char in BYTE_OF_CHAR for char in token):
        return bytes(BYTE_OF_CHAR[char] for char in token)
    return token.encode("utf-8")
