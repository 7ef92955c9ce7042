"""Where most of the prompt is cached, as long as that saves more than waiting there costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from router.placement.interface import (
    BlockNews,
    PlacementContext,
    PlacementPolicy,
    PlacementRequest,
)
from router.placement.loads import STREAM_WEIGHT_TOKENS, ServerLoad
from router.placement.simple import load_rank
from router.placement.view import PrefixView
from streamfill.stream.ids import ServerId
from streamfill.stream.prefix_blocks import BlockKey

BLOCK_TOKENS = 32
"""Small enough for the first piece of most contexts to have a whole block, and a quarter of a byte
per cached token in a snapshot."""
AHEAD_TOKENS = 4 * STREAM_WEIGHT_TOKENS
"""A context that began like another one, whole pieces of it, goes on like that in most cases: a
document is read by several agents, or a chat goes on. Four typical segments."""
MAX_BLOCKS = 1 << 17
"""Of one server: four million tokens of 32 in a block, and some 9 MB of the router's memory."""


class CacheAwarePolicy(PlacementPolicy):
    """the server that has least to compute before the prompt is done, its own part included

    The cost of a server is in tokens: what waits there (``ServerLoad.waiting_tokens``), plus what
    the prompt has and its cache lacks. A context that is not complete, and whose pieces so far are
    all there, is expected to go on as what is there does: this saves ``ahead_tokens`` more. So a
    shared document draws the streams that read it to one server until that is behind the others by
    more than sharing saves; then it is computed once more, elsewhere, and there are two of them.
    """

    OPTIONS: ClassVar[dict[str, str]] = {
        "block_tokens": f"tokens of the blocks that servers report; {BLOCK_TOKENS}",
        "ahead_tokens": f"what a context that began like a cached one saves later; {AHEAD_TOKENS}",
        "max_blocks": f"blocks noted of one server; {MAX_BLOCKS}",
    }

    def __init__(self, context: PlacementContext) -> None:
        self.block_tokens = context.number("block_tokens", BLOCK_TOKENS, least=1, most=4096)
        self.prefix_tokens = self.block_tokens
        self._ahead_tokens = context.number("ahead_tokens", AHEAD_TOKENS)
        self.view = PrefixView(context.number("max_blocks", MAX_BLOCKS, least=1))

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        best = min(servers, key=lambda load: (self._cost_tokens(request, load), load_rank(load)))
        return best.server_id

    def note_sent(self, server_id: ServerId, keys: Sequence[BlockKey], now_s: float) -> None:
        self.view.expect(server_id, keys, now_s)

    def note_blocks(self, server_id: ServerId, news: BlockNews) -> None:
        if news.is_complete:
            self.view.replace(server_id, news.stored)
        else:
            self.view.apply(server_id, news.stored, news.removed)

    def note_lost(self, server_id: ServerId) -> None:
        self.view.drop(server_id)

    def _cost_tokens(self, request: PlacementRequest, load: ServerLoad) -> int:
        num_blocks = self.view.num_matched(load.server_id, request.keys, request.now_s)
        saved_tokens = num_blocks * self.block_tokens
        if num_blocks and num_blocks == len(request.keys) and not request.is_complete:
            saved_tokens += self._ahead_tokens
        return load.waiting_tokens - saved_tokens
