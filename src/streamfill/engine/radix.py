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

from streamfill.engine.interface import PageSwap
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
        self.swap: PageSwap | None = None
        """Where KV goes that is taken from ``to_save``. None: nowhere."""
        self._to_save: frozenset[int] = frozenset()
        self._leaving: list[TreeNode] = []
        self._losers: set[int] = set()

    def set_ranks(self, ranks: Mapping[int, int], to_save: frozenset[int] = frozenset()) -> None:
        """Rank of each open stream; low ranks are evicted first. What is taken from the streams
        ``to_save`` is copied to host memory."""
        self._ranking.ranks = ranks
        self._to_save = to_save

    def evict(self, params: EvictParams) -> EvictResult:
        """SGLang's eviction, counted; the KV of streams to save is copied out before its pages can
        be used again."""
        self._leaving.clear()
        result = super().evict(params)
        self.num_evicted_tokens += result.num_tokens_evicted
        self._save_leaving()
        return result

    def take_losers(self) -> frozenset[int]:
        """Streams that lost KV to eviction since the last call."""
        losers, self._losers = frozenset(self._losers), set()
        return losers

    def _delete_leaf(self, node: TreeNode) -> None:
        # SGLang calls it from ``evict`` only. The node still hangs in the tree here, and its pages
        # are given to nobody before ``evict`` has returned.
        streams = streams_of(node)
        if streams:
            self._losers |= streams
            if self.swap is not None and not streams.isdisjoint(self._to_save):
                # By its place in the tree, which is lost with it.
                _page_keys(node, self.swap)
                self._leaving.append(node)
        super()._delete_leaf(node)

    def _save_leaving(self) -> None:
        """Copy out what ``evict`` took, in one group, the beginning of each sequence first."""
        if self.swap is None or not self._leaving:
            return
        nodes = self._leaving[::-1]  # leaves went before their parents
        self._leaving = []
        keys = [key for node in nodes for key in node.page_keys]
        slots = torch.cat([node.value for node in nodes])
        self.swap.save(keys, slots[:: self.page_size] // self.page_size)

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
        keys: list[bytes] | None = child.__dict__.get("page_keys")
        parent = super()._split_node(key, child, split_len)
        if keys is not None:
            num_pages = split_len // self.page_size
            parent.page_keys, child.page_keys = keys[:num_pages], keys[num_pages:]
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


def _page_keys(node: TreeNode, swap: PageSwap) -> list[bytes]:
    """Keys of the node's pages, kept at the node: they depend on the tokens up to it alone."""
    path: list[TreeNode] = []
    while node.parent is not None and "page_keys" not in node.__dict__:
        path.append(node)
        node = node.parent
    keys: list[bytes] = node.__dict__.get("page_keys", [])
    for each in reversed(path):
        previous = keys[-1] if keys else b""
        keys = each.page_keys = swap.keys(each.key.raw_token_ids(), previous)
    return keys


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
    def buffers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values, a tensor ``[number of slots, heads, dim]`` per layer each."""
        return self._k_buffers, self._v_buffers

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
            self._insert(token_ids, prefix_slots, slots)
        finally:
            self._tree.dec_lock_ref(match.last_device_node)
        return num_tokens

    def host_tokens(self, token_ids: array[int], num_resident: int) -> int:
        """How many tokens right behind the first ``num_resident`` host memory holds; whole
        pages."""
        swap, page_size = self._tree.swap, self._tree.page_size
        if swap is None or not swap.num_held:
            return 0
        keys = swap.keys(token_ids, b"")[num_resident // page_size :]
        num_tokens: int = swap.num_present(keys) * page_size
        return num_tokens

    def copy_ahead(self, token_ids: array[int]) -> int:
        """Copy the cached prefix of ``token_ids`` to host memory, and leave it where it is. Returns
        how many of its tokens host memory holds now."""
        swap, page_size = self._tree.swap, self._tree.page_size
        if swap is None:
            return 0
        slots = self.cached_slots(token_ids)
        keys = swap.keys(token_ids[: len(slots)], b"")
        num_tokens: int = swap.save(keys, slots[::page_size] // page_size) * page_size
        return num_tokens

    def restore(self, token_ids: array[int]) -> int:
        """Bring back what host memory holds right behind the cached prefix of ``token_ids``.

        Returns the length of the cached prefix afterwards: the same as before where device memory
        cannot be had for all of it, since half of it would have to be asked for again.
        """
        swap, page_size = self._tree.swap, self._tree.page_size
        match = self._tree.match_prefix(MatchPrefixParams(key=RadixKey(token_ids)))
        prefix_slots = match.device_indices
        cached = len(prefix_slots)
        if swap is None:
            return cached
        keys = swap.keys(token_ids, b"")[cached // page_size :]
        keys = keys[: swap.num_present(keys)]
        if not keys:
            return cached
        # Making room may put others' pages into host memory, which must not cost these.
        swap.touch(keys)
        self._tree.inc_lock_ref(match.last_device_node)
        try:
            slots = self._allocate(len(keys) * page_size)
            if slots is None:
                return cached
            num_left = swap.num_present(keys)
            if num_left < len(keys):
                self._allocator.free(slots[num_left * page_size :])
                keys, slots = keys[:num_left], slots[: num_left * page_size]
            if not keys:
                return cached
            swap.restore(keys, slots[::page_size] // page_size)
            num_tokens = cached + len(slots)
            self._insert(token_ids[:num_tokens], prefix_slots, slots)
        finally:
            self._tree.dec_lock_ref(match.last_device_node)
        return num_tokens

    def release_host(self, token_ids: array[int] | None, first_token: int) -> None:
        """Nobody is expected to need the host copies of these tokens from ``first_token`` on.
        None: of any tokens."""
        swap = self._tree.swap
        if swap is None or not swap.num_held:
            return
        if token_ids is None:
            swap.demote(None)
        else:
            swap.demote(swap.keys(token_ids, b"")[-(-first_token // self._tree.page_size) :])

    def _insert(
        self, token_ids: array[int], prefix_slots: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Give ``slots``, which hold what follows the cached prefix, to the tree."""
        value = torch.cat([prefix_slots, slots])
        result = self._tree.insert(InsertParams(key=RadixKey(token_ids), value=value))
        already = result.prefix_len - len(prefix_slots)
        if already > 0:
            self._allocator.free(slots[:already])

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
