"""What a client sends in each mode, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from streamfill.errors import ResourceExhaustedError, StreamError, UnavailableError
from streamfill.loadgen.modes import play
from streamfill.loadgen.records import ModeName, RequestRecord
from streamfill.loadgen.request_log import RequestLog
from streamfill.loadgen.targets.fake import FakeTarget, FakeTimes, Sent
from streamfill.messages.common import StreamMode
from streamfill.observability.lifetime import (
    LifetimeEvent,
    e2e_s,
    first_at_s,
    token_times_s,
    ttft_from_commit_s,
    ttft_from_last_segment_s,
    ttft_from_open_s,
)
from streamfill.traces.script import Script
from tests.unit.loadgen.script_builders import script
from tests.unit.loadgen.virtual_time import Clock, run_virtually

Fails = Callable[[str, str], StreamError | None]
MODES = list(ModeName)


def played(
    mode: ModeName,
    one: Script,
    times: FakeTimes | None = None,
    *,
    fails: Fails = lambda kind, request_id: None,
) -> tuple[RequestRecord, list[Sent]]:
    """The record of one request that was due at second 0, and what reached the target."""

    async def work(clock: Clock) -> tuple[RequestRecord, list[Sent]]:
        zero_s = clock()
        target = FakeTarget(times, clock=clock, fails=fails)
        log = RequestLog(one, index=0, zero_s=zero_s, due_s=zero_s)
        try:
            await play(mode, target, log, clock=clock)
        except StreamError as error:
            log.note_failure(error, clock())
        sent = [
            Sent(at_s=s.at_s - zero_s, kind=s.kind, request_id=s.request_id, content=s.content)
            for s in target.sent
        ]
        return log.record(), sent

    return run_virtually(work)


def summary(sent: list[Sent]) -> list[tuple[str, object, float]]:
    """What came, and when, to the millisecond."""
    return [(each.kind, each.content, round(each.at_s, 3)) for each in sent]


def test_oneshot_waits_for_the_whole_prompt() -> None:
    """One request, when the commit is due."""
    record, sent = played(ModeName.ONESHOT, script(commit_due_s=2.5))
    assert summary(sent) == [("generate", "abc", 2.5)]
    assert record.num_requests == 1


def test_oneshot_sends_the_newest_context_of_an_update_stream() -> None:
    """What was replaced is never sent."""
    _, sent = played(ModeName.ONESHOT, script(mode=StreamMode.UPDATE))
    assert summary(sent) == [("generate", "c", 2.0)]


def test_stream_sends_each_piece_when_it_is_there() -> None:
    """The last one goes with the commit."""
    record, sent = played(ModeName.STREAM, script())
    assert summary(sent) == [
        ("open", None, 0.0),
        ("send", "a", 0.0),
        ("send", "b", 1.0),
        ("commit", "c", 2.0),
    ]
    assert record.num_requests == 1


def test_stream_commits_alone_where_the_commit_comes_later() -> None:
    """All pieces are appended, and the commit has none."""
    _, sent = played(ModeName.STREAM, script(commit_due_s=2.5))
    assert summary(sent)[-2:] == [("send", "c", 2.0), ("commit", None, 2.5)]


def test_stream_does_not_wait_for_acknowledgements() -> None:
    """Each piece and the commit leave in time and in order, though each answer takes 10 s."""
    _, sent = played(ModeName.STREAM, script(), FakeTimes(acknowledge_s=10.0))
    assert summary(sent)[1:] == [("send", "a", 0.0), ("send", "b", 1.0), ("commit", "c", 2.0)]


def test_pieces_that_are_due_at_once_keep_their_order() -> None:
    """Also behind a slow opening of the stream."""
    many = script(pieces=list("abcdef"), dues_s=[0.1] * 6)
    _, sent = played(ModeName.STREAM, many, FakeTimes(open_s=5.0, acknowledge_s=1.0))
    assert [(each.kind, each.content) for each in sent] == [
        ("open", None),
        *(("send", letter) for letter in "abcde"),
        ("commit", "f"),
    ]


def test_stream_sends_no_empty_append() -> None:
    """There is nothing to be sent; an update to nothing is something."""
    _, appended = played(ModeName.STREAM, script(pieces=("a", "", "c")))
    assert [each.content for each in appended] == [None, "a", "c"]
    _, updated = played(ModeName.STREAM, script(pieces=("a", "", "c"), mode=StreamMode.UPDATE))
    assert [each.content for each in updated] == [None, "a", "", "c"]


def test_warm_ups_send_the_prompt_as_far_as_it_is_known() -> None:
    """After each piece but the last, with one token; the whole prompt when it is due."""
    record, sent = played(ModeName.WARMUP, script())
    assert summary(sent) == [
        ("generate", "a", 0.0),
        ("generate", "ab", 1.0),
        ("generate", "abc", 2.0),
    ]
    assert [each.request_id for each in sent] == ["q0-warm-up-1", "q0-warm-up-2", "q0"]
    assert record.num_requests == 3
    assert record.num_output_tokens == 3


def test_warm_ups_of_an_update_stream_send_the_context_of_that_time() -> None:
    """Not what it replaced."""
    _, sent = played(ModeName.WARMUP, script(mode=StreamMode.UPDATE))
    assert [each.content for each in sent] == ["a", "b", "c"]


def test_a_slow_warm_up_is_followed_by_the_newest_prefix() -> None:
    """One at a time: what came meanwhile goes together."""
    slow = FakeTimes(first_token_s=1.7)
    record, sent = played(ModeName.WARMUP, script(pieces=list("abcdef")), slow)
    assert summary(sent) == [
        ("generate", "a", 0.0),
        ("generate", "ab", 1.7),
        ("generate", "abcd", 3.4),
        ("generate", "abcdef", 5.0),
    ]
    assert record.num_requests == 4


def test_a_running_warm_up_does_not_delay_the_prompt() -> None:
    """The prompt is sent when it is due; the cost of the warm-up is counted all the same."""
    record, sent = played(ModeName.WARMUP, script(), FakeTimes(first_token_s=60.0))
    assert summary(sent) == [("generate", "a", 0.0), ("generate", "abc", 2.0)]
    assert ttft_from_commit_s(record.client_lifetime()) == pytest.approx(60.0)
    assert record.num_computed_tokens == len("a") + len("abc")


def test_a_warm_up_that_fails_does_no_harm() -> None:
    """The answer counts; the record tells of the warm-up."""

    def fails(kind: str, request_id: str) -> StreamError | None:
        return UnavailableError("away") if request_id == "q0-warm-up-1" else None

    record, _ = played(ModeName.WARMUP, script(), fails=fails)
    assert record.error_code is None
    assert record.token_ids is not None
    assert "warm-up 1" in record.error
    assert "away" in record.error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream_mode", list(StreamMode))
def test_all_modes_get_the_same_answer(mode: ModeName, stream_mode: StreamMode) -> None:
    """The answer depends on the prompt, not on how it came."""
    record, _ = played(mode, script(mode=stream_mode))
    expected, _ = played(ModeName.ONESHOT, script(mode=stream_mode))
    assert record.token_ids == expected.token_ids
    assert record.text == expected.text


@pytest.mark.parametrize("mode", MODES)
def test_latencies_run_from_when_things_were_due(mode: ModeName) -> None:
    """Query at 0, last piece at 2, commit at 2.5, tokens after 0.5, 0.7 and 0.9 more."""
    times = FakeTimes(first_token_s=0.5, next_token_s=0.2)
    record, _ = played(mode, script(commit_due_s=2.5), times)
    entries = record.client_lifetime()
    assert ttft_from_open_s(entries) == pytest.approx(3.0)
    assert ttft_from_last_segment_s(entries) == pytest.approx(1.0)
    assert ttft_from_commit_s(entries) == pytest.approx(0.5)
    assert token_times_s(entries) == pytest.approx([3.0, 3.2, 3.4])
    assert e2e_s(entries) == pytest.approx(3.4)
    assert [entry.at_s for entry in entries] == sorted(entry.at_s for entry in entries)
    assert max(record.lag_s) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_servers_events_are_moved_to_the_runs_clock(mode: ModeName) -> None:
    """The server's last OPENED is when the answered request was sent."""
    record, sent = played(mode, script(), FakeTimes(first_token_s=0.5))
    entries = record.server_lifetime()
    opened_s = [entry.at_s for entry in entries if entry.event is LifetimeEvent.OPENED]
    opening = [each.at_s for each in sent if each.kind in ("open", "generate")]
    assert opened_s == pytest.approx(opening)
    assert len(opened_s) == record.num_requests


@pytest.mark.parametrize("mode", MODES)
def test_a_refused_prompt_is_recorded(mode: ModeName) -> None:
    """With its code, and without an answer."""

    def fails(kind: str, request_id: str) -> StreamError | None:
        is_final = kind == "commit" or (kind == "generate" and request_id == "q0")
        return ResourceExhaustedError("full") if is_final else None

    record, _ = played(mode, script(), fails=fails)
    assert record.error_code == "RESOURCE_EXHAUSTED"
    assert record.error == "full"
    assert record.token_ids is None
    assert record.client_lifetime()[-1].event is LifetimeEvent.REJECTED


def test_a_refused_piece_ends_the_request_at_once() -> None:
    """The client does not go on until the commit; the stream is given up."""

    def fails(kind: str, request_id: str) -> StreamError | None:
        return UnavailableError("gone") if kind == "send" else None

    record, sent = played(ModeName.STREAM, script(), fails=fails)
    assert [each.kind for each in sent] == ["open", "send", "cancel"]
    assert record.error_code == "UNAVAILABLE"
    last = record.client_lifetime()[-1]
    assert last.event is LifetimeEvent.FAILED
    assert last.at_s == pytest.approx(0.0, abs=1e-3)


def test_pieces_that_never_were_due_are_not_in_the_record() -> None:
    """The request ended before the second one."""

    def fails(kind: str, request_id: str) -> StreamError | None:
        return UnavailableError("gone") if kind == "send" else None

    record, _ = played(ModeName.STREAM, script(), fails=fails)
    received = [e for e in record.client_lifetime() if e.event is LifetimeEvent.SEGMENT_RECEIVED]
    assert len(received) == 1
    assert first_at_s(record.client_lifetime(), LifetimeEvent.COMMIT_RECEIVED) is None


def test_a_generator_that_is_late_says_so() -> None:
    """The event loop was held up for 0.3 s when the second piece was due."""

    async def work(clock: Clock) -> RequestRecord:
        skew_s = 0.0

        def late_clock() -> float:
            return clock() + skew_s

        zero_s = late_clock()
        target = FakeTarget(clock=late_clock)
        log = RequestLog(script(), index=0, zero_s=zero_s, due_s=zero_s)
        playing = asyncio.create_task(play(ModeName.STREAM, target, log, clock=late_clock))
        await asyncio.sleep(0.5)
        skew_s = 0.8  # a jump of the clock is what a blocked loop looks like
        await playing
        return log.record()

    record = run_virtually(work)
    assert record.lag_s == pytest.approx((0.0, 0.0, 0.8, 0.0), abs=1e-3)
    sent = [e.at_s for e in record.client_lifetime() if e.event is LifetimeEvent.SEGMENT_SENT]
    assert sent[1] == pytest.approx(1.8)


def test_a_slow_opening_is_not_the_generators_lag() -> None:
    """The pieces wait for the stream; when they were sent is in the record."""
    record, _ = played(ModeName.STREAM, script(), FakeTimes(open_s=1.5))
    assert max(record.lag_s) == pytest.approx(0.0, abs=1e-3)
    sent = [e.at_s for e in record.client_lifetime() if e.event is LifetimeEvent.SEGMENT_SENT]
    assert sent == pytest.approx([1.5, 1.5, 2.0])
