"""What servers say of their work reaches the client, once, and in the order of time."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.accounts import WorkRecord
from router.interface import DoneEvent, Usage
from router.service_replies import stream_event
from streamfill.api.replies import AnswerBuilder
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import ComputeRun, Preemption, StreamAccount
from streamfill.observability.lifetime import (
    ComputeInterval,
    Lifetime,
    LifetimeEvent,
    compute_intervals,
    overlap_ratio,
)
from streamfill.stream.ids import StreamId
from tests.unit.router.cluster_for_tests import (
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    ids,
    until,
)
from tests.unit.router.fake_server import HANDOFF_BYTES_PER_TOKEN, HANDOFF_S

PROMPT = [20, 21, 22, 23]


def account(num_computed: int, *, reused: int = 0, lost: int = 0) -> StreamAccount:
    """One run from two seconds to one second before the message."""
    return StreamAccount(
        num_computed_tokens=num_computed,
        num_recomputed_tokens=lost,
        num_reused_tokens=reused,
        runs=(ComputeRun(start_age_s=2.0, end_age_s=1.0, num_tokens=num_computed),),
        preemptions=(Preemption(age_s=1.5, num_tokens=lost),) if lost else (),
    )


@pytest.fixture
async def cluster(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestCluster]:
    fast_timing(monkeypatch)
    async with TestCluster(tiny_model) as started:
        yield started


def test_accounts_add_up_and_count_once() -> None:
    """Those of different servers and attempts are added, one that comes again is dropped."""
    lifetime = Lifetime()
    lifetime.record(LifetimeEvent.OPENED, at_s=100.0)
    work = WorkRecord(lifetime, 100.0)
    assert work.add("p0", 1, account(40, reused=10, lost=5), 110.0)
    assert not work.add("p0", 1, account(40, reused=10, lost=5), 111.0)
    assert work.add("d0", 1, account(30), 112.0)
    assert work.add("p0", 2, account(3), 113.0)
    assert work.num_computed_tokens == 73
    assert (work.num_recomputed_tokens, work.num_reused_tokens) == (5, 10)
    assert compute_intervals(lifetime.entries) == [
        ComputeInterval(108.0, 109.0, 40),
        ComputeInterval(110.0, 111.0, 30),
        ComputeInterval(111.0, 112.0, 3),
    ]
    (lost,) = (e for e in lifetime.entries if e.event is LifetimeEvent.PREEMPTED_RECOMPUTE)
    assert (lost.at_s, lost.num_tokens) == (108.5, 5)


@pytest.mark.parametrize(
    ("start_age_s", "end_age_s", "start_s", "end_s"),
    [
        (20.0, 15.0, 100.0, 100.0),
        (math.inf, 1.0, 100.0, 109.0),
        (-5.0, -7.0, 110.0, 110.0),
        (math.nan, math.nan, 110.0, 110.0),
        (1.0, 2.0, 109.0, 109.0),
    ],
)
def test_impossible_times_stay_within_the_life_of_the_stream(
    start_age_s: float, end_age_s: float, start_s: float, end_s: float
) -> None:
    """Nothing happened before the stream was opened, in the future, or backwards."""
    lifetime = Lifetime()
    run = ComputeRun(start_age_s=start_age_s, end_age_s=end_age_s, num_tokens=1)
    told = StreamAccount(
        num_computed_tokens=1,
        num_recomputed_tokens=0,
        num_reused_tokens=0,
        runs=(run,),
        preemptions=(),
    )
    WorkRecord(lifetime, 100.0).add("p0", 1, told, 110.0)
    assert [entry.at_s for entry in lifetime.entries] == [start_s, end_s]


async def test_the_work_of_both_servers_is_told(cluster: TestCluster) -> None:
    """With every frame three times, each account counts once; hand-off and lifetime are there."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    prefill.account, decode.account = account(9, reused=1, lost=6), account(2)
    prefill.num_copies = decode.num_copies = 3
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    decode.output_limit = 7
    await handle.commit(commit_of(8))
    entries = cluster.manager._sessions[StreamId(handle.stream_id)].lifetime.entries
    await until(lambda: any(each.event is LifetimeEvent.HANDOFF_DONE for each in entries))
    decode.output_limit = 8
    _, done = await answer_of(handle)
    assert done.usage.num_computed_tokens == 11
    assert (done.usage.num_recomputed_tokens, done.usage.num_reused_tokens) == (6, 1)
    assert done.handoff == "done"
    assert done.handoff_bytes == HANDOFF_BYTES_PER_TOKEN * len(PROMPT)
    assert done.handoff_s == HANDOFF_S
    assert _handoffs(cluster) == (1, 0)
    assert [each.event for each in entries].count(LifetimeEvent.HANDOFF_DONE) == 1
    assert [run.num_tokens for run in compute_intervals(done.lifetime.entries)] == [9, 2]


async def test_a_hand_off_that_was_given_up_behind_its_report_is_a_failed_one(
    cluster: TestCluster,
) -> None:
    """The decode server had lost what it goes on behind, and computing that is cheaper than sending
    it again: two reports of one hand-off."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    decode.output_limit = 1
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(8))
    entries = cluster.manager._sessions[StreamId(handle.stream_id)].lifetime.entries
    await until(lambda: any(each.event is LifetimeEvent.HANDOFF_DONE for each in entries))
    (sent,) = prefill.of_type(r.Commit)
    assert sent.handoff is not None
    await prefill.send(
        s.HandoffReport(
            stream_id=sent.stream_id,
            attempt=sent.attempt,
            transfer_id=sent.handoff.transfer_id,
            ok=False,
            reason="cheaper to compute",
            num_tokens=0,
            num_bytes=0,
            seconds=0.0,
        )
    )
    await until(lambda: decode.of_type(r.HandoffFailed))
    decode.output_limit = 8
    _, done = await answer_of(handle)
    assert (done.handoff, done.handoff_bytes) == ("failed: cheaper to compute", None)
    assert _handoffs(cluster) == (0, 1)


def _handoffs(cluster: TestCluster) -> tuple[float, float]:
    """That went well, and that failed, by the router's metrics."""
    name = "streamfill_router_handoffs_total"
    registry = cluster.manager.metrics.set.registry
    done, failed = (
        registry.get_sample_value(name, {"outcome": outcome}) for outcome in ("done", "failed")
    )
    assert done is not None
    assert failed is not None
    return done, failed


async def test_an_attempt_that_died_leaves_no_account(cluster: TestCluster) -> None:
    """The stream is started over, and only what the second server did is told."""
    first = await cluster.prefill(0)
    first.account = account(100)
    first.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(2))
    second = await cluster.prefill(1)
    second.account = account(4)
    await until(lambda: any(stream.committed for stream in first.streams.values()))
    await cluster.kill(first)
    _, done = await answer_of(handle)
    assert (done.num_attempts, done.usage.num_computed_tokens) == (2, 4)
    assert (done.handoff_bytes, done.handoff_s) == (None, None)


async def test_a_decode_server_that_takes_over_adds_its_work(cluster: TestCluster) -> None:
    """What the dead one had computed stays counted."""
    prefill, decode = await cluster.prefill(), await cluster.decode(0)
    prefill.account, decode.account = account(4), account(3)
    decode.output_limit = 3
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(8))
    await until(lambda: handle.status().num_output_tokens == 3)
    other = await cluster.decode(1)
    other.account = account(5)
    await cluster.kill(decode)
    _, done = await answer_of(handle)
    assert done.usage.num_computed_tokens == 4 + 3 + 5


def test_the_client_gets_events_in_order_of_time() -> None:
    """However late the router learnt of them; those of one moment stay in the order recorded."""
    lifetime = Lifetime()
    for event, at_s in (
        (LifetimeEvent.OPENED, 100.0),
        (LifetimeEvent.SEGMENT_RECEIVED, 103.0),
        (LifetimeEvent.COMMIT_RECEIVED, 103.0),
    ):
        lifetime.record(event, at_s=at_s)
    told = StreamAccount(
        num_computed_tokens=40,
        num_recomputed_tokens=0,
        num_reused_tokens=0,
        runs=(
            ComputeRun(start_age_s=4.0, end_age_s=2.5, num_tokens=30, reason="segment"),
            ComputeRun(start_age_s=2.5, end_age_s=0.0, num_tokens=10),
        ),
        preemptions=(),
    )
    WorkRecord(lifetime, 100.0).add("p0", 1, told, 105.0)
    lifetime.record(LifetimeEvent.FIRST_TOKEN, at_s=105.0)
    lifetime.record(LifetimeEvent.DONE, at_s=105.0)
    done = DoneEvent(
        finish_reason="stop",
        text_tail="",
        matched_stop=None,
        usage=Usage(
            num_prompt_tokens=40, num_output_tokens=1, num_cached_tokens=0, num_invalidated_tokens=0
        ),
        prefill_server="p0",
        decode_server="d0",
        decoded_by_prefill=False,
        handoff="done",
        num_attempts=1,
        lifetime=lifetime,
        handoff_bytes=0,
        handoff_s=0.5,
    )
    builder = AnswerBuilder(commit_sent_s=0.0, last_segment_sent_s=0.0)
    result = builder.finish(stream_event(done, 1).done, 1.0)
    entries = result.timing.lifetime
    assert [(entry.event, entry.at_s, entry.num_tokens) for entry in entries] == [
        (LifetimeEvent.OPENED, 0.0, None),
        (LifetimeEvent.COMPUTE_STARTED, 1.0, None),
        (LifetimeEvent.COMPUTE_DONE, 2.5, 30),
        (LifetimeEvent.COMPUTE_STARTED, 2.5, None),
        (LifetimeEvent.SEGMENT_RECEIVED, 3.0, None),
        (LifetimeEvent.COMMIT_RECEIVED, 3.0, None),
        (LifetimeEvent.COMPUTE_DONE, 5.0, 10),
        (LifetimeEvent.FIRST_TOKEN, 5.0, None),
        (LifetimeEvent.DONE, 5.0, None),
    ]
    assert [(entry.at_s, entry.event) for entry in entries if entry.reason == "segment"] == [
        (1.0, LifetimeEvent.COMPUTE_STARTED),
        (2.5, LifetimeEvent.COMPUTE_DONE),
    ]
    assert overlap_ratio(entries) == pytest.approx(2.0 / 4.0)
    assert (result.metadata.handoff_bytes, result.metadata.handoff_s) == (0, 0.5)
