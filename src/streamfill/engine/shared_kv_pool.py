"""SGLang's KV pool in memory that other processes of the machine can map, for hand-offs that copy
every byte once.

Depends on ``mem_cache.memory_pool.MHATokenToKVPool`` (``_create_buffers_normal``, ``k_buffer``,
``v_buffer``).
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.staging import layout_of
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)


class SharedMhaTokenToKvPool(MHATokenToKVPool):  # type: ignore[misc]  # sglang is untyped
    """Of the CPU platform. Where such memory cannot be had, an ordinary pool."""

    shared_buffers: SharedBuffers | None
    page_size: int
    k_buffer: list[Any]
    v_buffer: list[Any]

    def _create_buffers_normal(self) -> None:
        super()._create_buffers_normal()
        self.shared_buffers = None
        # Zeroed memory is not there before it is touched, so nothing is held twice.
        try:
            layout = layout_of(self.k_buffer, self.v_buffer, page_size=self.page_size)
            shared = SharedBuffers(layout, self.k_buffer[0].shape[0])
        except (OSError, ValueError) as error:
            log_event(logger, "kv_pool_not_shared", level=logging.WARNING, reason=str(error))
            return
        self.k_buffer, self.v_buffer = shared.k_buffers, shared.v_buffers
        self.shared_buffers = shared
