"""Short and long prefills in separate queues, after PLA-Serve (LAPS).

A short prefill that shares a step with a long one takes as long as the long one. So a step runs
either short commits or long ones. Short ones gather for a moment, the *window*, so that they share
a step; the engine does long ones meanwhile, and does not idle: where no long one waits, short ones
run at once. A long one that has waited for ``long_wait_ms`` goes before the short ones that were
committed after it, so that they cannot keep it waiting for ever. Uncommitted context follows in the
same two queues, without a window.

Within a queue, the older commit goes first, and the context whose newest segment is older. Higher
priority goes before that.

Starvation: a long commit waits for at most ``long_wait_ms`` and what was committed before it; a
short one for the window, the short ones before it, and long ones that are overdue.
"""

from __future__ import annotations

from typing import Final

from streamfill.scheduling.plan import DeferReason
from streamfill.scheduling.policy import PolicyContext
from streamfill.scheduling.snapshot import Experience, Snapshot, StreamView
from streamfill.scheduling.step import Step, num_lacking_tokens
from streamfill.scheduling.turn_policy import TurnPolicy
from streamfill.scheduling.turn_queue import Key
from streamfill.stream.ids import StreamId

SHORT_TOKENS: Final = 96
WINDOW_MS: Final = 50.0
LONG_WAIT_MS: Final = 5000.0
_LONG: Final = float(1 << 40)


class LapsPolicy(TurnPolicy):
    """The ``Policy`` described above."""

    def __init__(self, context: PolicyContext | None = None) -> None:
        context = context or PolicyContext()
        self._short_tokens = int(context.number("short_tokens", SHORT_TOKENS, least=1))
        self._window_s = context.number("window_ms", WINDOW_MS, least=0.0) / 1e3
        self._long_wait_s = context.number("long_wait_ms", LONG_WAIT_MS, least=0.0) / 1e3
        super().__init__(context)

    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        committed_s = view.last_segment_s if view.committed_s is None else view.committed_s
        return self._queue(view), committed_s

    def context_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return self._queue(view), view.last_segment_s

    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        is_committed = view.committed_s is not None
        return float(is_committed), -view.arrival_s

    def _queue(self, view: StreamView) -> float:
        return (_LONG if self._is_long(view) else 0.0) - view.priority

    def _is_long(self, view: StreamView) -> bool:
        return num_lacking_tokens(view) > self._short_tokens

    def _run_commits(self, snapshot: Snapshot, step: Step) -> DeferReason | None:
        streams = snapshot.streams
        commits = list(self._index.commits)
        short, long = list[StreamId](), list[StreamId]()
        for stream_id in commits:
            (long if self._is_long(streams[stream_id]) else short).append(stream_id)
        unfinished = self._index.unfinished
        if unfinished is not None and commits[0] == unfinished:
            return self._run_queue(snapshot, step, short if unfinished in short else long)
        if short and long and not self._is_long_next(snapshot, streams[short[0]], streams[long[0]]):
            return self._run_queue(snapshot, step, short) or DeferReason.NOT_WORTH_IT
        if short and long:
            return self._run_queue(snapshot, step, long) or DeferReason.WINDOW
        return self._run_queue(snapshot, step, commits)

    def _is_long_next(self, snapshot: Snapshot, short: StreamView, long: StreamView) -> bool:
        now_s = snapshot.now_s
        assert short.committed_s is not None
        assert long.committed_s is not None
        is_overdue = now_s - long.committed_s >= self._long_wait_s
        # A nearly finished prompt counts as short. If it lost its KV to a younger long one, it
        # would be long again and take it back.
        is_older = (-long.priority, long.committed_s) < (-short.priority, short.committed_s)
        if is_overdue and is_older:
            return True
        return now_s - short.committed_s < self._window_s
