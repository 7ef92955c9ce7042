"""What servers tell of their work for a stream, with its first token."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest

from streamfill.kv_transfer.interface import TransferStatus
from streamfill.kv_transfer.slices import HeadShare
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import StreamAccount
from tests.support.fake_engine import FakeEngine, kv_bytes, next_token
from tests.unit.serving.builders import (
    GREEDY,
    TO_DECODE,
    DecodeUnderTest,
    PrefillUnderTest,
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


def _account(server: PrefillUnderTest | DecodeUnderTest, stream_id: int = 1) -> StreamAccount:
    first, *others = server.take(s.Output, stream_id)
    assert first.account is not None
    assert all(output.account is None for output in others), "told with each token"
    return first.account


def _sums(account: StreamAccount) -> tuple[int, int, int]:
    return (
        account.num_computed_tokens,
        account.num_recomputed_tokens,
        account.num_reused_tokens,
    )


def test_each_run_is_told(server: PrefillUnderTest) -> None:
    """How much, and how long ago it began and ended, by the server's clock."""
    server.step(opened(), splice(PROMPT[:30]))
    began_s = server.clock.now_s
    server.clock.now_s += 2.0
    server.step()
    ended_s = server.clock.now_s
    server.clock.now_s += 5.0
    server.step(splice(PROMPT[30:], keep=30, seq=2), commit(40, seq=3))
    server.turn()
    sent_s = server.clock.now_s
    account = _account(server)
    first, second = account.runs
    assert first.start_age_s == pytest.approx(sent_s - began_s)
    assert first.end_age_s == pytest.approx(sent_s - ended_s)
    assert second.start_age_s == pytest.approx(0.01)
    assert second.end_age_s == 0.0
    assert [run.num_tokens for run in account.runs] == [30, 10]
    assert _sums(account) == (40, 0, 0)
    assert account.preemptions == ()


def test_an_account_that_got_lost_is_told_again(server: PrefillUnderTest) -> None:
    """With the tokens that are asked for again, its times as old as they are by then."""
    server.run(opened(), splice(PROMPT), commit(40))
    before = _account(server)
    server.clock.now_s += 3.0
    server.turn(r.ResendOutput(stream_id=1, attempt=1, from_index=0))
    after = _account(server)
    assert after.runs[0].start_age_s > before.runs[0].start_age_s + 3.0
    assert _sums(after) == _sums(before)
    server.turn(r.ResendOutput(stream_id=1, attempt=1, from_index=1))
    assert server.take(s.Output)[0].account is None


def test_no_account_before_the_first_token(server: PrefillUnderTest) -> None:
    """A sign of life that is asked for meanwhile must not pass for the whole account."""
    server.step(opened(), splice(PROMPT), commit(40))
    server.turn(r.ResendOutput(stream_id=1, attempt=1, from_index=0))
    sign, first = server.take(s.Output)
    assert (sign.token_ids, sign.account) == (b"", None)
    assert first.account is not None
    assert first.account.num_computed_tokens == 40


def test_waiting_in_the_engine_is_not_computing() -> None:
    """A run begins when the engine takes it out of its queue."""
    server = PrefillUnderTest(FakeEngine(pool_tokens=81))  # the first one leaves one token
    long_answer = msgspec.structs.replace(GREEDY, max_new_tokens=40)
    server.step(opened(1), splice(tokens(40)), commit(40, sampling=long_answer))
    server.turn(opened(2), splice(tokens(40, start=2), stream_id=2), commit(40, stream_id=2))
    server.step()
    waited_from_s = server.clock.now_s
    assert len(server.engine.waiting_keys()) == 1
    server.run()
    assert server.clock.now_s > waited_from_s + 0.3
    (run,) = _account(server, 2).runs
    assert run.start_age_s - run.end_age_s == pytest.approx(0.01)


def test_shared_prefixes_are_reused(server: PrefillUnderTest) -> None:
    """What another stream computed is not computed, and told as found."""
    server.run(opened(1), splice(PROMPT))
    server.run(opened(2), splice([*PROMPT[:30], 5, 6], stream_id=2), commit(32, stream_id=2))
    assert _sums(_account(server, 2)) == (2, 0, 30)


def test_evicted_tokens_are_recomputed(server: PrefillUnderTest) -> None:
    """Told with the moment at which the loss was noticed; the server counts them too."""
    server.run(opened(), splice(PROMPT))
    server.engine.evict(25)
    server.clock.now_s += 2.0
    server.run(commit(40))
    account = _account(server)
    assert _sums(account) == (40 + 25, 25, 0)
    (preemption,) = account.preemptions
    assert preemption.num_tokens == 25
    assert preemption.age_s == pytest.approx(0.01)
    counters = server.core.counters(0)
    assert (counters.num_recomputed_tokens, counters.num_preemptions) == (25, 1)
    assert counters.num_computed_tokens == 65


def test_kv_that_is_taken_at_once_is_noticed(server: PrefillUnderTest) -> None:
    """Also where it was evicted in the very pass that computed it."""
    server.step(opened(), splice(PROMPT))
    server.engine.evict(40)
    server.turn()
    server.run(commit(40))
    account = _account(server)
    assert _sums(account) == (81, 40, 0), "the last token for its logits"
    assert [each.num_tokens for each in account.preemptions] == [40]


@pytest.mark.parametrize("when", ["before the plan", "before the run"])
def test_each_loss_is_noticed_once(server: PrefillUnderTest, when: str) -> None:
    """When the server relies on the KV: as it plans, or as the engine runs."""
    server.run(opened(), splice(PROMPT))
    server.core.handle(splice([5], keep=40, seq=2))
    if when == "before the plan":
        server.engine.evict(25)
        server.turn()
        assert server.core.counters(0).num_preemptions == 1
    else:
        server.turn()
        server.engine.evict(25)
    server.run()
    server.run(commit(41, seq=3))
    account = _account(server)
    assert _sums(account) == (40 + 25 + 1 + 1, 25, 0), "the last token for its logits"
    assert [each.num_tokens for each in account.preemptions] == [25]
    assert server.core.counters(0).num_preemptions == 1


def test_updates_are_no_preemptions(server: PrefillUnderTest) -> None:
    """What the client replaced is computed anew, not again."""
    server.run(opened(), splice(PROMPT))
    server.run(splice(tokens(30, start=2), keep=15, seq=2), commit(45, seq=3))
    account = _account(server)
    assert _sums(account) == (40 + 30, 0, 0)
    assert account.preemptions == ()


def test_a_new_attempt_begins_a_new_account(server: PrefillUnderTest) -> None:
    """What the old one had computed is found in the cache like anybody's."""
    server.run(opened(), splice(PROMPT))
    server.run(opened(attempt=2), splice(PROMPT, attempt=2), commit(40, attempt=2))
    assert _sums(_account(server)) == (1, 0, 39)


def test_a_decode_server_that_found_the_prompt_has_nothing_to_tell(
    server: PrefillUnderTest,
) -> None:
    """KV that was handed over counts nowhere."""
    decode = DecodeUnderTest(network=server.network)
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    decode.run(generate(PROMPT, server.answer()[0], transfer_id=900))
    outputs = decode.take(s.Output)
    assert outputs[0].num_cached_tokens == 40
    assert {output.account for output in outputs} == {None}


def test_a_decode_server_tells_what_it_had_to_compute() -> None:
    """Prompt tokens only, and none of them as reused or recomputed."""
    server = DecodeUnderTest()
    server.run(generate(tokens(100), [next_token(tokens(100))]))
    account = _account(server)
    assert _sums(account) == (100, 0, 0)
    assert sum(run.num_tokens for run in account.runs) == 100


def test_handed_over_bytes_are_counted() -> None:
    """All ranks together, and only what arrived."""
    server = PrefillUnderTest(share=HeadShare(num_heads=2, tp_size=2))
    decode = DecodeUnderTest(network=server.network)
    two_ranks = msgspec.structs.replace(TO_DECODE, control_ports=(1, 2))
    server.run(opened(), splice(PROMPT), commit(40, handoff=two_ranks))
    (report,) = server.take(s.HandoffReport)
    assert report.num_bytes == 2 * len(kv_bytes(PROMPT))
    assert server.core.counters(0).num_handoff_bytes == report.num_bytes
    server.turn(forget())
    server.network.next_failures = deque([(TransferStatus.FAILED, "for a test")])
    other = msgspec.structs.replace(two_ranks, transfer_id=901)
    server.run(opened(2), splice(PROMPT, stream_id=2), commit(40, stream_id=2, handoff=other))
    assert not server.take(s.HandoffReport)[0].ok
    assert server.core.counters(0).num_handoff_bytes == report.num_bytes
    assert decode.core.counters(0).num_handoff_bytes == 0
