"""The radix tree of a server: SGLang's, with nodes that know their streams, and KV export and
import.

Depends on ``sglang.srt.mem_cache.radix_cache`` (``RadixCache``, ``RadixKey``, ``TreeNode``), on the
hooks of ``mem_cache.events`` in it, on the interface of ``mem_cache.allocator`` and on
``MHATokenToKVPool.k_buffer`` / ``v_buffer``.

Slots of the KV pool, who owns them and who frees them:

========================  ==================  ==========================================
slots                      owner               freed by
========================  ==================  ==========================================
of a running request       the request         SGLang, when it ends (``release_kv_cache``)
of a tree node             the tree            eviction
allocated by ``import_kv`` the import          itself, before it returns: the tree takes
                                               them, or they are freed
========================  ==================  ==========================================

The tree has namespaces: a prompt is found only in the one in which it was computed. They are
SGLang's ``extra_key``, which is part of every node's key, from the root on.
"""

from __future__ import annotations

import time
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

from streamfill.engine.interface import BlockSwap, CopyReport
from streamfill.engine.tree_blocks import TreeBlocks
from streamfill.kv_transfer.head_copies import scatter_blocks
from streamfill.kv_transfer.interface import IncomingTransfer
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.staging import gather, layout_of
from streamfill.messages.common import SHARED_NAMESPACE

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

    blocks: TreeBlocks | None = None
    """Records which blocks of prompts come and go. None: nobody wants to know."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self._ranking = _StreamRank()
        self.eviction_strategy = self._ranking
        self.num_evicted_tokens = 0
        self.swap: BlockSwap | None = None
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
        # SGLang calls it from ``evict`` only, whose freed pages are given to nobody before it has
        # returned. The node keeps its pointer to its parent.
        streams = streams_of(node)
        if streams:
            self._losers |= streams
            if self.swap is not None and not streams.isdisjoint(self._to_save):
                self._leaving.append(node)
        super()._delete_leaf(node)

    def _save_leaving(self) -> None:
        """Copy out what ``evict`` took.

        Leaves went before their parents, so a branch that goes is met from its end: it is saved
        whole, up to the first node that stays. The block that a branch begins in the middle of is
        completed from there.
        """
        swap = self.swap
        if swap is None or not self._leaving:
            return
        waiting = dict.fromkeys(self._leaving)
        self._leaving = []
        while waiting:
            end = next(iter(waiting))
            top = end
            while top in waiting:
                del waiting[top]
                top = top.parent
            self._save_branch(swap, end, top)

    def _save_branch(self, swap: BlockSwap, end: TreeNode, stays: TreeNode) -> None:
        """Save all tokens up to ``end`` from those of ``stays`` on, in whole blocks."""
        path: list[TreeNode] = []
        node = end
        num_staying = 0
        while node is not self.root_node:
            path.append(node)
            node = node.parent
        for node in reversed(path):
            num_staying += len(node.key)
            if node is stays:
                break
        else:
            num_staying = 0
        token_ids = array("q")
        for node in reversed(path):
            token_ids.extend(node.key.raw_token_ids())
        first_block = num_staying // swap.block_tokens
        keys = swap.keys(token_ids, end.key.extra_key or SHARED_NAMESPACE)[first_block:]
        if keys:
            slots = torch.cat([node.value for node in reversed(path)])
            first_slot = first_block * swap.block_tokens
            slots = slots[first_slot : first_slot + len(keys) * swap.block_tokens]
            swap.save(keys, slots[:: self.page_size] // self.page_size)

    def _record_store_event(self, node: TreeNode, medium: Any = None) -> None:
        super()._record_store_event(node, medium)  # SGLang's own, where they are asked for
        if self.blocks is not None:
            self.blocks.store(node)

    def _record_remove_event(self, node: TreeNode, medium: Any = None) -> None:
        super()._record_remove_event(node, medium)
        if self.blocks is not None:
            self.blocks.remove(node)

    def _record_all_cleared_event(self) -> None:
        super()._record_all_cleared_event()
        if self.blocks is not None:
            self.blocks.clear()

    def peek(self, token_ids: array[int], namespace: str = SHARED_NAMESPACE) -> int:
        """Length of the cached prefix of ``token_ids`` (type code ``q``), without touching the
        tree."""
        return sum(matched for _, matched in self._walk(token_ids, namespace))

    def tag(self, stream_id: int, token_ids: array[int], namespace: str = SHARED_NAMESPACE) -> int:
        """Add the stream to every node that holds part of ``token_ids``; they count as used now.
        Returns how many of these tokens are on nodes of other streams too.

        A node that holds more is split: what the stream does not need must not be kept for it.
        """
        key = radix_key(token_ids, namespace)
        node = self.match_prefix(MatchPrefixParams(key=key)).last_device_node
        num_shared = 0
        while node is not self.root_node:
            streams = streams_of(node, create=True)
            streams.add(stream_id)
            if len(streams) > 1:
                num_shared += len(node.key)
            node = node.parent
        return num_shared

    def untag(
        self, stream_id: int, token_ids: array[int], namespace: str = SHARED_NAMESPACE
    ) -> None:
        """Take the stream from every node along ``token_ids``."""
        for node, _ in self._walk(token_ids, namespace):
            streams_of(node).discard(stream_id)

    def _walk(self, token_ids: array[int], namespace: str) -> list[tuple[TreeNode, int]]:
        """Nodes along ``token_ids`` with the matched length of each."""
        path: list[tuple[TreeNode, int]] = []
        key = radix_key(token_ids, namespace).page_aligned(self.page_size)
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
        if self.blocks is not None:
            self.blocks.split(parent, child)
        return parent


def extra_key(namespace: str) -> str | None:
    """A namespace in SGLang's words."""
    return namespace or None


def radix_key(token_ids: array[int], namespace: str) -> RadixKey:
    """A prompt, as the tree looks it up in a namespace."""
    return RadixKey(token_ids, extra_key(namespace))


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
        self.shared: SharedBuffers | None = getattr(pool, "shared_buffers", None)
        """The pool's memory, where other processes of the machine can map it."""
        self._k_buffers: list[torch.Tensor] = list(pool.k_buffer)
        self._v_buffers: list[torch.Tensor] = list(pool.v_buffer)
        self._restores: list[CopyReport] = []
        self.restore_s = 0.0
        """What the newest ``restore`` took, without making room for it."""
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

    def cached_slots(
        self, token_ids: array[int], namespace: str = SHARED_NAMESPACE
    ) -> torch.Tensor:
        """KV slots, int64 [n], of the longest cached prefix of ``token_ids`` (type code ``q``)."""
        match = self._tree.match_prefix(MatchPrefixParams(key=radix_key(token_ids, namespace)))
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
        cached = self._tree.peek(token_ids, incoming.namespace)
        if cached < incoming.first_token or cached >= num_tokens:
            return cached
        # The cached prefix must survive the eviction below: its KV is not in the transfer, or not
        # needed twice.
        key = radix_key(token_ids, incoming.namespace)
        match = self._tree.match_prefix(MatchPrefixParams(key=key))
        prefix_slots = match.device_indices
        cached = len(prefix_slots)
        self._tree.inc_lock_ref(match.last_device_node)
        try:
            slots = self._allocate(num_tokens - cached)
            if slots is None:
                return cached
            skip = cached - incoming.first_token
            try:
                scatter_blocks(
                    self.layout,
                    incoming.staging,
                    self._k_buffers,
                    self._v_buffers,
                    slots,
                    blocks=incoming.blocks,
                    skip_tokens=skip,
                )
            except ValueError:
                self._allocator.free(slots)
                raise
            self._finish_copies()
            self._insert(key, prefix_slots, slots)
        finally:
            self._tree.dec_lock_ref(match.last_device_node)
        return num_tokens

    def host_tokens(
        self, token_ids: array[int], num_resident: int, namespace: str = SHARED_NAMESPACE
    ) -> int:
        """How many tokens right behind the first ``num_resident`` host memory holds; whole
        pages."""
        swap = self._tree.swap
        if swap is None or not swap.num_held:
            return 0
        keys = swap.keys(token_ids, namespace)
        return self._held_behind(swap, keys, num_resident)[1] - num_resident

    def copy_ahead(self, token_ids: array[int], namespace: str = SHARED_NAMESPACE) -> int:
        """Copy the cached prefix of ``token_ids`` to host memory, and leave it where it is. Returns
        how many of its tokens host memory holds now, without a gap."""
        swap, page_size = self._tree.swap, self._tree.page_size
        if swap is None:
            return 0
        slots = self.cached_slots(token_ids, namespace)
        keys = swap.keys(token_ids[: len(slots)], namespace)
        slots = slots[: len(keys) * swap.block_tokens]
        swap.save(keys, slots[::page_size] // page_size, is_resident=True)
        return swap.num_present(keys) * swap.block_tokens

    def restore(self, token_ids: array[int], namespace: str = SHARED_NAMESPACE) -> int:
        """Bring back what host memory holds right behind the cached prefix of ``token_ids``.

        What it took, finding and inserting included but not what making room took, which is others'
        cost, is for ``take_restores``. Returns the length of the cached prefix afterwards: the same
        as before where device memory cannot be had for all of it, since half of it would have to be
        asked for again.
        """
        start_s = time.perf_counter()
        swap, page_size = self._tree.swap, self._tree.page_size
        match = self._tree.match_prefix(MatchPrefixParams(key=radix_key(token_ids, namespace)))
        prefix_slots = match.device_indices
        cached = len(prefix_slots)
        if swap is None or not swap.num_held:
            return cached
        all_keys = swap.keys(token_ids, namespace)
        keys, end = self._held_behind(swap, all_keys, cached)
        if end == cached:
            return cached
        # Making room may put others' blocks into host memory, which must not cost these.
        swap.touch(keys)
        self._tree.inc_lock_ref(match.last_device_node)
        try:
            room_s = time.perf_counter()
            slots = self._allocate(end - cached)
            start_s += time.perf_counter() - room_s
            if slots is None:
                return cached
            keys, end_now = self._held_behind(swap, all_keys, cached)
            if end_now < end:
                self._allocator.free(slots[end_now - cached :])
                slots = slots[: end_now - cached]
            if not len(slots):
                return cached
            skip_pages = cached % swap.block_tokens // page_size
            swap.restore(keys, slots[::page_size] // page_size, skip_pages)
            self._insert(radix_key(token_ids[:end_now], namespace), prefix_slots, slots)
        finally:
            self._tree.dec_lock_ref(match.last_device_node)
        num_bytes = (end_now - cached) * self.layout.bytes_per_token
        self.restore_s = time.perf_counter() - start_s
        self._restores.append(CopyReport(False, num_bytes, self.restore_s))
        return end_now

    def take_restores(self) -> list[CopyReport]:
        """What ``restore`` did since the last call, and how long its caller waited for it."""
        restores, self._restores = self._restores, []
        return restores

    @staticmethod
    def _held_behind(
        swap: BlockSwap, all_keys: list[bytes], num_resident: int
    ) -> tuple[list[bytes], int]:
        """Blocks of a prompt in host memory that go on behind its first ``num_resident`` tokens,
        the first one maybe before, and where they end."""
        first = num_resident // swap.block_tokens
        keys = all_keys[first:]
        keys = keys[: swap.num_present(keys)]
        return keys, max(num_resident, (first + len(keys)) * swap.block_tokens)

    def release_host(
        self,
        token_ids: array[int] | None,
        first_token: int,
        namespace: str = SHARED_NAMESPACE,
    ) -> None:
        """Nobody is expected to need the host copies of these tokens from ``first_token`` on.
        None: of any tokens."""
        swap = self._tree.swap
        if swap is None or not swap.num_held:
            return
        if token_ids is None:
            swap.demote(None)
        else:
            keys = swap.keys(token_ids, namespace)
            swap.demote(keys[-(-first_token // swap.block_tokens) :])

    def _insert(self, key: RadixKey, prefix_slots: torch.Tensor, slots: torch.Tensor) -> None:
        """Give ``slots``, which hold what follows the cached prefix, to the tree."""
        value = torch.cat([prefix_slots, slots])
        result = self._tree.insert(InsertParams(key=key, value=value))
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
