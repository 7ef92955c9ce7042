"""KV on its way out of a server's pool.

On the CPU the transport reads it where it lies: the nodes of the radix tree are locked, so that
nobody evicts or overwrites them, until the transfer's outcome is known. That costs the scheduler's
loop nothing, and no memory. On a GPU it is copied into staging memory, since the transport's thread
has no turn on the compute stream. So it is for several tensor-parallel ranks: each hears of the
outcome by itself, and what is locked decides what all of them have to do alike.

Depends on ``mem_cache.radix_cache.RadixCache`` (``match_prefix``, ``inc_lock_ref``,
``dec_lock_ref``).
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import TreeNode

from streamfill.engine.interface import ExportedKv
from streamfill.engine.radix import KvPool, radix_key
from streamfill.kv_transfer.pool import StagingPool
from streamfill.kv_transfer.source import StagedKv, paged_kv
from streamfill.messages.common import SHARED_NAMESPACE


class KvExports:
    """What a server has lent to its transport."""

    def __init__(
        self, pool: KvPool, tree: Any, staging_limit_bytes: int, *, may_lock: bool = True
    ) -> None:
        """
        Args:
            pool: KV of this rank.
            tree: the radix tree over it.
            staging_limit_bytes: of staging memory, where KV is copied.
            may_lock: this is the only rank.
        """
        self._may_lock = may_lock and pool.device.type == "cpu"
        self._pool = pool
        self._tree = tree
        self._staging = StagingPool(staging_limit_bytes, device=pool.device)
        self._locked: dict[int, TreeNode] = {}
        """By identity of the export."""

    def __len__(self) -> int:
        """Exports that are still read from the pool itself."""
        return len(self._locked)

    def lend(
        self, token_ids: array[int], first_token: int, namespace: str = SHARED_NAMESPACE
    ) -> ExportedKv | None:
        """See ``interface.Engine.export_kv``."""
        match = self._tree.match_prefix(MatchPrefixParams(key=radix_key(token_ids, namespace)))
        slots: torch.Tensor = match.device_indices[first_token:]
        num_tokens = len(match.device_indices)
        if not len(slots):
            return None
        if self._may_lock:
            k_buffers, v_buffers = self._pool.buffers
            exported = ExportedKv(
                first_token=first_token,
                num_tokens=num_tokens,
                kv=paged_kv(
                    self._pool.layout, k_buffers, v_buffers, slots, buffers=self._pool.shared
                ),
            )
            self._tree.inc_lock_ref(match.last_device_node)
            self._locked[id(exported)] = match.last_device_node
            return exported
        staging = self._staging.try_acquire(len(slots) * self._pool.layout.bytes_per_token)
        if staging is None:
            return None
        self._pool.gather(slots, staging)
        return ExportedKv(first_token=first_token, num_tokens=num_tokens, kv=StagedKv(staging))

    def take_back(self, exported: ExportedKv) -> None:
        """See ``interface.Engine.release_export``."""
        node = self._locked.pop(id(exported), None)
        if node is not None:
            self._tree.dec_lock_ref(node)
        elif isinstance(exported.kv, StagedKv):
            self._staging.release(exported.kv.staging)
        else:
            raise ValueError("this export was given back before")
