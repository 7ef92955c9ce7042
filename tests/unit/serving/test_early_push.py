"""KV that goes to the decode server ahead of the commit: the logic of both around one network."""

from __future__ import annotations

import msgspec
import pytest

from decode_server.early import EARLY_SHARE, KEEP_S
from prefill_server.pushes import ANSWER_S, REFUSED_PAUSE_S, EarlyPush
from streamfill.kv_transfer.interface import ReceiverLost, SenderLost
from streamfill.links.server_link import RouterLost
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import FinishReason, HandoffTarget, StreamMode
from tests.support.fake_engine import KV_BYTES_PER_TOKEN, FakeEngine, predict
from tests.unit.serving.builders import (
    GREEDY,
    TO_DECODE,
    DecodeUnderTest,
    PrefillUnderTest,
    cancel,
    commit,
    forget,
    generate,
    ids_array,
    opened,
    splice,
    tokens,
)

PROMPT = tokens(200)
NUM_STEPS = 20


class Pair:
    """A prefill server and a decode server."""

    def __init__(
        self,
        early_push: EarlyPush = EarlyPush.AUTO,
        decode_engine: FakeEngine | None = None,
        page_size: int = 1,
    ) -> None:
        self.prefill = PrefillUnderTest(FakeEngine(page_size=page_size), early_push=early_push)
        self.network = self.prefill.network
        self.decode = DecodeUnderTest(
            decode_engine or FakeEngine(page_size=page_size), self.network
        )

    def open(self, mode: StreamMode = StreamMode.APPEND, stream_id: int = 1) -> None:
        """A stream that is to go to the decode server."""
        message = msgspec.structs.replace(opened(stream_id), mode=mode)
        self.run(message, r.PushTo(stream_id=stream_id, attempt=1, peer=TO_DECODE.peer))

    def run(self, *messages: r.RouterToServer) -> None:
        """Messages to the prefill server; then both, step by step, for long enough."""
        self.prefill.step(*messages)
        for _ in range(NUM_STEPS):
            self.decode.step()
            self.prefill.step()

    def commit(self, num_tokens: int, *, seq: int, handoff: HandoffTarget = TO_DECODE) -> None:
        """The answer is to go on at the decode server."""
        self.run(commit(num_tokens, seq=seq, handoff=handoff))

    def finish(self, prompt: list[int]) -> int:
        """The rest of the answer, checked; returns how much of the prompt the decode server
        found."""
        answer = predict(prompt, GREEDY, frozenset())
        assert self.prefill.answer() == (answer[:1], None)
        self.decode.run(generate(prompt, answer[:1], transfer_id=TO_DECODE.transfer_id))
        outputs = self.decode.take(s.Output)
        self.decode.sent.extend(outputs)
        assert self.decode.answer() == (answer[1:], FinishReason.LENGTH)
        return outputs[0].num_cached_tokens

    def end(self) -> None:
        """The router has all of the answer; nothing is left on either side."""
        self.run(forget())
        self.decode.run(forget())
        self.prefill.assert_nothing_is_left()
        self.decode.assert_nothing_is_left()

    @property
    def num_held(self) -> int:
        """Of the prompt, in the decode server's tree."""
        return self.decode.engine.cached_tokens(ids_array(PROMPT), namespace="")

    @property
    def report(self) -> s.HandoffReport:
        """The newest one."""
        return self.prefill.take(s.HandoffReport)[-1]


def test_context_goes_ahead_and_the_commit_sends_the_rest() -> None:
    """Segment by segment; the report counts all bytes, and says which went early."""
    pair = Pair()
    pair.open()
    pair.run(splice(PROMPT[:100]))
    assert pair.num_held == 100
    pair.run(splice(PROMPT[100:180], keep=100, seq=2))
    assert pair.num_held == 164  # a step; the rest is too little for a transfer of its own
    pair.run(splice(PROMPT[180:], keep=180, seq=3))
    assert pair.num_held == 200
    pair.commit(200, seq=4)
    report = pair.report
    assert report.ok
    assert (report.num_tokens, report.num_bytes) == (200, 200 * KV_BYTES_PER_TOKEN)
    assert report.num_early_bytes == 200 * KV_BYTES_PER_TOKEN
    assert pair.finish(PROMPT) == 200
    counters = pair.prefill.core.counters(0)
    assert counters.num_handoff_bytes == report.num_bytes
    assert counters.num_early_bytes == report.num_early_bytes
    pair.end()


def test_a_whole_prompt_goes_while_its_end_is_computed() -> None:
    """A prompt that is committed at once is sent step by step as well."""
    pair = Pair()
    pair.run(
        msgspec.structs.replace(opened(), mode=StreamMode.APPEND),
        splice(PROMPT, commit_follows=True),
        commit(200, handoff=TO_DECODE),
    )
    report = pair.report
    assert report.ok
    assert 0 < report.num_early_bytes < report.num_bytes == 200 * KV_BYTES_PER_TOKEN
    assert pair.finish(PROMPT) == 200
    pair.end()


def test_off_means_nothing_goes_ahead() -> None:
    """One transfer, after the first token."""
    pair = Pair(EarlyPush.OFF)
    pair.open()
    pair.run(splice(PROMPT[:100]))
    assert pair.num_held == 0
    pair.run(splice(PROMPT[100:], keep=100, seq=2))
    pair.commit(200, seq=3)
    assert pair.report.num_early_bytes == 0
    assert pair.finish(PROMPT) == 200
    pair.end()


def test_context_that_is_replaced_goes_when_it_has_stayed_once() -> None:
    """Never more than the last updates kept; what was sent and replaced does no harm."""
    pair = Pair()
    pair.open(StreamMode.UPDATE)
    pair.run(splice(tokens(100, start=5)))
    assert pair.decode.core.counters(0).num_cached_tokens == 0
    pair.run(splice(PROMPT[:150], seq=2))
    assert pair.num_held == 0  # nothing of it stayed
    for seq in (3, 4):
        pair.run(splice(tokens(50, start=seq), keep=150, seq=seq))
    assert pair.num_held == 150
    pair.run(splice(PROMPT[60:], keep=60, seq=5))
    pair.commit(200, seq=6)
    assert pair.finish(PROMPT) == 200
    pair.end()


def test_on_sends_what_may_be_replaced() -> None:
    """All that is computed."""
    pair = Pair(EarlyPush.ON)
    pair.open(StreamMode.UPDATE)
    pair.run(splice(PROMPT[:100]))
    assert pair.num_held == 100
    pair.run(cancel())
    pair.prefill.assert_nothing_is_left()
    pair.decode.assert_nothing_is_left()


def test_what_is_there_is_not_sent() -> None:
    """The prompt of an earlier stream: all of it was found, so no byte is sent."""
    pair = Pair()
    pair.open()
    pair.run(splice(PROMPT[:150]))
    pair.commit(150, seq=2)
    pair.finish(PROMPT[:150])
    pair.end()
    before = pair.prefill.core.counters(0).num_handoff_bytes
    pair.prefill.turn(RouterLost())  # the next one may use ids again
    pair.decode.turn(RouterLost())
    pair.open()
    pair.run(splice(PROMPT[:150]))
    pair.commit(150, seq=2)
    assert pair.prefill.core.counters(0).num_handoff_bytes == before
    assert pair.report.num_bytes == 0
    assert pair.finish(PROMPT[:150]) == 150
    pair.end()


def test_what_was_evicted_meanwhile_is_sent_again() -> None:
    """The decode server says so at once."""
    pair = Pair()
    pair.open()
    pair.run(splice(PROMPT[:150]))
    num_held = pair.num_held
    pair.decode.engine.evict(100)
    pair.run()
    assert pair.num_held >= num_held > 100
    pair.run(splice(PROMPT[150:], keep=150, seq=2))
    pair.commit(200, seq=3)
    assert pair.finish(PROMPT) == 200
    pair.end()


def test_what_was_evicted_too_late_to_say_is_missed_and_sent_again() -> None:
    """The rest arrives, and what it goes on behind is gone. The answer waits for the second try."""
    pair = Pair()
    pair.open()
    pair.run(splice(PROMPT[:150]))
    pair.run(splice(PROMPT[150:], keep=150, seq=2))
    pair.network.is_holding = True
    pair.commit(200, seq=3)
    answer = predict(PROMPT, GREEDY, frozenset())
    pair.decode.run(generate(PROMPT, answer[:1], transfer_id=TO_DECODE.transfer_id))
    pair.decode.engine.evict(120)
    pair.network.is_holding = False
    pair.network.deliver_held()
    pair.run()
    (outcome,) = pair.decode.take(s.Output)[:1]
    assert outcome.num_cached_tokens == 200
    reports = pair.prefill.take(s.HandoffReport)
    assert [report.ok for report in reports] == [True, True]
    assert {report.transfer_id for report in reports} == {TO_DECODE.transfer_id}
    pair.run(forget())
    pair.decode.run(forget())
    pair.decode.assert_nothing_is_left()


def test_what_is_gone_on_both_sides_is_recomputed() -> None:
    """The router hears that the hand-off failed after all."""
    pair = Pair()
    pair.open()
    pair.run(splice(PROMPT[:150]))
    pair.run(splice(PROMPT[150:], keep=150, seq=2))
    pair.network.is_holding = True
    pair.commit(200, seq=3)
    pair.decode.engine.evict(120)
    pair.prefill.engine.evict(190)
    pair.network.is_holding = False
    pair.network.deliver_held()
    pair.run()
    reports = pair.prefill.take(s.HandoffReport)
    assert [report.ok for report in reports] == [True, False]
    assert "cheaper to compute" in reports[1].reason


def test_a_decode_server_that_does_not_answer_gets_it_when_the_time_is_over() -> None:
    """Though nothing else happens to the stream meanwhile."""
    pair = Pair()
    pair.prefill.run(
        msgspec.structs.replace(opened(), mode=StreamMode.APPEND),
        r.PushTo(stream_id=1, attempt=1, peer=TO_DECODE.peer),
        splice(PROMPT[:100]),
    )
    pair.decode.receiver.poll_notes()  # lost
    assert pair.num_held == 0
    pair.prefill.clock.now_s += ANSWER_S
    pair.run()
    assert pair.num_held == 100


def test_what_was_refused_goes_when_the_pause_is_over() -> None:
    """Though nothing else happens to the stream meanwhile."""
    pair = Pair(decode_engine=FakeEngine(pool_tokens=300))
    for stream_id in (1, 2):
        pair.open(stream_id=stream_id)
        pair.run(splice(tokens(100, start=stream_id), stream_id=stream_id))
    second = ids_array(tokens(100, start=2))
    assert pair.decode.engine.cached_tokens(second, namespace="") < 100
    pair.run(cancel(stream_id=1))
    pair.prefill.clock.now_s += REFUSED_PAUSE_S
    pair.run()
    assert pair.decode.engine.cached_tokens(second, namespace="") == 100


def test_early_kv_is_bounded() -> None:
    """Half of the decode server's pool; more is refused, and comes with the commit."""
    engine = FakeEngine(pool_tokens=300)
    pair = Pair(decode_engine=engine)
    for stream_id in (1, 2, 3):
        pair.open(stream_id=stream_id)
        pair.run(splice(tokens(100, start=stream_id), stream_id=stream_id))
    limit = EARLY_SHARE * engine.memory().total_tokens
    assert 100 <= pair.decode.core.counters(0).num_cached_tokens <= limit
    pair.run(cancel(stream_id=1), cancel(stream_id=2))
    pair.prefill.clock.now_s += REFUSED_PAUSE_S
    pair.run(splice(tokens(150, start=3)[100:], keep=100, seq=2, stream_id=3))
    assert engine.cached_tokens(ids_array(tokens(150, start=3)), namespace="") == 150


def test_answers_take_early_kv_back() -> None:
    """Nothing protects it: an answer that needs the memory gets it, and the sender hears of it."""
    engine = FakeEngine(pool_tokens=260)
    pair = Pair(decode_engine=engine)
    pair.open()
    pair.run(splice(PROMPT[:120]))
    assert pair.num_held == 120
    other = tokens(200, start=9)
    pair.decode.run(generate(other, stream_id=2))
    assert pair.decode.answer(2) == (predict(other, GREEDY, frozenset()), FinishReason.LENGTH)
    assert pair.num_held < 120


def test_a_decode_server_that_was_lost_gets_all_again() -> None:
    """Its successor's tree is empty."""
    pair = Pair()
    pair.open()
    pair.run(splice(PROMPT[:100]))
    pair.decode.engine.evict(100)
    pair.decode.engine.take_losers()  # the old process said nothing
    pair.prefill.sender.hear(ReceiverLost("d0"))
    pair.run()
    assert pair.num_held == 100


@pytest.mark.parametrize("how", ["lost sender", "lost router", "time"])
def test_prompts_are_forgotten_with_those_who_asked(how: str) -> None:
    """Or after a long time."""
    pair = Pair()
    pair.open()
    pair.run(splice(PROMPT[:100]))
    match how:
        case "lost sender":
            pair.decode.receiver.note(SenderLost("p0"))
        case "lost router":
            pair.run(RouterLost())  # type: ignore[arg-type]
        case _:
            pair.decode.clock.now_s += KEEP_S
    pair.decode.run()
    pair.decode.assert_nothing_is_left()


def test_another_decode_server_than_announced() -> None:
    """The commit decides; the first one is let go."""
    pair = Pair()
    other = DecodeUnderTest(network=pair.network, server_id="d1")
    pair.open()
    pair.run(splice(PROMPT))
    target = msgspec.structs.replace(TO_DECODE, server_id="d1")
    pair.commit(200, seq=2, handoff=target)
    assert pair.report.num_bytes == 200 * KV_BYTES_PER_TOKEN
    other.run()
    assert other.engine.cached_tokens(ids_array(PROMPT), namespace="") == 200
    pair.run(forget())
    pair.decode.assert_nothing_is_left()
    other.assert_nothing_is_left()


def test_pages_that_are_not_full_stay_behind() -> None:
    """Whole pages only, early or not."""
    pair = Pair(page_size=16)
    pair.open()
    pair.run(splice(PROMPT[:100]))
    assert pair.num_held == 96
    pair.run(splice(PROMPT[100:], keep=100, seq=2))
    pair.commit(200, seq=3)
    assert pair.finish(PROMPT) == 192
    pair.end()


def test_answers_that_may_rest_on_lossy_kv_are_marked() -> None:
    """All that come after it, until the cache is emptied: prompts share their prefixes."""
    pair = Pair(EarlyPush.OFF)
    pair.decode.run(generate(PROMPT[:50], stream_id=2))
    assert {output.kv_codec for output in pair.decode.take(s.Output)} == {"none"}
    pair.decode.run(forget(2))
    pair.network.codec = "float16"
    pair.open()
    pair.run(splice(PROMPT))
    pair.commit(200, seq=2)
    pair.finish(PROMPT)
    pair.decode.run(generate(PROMPT[:60], stream_id=3))
    assert {output.kv_codec for output in pair.decode.take(s.Output, 3)} == {"float16"}
    pair.decode.run(forget(3))
    pair.run(forget())
    pair.decode.run(forget(), r.FlushCache(request_id=1))
    pair.decode.run(generate(PROMPT[:60], stream_id=4))
    assert {output.kv_codec for output in pair.decode.take(s.Output, 4)} == {"none"}


def test_the_successor_of_a_dead_decode_server_gets_the_kv_too() -> None:
    """All of it, under a new id, also of what had gone ahead."""
    pair = Pair()
    successor = DecodeUnderTest(network=pair.network, server_id="d1")
    pair.open()
    pair.run(splice(PROMPT))
    pair.commit(200, seq=2)
    answer = predict(PROMPT, GREEDY, frozenset())
    target = msgspec.structs.replace(TO_DECODE, server_id="d1", transfer_id=901)
    pair.prefill.take(s.HandoffReport)
    pair.run(r.HandOff(stream_id=1, attempt=1, target=target))
    report = pair.report
    assert (report.transfer_id, report.ok) == (901, True)
    assert (report.num_bytes, report.num_early_bytes) == (200 * KV_BYTES_PER_TOKEN, 0)
    successor.run(generate(PROMPT, answer[:2], attempt=2, transfer_id=901))
    outputs = successor.take(s.Output)
    assert outputs[0].num_cached_tokens == 200
    successor.sent.extend(outputs)
    assert successor.answer() == (answer[2:], FinishReason.LENGTH)
    successor.run(forget(attempt=2))
    pair.end()
    successor.assert_nothing_is_left()


def test_a_prompt_that_is_not_here_any_more_cannot_be_handed_off_again() -> None:
    """Said at once, so that nobody waits."""
    pair = Pair()
    target = msgspec.structs.replace(TO_DECODE, transfer_id=901)
    pair.run(r.HandOff(stream_id=7, attempt=1, target=target))
    report = pair.report
    assert (report.transfer_id, report.ok) == (901, False)
    assert "not here any more" in report.reason
