"""Which KV blocks are in host memory. Plain Python: no torch, no copies.

A block is a fixed number of tokens, whole pages (``swap.block_tokens``). It is known by its *key*:
a digest of its namespace and of all tokens up to its end. Two streams of one namespace with the
same prefix have the same keys, so a shared block is kept once, and an updated context finds again
whatever it still has in common with the old one.
"""

from __future__ import annotations

import enum
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

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


STALE_POOLS: Final = 4
"""A copy that waits is given up for others once so many times as much as host memory holds was to
be put in since it was used."""


class _Use(enum.Enum):
    """What a copy is for."""

    NONE = enum.auto()
    """Nobody is expected to need it."""
    SPARE = enum.auto()
    """The KV is in the device pool too: the copy spares the next copy out."""
    WAITING = enum.auto()
    """The KV is nowhere else, and a stream will come back for it."""


class HostIndex:
    """Host blocks by key. For a new one the demoted are given up, then those whose KV the device
    pool has too, of each the least recently used first.

    One that a stream waits for is not given up for a new one: where more is taken in turn than host
    memory holds, that would lose each copy just before it is wanted, and nothing would ever be
    brought back. Only when it was not used for long, counted by what was to be put in since, it is
    taken for forgotten. (Not by time, so that all tensor-parallel ranks do the same.)

    A prefix is of use without what follows, but not the other way round: blocks are touched from
    the last to the first, so that the end of a sequence goes before its beginning.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_dropped = 0
        """Blocks given up to make room."""
        self._free = list(range(num_blocks))
        """A heap: low numbers first, so that runs come together."""
        self._blocks: dict[BlockKey, tuple[int, _Use]] = {}
        self._by_use: dict[_Use, OrderedDict[BlockKey, int]] = {use: OrderedDict() for use in _Use}
        """Each with `_num_wanted` at its last use."""
        self._num_wanted = 0
        """Blocks that were to be put in, so far."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_spare(self) -> int:
        """Blocks that hold nothing, or what is given up for any new one."""
        waiting = self._by_use[_Use.WAITING]
        return self.num_blocks - len(waiting)

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
        """Host blocks of ``keys``, whose KV comes back into the device pool now.

        Raises:
            KeyError: one is not here.
        """
        blocks = [self._blocks[key][0] for key in keys]
        self._use(keys, _Use.SPARE)
        return blocks

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """They will be used. Unknown ones are passed over."""
        self._use(keys, _Use.WAITING)

    def put(
        self, keys: Sequence[BlockKey], *, is_resident: bool = False
    ) -> list[tuple[BlockKey, int]]:
        """Make room for those of ``keys`` that are not here, giving up others.

        Args:
            is_resident: the KV stays in the device pool as well.

        Returns:
            (key, host block to be written) of each new one, in order. Where there is too little
            room for all, the last ones are left out.
        """
        use = _Use.SPARE if is_resident else _Use.WAITING
        self._use(keys, use)
        wanted = [key for key in dict.fromkeys(keys) if key not in self._blocks]
        self._num_wanted += len(wanted)
        self._give_up(len(wanted) - len(self._free), frozenset(keys))
        new = [(key, heapq.heappop(self._free)) for key in wanted[: len(self._free)]]
        for key, block in reversed(new):
            self._blocks[key] = block, use
            self._by_use[use][key] = self._num_wanted
        return new

    def demote(self, keys: Sequence[BlockKey] | None) -> None:
        """Nobody is expected to need them: they are given up first, the last one before all. None:
        this holds for all blocks, the demoted and the least recently used before others."""
        if keys is None:
            for key in (*self._by_use[_Use.SPARE], *self._by_use[_Use.WAITING]):
                self._set_use(key, _Use.NONE)
            return
        for key in keys:
            if key in self._blocks:
                self._set_use(key, _Use.NONE)
                self._by_use[_Use.NONE].move_to_end(key, last=False)

    def clear(self) -> None:
        """Forget all."""
        self._blocks.clear()
        for blocks in self._by_use.values():
            blocks.clear()
        self._free = list(range(self.num_blocks))

    def _use(self, keys: Sequence[BlockKey], use: _Use) -> None:
        for key in reversed(keys):
            if key in self._blocks:
                self._set_use(key, use)

    def _set_use(self, key: BlockKey, use: _Use) -> None:
        """The newest one of its use."""
        block, before = self._blocks[key]
        del self._by_use[before][key]
        self._blocks[key] = block, use
        self._by_use[use][key] = self._num_wanted

    def _give_up(self, num_blocks: int, except_for: frozenset[BlockKey]) -> None:
        """Free so many blocks, or as many as there are to be had."""
        stale = self._num_wanted - STALE_POOLS * self.num_blocks
        for use in _Use:
            blocks = self._by_use[use]
            while num_blocks > 0 and blocks:
                key, used = next(iter(blocks.items()))
                # Those of this call were used last, so whatever is behind one is one too.
                if key in except_for or (use is _Use.WAITING and used > stale):
                    break
                del blocks[key]
                heapq.heappush(self._free, self._blocks.pop(key)[0])
                self.num_dropped += 1
                num_blocks -= 1
