"""Tells the router which blocks of prompts are in the radix tree, once it has asked.

1. ``watch``: the engine keeps a record from now on; all blocks that there are go out with the next
   ``publish``. The router asks again when a report was lost.
2. ``publish``, at the end of each turn: what changed since the last report, at most every
   ``INTERVAL_S``, at once when the engine is idle. What came and went in between is not told.
3. Where a report of all blocks is shorter than one of the changes, that goes out instead. So what
   waits to be told never outgrows the tree, however long nothing could be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamfill.engine.interface import Engine
from streamfill.messages import server_to_router as s
from streamfill.stream.prefix_blocks import BlockKey, pack_keys

INTERVAL_S = 0.1
"""The router expects what it sent itself, so it waits for no report."""
REPEAT_S = 1.0
"""The newest number is repeated so often; an idle server has a turn as often as that."""
COMPLETE_INTERVAL_S = 0.5
"""All blocks of a large pool take milliseconds to collect, and a router that misses reports asks
for them at each."""


class ResidencyReports:
    """Of one rank; the reports of all ranks are the same, and rank 0's are sent."""

    def __init__(
        self,
        engine: Engine,
        send: Callable[[s.ServerToRouter], None],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._send = send
        self._clock = clock
        self._block_tokens = 0
        self._seq = 0
        self._is_complete_due = False
        self._completed_s = float("-inf")
        self._sent_s = float("-inf")

    def watch(self, block_tokens: int) -> None:
        """Report blocks of so many tokens, all of them first. 0 or less: report nothing."""
        if block_tokens <= 0:
            self.stop()
            return
        if block_tokens != self._block_tokens:
            self._block_tokens = block_tokens
            self._engine.watch_blocks(block_tokens)
            self._completed_s = float("-inf")
        self._is_complete_due = True

    def stop(self) -> None:
        """Nobody wants to know any more. Idempotent."""
        if self._block_tokens:
            self._block_tokens = 0
            self._engine.watch_blocks(0)

    def publish(self, *, is_idle: bool) -> None:
        """Send what is due."""
        if not self._block_tokens:
            return
        now_s = self._clock()
        if self._is_complete_due:
            if now_s >= self._completed_s + COMPLETE_INTERVAL_S:
                self._report_all(now_s)
            return
        if not is_idle and now_s < self._sent_s + INTERVAL_S:
            return
        changes = self._engine.take_blocks()
        num_changes = len(changes.stored) + len(changes.removed)
        if changes.cleared or num_changes > self._engine.num_held_blocks:
            self._report_all(now_s)
        elif num_changes or now_s >= self._sent_s + REPEAT_S:
            after_seq = self._seq
            self._seq += bool(num_changes)
            self._report(now_s, after_seq, changes.stored, changes.removed)

    def _report_all(self, now_s: float) -> None:
        self._engine.take_blocks()
        self._is_complete_due = False
        self._completed_s = now_s
        self._seq += 1
        self._report(now_s, self._seq - 1, self._engine.held_blocks(), (), is_complete=True)

    def _report(
        self,
        now_s: float,
        after_seq: int,
        stored: Sequence[BlockKey],
        removed: Sequence[BlockKey],
        *,
        is_complete: bool = False,
    ) -> None:
        self._sent_s = now_s
        self._send(
            s.Residency(
                block_tokens=self._block_tokens,
                after_seq=after_seq,
                seq=self._seq,
                is_complete=is_complete,
                stored=pack_keys(stored),
                removed=pack_keys(removed),
            )
        )
