"""How much of a prompt was the beginning of an earlier one: a chain of hashes over blocks. Pure."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from streamfill.traces.format import BLOCK_TOKENS, Segment

TOKENS_PER_BLOCK: Final = 16
CHARS_PER_BLOCK: Final = 64
_MAX_BLOCKS: Final = 4_000_000
"""Some 300 MB of hashes. Sharing with prompts behind them is not seen."""


class PrefixIndex:
    """All prefixes seen so far, in whole blocks.

    Attributes:
        is_full: whether there was no room for some of them, so that what is found is a lower bound.
    """

    def __init__(self, max_blocks: int = _MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._seen: set[bytes] = set()
        self.is_full = False

    def text(self, text: str) -> int:
        """Characters at the beginning of a prompt that were seen before; remembers the prompt."""
        blocks = (text[n : n + CHARS_PER_BLOCK].encode() for n in _starts(text, CHARS_PER_BLOCK))
        return self._add(b"text", blocks) * CHARS_PER_BLOCK

    def tokens(self, ids: Sequence[int]) -> int:
        """The same of token ids."""
        size = TOKENS_PER_BLOCK
        blocks = (repr(tuple(ids[n : n + size])).encode() for n in _starts(ids, size))
        return self._add(b"tokens", blocks) * size

    def blocks(self, segments: Sequence[Segment]) -> int:
        """The same of segments of ``block_ids``, in tokens: of whole blocks in which no segment
        ends before its last block."""
        ids: list[int] = []
        for segment in segments:
            num_whole = (segment.num_tokens or 0) // BLOCK_TOKENS
            ids.extend((segment.block_ids or ())[:num_whole])
            if num_whole * BLOCK_TOKENS != segment.num_tokens:
                break
        return self._add(b"blocks", (b"%d" % each for each in ids)) * BLOCK_TOKENS

    def _add(self, kind: bytes, blocks: Iterator[bytes]) -> int:
        """How many blocks at the beginning are known."""
        num_known = 0
        chained = kind
        for number, block in enumerate(blocks):
            chained = hashlib.blake2b(chained + block, digest_size=12).digest()
            if chained in self._seen:
                # Known blocks come first: a chain is remembered from its beginning.
                num_known = number + 1
            elif len(self._seen) < self._max_blocks:
                self._seen.add(chained)
            else:
                self.is_full = True
                break
        return num_known


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Elements at the beginning that two sequences have in common."""
    if first == second:
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_block_tokens(first: Segment, second: Segment) -> int:
    """The same of two segments with ``block_ids``, in tokens."""
    pairs = zip(first.block_ids or (), second.block_ids or (), strict=False)
    num_blocks = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(num_blocks * BLOCK_TOKENS, first.num_tokens or 0, second.num_tokens or 0)


def _starts(units: Sequence[object], block: int) -> range:
    """Where the whole blocks of a prompt begin."""
    return range(0, len(units) - len(units) % block, block)
