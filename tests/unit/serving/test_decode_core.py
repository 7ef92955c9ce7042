"""The receiving end of the hand-off."""

from __future__ import annotations

import pytest
import torch

from decode_server.core import HANDOFF_WAIT_S
from streamfill.kv_transfer.fake import FakeKvSender, FakeNetwork
from streamfill.kv_transfer.interface import HeldReport, OutgoingTransfer, PeerAddress
from streamfill.kv_transfer.source import StagedKv
from streamfill.links.server_link import RouterLost
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import FinishReason
from tests.support.fake_engine import KV_BYTES_PER_TOKEN, FakeEngine, kv_bytes, next_token, predict
from tests.unit.serving.builders import (
    GREEDY,
    TO_DECODE,
    DecodeUnderTest,
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
FIRST = next_token(PROMPT)
REST = predict(PROMPT, GREEDY, frozenset())[1:]
TRANSFER = 900


@pytest.fixture
def server() -> DecodeUnderTest:
    return DecodeUnderTest()


def _send_kv(
    server: DecodeUnderTest,
    *,
    token_ids: list[int] = PROMPT,
    first_token: int = 0,
    transfer_id: int = TRANSFER,
) -> None:
    sender = FakeKvSender("p0", server.network)
    content = bytearray(kv_bytes(token_ids)[first_token * KV_BYTES_PER_TOKEN :])
    staging = torch.frombuffer(content, dtype=torch.uint8)
    transfer = OutgoingTransfer(transfer_id, 1, token_ids, first_token, StagedKv(staging))
    sender.submit(PeerAddress("d0", "nowhere", 1), transfer)
    assert [outcome.ok for outcome in sender.poll()] == [True]
    sender.close()


def _failed(transfer_id: int = TRANSFER, attempt: int = 1) -> r.HandoffFailed:
    return r.HandoffFailed(stream_id=1, attempt=attempt, transfer_id=transfer_id)


def _assert_answered(server: DecodeUnderTest, num_cached: int) -> None:
    outputs = server.take(s.Output)
    assert outputs[0].first_index == 1
    assert outputs[0].num_cached_tokens == num_cached
    server.sent.extend(outputs)
    assert server.answer() == (REST, FinishReason.LENGTH)
    server.turn(forget())
    server.assert_nothing_is_left()


def test_kv_before_its_generate(server: DecodeUnderTest) -> None:
    """It waits in the cache; the answer goes on at once, with the second token."""
    _send_kv(server)
    server.run()
    assert server.core.counters(0).num_cached_tokens == 40
    server.run(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    assert server.engine.started == [("answer", 1, 41)]
    _assert_answered(server, num_cached=40)


def test_kv_after_its_generate(server: DecodeUnderTest) -> None:
    """The stream waits for it, and says that it is there."""
    server.run(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    assert server.engine.started == []
    assert server.progress().num_known_tokens == 41
    _send_kv(server)
    server.run()
    _assert_answered(server, num_cached=40)


def test_a_generate_without_kv_recomputes(server: DecodeUnderTest) -> None:
    """At once."""
    server.run(generate(PROMPT, [FIRST]))
    _assert_answered(server, num_cached=0)


@pytest.mark.parametrize("order", ["generate first", "failure first"])
def test_a_failed_hand_off_is_recomputed_at_once(server: DecodeUnderTest, order: str) -> None:
    """In whichever order the news come."""
    messages: list[r.Generate | r.HandoffFailed] = [
        generate(PROMPT, [FIRST], transfer_id=TRANSFER),
        _failed(),
    ]
    if order == "failure first":
        messages.reverse()
    server.run(*messages)
    _assert_answered(server, num_cached=0)


def test_the_failure_of_another_transfer_ends_no_wait(server: DecodeUnderTest) -> None:
    """A retry has a new id."""
    server.run(generate(PROMPT, [FIRST], transfer_id=TRANSFER), _failed(TRANSFER - 1))
    assert server.engine.started == []
    _send_kv(server)
    server.run()
    _assert_answered(server, num_cached=40)


def test_a_wait_is_not_for_ever(server: DecodeUnderTest) -> None:
    """After ``HANDOFF_WAIT_S`` the server recomputes; KV that comes later harms nothing."""
    server.turn(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    server.clock.now_s += HANDOFF_WAIT_S - 1
    server.run()
    assert server.engine.started == []
    server.clock.now_s += 1
    server.step()
    assert len(server.engine.started) == 1
    _send_kv(server)
    server.run()
    _assert_answered(server, num_cached=0)


def test_kv_for_which_there_is_no_room_is_recomputed() -> None:
    """An import that finds no memory gives its staging memory back and holds nobody up."""
    server = DecodeUnderTest(FakeEngine(pool_tokens=60))
    server.step(generate(tokens(30, start=5), stream_id=5))
    server.step()
    _send_kv(server)
    server.turn(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    assert server.core.counters(0).staging_bytes == 0
    server.run()
    assert server.answer(5)[1] is FinishReason.LENGTH
    server.turn(forget(5))
    assert server.engine.started[1][:2] == ("answer", 1), "begun when it fits, and not before"
    assert server.answer() == (REST, FinishReason.LENGTH)


def test_an_import_that_breaks_gives_its_staging_back(server: DecodeUnderTest) -> None:
    """An error in the engine is not swallowed, and leaks nothing."""

    def broken(incoming: object) -> int:
        raise RuntimeError("no such slot")

    server.engine.import_kv = broken  # type: ignore[method-assign]
    _send_kv(server)
    with pytest.raises(RuntimeError, match="no such slot"):
        server.turn()
    assert server.core.counters(0).staging_bytes == 0
    assert server.core.counters(0).num_transfers == 0


def test_kv_behind_a_prefix_that_is_gone_is_of_no_use(server: DecodeUnderTest) -> None:
    """It is released. Its sender is told, and when nothing comes of it the whole prompt is
    computed."""
    sender = FakeKvSender("p0", server.network)
    _send_kv(server, first_token=20)
    server.network.senders["p0"] = sender
    server.run(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    (missed,) = sender.poll_held()
    assert isinstance(missed, HeldReport)
    assert (missed.missed_transfer_id, missed.num_tokens) == (TRANSFER, 0)
    assert server.core.counters(0).staging_bytes == 0
    assert server.engine.started == []
    server.run(_failed())
    _assert_answered(server, num_cached=0)
    sender.close()


def test_kv_that_was_evicted_again_is_recomputed(server: DecodeUnderTest) -> None:
    """The stream relies on what is in the tree, not on what arrived."""
    _send_kv(server)
    server.turn()
    server.engine.evict(30)
    server.run(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    _assert_answered(server, num_cached=10)


def test_kv_that_is_not_imported_everywhere_yet_is_counted(server: DecodeUnderTest) -> None:
    """Between its arrival here and on the other ranks."""
    _send_kv(server)
    arrived = server.core.receive()
    assert arrived == [TRANSFER]
    counters = server.core.counters(0)
    assert counters.num_transfers == 1
    assert counters.staging_bytes > 0
    server.core.take_in([*arrived, 12345])
    counters = server.core.counters(0)
    assert (counters.num_transfers, counters.staging_bytes) == (0, 0)


def test_kv_that_other_ranks_never_got_is_given_up(server: DecodeUnderTest) -> None:
    """Its staging memory comes back and who waits for it recomputes."""
    server.turn(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    _send_kv(server)
    assert server.core.receive() == [TRANSFER]
    server.core.give_up([TRANSFER, 12345])
    assert server.core.counters(0).staging_bytes == 0
    server.run()
    _assert_answered(server, num_cached=0)


def test_a_generate_sent_again_gets_a_sign_of_life(server: DecodeUnderTest) -> None:
    """And is not started twice, whether it waits, answers or is done."""
    message = generate(PROMPT, [FIRST], transfer_id=TRANSFER)
    server.turn(message, message)
    assert len(server.take(s.Progress)) == 2
    _send_kv(server)
    server.step(message)
    server.step(message)
    server.run()
    server.run(message)
    assert len(server.engine.started) == 1
    _assert_answered(server, num_cached=40)


def test_an_older_generate_changes_nothing(server: DecodeUnderTest) -> None:
    """A newer one replaces the stream, with its own answer."""
    server.step(generate(PROMPT, [FIRST], attempt=2))
    server.run(generate(tokens(5), attempt=1))
    assert server.answer() == (REST, FinishReason.LENGTH)
    server.run(generate(PROMPT, [FIRST, REST[0]], attempt=3))
    (output, *_) = server.take(s.Output)
    assert (output.attempt, output.first_index) == (3, 2)


def test_a_newer_generate_stops_the_older_one(server: DecodeUnderTest) -> None:
    """In the middle of its answer; nothing of it stays."""
    server.step(generate(PROMPT, [FIRST]))
    server.run(generate(PROMPT, [FIRST], attempt=2))
    assert {output.attempt for output in server.take(s.Output)} == {2}
    server.turn(forget(attempt=2))
    server.assert_nothing_is_left()


@pytest.mark.parametrize("phase", ["waiting", "answering", "done"])
@pytest.mark.parametrize("ending", ["cancel", "router lost"])
def test_an_ending_leaves_nothing_behind(server: DecodeUnderTest, phase: str, ending: str) -> None:
    """In whatever phase it finds the stream; KV that comes afterwards is only cache."""
    server.step(generate(PROMPT, [FIRST], transfer_id=TRANSFER))
    if phase != "waiting":
        _send_kv(server)
        server.step()
    if phase == "done":
        server.run()
    server.turn(cancel() if ending == "cancel" else RouterLost())
    server.sent.clear()
    if phase == "waiting":
        _send_kv(server)
    server.assert_nothing_is_left()
    assert server.sent == []
    assert server.core.counters(0).num_cached_tokens >= 40


def test_a_whole_hand_off() -> None:
    """Prefill and decode server together say what one server would have said."""
    network = FakeNetwork()
    prefill, decode = PrefillUnderTest(network=network), DecodeUnderTest(network=network)
    prefill.run(opened(), splice(PROMPT), commit(40, handoff=TO_DECODE))
    first, finish = prefill.answer()
    assert finish is None
    decode.run(generate(PROMPT, first, transfer_id=TO_DECODE.transfer_id))
    assert first + decode.answer()[0] == predict(PROMPT, GREEDY, frozenset())
    assert prefill.take(s.HandoffReport)[0].ok
    for server in (prefill, decode):
        server.turn(forget())
        server.assert_nothing_is_left()


def test_a_long_prompt_without_kv_is_recomputed_in_steps(server: DecodeUnderTest) -> None:
    """The brought token is part of the sequence, not of the answer."""
    prompt = tokens(150)
    answer = predict(prompt, GREEDY, frozenset())
    server.run(generate(prompt, answer[:3]))
    assert server.engine.started == [("segment", 1, 64), ("segment", 1, 128), ("answer", 1, 153)]
    assert server.answer() == (answer[3:], FinishReason.LENGTH)
