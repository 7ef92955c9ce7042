"""Which KV blocks are in host memory. Plain Python: no torch, no copies.

A block is a fixed number of tokens, whole pages (``swap.block_tokens``). It is known by its *key*:
a digest of its namespace and of all tokens up to its end. Two streams of one namespace with the
same prefix have the same keys, so a shared block is kept once, and an updated context finds again
whatever it still has in common with the old one.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from streamfill.messages.common import SHARED_NAMESPACE

BlockKey = bytes


def block_keys(
    token_ids: array[int], block_tokens: int, namespace: str = SHARED_NAMESPACE
) -> list[BlockKey]:
    """Keys of all whole blocks of ``token_ids`` (type code ``q``), from the beginning of the
    prompt."""
    view = memoryview(token_ids).cast("B")
    block_bytes = block_tokens * token_ids.itemsize
    keys: list[BlockKey] = []
    previous = b""
    if namespace:
        previous = blake2b(namespace.encode(), digest_size=16, person=b"namespace").digest()
    for start in range(0, len(token_ids) // block_tokens * block_bytes, block_bytes):
        block = view[start : start + block_bytes]
        previous = blake2b(block, key=previous, digest_size=16).digest()
        keys.append(previous)
    return keys


class HostIndex:
    """Host blocks by key, the least recently used given up first.

    A prefix is of use without what follows, but not the other way round: blocks are touched from
    the last to the first, so that the end of a sequence goes before its beginning.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_dropped = 0
        """Blocks given up to make room."""
        self._free = list(range(num_blocks))
        """A heap: low numbers first, so that runs come together."""
        self._blocks: OrderedDict[BlockKey, int] = OrderedDict()
        self._demoted: set[BlockKey] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_demoted(self) -> int:
        """Blocks that nobody is expected to need."""
        return len(self._demoted)

    def num_present(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys`` are here without a gap, from the first one on."""
        blocks = self._blocks
        for number, key in enumerate(keys):
            if key not in blocks:
                return number
        return len(keys)

    def num_present_total(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys`` are here, with or without gaps."""
        return sum(key in self._blocks for key in keys)

    def find(self, keys: Sequence[BlockKey]) -> list[int]:
        """Host blocks of ``keys``, which are used now.

        Raises:
            KeyError: one is not here.
        """
        blocks = [self._blocks[key] for key in keys]
        self.touch(keys)
        return blocks

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """They are used now. Unknown ones are passed over."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)
                self._demoted.discard(key)

    def put(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, int]]:
        """Make room for those of ``keys`` that are not here, giving up others.

        Returns:
            (key, host block to be written) of each new one, in order. Where there is too little
            room for all, the last ones are left out.
        """
        here = [key for key in keys if key in self._blocks]
        self.touch(here)
        wanted = [key for key in dict.fromkeys(keys) if key not in self._blocks]
        room = self.num_blocks - len(here)
        wanted = wanted[: max(0, room)]
        for _ in range(len(wanted) - len(self._free)):
            key, block = self._blocks.popitem(last=False)
            self._demoted.discard(key)
            heapq.heappush(self._free, block)
            self.num_dropped += 1
        new = [(key, heapq.heappop(self._free)) for key in wanted]
        for key, block in reversed(new):
            self._blocks[key] = block
        return new

    def demote(self, keys: Sequence[BlockKey] | None) -> None:
        """Nobody is expected to need them: they are given up first, the last one before all. None:
        this holds for all blocks, whose order stays."""
        if keys is None:
            self._demoted.update(self._blocks)
            return
        for key in keys:
            if key in self._blocks:
                self._blocks.move_to_end(key, last=False)
                self._demoted.add(key)

    def clear(self) -> None:
        """Forget all."""
        self._blocks.clear()
        self._demoted.clear()
        self._free = list(range(self.num_blocks))
