"""Replays scripts against a target: starts each when it is due, whatever the others do.

1. The target's counters are read, and the garbage collector is kept from long pauses.
2. The feeder takes one script after the other, waits until it is due and for a place, and makes a
   task of it. Only the scripts of running requests are in memory.
3. Each task plays its mode and ends with a record, also when the request fails, takes too long or
   is stopped.
4. The counters are read again.

The event loop's timers are exact to about a millisecond, which is the resolution of the operating
system's wait; `lag` tells how late things really were.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from streamfill.errors import CancelledStreamError, DeadlineExceededError, StreamError
from streamfill.loadgen.modes import play
from streamfill.loadgen.records import ModeName, RequestRecord, RunResult
from streamfill.loadgen.request_log import RequestLog
from streamfill.loadgen.short_collections import short_collections
from streamfill.loadgen.target import Target
from streamfill.traces.script import Script

logger = logging.getLogger(__name__)

_LEAD_S: Final = 0.05
"""From the end of the preparations to the first arrival."""
_PROGRESS_S: Final = 0.25
"""Between two reports: often enough for people, too seldom to disturb the schedule."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How a run is made.

    Attributes:
        mode: what the client does with each request.
        label: what the run is called; the same for all repetitions.
        run: number of the repetition, from 0.
        request_rate: for the result only: the rate of ``starts_s``.
        max_concurrency: most requests at the same time; None: no limit.
        is_closed_loop: a request arrives when a place is free; ``starts_s`` says only how many.
        num_warm_up: so many requests at the start are left out of the figures.
        timeout_s: a request that has no whole answer so long after its prompt was complete is given
            up; None: never.
        ttft_slo_ms: what each request tells the target of the time to its first token that it
            wants; None: nothing.
    """

    mode: ModeName
    label: str
    run: int = 0
    policy: str = ""
    trace: str = ""
    request_rate: float | None = None
    max_concurrency: int | None = None
    is_closed_loop: bool = False
    num_warm_up: int = 0
    timeout_s: float | None = None
    ttft_slo_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """How far a run is."""

    num_total: int
    num_done: int
    """Failed ones too."""
    num_failed: int
    num_in_flight: int


async def replay(
    target: Target,
    scripts: Iterable[Script],
    starts_s: Sequence[float],
    plan: RunPlan,
    *,
    on_progress: Callable[[RunProgress], None] | None = None,
    stop: asyncio.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> RunResult:
    """Makes one run.

    Args:
        scripts: read as they are needed; those without an entry in ``starts_s`` are left out.
        starts_s: of each request, since the start of the run; never falling.
        on_progress: called in the event loop now and then, and at the end; must return at once.
        stop: once it is set, nothing is started any more, and what is running is given up and
            recorded as CANCELLED.
        clock: the event loop's own, in seconds; tests have another one.

    Raises:
        StreamError: the target did not give its counters before the run.
        TraceError: the trace turned out to be wrong while it was read.
    """
    counters_before = await target.counters()
    run = _Run(target, plan, len(starts_s), clock)
    reporter = asyncio.create_task(_report(run, on_progress)) if on_progress else None
    watcher = asyncio.create_task(_stop_when_set(run, stop)) if stop else None
    try:
        with short_collections():
            await run.make(scripts, starts_s)
    finally:
        for helper in (reporter, watcher):
            if helper is not None:
                helper.cancel()
    if on_progress is not None:
        on_progress(run.progress)
    records = tuple(sorted(run.records, key=lambda record: record.index))
    return RunResult(
        run=plan.run,
        label=plan.label,
        mode=plan.mode,
        target=target.name,
        policy=plan.policy,
        trace=plan.trace,
        request_rate=plan.request_rate,
        max_concurrency=plan.max_concurrency,
        is_closed_loop=plan.is_closed_loop,
        wall_s=wall_s(records),
        records=records,
        counters_before=counters_before,
        counters_after=await _counters_after(target),
    )


def wall_s(records: Sequence[RequestRecord]) -> float:
    """From the first arrival to the end of the last answer."""
    starts_s = [record.client_events[0][1] for record in records]
    ends_s = [record.client_events[-1][1] for record in records]
    return max(ends_s) - min(starts_s) if records else 0.0


class _Run:
    """The requests of one run. ``records`` are in the order of their ends."""

    def __init__(
        self, target: Target, plan: RunPlan, num_total: int, clock: Callable[[], float]
    ) -> None:
        self.records: list[RequestRecord] = []
        self._target = target
        self._plan = plan
        self._num_total = num_total
        self._clock = clock
        self._zero_s = 0.0
        self._num_failed = 0
        self._places = (
            None if plan.max_concurrency is None else asyncio.Semaphore(plan.max_concurrency)
        )
        self._feeder: asyncio.Task[None] | None = None
        self._in_flight: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    @property
    def progress(self) -> RunProgress:
        """At this moment."""
        return RunProgress(
            num_total=self._num_total,
            num_done=len(self.records),
            num_failed=self._num_failed,
            num_in_flight=len(self._in_flight),
        )

    async def make(self, scripts: Iterable[Script], starts_s: Sequence[float]) -> None:
        """Everything from the first arrival to the last answer."""
        remaining = iter(scripts)
        # The first one is slow to make: modules are loaded for it.
        ahead = tuple(islice(remaining, 1))
        self._zero_s = self._clock() + _LEAD_S
        try:
            async with asyncio.TaskGroup() as group:
                feeding = self._feed(chain(ahead, remaining), starts_s, group)
                self._feeder = group.create_task(feeding)
                if self._is_stopped:
                    self._feeder.cancel()
        except ExceptionGroup as errors:
            first = errors.exceptions[0]  # a broken line of the trace, or a bug
            raise first from first.__cause__

    def stop(self) -> None:
        """Give up what is running and start nothing any more. Idempotent."""
        self._is_stopped = True
        for task in (self._feeder, *self._in_flight):
            if task is not None:
                task.cancel()

    async def _feed(
        self, scripts: Iterable[Script], starts_s: Sequence[float], group: asyncio.TaskGroup
    ) -> None:
        for index, (start_s, script) in enumerate(zip(starts_s, scripts, strict=False)):
            due_s = self._zero_s + start_s
            wait_s = due_s - self._clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            released_s: float | None = None
            if self._places is not None:
                if self._places.locked():
                    await self._places.acquire()
                    released_s = self._clock()
                else:
                    await self._places.acquire()
            if self._plan.is_closed_loop:
                due_s, released_s = max(due_s, self._clock()), None
            log = RequestLog(
                script,
                index=index,
                zero_s=self._zero_s,
                due_s=due_s,
                released_s=released_s,
                is_warm_up=index < self._plan.num_warm_up,
            )
            task = group.create_task(self._request(log))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)

    async def _request(self, log: RequestLog) -> None:
        try:
            async with asyncio.timeout(self._remaining_s(log)):
                await play(
                    self._plan.mode,
                    self._target,
                    log,
                    ttft_slo_ms=self._plan.ttft_slo_ms,
                    clock=self._clock,
                )
        except StreamError as error:
            log.note_failure(error, self._clock())
        except TimeoutError:
            text = f"no whole answer {self._plan.timeout_s:g} s after the prompt was complete"
            log.note_failure(DeadlineExceededError(text), self._clock())
        except asyncio.CancelledError:
            if not self._is_stopped:
                raise
            log.note_failure(CancelledStreamError("the run was stopped"), self._clock())
        finally:
            if self._places is not None:
                self._places.release()
        record = log.record()
        self._num_failed += record.error_code is not None
        self.records.append(record)

    def _remaining_s(self, log: RequestLog) -> float | None:
        if self._plan.timeout_s is None:
            return None
        end_s = log.due_s + log.script.commit_due_s + self._plan.timeout_s
        return max(0.0, end_s - self._clock())


async def _report(run: _Run, on_progress: Callable[[RunProgress], None]) -> None:
    while True:
        on_progress(run.progress)
        await asyncio.sleep(_PROGRESS_S)


async def _stop_when_set(run: _Run, stop: asyncio.Event) -> None:
    await stop.wait()
    run.stop()


async def _counters_after(target: Target) -> dict[str, int]:
    """Nothing where the target is gone by now: that must not cost the run."""
    try:
        return await target.counters()
    except StreamError as error:
        logger.warning("no counters after the run error=%s", error)
        return {}
