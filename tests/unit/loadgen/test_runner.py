"""The loop that starts requests when they are due."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from streamfill.errors import InternalError, StreamError, TraceError, UnavailableError
from streamfill.loadgen.records import ModeName, RunResult
from streamfill.loadgen.runner import RunPlan, RunProgress, replay
from streamfill.loadgen.target import Ask, Reply
from streamfill.loadgen.targets.fake import FakeTarget, FakeTimes
from streamfill.observability.lifetime import LifetimeEvent, first_at_s, ttft_from_open_s
from streamfill.traces.script import Content, Script
from tests.unit.loadgen.script_builders import script
from tests.unit.loadgen.virtual_time import Clock, run_virtually

ONE_PIECE = {"pieces": ("prompt",), "max_output_tokens": 1}


def scripts(num: int, **fields: Any) -> list[Script]:
    return [script(f"q{number}", **{**ONE_PIECE, **fields}) for number in range(num)]


def run(
    starts_s: Sequence[float],
    times: FakeTimes | None = None,
    *,
    plan: dict[str, Any] | None = None,
    replayed: Iterator[Script] | list[Script] | None = None,
    stop_at_s: float | None = None,
    on_progress: Callable[[RunProgress], None] | None = None,
    target_of: Callable[[Clock], FakeTarget] | None = None,
) -> RunResult:
    """A run in virtual time."""

    async def work(clock: Clock) -> RunResult:
        target = FakeTarget(times, clock=clock) if target_of is None else target_of(clock)
        stop = asyncio.Event()
        if stop_at_s is not None:
            asyncio.get_running_loop().call_later(stop_at_s, stop.set)
        return await replay(
            target,
            scripts(len(starts_s)) if replayed is None else replayed,
            starts_s,
            RunPlan(**{"mode": ModeName.ONESHOT, "label": "oneshot", **(plan or {})}),
            on_progress=on_progress,
            stop=stop,
            clock=clock,
        )

    return run_virtually(work)


def sent_s(result: RunResult) -> list[float]:
    """When each request was sent."""
    found = [first_at_s(r.client_lifetime(), LifetimeEvent.SEGMENT_SENT) for r in result.records]
    return [at_s for at_s in found if at_s is not None]


def opened_s(result: RunResult) -> list[float]:
    return [record.client_events[0][1] for record in result.records]


def test_requests_start_when_they_are_due() -> None:
    """Whatever the others do: each takes longer than the time between two of them."""
    starts_s = [0.0, 0.1, 0.1, 5.0]
    result = run(starts_s, FakeTimes(first_token_s=3.0))
    assert sent_s(result) == pytest.approx(starts_s, abs=1e-6)
    assert [record.index for record in result.records] == [0, 1, 2, 3]
    assert [record.error_code for record in result.records] == [None] * 4
    assert result.wall_s == pytest.approx(8.0)


def test_a_limit_makes_requests_wait_and_the_wait_counts() -> None:
    """Two at a time, of 3 s each; latency runs from when a request was due, lag does not."""
    result = run([0.0, 0.0, 1.0], FakeTimes(first_token_s=3.0), plan={"max_concurrency": 2})
    assert sent_s(result) == pytest.approx([0.0, 0.0, 3.0])
    assert opened_s(result) == pytest.approx([0.0, 0.0, 1.0])
    waits = [ttft_from_open_s(record.client_lifetime()) for record in result.records]
    assert waits == pytest.approx([3.0, 3.0, 5.0])
    assert max(lag_s for record in result.records for lag_s in record.lag_s) < 1e-6


def test_in_a_closed_loop_a_request_arrives_when_a_place_is_free() -> None:
    """So that no waiting is in its latency."""
    result = run(
        [0.0] * 4,
        FakeTimes(first_token_s=3.0),
        plan={"max_concurrency": 2, "is_closed_loop": True},
    )
    assert opened_s(result) == pytest.approx([0.0, 0.0, 3.0, 3.0])
    waits = [ttft_from_open_s(record.client_lifetime()) for record in result.records]
    assert waits == pytest.approx([3.0] * 4)
    assert result.is_closed_loop


def test_a_request_that_fails_gives_its_place_back() -> None:
    """And its record says why."""

    def fails(kind: str, request_id: str) -> StreamError | None:
        return UnavailableError("down") if request_id == "q0" else None

    result = run(
        [0.0, 0.0],
        plan={"max_concurrency": 1},
        target_of=lambda clock: FakeTarget(clock=clock, fails=fails),
    )
    assert [record.error_code for record in result.records] == ["UNAVAILABLE", None]


@pytest.mark.parametrize("mode", list(ModeName))
def test_a_request_that_takes_too_long_is_given_up(mode: ModeName) -> None:
    """So long after its prompt was complete; the time before does not count."""
    slow = scripts(1, pieces=("a", "b"), dues_s=(0.0, 10.0))
    result = run(
        [0.0],
        FakeTimes(first_token_s=60.0),
        plan={"mode": mode, "timeout_s": 2.0},
        replayed=slow,
    )
    (record,) = result.records
    assert record.error_code == "DEADLINE_EXCEEDED"
    assert "2 s after" in record.error
    last = record.client_lifetime()[-1]
    assert last.event is LifetimeEvent.DEADLINE
    assert last.at_s == pytest.approx(12.0)


def test_a_time_out_counts_the_wait_for_a_place() -> None:
    """The time of a request runs while it waits for its turn."""
    result = run(
        [0.0, 0.0],
        FakeTimes(first_token_s=1.5),
        plan={"max_concurrency": 1, "timeout_s": 2.0},
    )
    assert [record.error_code for record in result.records] == [None, "DEADLINE_EXCEEDED"]


def test_the_first_requests_are_warm_ups() -> None:
    """As many as the plan says."""
    result = run([0.0, 0.1, 0.2], plan={"num_warm_up": 2})
    assert [record.is_warm_up for record in result.records] == [True, True, False]


def test_a_stop_records_what_was_running_and_starts_nothing() -> None:
    """One is done, one is under way, one has not begun."""
    result = run([0.0, 2.0, 9.0], FakeTimes(first_token_s=1.5), stop_at_s=3.0)
    assert [record.error_code for record in result.records] == [None, "CANCELLED"]
    last = result.records[1].client_lifetime()[-1]
    assert last.event is LifetimeEvent.ABORTED


def test_a_stop_frees_requests_that_wait_for_a_place() -> None:
    """The run ends though the one that runs never would."""
    result = run(
        [0.0, 0.0], FakeTimes(first_token_s=1e6), plan={"max_concurrency": 1}, stop_at_s=1.0
    )
    assert [record.error_code for record in result.records] == ["CANCELLED"]


def test_only_running_scripts_are_in_memory() -> None:
    """A script is made when the one before it has started, not earlier."""
    made: list[int] = []
    started: list[int] = []

    class Watching(FakeTarget):
        async def generate(self, prompt: Content, ask: Ask) -> Reply:
            started.append(len(made))
            return await super().generate(prompt, ask)

    def making() -> Iterator[Script]:
        for number, one in enumerate(scripts(50)):
            made.append(number)
            yield one

    starts_s = [0.1 * number for number in range(50)]
    run(starts_s, replayed=making(), target_of=lambda clock: Watching(clock=clock))
    assert started == [min(number + 2, 50) for number in range(50)]


def test_more_starts_than_scripts_are_no_harm() -> None:
    """The run is as long as the trace."""
    assert len(run([0.0, 0.1, 0.2], replayed=scripts(2)).records) == 2


def test_a_broken_trace_ends_the_run() -> None:
    """With the error of the trace, and nothing left running."""

    def broken() -> Iterator[Script]:
        yield from scripts(1)
        raise TraceError("t.jsonl, line 3: bad")

    with pytest.raises(TraceError, match="line 3"):
        run([0.0, 1.0], FakeTimes(first_token_s=60.0), replayed=broken())


def test_a_bug_in_a_target_is_not_taken_for_a_failed_request() -> None:
    """It ends the run."""

    class Broken(FakeTarget):
        async def generate(self, prompt: Content, ask: Ask) -> Reply:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([0.0], target_of=lambda clock: Broken(clock=clock))


def test_counters_are_read_before_and_after() -> None:
    """Of a target that is gone afterwards there are none, which does not cost the run."""
    result = run([0.0])
    assert result.counters_before == {"num_computed_tokens": 0}
    assert result.counters_after == {"num_computed_tokens": len("prompt")}

    class Vanishing(FakeTarget):
        async def counters(self) -> dict[str, int]:
            if self.sent:
                raise InternalError("gone")
            return {}

    gone = run([0.0], target_of=lambda clock: Vanishing(clock=clock))
    assert gone.counters_after == {}
    assert gone.records[0].error_code is None


def test_progress_is_told_now_and_then() -> None:
    """At the end too, with everything done."""
    seen: list[RunProgress] = []
    run([0.0, 1.0], FakeTimes(first_token_s=0.5), on_progress=seen.append)
    assert seen[0].num_done == 0
    assert any(progress.num_in_flight == 1 for progress in seen)
    assert seen[-1] == RunProgress(num_total=2, num_done=2, num_failed=0, num_in_flight=0)
    assert len(seen) < 10


def test_the_garbage_collector_is_as_before() -> None:
    """Whatever the run did to keep its pauses short."""
    before = gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()
    run([0.0])
    assert (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()) == before


def test_two_thousand_streams_at_once() -> None:
    """All are open at the same time, and all are answered."""
    num = 2000
    seen: list[RunProgress] = []
    many = scripts(num, pieces=("a", "b"), dues_s=(0.0, 10.0))
    starts_s = [number / num for number in range(num)]
    result = run(starts_s, replayed=many, plan={"mode": ModeName.STREAM}, on_progress=seen.append)
    assert max(progress.num_in_flight for progress in seen) == num
    assert all(record.error_code is None for record in result.records)
