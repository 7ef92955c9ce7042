"""Names of the whole blocks of a prompt, as servers and router say to each other what is cached.

A *block* is a fixed number of tokens from the beginning of a prompt on, whatever the page size. Its
*key* is a digest of the namespace and of all tokens up to the block's end, so equal keys mean equal
prefixes, and a prompt's cached prefix is found by its keys alone::

    namespace ─▶ key of tokens [0, n) ─▶ key of tokens [0, 2n) ─▶ …

Prompts of different namespaces have no key in common, whatever their tokens are.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TypeAlias

from streamfill.errors import ProtocolError
from streamfill.messages.codec import pack_ids

BlockKey: TypeAlias = int
"""Unsigned, 64 bits. Two different prefixes have the same one by chance only; what follows then is
a worse choice of a server, and nothing else."""

_KEY_BYTES = 8
_TOKEN_BYTES = 4


def block_keys(
    token_ids: Sequence[int],
    block_tokens: int,
    namespace: str = "",
    *,
    after: BlockKey | None = None,
) -> list[BlockKey]:
    """Keys of all whole blocks of ``token_ids``; what is left over has none.

    Args:
        after: key of the block that ends where ``token_ids`` begin. None: they begin the prompt.
    """
    data = memoryview(pack_ids(token_ids))
    block_bytes = block_tokens * _TOKEN_BYTES
    if after is None:
        previous = blake2b(namespace.encode(), digest_size=_KEY_BYTES).digest()
    else:
        previous = after.to_bytes(_KEY_BYTES, "little")
    keys: list[BlockKey] = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        block = data[start : start + block_bytes]
        previous = blake2b(block, key=previous, digest_size=_KEY_BYTES).digest()
        keys.append(int.from_bytes(previous, "little"))
    return keys


class PrefixChain:
    """Keys of a prompt that grows and changes; only what is new is computed."""

    __slots__ = ("_block_tokens", "_namespace", "keys")

    def __init__(self, block_tokens: int, namespace: str = "") -> None:
        self._block_tokens = block_tokens
        self._namespace = namespace
        self.keys: list[BlockKey] = []
        """Of all whole blocks."""

    def splice(self, keep_tokens: int, token_ids: Sequence[int]) -> list[BlockKey]:
        """The prompt is ``token_ids`` now, whose first ``keep_tokens`` it had before. Returns the
        keys that are new."""
        del self.keys[keep_tokens // self._block_tokens :]
        fresh = block_keys(
            token_ids[len(self.keys) * self._block_tokens :],
            self._block_tokens,
            self._namespace,
            after=self.keys[-1] if self.keys else None,
        )
        self.keys += fresh
        return fresh


def pack_keys(keys: Iterable[BlockKey]) -> bytes:
    """Keys as little-endian 64-bit integers, eight bytes each."""
    packed = array("Q", keys)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_keys(data: bytes) -> array[int]:
    """The keys that ``pack_keys`` wrote, as ``array('Q')``.

    Raises:
        ProtocolError: the length is not a multiple of eight bytes.
    """
    if len(data) % _KEY_BYTES:
        raise ProtocolError(f"block keys of {len(data)} bytes are not whole 64-bit integers")
    keys = array("Q")
    keys.frombytes(data)
    if sys.byteorder == "big":
        keys.byteswap()
    return keys
