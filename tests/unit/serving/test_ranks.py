"""Hand-offs to a decode server with another number of tensor-parallel ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec
import pytest

from prefill_server.pushes import ANSWER_S, EarlyPush
from streamfill.kv_transfer.fake import FakeKvReceiver
from streamfill.kv_transfer.interface import TransferStatus
from streamfill.kv_transfer.slices import HeadShare
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import HandoffTarget, StreamMode
from tests.support.fake_engine import kv_bytes
from tests.unit.serving.builders import (
    TO_DECODE,
    PrefillUnderTest,
    cancel,
    commit,
    forget,
    opened,
    splice,
    tokens,
)

PROMPT = tokens(100)
TO_TWO = msgspec.structs.replace(TO_DECODE, control_ports=(1, 2))
TO_FOUR = msgspec.structs.replace(TO_DECODE, control_ports=(1, 2, 3, 4))
NUM_BYTES = len(kv_bytes(PROMPT))
"""Of all heads."""


@pytest.fixture
def server() -> PrefillUnderTest:
    """One rank with both heads of the model."""
    return PrefillUnderTest()


@pytest.fixture
def receivers(server: PrefillUnderTest) -> Iterator[list[FakeKvReceiver]]:
    receivers = [FakeKvReceiver("d0", server.network, rank=rank) for rank in range(4)]
    yield receivers
    for receiver in receivers:
        receiver.close()


def _take(receiver: FakeKvReceiver) -> list[int]:
    """How many tokens each transfer brought that arrived."""
    arrived = receiver.poll()
    for incoming in arrived:
        receiver.release(incoming)
    return [len(incoming.token_ids) for incoming in arrived]


@pytest.mark.parametrize(
    ("target", "num_copies"), [(TO_DECODE, 1), (TO_TWO, 1), (TO_FOUR, 2)], ids=["1", "2", "4"]
)
def test_each_rank_gets_a_part_and_one_report_tells(
    server: PrefillUnderTest,
    receivers: list[FakeKvReceiver],
    target: HandoffTarget,
    num_copies: int,
) -> None:
    """Heads that several ranks hold are sent as often, and count as often."""
    server.run(opened(), splice(PROMPT), commit(100, handoff=target))
    num_ranks = len(target.control_ports)
    assert [_take(receiver) for receiver in receivers[:num_ranks]] == [[100]] * num_ranks
    (report,) = server.take(s.HandoffReport)
    assert (report.ok, report.num_tokens, report.num_bytes) == (True, 100, num_copies * NUM_BYTES)
    assert server.core.counters(0).num_handoff_bytes == num_copies * NUM_BYTES
    server.turn(forget())
    server.assert_nothing_is_left()
    assert server.engine.staging_bytes == 0


def test_all_ranks_of_this_server_count() -> None:
    """Rank 0 reports what its neighbours send too; what it sends itself is its part."""
    server = PrefillUnderTest(share=HeadShare(num_heads=2, tp_size=2))
    receiver = FakeKvReceiver("d0", server.network)
    server.run(opened(), splice(PROMPT), commit(100, handoff=TO_DECODE))
    assert _take(receiver) == [100]
    (report,) = server.take(s.HandoffReport)
    assert report.num_bytes == 2 * NUM_BYTES
    receiver.close()


def test_a_rank_whose_heads_another_one_sends_keeps_nothing() -> None:
    """It goes on as if it had sent them: rank 0's word about that counts."""
    server = PrefillUnderTest(
        early_push=EarlyPush.ON, share=HeadShare(num_heads=2, tp_size=4, rank=1)
    )
    server.run(opened(), r.PushTo(stream_id=1, attempt=1, peer=TO_DECODE.peer), splice(PROMPT[:80]))
    server.run(splice(PROMPT[80:], keep=80, seq=2), commit(100, seq=3, handoff=TO_DECODE))
    assert server.take(s.HandoffReport) == []
    assert server.engine.staging_bytes == 0
    server.turn(forget())
    server.assert_nothing_is_left()


def test_one_part_that_fails_fails_the_hand_off(
    server: PrefillUnderTest, receivers: list[FakeKvReceiver]
) -> None:
    """The report gives its reason, and nothing counts as handed over."""
    server.network.next_failures = deque([(TransferStatus.FAILED, "for a test")])
    server.run(opened(), splice(PROMPT), commit(100, handoff=TO_TWO))
    (report,) = server.take(s.HandoffReport)
    assert (report.ok, report.reason) == (False, "for a test")
    assert server.core.counters(0).num_handoff_bytes == 0
    assert _take(receivers[1]) == [100]
    server.turn(forget())
    server.assert_nothing_is_left()


def test_the_other_parts_of_one_that_failed_are_cancelled(server: PrefillUnderTest) -> None:
    """They would be of no use; the KV is lent until the last of them has ended."""
    receiver = FakeKvReceiver("d0", server.network)
    server.network.is_holding = True
    server.run(opened(), splice(PROMPT), commit(100, handoff=TO_TWO))
    assert server.network.num_held == 2
    server.network.next_failures = deque([(TransferStatus.REFUSED, "for a test")])
    server.network.deliver_held(1)
    assert server.engine.staging_bytes > 0
    server.run()
    assert server.network.num_held == 0
    (report,) = server.take(s.HandoffReport)
    assert (report.ok, report.reason) == (False, "for a test")
    assert server.engine.staging_bytes == 0
    receiver.close()


def test_a_cancelled_stream_takes_all_parts_along(server: PrefillUnderTest) -> None:
    """And its KV is its own again."""
    server.network.is_holding = True
    server.run(opened(), splice(PROMPT), commit(100, handoff=TO_TWO))
    assert server.core.counters(0).num_transfers == 1
    server.run(cancel())
    assert server.network.num_held == 0
    assert server.engine.staging_bytes == 0
    server.assert_nothing_is_left()


def test_ranks_that_cannot_share_the_heads_mean_no_hand_off(server: PrefillUnderTest) -> None:
    """The reason names both servers' numbers; nothing goes ahead either."""
    to_three = msgspec.structs.replace(TO_DECODE, control_ports=(1, 2, 3))
    server.run(opened(), splice(PROMPT), commit(100, handoff=to_three))
    (report,) = server.take(s.HandoffReport)
    assert not report.ok
    assert report.reason == "3 ranks at d0: 3 ranks cannot share 2 KV heads evenly"
    assert server.engine.staging_bytes == 0


def test_context_goes_ahead_to_every_rank() -> None:
    """In as many parts as the rest of it after the commit."""
    server = PrefillUnderTest(early_push=EarlyPush.AUTO)
    receivers = [FakeKvReceiver("d0", server.network, rank=rank) for rank in range(2)]
    append = msgspec.structs.replace(opened(), mode=StreamMode.APPEND)
    server.run(append, r.PushTo(stream_id=1, attempt=1, peer=TO_TWO.peer), splice(PROMPT[:60]))
    server.clock.now_s += ANSWER_S  # nobody says what is held
    server.run(splice(PROMPT[60:], keep=60, seq=2))
    early = [_take(receiver) for receiver in receivers]
    assert early[0] == early[1] == [60, 100]
    server.run(commit(100, seq=3, handoff=TO_TWO))
    assert [_take(receiver) for receiver in receivers] == [[100], [100]]  # nothing is left to send
    (report,) = server.take(s.HandoffReport)
    assert (report.ok, report.num_bytes, report.num_early_bytes) == (True, NUM_BYTES, NUM_BYTES)
    for receiver in receivers:
        receiver.close()
