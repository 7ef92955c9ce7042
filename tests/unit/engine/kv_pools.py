"""SGLang's KV pools on the CPU with our radix tree, and KV whose content tells its tokens."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from prefill_server.swap import SwapEngine
from streamfill.engine.exports import KvExports
from streamfill.engine.paged_allocator import CpuPagedAllocator
from streamfill.engine.radix import KvPool, StreamRadixCache, radix_key
from streamfill.engine.shared_kv_pool import SharedMhaTokenToKvPool
from streamfill.kv_transfer.interface import IncomingTransfer

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 1, 2


def kv_of(token_ids: Sequence[int]) -> list[float]:
    """KV of each token: a number that depends on all tokens up to it, exact in float32."""
    digest, values = 0, []
    for token_id in token_ids:
        digest = zlib.crc32(int(token_id).to_bytes(8, "little"), digest)
        values.append(float(digest % (1 << 20)))
    return values


@dataclass(frozen=True, eq=False)
class Held:
    """What a running request holds: a locked prefix, and slots that are not in the tree."""

    node: TreeNode
    slots: torch.Tensor


class PoolUnderTest:
    """One rank's pool, allocator and tree."""

    def __init__(self, num_pages: int, page_size: int, *, paged: bool = True) -> None:
        self.page_size = page_size
        self.num_tokens = num_pages * page_size
        self.kv = SharedMhaTokenToKvPool(
            size=self.num_tokens,
            page_size=page_size,
            dtype=torch.float32,
            head_num=NUM_HEADS,
            head_dim=HEAD_DIM,
            layer_num=NUM_LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        if paged:
            self.allocator = CpuPagedAllocator(
                self.num_tokens,
                page_size=page_size,
                dtype=torch.float32,
                device="cpu",
                kvcache=self.kv,
                need_sort=False,
            )
        else:
            assert page_size == 1
            self.allocator = TokenToKVPoolAllocator(
                self.num_tokens,
                dtype=torch.float32,
                device="cpu",
                kvcache=self.kv,
                need_sort=False,
            )
        self.tree = StreamRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=self.allocator,
                page_size=page_size,
            )
        )
        self.pool = KvPool(self.tree, self.allocator)
        self.exports = KvExports(self.pool, self.tree, staging_limit_bytes=1 << 20)
        self.held: list[Held] = []

    def swap_to(self, num_host_blocks: int) -> SwapEngine:
        """Give the tree host memory."""
        swap = SwapEngine(
            self.kv.k_buffer,
            self.kv.v_buffer,
            page_size=self.page_size,
            num_host_blocks=num_host_blocks,
        )
        self.tree.swap = swap
        return swap

    def compute(self, token_ids: Sequence[int], namespace: str = "") -> bool:
        """A request that fills the cache, from start to end, as SGLang runs it. False: there is no
        memory for it."""
        ids = array("q", token_ids)
        key = radix_key(ids, namespace)
        match = self.tree.match_prefix(MatchPrefixParams(key=key))
        prefix, node = match.device_indices, match.last_device_node
        self.tree.inc_lock_ref(node)
        num_new = -(-(len(ids) - len(prefix)) // self.page_size) * self.page_size
        slots = self._allocate(num_new)
        if slots is None:
            self.tree.dec_lock_ref(node)
            return False
        self.write(slots[: len(ids) - len(prefix)], kv_of(ids)[len(prefix) :])
        whole = len(ids) - len(ids) % self.page_size
        values = torch.cat([prefix, slots])[:whole]
        result = self.tree.insert(InsertParams(key=key[:whole], value=values))
        self.allocator.free(values[len(prefix) : result.prefix_len])
        self.allocator.free(slots[whole - len(prefix) :])
        self.tree.dec_lock_ref(node)
        return True

    def hold(self, token_ids: Sequence[int], num_slots: int) -> None:
        """A running request: locks its cached prefix and takes slots of its own."""
        match = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", token_ids))))
        self.tree.inc_lock_ref(match.last_device_node)
        slots = self._allocate(num_slots)
        if slots is None:
            slots = torch.empty(0, dtype=torch.int64)
        self.held.append(Held(match.last_device_node, slots))

    def let_go(self) -> None:
        """End the oldest running request without keeping what it computed."""
        held = self.held.pop(0)
        self.allocator.free(held.slots)
        self.tree.dec_lock_ref(held.node)

    def evict(self, num_tokens: int) -> None:
        """Free memory, in the tree's order."""
        self.tree.evict(EvictParams(num_tokens=num_tokens))

    def peek(self, token_ids: Sequence[int], namespace: str = "") -> int:
        """Length of the cached prefix."""
        return self.tree.peek(array("q", token_ids), namespace)

    def incoming(
        self, token_ids: Sequence[int], first_token: int = 0, namespace: str = ""
    ) -> IncomingTransfer:
        """A transfer of KV as a server that computed it would have sent it."""
        staging = torch.empty(
            (2, NUM_LAYERS, len(token_ids) - first_token, NUM_HEADS * HEAD_DIM), dtype=torch.float32
        )
        staging[:] = torch.tensor(kv_of(token_ids)[first_token:]).view(1, 1, -1, 1)
        return IncomingTransfer(
            transfer_id=1,
            stream_id=1,
            epoch=1,
            source_server_id="p0",
            token_ids=array("i", token_ids),
            first_token=first_token,
            staging=staging.view(-1).view(torch.uint8),
            namespace=namespace,
        )

    def write(self, slots: torch.Tensor, values: Sequence[float]) -> None:
        """Put KV into slots, as the model does."""
        content = torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1)
        for buffer in (*self.kv.k_buffer, *self.kv.v_buffer):
            buffer[slots] = content.expand(-1, NUM_HEADS, HEAD_DIM)

    def rows(self) -> torch.Tensor:
        """A copy of all KV, [2 * layers, slots, heads, dim]."""
        return torch.stack([*self.kv.k_buffer, *self.kv.v_buffer]).clone()

    def paths(self) -> Iterator[tuple[TreeNode, list[int]]]:
        """Every node of the tree with all tokens up to its end."""
        stack: list[tuple[TreeNode, list[int]]] = [(self.tree.root_node, [])]
        while stack:
            node, before = stack.pop()
            for child in node.children.values():
                ids = before + list(child.key.token_ids)
                stack.append((child, ids))
                yield child, ids

    def tree_slots(self) -> list[int]:
        """All slots that the tree owns."""
        return [slot for node, _ in self.paths() for slot in node.value.tolist()]

    def check(self) -> None:
        """Every slot has one owner, the counts add up, and the KV is that of its tokens."""
        num_free = self.allocator.available_size()
        held = [slot for request in self.held for slot in request.slots.tolist()]
        evictable, protected = self.tree.evictable_size(), self.tree.protected_size()
        assert num_free + evictable + protected + len(held) == self.num_tokens
        owned = self.tree_slots()
        assert evictable + protected == len(owned)
        assert len(set(owned + held)) == len(owned) + len(held), "a slot has two owners"
        for node, ids in self.paths():
            expected = torch.tensor(kv_of(ids)[len(ids) - len(node.key) :]).view(-1, 1, 1)
            for buffer in (*self.kv.k_buffer, *self.kv.v_buffer):
                assert torch.equal(buffer[node.value], expected.expand(-1, NUM_HEADS, HEAD_DIM))

    def _allocate(self, num_tokens: int) -> torch.Tensor | None:
        missing = num_tokens - self.allocator.available_size()
        if missing > 0:
            self.evict(missing)
        slots: torch.Tensor | None = self.allocator.alloc(num_tokens)
        return slots
