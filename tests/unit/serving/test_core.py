"""The logic common to both roles, shown on a prefill server that keeps its answers."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from streamfill.errors import ErrorCode
from streamfill.links.server_link import RouterLost
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import FinishReason, Sampling
from streamfill.messages.control import Plan, PlanEntry, PreemptionAction
from streamfill.serving.core import DONE_RETENTION_S
from tests.support.fake_engine import FakeEngine, next_token, predict
from tests.unit.serving.builders import (
    GREEDY,
    STEP_TOKENS,
    PrefillUnderTest,
    cancel,
    commit,
    forget,
    generate,
    opened,
    splice,
    tokens,
)

PROMPT = tokens(40)


@pytest.fixture
def server() -> PrefillUnderTest:
    return PrefillUnderTest()


def test_open_splice_commit_answer(server: PrefillUnderTest) -> None:
    """Context is computed before the commit; the answer is the model's, and ends as told."""
    server.step(opened(), splice(PROMPT[:30]))
    assert server.progress().num_computed_tokens == 0
    server.turn()
    assert server.progress() == s.Progress(
        stream_id=1,
        attempt=1,
        seq=1,
        num_known_tokens=30,
        num_computed_tokens=30,
        num_invalidated_tokens=0,
    )
    server.run(splice(PROMPT[30:], keep=30, seq=2), commit(40, seq=3))
    assert server.answer() == (predict(PROMPT, GREEDY, frozenset()), FinishReason.LENGTH)
    server.turn(forget())
    server.assert_nothing_is_left()


def test_the_answer_says_how_much_was_cached(server: PrefillUnderTest) -> None:
    """All of the prompt but what came with the commit."""
    server.run(opened(), splice(PROMPT[:30]))
    server.step(splice(PROMPT[30:], keep=30, seq=2), commit(40, seq=3))
    server.turn()
    assert server.take(s.Output)[0].num_cached_tokens == 30
    assert server.core.num_computed_tokens == 40


def test_tokens_are_sent_as_they_come(server: PrefillUnderTest) -> None:
    """One message per step, numbered within the answer, the end with the last one."""
    server.step(opened(), splice(PROMPT), commit(40))
    indices = []
    for _ in range(GREEDY.max_new_tokens):
        server.step()
        (output,) = server.take(s.Output)
        indices.append(output.first_index)
        assert (output.finish is not None) == (len(indices) == GREEDY.max_new_tokens)
    assert indices == [0, 1, 2, 3]


def test_logprobs_go_with_their_tokens(server: PrefillUnderTest) -> None:
    """One per token, where they were asked for."""
    sampling = msgspec.structs.replace(GREEDY, num_logprobs=0)
    server.run(opened(), splice(PROMPT), commit(40, sampling=sampling))
    outputs = server.take(s.Output)
    assert [p.token_id for output in outputs for p in output.logprobs] == predict(
        PROMPT, sampling, frozenset()
    )


def test_a_stop_token_ends_the_answer() -> None:
    """It is the last token that is sent, and named as the reason."""
    eos = frozenset({next_token([*PROMPT, next_token(PROMPT)])})
    server = PrefillUnderTest(FakeEngine(eos_token_ids=eos))
    server.run(opened(), splice(PROMPT), commit(40))
    last = server.take(s.Output)[-1]
    assert last.first_index == 1
    assert last.finish is not None
    assert last.finish.matched_token_id in eos


def test_a_long_prompt_is_computed_in_steps_of_bounded_size(server: PrefillUnderTest) -> None:
    """No request is larger than a step's budget, so that no other stream waits for more."""
    prompt = tokens(300)
    server.run(opened(), splice(prompt), commit(300))
    assert [size for _, _, size in server.engine.started] == [64, 128, 192, 256, 300]
    assert server.answer()[0] == predict(prompt, GREEDY, frozenset())


def test_several_streams_make_progress_in_one_step(server: PrefillUnderTest) -> None:
    """The budget of a step is shared, one forward pass serves them all."""
    server.turn(*(opened(n) for n in (1, 2, 3)))
    server.step(*(splice(tokens(STEP_TOKENS // 3, start=n), stream_id=n) for n in (1, 2, 3)))
    server.turn()
    assert server.engine.largest_batch == 3
    assert [server.progress(n).num_computed_tokens for n in (1, 2, 3)] == [21, 21, 21]


def test_a_stream_that_never_pauses_does_not_hold_up_the_others(server: PrefillUnderTest) -> None:
    """A stream that sends a segment every second goes behind one that waited for long enough."""
    server.turn(opened(1), opened(2))
    keep = 0
    for seq in range(1, 30):
        messages: list[r.Splice] = [splice(tokens(64, start=seq), keep=keep, seq=seq)]
        keep += 64
        if seq == 3:
            messages.append(splice(tokens(10, start=99), stream_id=2))
        server.step(*messages)
        server.clock.now_s += 1.0
    assert server.progress(2).num_computed_tokens == 10


# Nothing to compute


def test_an_empty_append_is_answered(server: PrefillUnderTest) -> None:
    """With the new number, and without a request."""
    server.run(opened(), splice(PROMPT))
    num_started = len(server.engine.started)
    server.run(splice([], keep=40, seq=2))
    progress = server.progress()
    assert (progress.seq, progress.num_known_tokens, progress.num_computed_tokens) == (2, 40, 40)
    assert len(server.engine.started) == num_started


def test_an_update_to_a_prefix_leaves_nothing_to_compute(server: PrefillUnderTest) -> None:
    """The final update drops the tail; the commit behind it is answered all the same."""
    server.run(opened(), splice(PROMPT))
    server.run(splice([], keep=25, seq=2), commit(25, seq=3))
    assert server.answer() == (predict(PROMPT[:25], GREEDY, frozenset()), FinishReason.LENGTH)


def test_a_commit_whose_prompt_is_entirely_cached(server: PrefillUnderTest) -> None:
    """Only the last token is computed, for its logits."""
    server.run(opened(1), splice(PROMPT), commit(40), opened(2))
    server.step(splice(PROMPT, stream_id=2), commit(40, stream_id=2))
    server.run()
    (first, *_) = server.take(s.Output, 2)
    assert first.num_cached_tokens == 39
    assert server.engine.started[-1] == ("answer", 2, 40)


def test_two_identical_streams_at_once(server: PrefillUnderTest) -> None:
    """Both get the same, right answer, and their KV is there once."""
    for stream_id in (1, 2):
        server.turn(opened(stream_id), splice(PROMPT, stream_id=stream_id))
    server.run(commit(40, stream_id=1), commit(40, stream_id=2))
    answer = predict(PROMPT, GREEDY, frozenset())
    assert server.answer(1)[0] == server.answer(2)[0] == answer
    assert server.engine.cache.num_pages == 40 + len(answer) - 1


def test_a_shared_prefix_is_computed_once(server: PrefillUnderTest) -> None:
    """A splice whose beginning another stream computed says so at once."""
    server.run(opened(1), splice(PROMPT))
    server.turn(opened(2), splice([*PROMPT[:30], 5, 6], stream_id=2))
    assert server.progress(2).num_computed_tokens == 30


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_max_new_tokens_is_kept(server: PrefillUnderTest, max_new_tokens: int) -> None:
    """Also where it is one."""
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    server.run(opened(), splice(PROMPT), commit(40, sampling=sampling))
    assert server.answer() == (predict(PROMPT, sampling, frozenset()), FinishReason.LENGTH)


# Updates


def test_an_update_while_a_segment_is_in_flight(server: PrefillUnderTest) -> None:
    """What the request computed behind the common prefix is not believed."""
    server.turn(opened(), splice(PROMPT))
    server.step(splice(tokens(20, start=2), keep=15, seq=2))  # in flight: 40 tokens of the old
    server.turn()
    progress = server.progress()
    assert (progress.num_computed_tokens, progress.num_invalidated_tokens) == (15, 0)
    assert server.core._records[1].num_reached == 15, "the rest is new context, not evicted"
    prompt = PROMPT[:15] + tokens(20, start=2)
    server.run(commit(35, seq=3))
    assert server.answer()[0] == predict(prompt, GREEDY, frozenset())


def test_invalidated_tokens_are_counted(server: PrefillUnderTest) -> None:
    """Computed tokens that an update threw away, in total."""
    server.run(opened(), splice(PROMPT))
    server.run(splice(tokens(10, start=2), keep=15, seq=2))
    assert server.progress().num_invalidated_tokens == 25
    server.run(splice([], keep=20, seq=3))
    assert server.progress().num_invalidated_tokens == 30


def test_replaced_context_is_the_first_to_go() -> None:
    """The stream's tag leaves what an update replaced, so it is evicted before what is in use."""
    server = PrefillUnderTest(FakeEngine(pool_tokens=100))
    server.run(opened(1), splice(tokens(40)))
    server.run(splice(tokens(20, start=2), keep=10, seq=2))
    assert server.engine.cached_tokens(server.core._records[1].ids, namespace="") == 30
    server.engine.evict(30)
    assert server.engine.cached_tokens(server.core._records[1].ids, namespace="") == 30


# Memory


def test_eviction_between_segment_and_commit(server: PrefillUnderTest) -> None:
    """What was believed to be there is looked for again, and computed again."""
    server.run(opened(), splice(PROMPT))
    server.engine.evict(25)
    server.run(commit(40))
    assert server.answer()[0] == predict(PROMPT, GREEDY, frozenset())
    assert server.core.num_computed_tokens == 40 + 25


def test_eviction_between_the_plan_and_its_execution(server: PrefillUnderTest) -> None:
    """Many plans that rely on KV that is gone are made anew within the same turn: a server whose
    streams were all evicted would sleep with work to do."""
    streams = range(1, 9)
    for n in streams:
        server.run(opened(n), splice(tokens(20, start=n), stream_id=n))
    for n in streams:  # handled in one turn, evicted before it plans
        server.core.handle(splice([5], keep=20, seq=2, stream_id=n))
    server.engine.evict(160)
    server.turn()
    # Every token is to be computed again, so these sizes are the work: a whole step, not more.
    assert sum(size for _, _, size in server.engine.started[8:]) == STEP_TOKENS
    server.run()
    assert all(server.progress(n).num_computed_tokens == 21 for n in streams)


def test_an_evicted_segment_does_not_pass_for_new_context() -> None:
    """Else two streams that do not fit together would evict each other for ever."""
    server = PrefillUnderTest(FakeEngine(pool_tokens=100))
    server.turn(opened(1), opened(2))
    server.step(splice(tokens(60, start=1), stream_id=1))
    server.step(splice(tokens(60, start=2), stream_id=2))
    server.run(max_steps=20)
    server.run(commit(60, stream_id=1), commit(60, stream_id=2))
    for n in (1, 2):
        assert server.answer(n)[0] == predict(tokens(60, start=n), GREEDY, frozenset())


def test_kv_that_is_taken_before_it_is_seen_is_not_chased() -> None:
    """A segment that was evicted in the very pass that computed it counts as reached."""
    server = PrefillUnderTest(FakeEngine(pool_tokens=100))
    server.step(opened(1), splice(tokens(60)))
    server.engine.evict(60)
    server.turn()
    assert server.progress().num_computed_tokens == 0
    assert server.core._records[1].num_reached == 60


def test_the_plan_decides_who_loses_memory() -> None:
    """Without a controller the stream that was idle for longest; with one, as it says."""
    for planned, evicted in ((None, 1), (2, 2)):
        server = PrefillUnderTest(FakeEngine(pool_tokens=100))
        for n in (1, 2):
            server.run(opened(n), splice(tokens(40, start=n), stream_id=n))
        if planned is not None:
            entry = PlanEntry(stream_id=planned, action=PreemptionAction.RECOMPUTE, reason="test")
            plan = Plan(server_id="p0", epoch=1, version=7, victims=(entry,))
            server.core.plan.update(plan, controller_alive=True)
        server.run(opened(3), splice(tokens(40, start=3), stream_id=3))
        left = {
            n: server.engine.cached_tokens(server.core._records[n].ids, namespace="")
            for n in (1, 2)
        }
        assert left[evicted] < 40
        assert left[3 - evicted] == 40
        assert server.core.counters(0).plan_version == (7 if planned else 0)


def test_pages_are_computed_whole() -> None:
    """With a page size of 16 the rest of a page waits for the commit, and the answer is right."""
    server = PrefillUnderTest(FakeEngine(page_size=16))
    server.run(opened(), splice(PROMPT))
    assert server.progress().num_computed_tokens == 32
    server.run(commit(40))
    assert server.answer()[0] == predict(PROMPT, GREEDY, frozenset())


def test_more_streams_than_slots() -> None:
    """The others wait their turn; every answer comes."""
    server = PrefillUnderTest(FakeEngine(max_requests=2))
    for n in range(1, 8):
        prompt = tokens(10, start=n)
        server.turn(opened(n), splice(prompt, stream_id=n), commit(10, stream_id=n))
    assert len(server.engine.started) == 2, "the order is the policy's until a slot is free"
    server.run()
    assert server.engine.largest_batch == 2
    for n in range(1, 8):
        assert server.answer(n)[0] == predict(tokens(10, start=n), GREEDY, frozenset())


# commit_follows


def test_a_segment_with_a_commit_right_behind_waits_for_it(server: PrefillUnderTest) -> None:
    """Then one request computes the rest and samples."""
    server.turn(opened(), splice(PROMPT, commit_follows=True))
    server.step()
    assert server.engine.started == []
    server.run(commit(40))
    assert server.engine.started == [("answer", 1, 40)]
    assert server.answer()[0] == predict(PROMPT, GREEDY, frozenset())


def test_a_commit_that_did_not_follow_delays_nothing(server: PrefillUnderTest) -> None:
    """The next splice takes the promise back."""
    server.turn(opened(), splice(PROMPT[:20], commit_follows=True))
    server.run(splice(PROMPT[20:], keep=20, seq=2))
    assert server.progress().num_computed_tokens == 40


# Duplicates and stale messages


def test_a_stream_opened_twice_is_opened_once(server: PrefillUnderTest) -> None:
    """Its context stays; only a newer attempt begins anew."""
    server.run(opened(), splice(PROMPT))
    server.run(opened(), commit(40))
    assert server.answer()[0] == predict(PROMPT, GREEDY, frozenset())
    server.run(opened(attempt=2))
    server.run(opened(attempt=1))
    record = server.core._records[1]
    assert (record.attempt, len(record.ids)) == (2, 0)


def test_a_new_attempt_stops_the_old_one(server: PrefillUnderTest) -> None:
    """Of an answer under way nothing more comes, and nothing of it stays."""
    server.step(opened(), splice(PROMPT), commit(40))
    server.run(opened(attempt=2))
    assert server.take(s.Output) == []
    server.turn(cancel(attempt=2))
    server.assert_nothing_is_left()


def test_messages_of_another_attempt_change_nothing(server: PrefillUnderTest) -> None:
    """Neither older nor newer ones, except those that speak of all attempts up to theirs."""
    server.run(opened(attempt=2), splice(PROMPT, attempt=2))
    server.run(
        splice([1], keep=0, attempt=1),
        commit(1, attempt=1),
        splice([1], keep=0, attempt=3),
        commit(1, attempt=3),
        forget(attempt=1),
        cancel(attempt=1),
    )
    assert server.take(s.Closed) == [s.Closed(stream_id=1, attempt=1)] * 2
    server.run(commit(40, attempt=2))
    assert server.answer()[0] == predict(PROMPT, GREEDY, frozenset())


def test_a_splice_behind_the_commit_changes_nothing(server: PrefillUnderTest) -> None:
    """The router refuses those; one that got through does not touch the answer."""
    server.turn(opened(), splice(PROMPT), commit(40))
    server.run(splice([1], keep=0, seq=3), commit(1, seq=4))
    assert server.answer()[0] == predict(PROMPT, GREEDY, frozenset())


def test_an_unknown_stream_is_nobody(server: PrefillUnderTest) -> None:
    """Nothing is answered but what always is."""
    server.run(splice([1]), commit(1), forget(), cancel(7))
    assert server.sent == [s.Closed(stream_id=number, attempt=1) for number in (1, 7)]


def test_a_cancel_is_answered_each_time(server: PrefillUnderTest) -> None:
    """A repeated one too."""
    server.run(opened(), cancel(), cancel())
    assert server.take(s.Closed) == [s.Closed(stream_id=1, attempt=1)] * 2


@pytest.mark.parametrize("end", [cancel, forget])
def test_an_opening_that_its_end_overtook_opens_nothing(
    server: PrefillUnderTest, end: Callable[..., r.Cancel | r.Forget]
) -> None:
    """Nobody would ever end it: the router has heard already that the stream is closed here."""
    prompt = tokens(8)
    late = opened(), splice(prompt), generate(prompt)
    server.run(end(), *late)
    server.run(opened(2), end(2), opened(2))
    server.run(*late, end(), *late)
    assert server.core.counters(0).num_streams == 0
    server.run(opened(attempt=2), splice(prompt, attempt=2), commit(8, attempt=2))
    assert server.answer(1)[0]


def test_a_new_router_counts_attempts_anew(server: PrefillUnderTest) -> None:
    """It may have found streams in its log."""
    server.run(opened(), cancel(), RouterLost(), opened())
    assert server.core.counters(0).num_streams == 1


# Endings


def _in_phase(server: PrefillUnderTest, phase: str) -> None:
    prompt = tokens(200)
    server.turn(opened())
    match phase:
        case "empty":
            pass
        case "pending":
            server.turn(splice(prompt))
        case "computing":
            server.step(splice(prompt))
            server.turn()
        case "idle":
            server.run(splice(prompt))
        case "awaits commit":
            server.turn(splice(prompt, commit_follows=True))
        case "committed":
            server.step(splice(prompt), commit(200))
        case "answering":
            server.run(splice(prompt))
            server.step(commit(200))
            server.step()
        case "done":
            server.run(splice(prompt), commit(200))
        case _:
            raise AssertionError(phase)


_PHASES = [
    "empty",
    "pending",
    "computing",
    "idle",
    "awaits commit",
    "committed",
    "answering",
    "done",
]


@pytest.mark.parametrize("phase", _PHASES)
def test_cancel_leaves_nothing_behind(server: PrefillUnderTest, phase: str) -> None:
    """In whatever phase it finds the stream."""
    _in_phase(server, phase)
    server.sent.clear()
    server.turn(cancel())
    assert server.take(s.Closed) == [s.Closed(stream_id=1, attempt=1)]
    server.assert_nothing_is_left()
    assert server.sent == [], "nothing is said of a cancelled stream"


@pytest.mark.parametrize("phase", _PHASES)
def test_a_lost_router_leaves_nothing_behind(server: PrefillUnderTest, phase: str) -> None:
    """All its streams are dropped, in whatever phase; the next router's are served."""
    _in_phase(server, phase)
    server.turn(opened(2), splice(PROMPT, stream_id=2))
    server.sent.clear()
    server.turn(RouterLost())
    server.assert_nothing_is_left()
    assert server.sent == []
    server.run(opened(3), splice(PROMPT, stream_id=3), commit(40, stream_id=3))
    assert server.answer(3)[0] == predict(PROMPT, GREEDY, frozenset())


@pytest.mark.parametrize("phase", ["pending", "computing", "committed"])
def test_a_request_that_waits_for_memory_can_be_cancelled(phase: str) -> None:
    """SGLang drops it at once instead of letting it run out."""
    engine = FakeEngine(pool_tokens=300)
    server = PrefillUnderTest(engine)
    hog = Sampling(temperature=0.0, max_new_tokens=200)
    server.step(opened(9), splice(tokens(50, start=9), stream_id=9))
    server.step(commit(50, stream_id=9, sampling=hog))
    _in_phase(server, phase)
    server.turn()
    server.turn(cancel(), cancel(9))
    server.assert_nothing_is_left()


def test_an_engine_that_gives_a_segment_up_fails_the_stream(server: PrefillUnderTest) -> None:
    """The router is told why; other streams go on."""
    server.turn(opened(1), splice(PROMPT), opened(2), splice(PROMPT[:5], stream_id=2))
    (key, _) = server.engine.waiting_keys_in_order()
    server.engine.fail(key, "too long for me")
    server.run()
    (failed,) = server.take(s.StreamFailed)
    assert (failed.stream_id, failed.code) == (1, ErrorCode.INTERNAL.value)
    assert "too long for me" in failed.message
    assert server.progress(2).num_computed_tokens == 5
    server.turn(cancel(2))
    server.assert_nothing_is_left()


def test_an_engine_that_gives_an_answer_up_fails_the_stream(server: PrefillUnderTest) -> None:
    """Also in the middle of it."""
    server.step(opened(), splice(PROMPT), commit(40))
    server.step()
    (record,) = server.core._records.values()
    assert record.in_flight is not None
    server.engine.abort(record.in_flight.key)
    server.run()
    (failed,) = server.take(s.StreamFailed)
    assert failed.stream_id == 1
    server.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (splice([1], keep=41, seq=2), "cannot keep 41 of 40"),
        (splice([1], keep=-1, seq=2), "cannot keep -1"),
        (r.Splice(stream_id=1, attempt=1, seq=2, keep_tokens=0, token_ids=b"abc"), "3 bytes"),
        (splice([1, 1000], keep=40, seq=2), "token id 1000"),
        (splice([-1], keep=40, seq=2), "token id -1"),
        (commit(39), "commit of 39 tokens, but 40"),
        (generate([2000], attempt=2), "token id 2000"),
        (generate([], attempt=2), "empty prompt"),
        (
            r.Generate(
                stream_id=1,
                attempt=2,
                prompt_ids=b"abc",
                output_ids=b"",
                sampling=GREEDY,
                transfer_id=None,
            ),
            "3 bytes",
        ),
    ],
)
def test_a_bad_message_fails_its_stream(
    server: PrefillUnderTest, message: r.Splice | r.Commit | r.Generate, named: str
) -> None:
    """And is answered with its own attempt; the server and its other streams live."""
    server.run(opened(), splice(PROMPT), opened(2), splice(PROMPT, stream_id=2))
    server.turn(message)
    (failed,) = server.take(s.StreamFailed)
    assert (failed.stream_id, failed.attempt) == (1, message.attempt)
    assert named in failed.message
    server.run(commit(40, stream_id=2))
    assert server.answer(2)[1] is FinishReason.LENGTH
    server.turn(forget(2))
    server.assert_nothing_is_left()


def test_a_bad_message_of_an_old_attempt_does_not_harm_the_new_one(
    server: PrefillUnderTest,
) -> None:
    """It is answered, that is all."""
    server.run(opened(attempt=2), splice(PROMPT, attempt=2))
    server.turn(generate([2000], attempt=1))
    assert [failed.attempt for failed in server.take(s.StreamFailed)] == [1]
    server.run(commit(40, attempt=2))
    assert server.answer()[1] is FinishReason.LENGTH


def test_the_commit_of_an_empty_stream_fails(server: PrefillUnderTest) -> None:
    """It could never be answered."""
    server.turn(opened(), commit(0, seq=1))
    assert [failed.stream_id for failed in server.take(s.StreamFailed)] == [1]
    server.assert_nothing_is_left()


# What the router asks for


def test_output_can_be_sent_again(server: PrefillUnderTest) -> None:
    """From any index on, with the end, also after it."""
    server.run(opened(), splice(PROMPT), commit(40))
    answer = server.answer()[0]
    for index in range(5):
        server.turn(r.ResendOutput(stream_id=1, attempt=1, from_index=index))
        (output,) = server.take(s.Output)
        assert output.first_index == index
        assert output.finish is not None
        server.sent.append(output)
        assert server.answer()[0] == answer[index:]


def test_output_of_an_unknown_attempt_cannot_be_sent_again(server: PrefillUnderTest) -> None:
    """The router learns that the stream is not here."""
    server.run(opened(), splice(PROMPT), commit(40))
    server.sent.clear()
    server.turn(r.ResendOutput(stream_id=1, attempt=2, from_index=0))
    assert server.sent == [s.ResyncRequest(stream_id=1, attempt=2, have_seq=-1)]


def test_an_unfinished_answer_sent_again_has_no_end(server: PrefillUnderTest) -> None:
    """Before the first token there is nothing to send, which is no error."""
    server.turn(opened(), r.ResendOutput(stream_id=1, attempt=1, from_index=0))
    assert server.sent == []
    server.step(splice(PROMPT), commit(40))
    server.turn()
    server.sent.clear()
    server.turn(r.ResendOutput(stream_id=1, attempt=1, from_index=0))
    assert server.answer() == ([next_token(PROMPT)], None)


def test_a_finished_stream_is_forgotten_in_the_end(server: PrefillUnderTest) -> None:
    """Even if the router never says so."""
    server.run(opened(), splice(PROMPT), commit(40))
    server.clock.now_s += DONE_RETENTION_S - 1
    server.turn()
    assert server.core.counters(0).num_streams == 1
    server.clock.now_s += 2
    server.turn()
    server.assert_nothing_is_left()


def test_flush_is_refused_while_a_stream_is_open(server: PrefillUnderTest) -> None:
    """And empties the cache when none is."""
    server.run(opened(), splice(PROMPT))
    server.turn(r.FlushCache(request_id=5))
    assert server.take(s.CacheFlushed) == [s.CacheFlushed(request_id=5, ok=False)]
    server.run(commit(40))
    server.turn(r.FlushCache(request_id=6))
    assert server.take(s.CacheFlushed) == [s.CacheFlushed(request_id=6, ok=True)]
    assert server.core.counters(0).num_cached_tokens == 0
    server.run(opened(2), splice(PROMPT, stream_id=2), commit(40, stream_id=2))
    assert server.answer(2)[0] == predict(PROMPT, GREEDY, frozenset())


def test_counters_tell_what_there_is(server: PrefillUnderTest) -> None:
    """Of streams, tokens and slots."""
    server.turn(opened(), splice(tokens(100)))
    counters = server.core.counters(3)
    assert (counters.num_streams, counters.num_pending_tokens) == (1, 100)
    assert (counters.num_waiting, counters.num_malformed_frames) == (1, 3)
    server.run()
    counters = server.core.counters(0)
    assert (counters.num_pending_tokens, counters.num_computed_tokens) == (0, 100)
    assert counters.num_cached_tokens == 100
    assert counters.num_free_tokens == counters.num_total_tokens - 100


def test_a_generate_on_a_server_without_transport_recomputes(server: PrefillUnderTest) -> None:
    """Any server can go on with an answer; indices continue those of the client."""
    answer = predict(PROMPT, GREEDY, frozenset())
    server.run(generate(PROMPT, answer[:2]))
    outputs = server.take(s.Output)
    assert outputs[0].first_index == 2
    server.sent.extend(outputs)
    assert server.answer() == (answer[2:], FinishReason.LENGTH)
    server.turn(forget())
    server.assert_nothing_is_left()


def test_a_generate_in_place_of_a_stream_that_handed_its_answer_off(
    server: PrefillUnderTest,
) -> None:
    """With no decode server alive the prefill server goes on by itself, on the same attempt."""
    server.run(opened(), splice(PROMPT))
    server.run(generate(PROMPT))
    assert server.answer()[0] == predict(PROMPT, GREEDY, frozenset())
