"""The radix tree of a server: SGLang's, with nodes that know their streams, and KV export and
import.

Depends on ``sglang.srt.mem_cache.radix_cache`` (``RadixCache``, ``RadixKey``, ``TreeNode``), on the
interface of ``mem_cache.allocator`` and on ``MHATokenToKVPool.k_buffer`` / ``v_buffer``.

Slots of the KV pool, who owns them and who frees them:

========================  ==================  ==========================================
slots                      owner               freed by
========================  ==================  ==========================================
of a running request       the request         SGLang, when it ends (``release_kv_cache``)
of a tree node             the tree            eviction
allocated by ``import_kv`` the import          itself, before it returns: the tree takes
                                               them, or they are freed
========================  ==================  ==========================================
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.evict_policy import EvictionStrategy
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    get_radix_cache_factory,
    register_radix_cache_backend,
)

from streamfill.kv_transfer.interface import IncomingTransfer
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.staging import gather, layout_of, scatter

BACKEND_NAME = "streamfill"

NO_STREAM_RANK = -1
"""Of nodes that no open stream uses: they go first."""


class _StreamRank(EvictionStrategy):  # type: ignore[misc]  # sglang is untyped
    """Evicts by the rank of the best-protected open stream on a node, then least recently used."""

    def __init__(self) -> None:
        self.ranks: Mapping[int, int] = {}

    def get_priority(self, node: TreeNode) -> tuple[int, float]:
        ranks = self.ranks
        rank = max(
            (ranks[stream_id] for stream_id in streams_of(node) if stream_id in ranks),
            default=NO_STREAM_RANK,
        )
        return (rank, node.last_access_time)


class StreamRadixCache(RadixCache):  # type: ignore[misc]  # sglang is untyped
    """SGLang's radix tree whose nodes carry the ids of the streams that use them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self._ranking = _StreamRank()
        self.eviction_strategy = self._ranking
        self.num_evicted_tokens = 0

    def set_ranks(self, ranks: Mapping[int, int]) -> None:
        """Rank of each open stream; low ranks are evicted first."""
        self._ranking.ranks = ranks

    def evict(self, params: EvictParams) -> EvictResult:
        """SGLang's eviction, counted."""
        result = super().evict(params)
        self.num_evicted_tokens += result.num_tokens_evicted
        return result

    def peek(self, token_ids: array[int]) -> int:
        """Length of the cached prefix of ``token_ids`` (type code ``q``), without touching the
        tree."""
        return sum(matched for _, matched in self._walk(token_ids))

    def tag(self, stream_id: int, token_ids: array[int]) -> int:
        """Add the stream to every node that holds part of ``token_ids``; they count as used now.
        Returns how many of these tokens are on nodes of other streams too.

        A node that holds more is split: what the stream does not need must not be kept for it.
        """
        node = self.match_prefix(MatchPrefixParams(key=RadixKey(token_ids))).last_device_node
        num_shared = 0
        while node is not self.root_node:
            streams = streams_of(node, create=True)
            streams.add(stream_id)
            if len(streams) > 1:
                num_shared += len(node.key)
            node = node.parent
        return num_shared

    def untag(self, stream_id: int, token_ids: array[int]) -> None:
        """Take the stream from every node along ``token_ids``."""
        for node, _ in self._walk(token_ids):
            streams_of(node).discard(stream_id)

    def _walk(self, token_ids: array[int]) -> list[tuple[TreeNode, int]]:
        """Nodes along ``token_ids`` with the matched length of each."""
        path: list[tuple[TreeNode, int]] = []
        key = RadixKey(token_ids).page_aligned(self.page_size)
        node = self.root_node
        while len(key):
            child = node.children.get(key.child_key(self.page_size))
            if child is None:
                break
            matched = child.key.match(key, page_size=self.page_size)
            path.append((child, matched))
            if matched < len(child.key):
                break
            node = child
            key = key[matched:]
        return path

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        parent = super()._split_node(key, child, split_len)
        streams = streams_of(child)
        if streams:
            streams_of(parent, create=True).update(streams)
        return parent


def streams_of(node: TreeNode, create: bool = False) -> set[int]:
    """Ids of the streams that use a node; with ``create`` the node's own set, to be changed."""
    streams: set[int] | None = node.__dict__.get("stream_ids")
    if streams is None:
        streams = set()
        if create:
            node.stream_ids = streams
    return streams


def register_backend() -> None:
    """Make ``radix_cache_backend=streamfill`` known to SGLang (``mem_cache.registry``).
    Idempotent."""
    if get_radix_cache_factory(BACKEND_NAME) is not None:
        return

    def build(context: TreeCacheBuildContext) -> StreamRadixCache:
        return StreamRadixCache(context.params)

    register_radix_cache_backend(BACKEND_NAME, build)


class KvPool:
    """Export and import of KV between the pool of this rank and contiguous staging memory."""

    def __init__(self, tree: StreamRadixCache, allocator: Any) -> None:
        self._tree = tree
        self._allocator = allocator
        pool = allocator.get_kvcache()
        self._k_buffers: list[torch.Tensor] = list(pool.k_buffer)
        self._v_buffers: list[torch.Tensor] = list(pool.v_buffer)
        self.layout: KvLayout = layout_of(
            self._k_buffers, self._v_buffers, page_size=tree.page_size
        )

    @property
    def device(self) -> torch.device:
        """Where the KV is."""
        return self._k_buffers[0].device

    def cached_slots(self, token_ids: array[int]) -> torch.Tensor:
        """KV slots, int64 [n], of the longest cached prefix of ``token_ids`` (type code ``q``)."""
        match = self._tree.match_prefix(MatchPrefixParams(key=RadixKey(token_ids)))
        slots: torch.Tensor = match.device_indices
        return slots

    def gather(self, slots: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy the KV of ``slots`` into ``staging``, uint8 [len(slots) * bytes per token]."""
        gather(self.layout, self._k_buffers, self._v_buffers, slots, out=staging)
        self._finish_copies()

    def import_kv(self, incoming: IncomingTransfer) -> int:
        """Insert received KV into the tree. Returns the length of the sequence's cached prefix
        afterwards.

        What the tree already has is not written again; where memory cannot be had, nothing is
        imported and the server recomputes.
        """
        token_ids = array("q", incoming.token_ids)
        num_tokens = len(token_ids)
        cached = self._tree.peek(token_ids)
        if cached < incoming.first_token or cached >= num_tokens:
            return cached
        # The cached prefix must survive the eviction below: its KV is not in the transfer, or not
        # needed twice.
        match = self._tree.match_prefix(MatchPrefixParams(key=RadixKey(token_ids)))
        prefix_slots = match.device_indices
        cached = len(prefix_slots)
        self._tree.inc_lock_ref(match.last_device_node)
        try:
            slots = self._allocate(num_tokens - cached)
            if slots is None:
                return cached
            skip = cached - incoming.first_token
            try:
                scatter(
                    self.layout,
                    incoming.staging,
                    self._k_buffers,
                    self._v_buffers,
                    slots,
                    skip_tokens=skip,
                )
            except ValueError:
                self._allocator.free(slots)
                raise
            self._finish_copies()
            value = torch.cat([prefix_slots, slots])
            result = self._tree.insert(InsertParams(key=RadixKey(token_ids), value=value))
            already = result.prefix_len - cached
            if already > 0:
                self._allocator.free(slots[:already])
        finally:
            self._tree.dec_lock_ref(match.last_device_node)
        return num_tokens

    def _finish_copies(self) -> None:
        """On a GPU copies run on; the transport's threads, on other CUDA streams, come after."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _allocate(self, num_tokens: int) -> torch.Tensor | None:
        missing = num_tokens - self._allocator.available_size()
        if missing > 0:
            if missing > self._tree.evictable_size():
                return None
            self._tree.evict(EvictParams(num_tokens=missing))
        slots: torch.Tensor | None = self._allocator.alloc(num_tokens)
        return slots
