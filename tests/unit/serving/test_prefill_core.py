"""The sending end of the hand-off."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec
import pytest

from streamfill.kv_transfer.fake import FakeKvReceiver
from streamfill.kv_transfer.interface import OutgoingTransfer, PeerAddress, TransferStatus
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import unpack_ids
from streamfill.messages.common import FinishReason, Sampling
from tests.support.fake_engine import FakeEngine, kv_bytes, next_token, predict
from tests.unit.serving.builders import (
    GREEDY,
    TO_DECODE,
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


@pytest.fixture
def receiver(server: PrefillUnderTest) -> Iterator[FakeKvReceiver]:
    receiver = FakeKvReceiver("d0", server.network)
    yield receiver
    receiver.close()


def _report(server: PrefillUnderTest) -> s.HandoffReport:
    (report,) = server.take(s.HandoffReport)
    return report


def test_the_first_token_leaves_before_the_hand_off(
    server: PrefillUnderTest, receiver: FakeKvReceiver
) -> None:
    """It is on its way before the transport has anything, and the KV is that of the prompt."""
    server.run(opened(), splice(PROMPT))
    tokens_at_submit: list[int] = []
    submit = server.sender.submit

    def note_and_submit(peer: PeerAddress, transfer: OutgoingTransfer) -> None:
        tokens_at_submit.extend(server.answer()[0])
        submit(peer, transfer)

    server.sender.submit = note_and_submit  # type: ignore[method-assign]
    server.run(commit(40, handoff=TO_DECODE))
    server.run()
    assert tokens_at_submit == [next_token(PROMPT)]
    (incoming,) = receiver.poll()
    assert list(incoming.token_ids) == PROMPT
    assert bytes(incoming.staging.numpy()) == kv_bytes(PROMPT)
    receiver.release(incoming)
    report = _report(server)
    assert (report.transfer_id, report.ok, report.reason, report.num_tokens) == (900, True, "", 40)
    assert report.num_bytes == len(kv_bytes(PROMPT))


def test_the_first_token_alone_does_not_end_the_answer(
    server: PrefillUnderTest, receiver: FakeKvReceiver
) -> None:
    """Whatever ended this server's request, the router is told of no end; only one token is
    sampled here."""
    sampling = msgspec.structs.replace(GREEDY, min_new_tokens=3)
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE, sampling=sampling))
    assert server.answer() == ([next_token(PROMPT)], None)
    assert server.engine.started[-1] == ("answer", 1, 40)


@pytest.mark.parametrize("named_by", ["model", "request"])
def test_a_first_token_that_ends_the_answer_is_not_handed_off(named_by: str) -> None:
    """End of sequence or stop token: the answer is complete, nothing is transferred."""
    first = next_token(PROMPT)
    by_model = named_by == "model"
    server = PrefillUnderTest(FakeEngine(eos_token_ids=frozenset({first} if by_model else ())))
    sampling = msgspec.structs.replace(GREEDY, stop_token_ids=() if by_model else (first,))
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE, sampling=sampling))
    (output,) = server.take(s.Output)
    assert list(unpack_ids(output.token_ids)) == [first]
    assert output.finish is not None
    assert (output.finish.reason, output.finish.matched_token_id) == (FinishReason.STOP, first)
    assert server.take(s.HandoffReport) == []
    assert server.sender.stats().num_failed == 0
    server.turn(forget())
    server.assert_nothing_is_left()


def test_an_ignored_end_of_sequence_is_handed_off() -> None:
    """``ignore_eos`` ignores stop tokens too, as in SGLang."""
    first = next_token(PROMPT)
    server = PrefillUnderTest(FakeEngine(eos_token_ids=frozenset({first})))
    sampling = msgspec.structs.replace(GREEDY, ignore_eos=True, stop_token_ids=(first,))
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE, sampling=sampling))
    assert server.answer() == ([first], None)
    assert len(server.take(s.HandoffReport)) == 1


def test_an_answer_of_one_token_is_not_handed_off(server: PrefillUnderTest) -> None:
    """It is complete with the first token."""
    sampling = Sampling(temperature=0.0, max_new_tokens=1)
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE, sampling=sampling))
    assert server.answer() == ([next_token(PROMPT)], FinishReason.LENGTH)
    assert server.take(s.HandoffReport) == []


def test_without_a_target_the_prefill_server_answers_by_itself(server: PrefillUnderTest) -> None:
    """All of it, and nothing is transferred."""
    server.run(opened(), splice(PROMPT), commit(40))
    assert server.answer() == (predict(PROMPT, GREEDY, frozenset()), FinishReason.LENGTH)
    assert server.take(s.HandoffReport) == []


def test_a_decode_server_that_is_gone_is_reported(server: PrefillUnderTest) -> None:
    """The router learns it, the client does not; staging memory comes back."""
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    report = _report(server)
    assert not report.ok
    assert "did not answer" in report.reason
    assert server.take(s.StreamFailed) == []
    server.turn(forget())
    server.assert_nothing_is_left()
    assert server.engine.staging_bytes == 0


@pytest.mark.parametrize("status", [TransferStatus.REFUSED, TransferStatus.FAILED])
def test_a_transfer_that_fails_is_reported(
    server: PrefillUnderTest, receiver: FakeKvReceiver, status: TransferStatus
) -> None:
    """With its reason."""
    server.network.next_failures = deque([(status, "for a test")])
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    report = _report(server)
    assert (report.ok, report.reason) == (False, "for a test")
    assert server.engine.staging_bytes == 0


def test_no_staging_memory_means_no_hand_off() -> None:
    """The decode server recomputes; the first token is sent all the same."""
    server = PrefillUnderTest(FakeEngine(staging_limit_bytes=8))
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    assert server.answer() == ([next_token(PROMPT)], None)
    assert not _report(server).ok


def test_fewer_ranks_at_the_other_end_mean_no_hand_off() -> None:
    """A rank without a counterpart reports failure and keeps nothing."""
    server = PrefillUnderTest()
    target = msgspec.structs.replace(TO_DECODE, control_ports=())
    server.run(opened(), splice(PROMPT), commit(40, handoff=target))
    assert "0 ranks" in _report(server).reason
    assert server.engine.staging_bytes == 0


def test_a_transfer_id_is_not_used_twice(server: PrefillUnderTest) -> None:
    """The second hand-off fails, the first one is not touched."""
    server.network.is_holding = True
    for n in (1, 2):
        prompt = tokens(40, start=n)
        server.turn(opened(n), splice(prompt, stream_id=n))
        server.turn(commit(40, stream_id=n, handoff=TO_DECODE))
    server.run()
    report = _report(server)
    assert (report.stream_id, report.ok) == (2, False)
    assert server.core.counters(0).num_transfers == 1
    server.network.deliver_held()
    server.run()
    assert _report(server).stream_id == 1
    assert server.engine.staging_bytes == 0


def test_pages_that_are_not_full_are_not_handed_off() -> None:
    """Whole pages only; the rest is recomputed with the first step of the decode server."""
    server = PrefillUnderTest(FakeEngine(page_size=16))
    receiver = FakeKvReceiver("d0", server.network)
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    (incoming,) = receiver.poll()
    assert list(incoming.token_ids) == PROMPT[:32]
    assert _report(server).num_tokens == 32
    receiver.release(incoming)
    receiver.close()


@pytest.mark.parametrize("how", ["cancel", "forget", "reopen", "generate here"])
def test_a_stream_that_ends_takes_its_transfer_along(server: PrefillUnderTest, how: str) -> None:
    """A transfer under way is given up, its staging memory comes back."""
    server.network.is_holding = True
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    counters = server.core.counters(0)
    assert (counters.num_transfers, counters.staging_bytes) == (1, len(kv_bytes(PROMPT)))
    match how:
        case "cancel":
            server.turn(cancel())
        case "forget":
            server.turn(forget())
        case "reopen":
            server.turn(opened(attempt=2), cancel(attempt=2))
        case _:
            server.run(generate(PROMPT, [next_token(PROMPT)]))
            assert server.answer()[1] is FinishReason.LENGTH
            server.turn(forget())
    server.assert_nothing_is_left()
    assert server.engine.staging_bytes == 0


def test_a_server_is_not_through_before_its_hand_offs_are(server: PrefillUnderTest) -> None:
    """Else the last prompt before an orderly end would be computed again."""
    receiver = FakeKvReceiver("d0", server.network)
    server.network.is_holding = True
    server.run(opened(), splice(PROMPT))
    is_through = [server.core.is_through]
    server.run(commit(40, handoff=TO_DECODE))
    assert server.core.num_streams == 0
    is_through.append(server.core.is_through)
    server.network.deliver_held()
    (incoming,) = receiver.poll()
    receiver.release(incoming)
    server.turn()
    assert _report(server).ok
    is_through.append(server.core.is_through)
    assert is_through == [False, False, True]
    receiver.close()


def test_the_answer_goes_on_here_when_the_decode_server_died(server: PrefillUnderTest) -> None:
    """On the same attempt, from the second token, out of the cache."""
    server.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    first = server.answer()[0]
    server.run(generate(PROMPT, first))
    (second, *_) = outputs = server.take(s.Output)
    assert (second.first_index, second.num_cached_tokens) == (1, 40)
    server.sent.extend(outputs)
    answer = predict(PROMPT, GREEDY, frozenset())
    assert server.answer() == (answer[1:], FinishReason.LENGTH)
