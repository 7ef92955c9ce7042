"""Follows what servers report of their caches (``Residency``), without a gap or with a new start.

Of each server, by the number of its newest change that was applied::

    (asked) ──complete──▶ at seq ──change behind seq──▶ at its seq
                             │ a report that goes on behind another one: a gap
                             └──▶ (asked again); until all blocks are there, the old view is kept

What is older than what is known is passed over, so repetitions are harmless. A server that does not
answer is asked again after ``ASK_AGAIN_S``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from router.placement.interface import BlockNews
from router.placement.placer import Placer
from streamfill.messages.server_to_router import Residency
from streamfill.observability.logging import RateLimited, log_event
from streamfill.stream.ids import ServerId
from streamfill.stream.prefix_blocks import unpack_keys

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 3.0
"""A server answers between two forward passes, which on a CPU may take seconds; asking twice costs
it a report of everything."""


@dataclass(slots=True)
class _Followed:
    seq: int | None = None
    """Newest change that was applied. None: all blocks were asked for, or are to be."""
    asked_s: float = float("-inf")


class ResidencyFollower:
    """Owned by the cluster. No sockets, no clock."""

    def __init__(self, placer: Placer, ask: Callable[[ServerId, int], None]) -> None:
        """
        Args:
            ask: sends ``WatchResidency`` with that many tokens to a block; may fail in silence.
        """
        self._placer = placer
        self._block_tokens = placer.policy.block_tokens
        self._ask = ask
        self._servers: dict[ServerId, _Followed] = {}
        self._log_gap = RateLimited()
        self.num_gaps = 0
        """Since the start."""
        self.num_asked = 0
        """Questions for all blocks of a server, since the start."""

    @property
    def num_awaited(self) -> int:
        """Servers that have not answered such a question yet: what is known of them is old, or
        nothing."""
        return sum(followed.seq is None for followed in self._servers.values())

    def follow(self, server_id: ServerId, now_s: float) -> None:
        """A prefill server registered: whatever was known of one with this id is over."""
        self.lost(server_id)
        if self._block_tokens:
            followed = self._servers[server_id] = _Followed()
            self._ask_all(server_id, followed, now_s)

    def lost(self, server_id: ServerId) -> None:
        """The server is gone. Idempotent."""
        self._servers.pop(server_id, None)
        self._placer.note_lost(server_id)

    def tick(self, now_s: float) -> None:
        """Ask those again that have not answered."""
        for server_id, followed in self._servers.items():
            if followed.seq is None and now_s >= followed.asked_s + ASK_AGAIN_S:
                self._ask_all(server_id, followed, now_s)

    def heard(self, server_id: ServerId, report: Residency, now_s: float) -> None:
        """A server reported.

        Raises:
            ProtocolError: its keys cannot be read; nothing was changed.
        """
        followed = self._servers.get(server_id)
        if followed is None or report.block_tokens != self._block_tokens:
            return
        news = BlockNews(
            is_complete=report.is_complete,
            stored=unpack_keys(report.stored),
            removed=unpack_keys(report.removed),
        )
        if report.is_complete:
            if followed.seq is None or report.seq > followed.seq:
                followed.seq = report.seq
                self._placer.note_blocks(server_id, news)
        elif followed.seq is None or report.seq <= followed.seq:
            return
        elif report.after_seq == followed.seq:
            followed.seq = report.seq
            self._placer.note_blocks(server_id, news)
        else:
            self.num_gaps += 1
            if self._log_gap.allow():
                log_event(
                    logger,
                    "residency_gap",
                    level=logging.WARNING,
                    server_id=server_id,
                    have_seq=followed.seq,
                    after_seq=report.after_seq,
                )
            followed.seq = None
            self._ask_all(server_id, followed, now_s)

    def _ask_all(self, server_id: ServerId, followed: _Followed, now_s: float) -> None:
        followed.asked_s = now_s
        self.num_asked += 1
        self._ask(server_id, self._block_tokens)
