"""Which blocks of prompts a radix tree holds, told by what happens to its nodes.

SGLang's tree calls ``_record_store_event``, ``_record_remove_event`` and
``_record_all_cleared_event`` (``mem_cache.events``) wherever KV comes or goes; ``radix`` passes
these on. SGLang's own events name one page each, with its tokens and a SHA-256 digest; at a page
size of 1 that is an event per token. Here a block has a fixed number of tokens, whatever the page
size, and belongs to the node in which it ends:

    root ── [0 ........ 50) ── [50 .. 90)          blocks of 32: the first node has the one that
                         └──── [50 ......... 130)  ends at 32, the second that at 64, the third
                                                   those at 64, 96 and 128

No torch here and nothing of sglang: nodes are what SGLang makes of them.
"""

from __future__ import annotations

from array import array
from typing import Any

from streamfill.engine.interface import BlockChanges
from streamfill.stream.prefix_blocks import BlockKey, block_keys


class TreeBlocks:
    """Blocks of one tree since it was made. Every node of the tree has two attributes of ours:
    ``block_start``, the tokens before it, and ``block_keys``, of the blocks that end in it."""

    def __init__(self, block_tokens: int, root: Any) -> None:
        self.block_tokens = block_tokens
        self._stored: set[BlockKey] = set()
        self._removed: set[BlockKey] = set()
        self._cleared = False
        stack = list(root.children.values())
        while stack:  # parents first
            node = stack.pop()
            self._describe(node)
            stack += node.children.values()

    def store(self, node: Any) -> None:
        """A new node, whose ancestors are known."""
        self._describe(node)
        for key in node.block_keys:
            if key in self._removed:
                self._removed.discard(key)
            else:
                self._stored.add(key)

    def remove(self, node: Any) -> None:
        """A node is gone."""
        for key in node.block_keys:
            if key in self._stored:
                self._stored.discard(key)
            else:
                self._removed.add(key)

    def split(self, parent: Any, child: Any) -> None:
        """The beginning of ``child`` is the new node ``parent``."""
        start = child.block_start
        child.block_start = start + len(parent.key)
        num_in_parent = child.block_start // self.block_tokens - start // self.block_tokens
        parent.block_start = start
        parent.block_keys = child.block_keys[:num_in_parent]
        child.block_keys = child.block_keys[num_in_parent:]

    def clear(self) -> None:
        """All nodes are gone."""
        self._stored.clear()
        self._removed.clear()
        self._cleared = True

    def take(self) -> BlockChanges:
        """What changed since the last call, less what was undone meanwhile."""
        changes = BlockChanges(
            cleared=self._cleared, stored=list(self._stored), removed=list(self._removed)
        )
        self._stored.clear()
        self._removed.clear()
        self._cleared = False
        return changes

    def all(self, root: Any) -> list[BlockKey]:
        """All blocks that there are now, beginnings of prompts before what follows."""
        keys: list[BlockKey] = []
        level = list(root.children.values())
        while level:
            for node in level:
                keys += node.block_keys
            level = [child for node in level for child in node.children.values()]
        return keys

    def _describe(self, node: Any) -> None:
        parent = node.parent
        is_top = parent.parent is None
        start = 0 if is_top else parent.block_start + len(parent.key)
        node.block_start = start
        num_open = start % self.block_tokens
        if num_open + len(node.key) < self.block_tokens:
            node.block_keys = []
            return
        # The tokens of the block that the node begins in, and the block before it, are further up.
        pieces: list[array[int]] = []
        num_missing = num_open
        above = parent
        while num_missing:
            ids = above.key.raw_token_ids()
            pieces.append(ids[max(0, len(ids) - num_missing) :])
            num_missing -= len(pieces[-1])
            if num_missing:
                above = above.parent
        after: BlockKey | None = None
        if start >= self.block_tokens:
            while not self._ends_before(above, start - num_open):
                above = above.parent
            after = above.block_keys[
                (start - num_open) // self.block_tokens - above.block_start // self.block_tokens - 1
            ]
        token_ids = array("q")
        for piece in reversed(pieces):
            token_ids += piece
        token_ids += node.key.raw_token_ids()
        node.block_keys = block_keys(
            token_ids, self.block_tokens, node.key.extra_key or "", after=after
        )

    def _ends_before(self, node: Any, position: int) -> bool:
        """Whether the block that ends at ``position`` ends in this node."""
        return bool(node.block_start < position <= node.block_start + len(node.key))
