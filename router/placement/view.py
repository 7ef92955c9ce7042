"""The router's view of which server holds which prefix.

For each server two sets of block keys (``stream.prefix_blocks``), which together are the radix tree
of its cache, cut into blocks:

========  ==================================  =====================================================
set       put in by                            taken out by
========  ==================================  =====================================================
held      the server: it has the block         the server: it has it no more
expected  the router: it sent the block there  the server, either way; or ``expect_s`` without news
========  ==================================  =====================================================

A key says all tokens from the beginning of the prompt on, so no tree of nodes is needed: the cached
prefix of a prompt ends before the first of its keys that is in neither set.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from streamfill.stream.ids import ServerId
from streamfill.stream.prefix_blocks import BlockKey

EXPECT_S = 15.0
"""A block that was sent and not reported for so long was not computed, or is gone again: computing
what is ahead of it rarely takes longer, and if it does, the report comes late and mends it."""

MAX_EXPECTED_BLOCKS = 8192
"""Of one server. A quarter of a million tokens of 32 in a block: more than are computed in
``EXPECT_S``."""


class _ServerBlocks:
    __slots__ = ("expected", "held")

    def __init__(self) -> None:
        self.held: set[BlockKey] = set()
        self.expected: OrderedDict[BlockKey, float] = OrderedDict()
        """Until when, the soonest first."""


class PrefixView:
    """Owned by a policy. Memory is bounded by ``max_blocks`` per server, some 70 bytes each."""

    def __init__(self, max_blocks: int, expect_s: float = EXPECT_S) -> None:
        self._max_blocks = max_blocks
        self._expect_s = expect_s
        self._servers: dict[ServerId, _ServerBlocks] = {}

    def held(self, server_id: ServerId) -> frozenset[BlockKey]:
        """What the server said it has."""
        blocks = self._servers.get(server_id)
        return frozenset() if blocks is None else frozenset(blocks.held)

    def replace(self, server_id: ServerId, keys: Sequence[BlockKey]) -> None:
        """The server has exactly these blocks, of which the first ``max_blocks`` are noted."""
        blocks = self._of(server_id)
        blocks.held = set(keys[: self._max_blocks])
        for key in blocks.held & blocks.expected.keys():
            del blocks.expected[key]

    def apply(
        self, server_id: ServerId, stored: Iterable[BlockKey], removed: Iterable[BlockKey]
    ) -> None:
        """The server lost some blocks and has others now. Beyond ``max_blocks`` new ones are passed
        over: the router then knows less than there is, never more."""
        blocks = self._of(server_id)
        held, expected = blocks.held, blocks.expected
        for key in removed:
            held.discard(key)
            expected.pop(key, None)
        for key in stored:
            expected.pop(key, None)
            if len(held) < self._max_blocks:
                held.add(key)

    def expect(self, server_id: ServerId, keys: Iterable[BlockKey], now_s: float) -> None:
        """The blocks are on their way to the server."""
        blocks = self._of(server_id)
        held, expected = blocks.held, blocks.expected
        until_s = now_s + self._expect_s
        for key in keys:
            if key not in held:
                expected[key] = until_s
                expected.move_to_end(key)
        while len(expected) > MAX_EXPECTED_BLOCKS:
            expected.popitem(last=False)

    def drop(self, server_id: ServerId) -> None:
        """The server is gone."""
        self._servers.pop(server_id, None)

    def num_matched(self, server_id: ServerId, keys: Sequence[BlockKey], now_s: float) -> int:
        """How many of a prompt's blocks, from the first one on, the server has or will have."""
        blocks = self._servers.get(server_id)
        if blocks is None:
            return 0
        held, expected = blocks.held, blocks.expected
        while expected:
            key, until_s = next(iter(expected.items()))
            if until_s > now_s:
                break
            del expected[key]
        for number, key in enumerate(keys):
            if key not in held and key not in expected:
                return number
        return len(keys)

    def _of(self, server_id: ServerId) -> _ServerBlocks:
        blocks = self._servers.get(server_id)
        if blocks is None:
            blocks = self._servers[server_id] = _ServerBlocks()
        return blocks
