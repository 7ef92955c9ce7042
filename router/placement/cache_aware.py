"""Where most of the prompt is cached, as long as that saves more than waiting there costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from router.placement.continuations import Continuations
from router.placement.interface import (
    BlockNews,
    Choice,
    PlacementContext,
    PlacementPolicy,
    PlacementReason,
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
AHEAD_TOKENS = 16 * STREAM_WEIGHT_TOKENS
"""Sixteen streams on one server, each counted as a typical segment, before a document that they
read is computed once more: those that read what is there bring hardly any work."""
PREFIX_TOKENS = STREAM_WEIGHT_TOKENS // 2
"""Instructions that all prompts begin with say little; what comes behind them does. Until so much
was sent, moving costs at most half a typical segment."""
MAX_BLOCKS = 1 << 17
"""Of one server: four million tokens of 32 in a block, and some 9 MB of the router's memory."""


class CacheAwarePolicy(PlacementPolicy):
    """the server that has least to compute before the prompt is done, its own part included

    The cost of a server is in tokens: what waits there (``ServerLoad.waiting_tokens``), plus what
    the prompt has and its cache lacks. A context that is not complete, and whose pieces so far are
    all there, may go on as what is there does: this saves ``ahead_tokens`` more, times the share of
    contexts that did so (``continuations``). So a shared document draws the streams that read it to
    one server until that is behind the others by more than sharing saves; then it is computed once
    more, elsewhere, and there are two of them. Instructions that all prompts begin with draw nobody
    beyond their own length.
    """

    OPTIONS: ClassVar[dict[str, str]] = {
        "block_tokens": f"tokens of the blocks that servers report; {BLOCK_TOKENS}",
        "ahead_tokens": f"what a context that began like a cached one saves later; {AHEAD_TOKENS}",
        "prefix_tokens": f"until so much was sent, a stream may still move; {PREFIX_TOKENS}",
        "max_blocks": f"blocks noted of one server; {MAX_BLOCKS}",
    }

    def __init__(self, context: PlacementContext) -> None:
        self.block_tokens = context.number("block_tokens", BLOCK_TOKENS, least=1, most=4096)
        self.prefix_tokens = context.number("prefix_tokens", PREFIX_TOKENS, least=1, most=1 << 20)
        self._ahead_tokens = context.number("ahead_tokens", AHEAD_TOKENS)
        self._continuations = Continuations()
        self.view = PrefixView(context.number("max_blocks", MAX_BLOCKS, least=1))

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        return self.decide(request, servers).server_id

    def decide(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> Choice:
        found = [
            self.view.num_matched(load.server_id, request.keys, request.now_s) for load in servers
        ]
        best, num_blocks = min(
            zip(servers, found, strict=True),
            key=lambda each: (self._cost_tokens(request, *each), load_rank(each[0])),
        )
        most = max(found)
        if num_blocks < most:
            reason = PlacementReason.RELIEF
        else:
            reason = PlacementReason.AFFINITY if most else PlacementReason.LOAD
        return Choice(best.server_id, reason, num_blocks * self.block_tokens)

    def note_sent(
        self,
        server_id: ServerId,
        keys: Sequence[BlockKey],
        now_s: float,
        after: BlockKey | None = None,
    ) -> None:
        self.view.expect(server_id, keys, now_s)
        self._continuations.note(after, keys)

    def note_blocks(self, server_id: ServerId, news: BlockNews) -> None:
        if news.is_complete:
            self.view.replace(server_id, news.stored)
        else:
            self.view.apply(server_id, news.stored, news.removed)

    def note_lost(self, server_id: ServerId) -> None:
        self.view.drop(server_id)

    def _cost_tokens(self, request: PlacementRequest, load: ServerLoad, num_blocks: int) -> int:
        saved_tokens = num_blocks * self.block_tokens
        if num_blocks and num_blocks == len(request.keys) and not request.is_complete:
            share = self._continuations.share(request.keys[-1])
            saved_tokens += round(share * self._ahead_tokens)
        return load.waiting_tokens - saved_tokens
