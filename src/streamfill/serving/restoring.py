"""Bringing KV back from host memory: what a plan's runs build on, what a request needs that waits
for memory, and ahead of time, while the engine has nothing to do.

Room in the device pool is what is scarce: what comes back takes it from others. So nothing comes
back for a run that would have to wait all the same, and not for two that would take it from each
other.
"""

from __future__ import annotations

from streamfill.engine.interface import Engine
from streamfill.scheduling.plan import StepPlan, StreamRun
from streamfill.serving.account import NEGLIGIBLE_TOKENS
from streamfill.serving.deciding import Decider
from streamfill.serving.records import Phase, StreamRecord, Streams
from streamfill.serving.stream_kv import StreamKv

PREFETCH_S = 1.0
"""KV comes back so long before its stream's next segment is expected: about one gap of a crawler,
and an idle server looks this often."""
IDLE_COPY_TOKENS = 1024
"""An idle turn copies no further stream behind so many tokens: some 10 ms on one CPU core, with 46
kB per token."""


class Restoring:
    """Owned by the core; has nothing of its own."""

    def __init__(self, engine: Engine, decider: Decider, kv: StreamKv, streams: Streams) -> None:
        self._engine = engine
        self._decider = decider
        self._kv = kv
        self._streams = streams

    def restore(self, plan: StepPlan) -> StepPlan | None:
        """Bring back from host memory what the plan's runs build on.

        There may be less room than was thought, also since what comes back for one run takes the
        room of another's. Runs that lack something then wait for a later plan: what they build on
        is still in host memory. The first run is served last, so that it is not one of them. None:
        nothing is left of the plan, and nothing is under way that would give memory back. Then what
        did not come back counts as lost from now on, so this is None at most once per stream.
        """
        if not any(run.num_restored for run in plan.runs):
            return plan
        plan = plan._replace(runs=tuple(run for run in plan.runs if self._may_restore(run)))
        if not plan.runs:
            return plan
        wanted: dict[int, int] = {}
        for run in reversed(plan.runs):
            record = self._streams.records[run.stream_id]
            wanted[run.stream_id] = record.num_computed + run.num_restored
            if run.num_restored:
                self._kv.bring_back(record, run.up_to)
        lacking: list[StreamRecord] = []
        for stream_id, num_wanted in wanted.items():
            record = self._streams.records[stream_id]
            if self._kv.cached_tokens(record, num_wanted) < num_wanted:
                self._kv.find(record)
                record.num_host = self._kv.host_tokens(record, record.num_computed)
                self._decider.touch(record)
                lacking.append(record)
        waiting = {record.stream_id for record in lacking}
        runs = tuple(run for run in plan.runs if run.stream_id not in waiting)
        if runs or self._will_free_memory():
            return plan._replace(runs=runs)
        for record in lacking:
            record.num_host = 0
        return None

    def restore_for_waiting(self) -> None:
        """The first request that the engine found no memory for may have lost what it builds on to
        those that it started: bring that back, or the engine computes it again. Not for those
        behind it, which would only take it from each other."""
        waiting, by_key = self._engine.waiting_keys(), self._streams.by_key
        record = next((by_key[key] for key in by_key if key in waiting), None)
        if record is None or record.in_flight is None:
            return
        num_in_tree = record.in_flight.num_in_tree
        cached = self._kv.cached_tokens(record, num_in_tree)
        if cached >= num_in_tree or not self._kv.host_tokens(record, cached):
            return
        if record.phase is Phase.ANSWERING:  # its account is closed
            self._engine.restore(record.ids[: record.in_flight.up_to], namespace=record.namespace)
            self._kv.tag(record)
        else:
            self._kv.bring_back(record, record.in_flight.up_to)

    def use_idle_time(self, now_s: float) -> None:
        """The engine has nothing to do: copies cost nobody anything now. A turn ends with the
        stream that reaches ``IDLE_COPY_TOKENS``, so what arrives meanwhile waits for little more
        than one stream's copy.

        1. What will soon be needed comes back, where memory is free that nobody needs: streams in
           host memory whose next segment is expected within ``PREFETCH_S``.
        2. While memory is short, those who would be taken from next are copied ahead, so that
           taking it costs nothing when it is needed (rotation above a watermark).
        """
        if self._engine.host_room().num_tokens:
            self._copy_ahead(self._prefetch(now_s))

    def _prefetch(self, now_s: float) -> int:
        """Part 1. Returns how many tokens may be copied still."""
        num_left = IDLE_COPY_TOKENS
        num_spare = self._engine.memory().free_tokens - self._decider.watermark_tokens
        for record in self._streams.records.values():
            if num_left <= 0 or num_spare <= 0:
                break
            if not 0 < record.num_host <= num_spare or record.phase is not Phase.OPEN:
                continue
            expected_s = record.expected_next_s()
            if expected_s is None or not 0.0 <= expected_s - now_s <= PREFETCH_S:
                continue
            num_before = record.num_computed
            self._kv.bring_back(record, len(record.ids))
            num_left -= record.num_computed - num_before
            num_spare -= record.num_computed - num_before
        return num_left

    def _copy_ahead(self, num_left: int) -> None:
        """Part 2."""
        to_save = self._decider.to_save
        for stream_id in self._decider.standing_order:
            if num_left <= 0:
                break
            victim = self._streams.find(stream_id)
            if (
                victim is None
                or stream_id not in to_save
                or victim.num_computed - victim.num_saved < NEGLIGIBLE_TOKENS
            ):
                continue
            ids = victim.ids[: victim.num_computed]
            num_saved = self._engine.copy_ahead(ids, namespace=victim.namespace)
            num_left -= max(0, num_saved - victim.num_saved)
            victim.num_saved = max(victim.num_saved, num_saved)
            if victim.num_computed - num_saved >= NEGLIGIBLE_TOKENS:
                break  # host memory is full
            self._decider.touch(victim)

    def _may_restore(self, run: StreamRun) -> bool:
        """Whether what the run builds on may come back from host memory. Not while the engine has
        no memory for a request that is as urgent: the room would be taken from what that one
        builds on, and the run would have to wait behind it all the same."""
        if not run.num_restored:
            return True
        by_key = self._streams.by_key
        waiting = [by_key[key] for key in self._engine.waiting_keys() if key in by_key]
        if self._streams.records[run.stream_id].answer is None:
            return not waiting
        return all(record.answer is None for record in waiting)

    def _will_free_memory(self) -> bool:
        """Whether something is under way that gives memory back when it ends, and ends soon."""
        return bool(self._streams.by_key or self._engine.num_lent)
