"""Every operation of a stream is delivered once and in order, whatever the wire does."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from streamfill.links.inbound_gate import InboundGate
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Sampling, StreamMode

STREAM = 7
Operation = r.OpenStream | r.Splice | r.Commit


def _open(attempt: int = 1) -> r.OpenStream:
    return r.OpenStream(stream_id=STREAM, attempt=attempt, mode=StreamMode.APPEND)


def _splice(seq: int, attempt: int = 1) -> r.Splice:
    return r.Splice(stream_id=STREAM, attempt=attempt, seq=seq, keep_tokens=0, token_ids=b"")


def _commit(seq: int, attempt: int = 1) -> r.Commit:
    return r.Commit(
        stream_id=STREAM,
        attempt=attempt,
        seq=seq,
        num_prompt_tokens=1,
        sampling=Sampling(),
        handoff=None,
    )


def _received(seq: int, attempt: int = 1) -> s.Received:
    return s.Received(stream_id=STREAM, attempt=attempt, seq=seq)


def _resync(have_seq: int, attempt: int = 1) -> s.ResyncRequest:
    return s.ResyncRequest(stream_id=STREAM, attempt=attempt, have_seq=have_seq)


def test_operations_in_order_are_delivered_and_acknowledged() -> None:
    """Each with its own number."""
    gate = InboundGate()
    assert gate.admit(_open()) == (True, _received(0))
    assert gate.admit(_splice(1)) == (True, _received(1))
    assert gate.admit(_commit(2)) == (True, _received(2))


def test_a_repeated_operation_is_acknowledged_again_and_not_delivered() -> None:
    """With all that arrived, since the acknowledgement may have been lost."""
    gate = InboundGate()
    for message in (_open(), _splice(1), _splice(2)):
        gate.admit(message)
    repeated: list[Operation] = [_open(), _splice(1), _splice(2), _commit(2), _splice(0)]
    for again in (*repeated, _splice(-3)):
        assert gate.admit(again) == (False, _received(2))
    assert gate.num_duplicates == 6


def test_a_gap_is_asked_for() -> None:
    """From the first operation that is missing; what is behind it is not kept."""
    gate = InboundGate()
    gate.admit(_open())
    assert gate.admit(_splice(2)) == (False, _resync(0))
    assert gate.admit(_splice(1)) == (True, _received(1))
    assert gate.admit(_splice(2)) == (True, _received(2))
    assert gate.num_gaps == 1


def test_operations_of_an_unknown_stream_or_a_newer_attempt_are_asked_for_from_the_start() -> None:
    """-1: its opening is missing too."""
    gate = InboundGate()
    assert gate.admit(_splice(1)) == (False, _resync(-1))
    gate.admit(_open())
    assert gate.admit(_splice(1, attempt=2)) == (False, _resync(-1, attempt=2))


def test_operations_of_an_older_attempt_are_dropped_without_a_word() -> None:
    """Nobody waits for an answer to them."""
    gate = InboundGate()
    gate.admit(_open(attempt=2))
    assert gate.admit(_splice(1, attempt=1)) == (False, None)
    assert gate.num_stale == 1


def test_a_newer_attempt_starts_over() -> None:
    """An older opening that comes late does not bring the old one back."""
    gate = InboundGate()
    gate.admit(_open())
    gate.admit(_splice(1))
    assert gate.admit(_open(attempt=2)) == (True, _received(0, attempt=2))
    assert gate.admit(_open(attempt=1)) == (False, _received(0, attempt=2))
    assert gate.admit(_splice(1, attempt=2)) == (True, _received(1, attempt=2))


def test_cancel_and_forget_are_always_delivered_and_take_the_entry_away() -> None:
    """Unless a newer attempt was opened; the gate does not grow with the streams of the past."""
    for ending in (
        r.Cancel(stream_id=STREAM, attempt=1),
        r.Forget(stream_id=STREAM, attempt=1),
    ):
        gate = InboundGate()
        gate.admit(_open(attempt=2))
        assert gate.admit(ending) == (True, None)
        assert len(gate) == 1
        gate = InboundGate()
        gate.admit(_open())
        assert gate.admit(ending) == (True, None)
        assert len(gate) == 0
        assert gate.admit(ending) == (True, None)


def test_a_stream_that_the_scheduler_gave_up_is_forgotten_but_not_its_successor() -> None:
    """The news of the old attempt may come after the new one was opened."""
    gate = InboundGate()
    gate.admit(_open(attempt=2))
    gate.drop(STREAM, 1)
    assert gate.admit(_splice(1, attempt=2)) == (True, _received(1, attempt=2))
    gate.drop(STREAM, 2)
    assert len(gate) == 0
    gate.drop(STREAM, 2)


def test_messages_without_a_number_pass() -> None:
    """Generate, resends and the rest are harmless when repeated."""
    gate = InboundGate()
    for message in (
        r.ResendOutput(stream_id=STREAM, attempt=1, from_index=0),
        r.HandoffFailed(stream_id=STREAM, attempt=1, transfer_id=3),
        r.FlushCache(request_id=1),
        r.SetPolicy(request_id=1, policy="fcfs"),
        r.DescribeStreams(request_id=1),
    ):
        assert gate.admit(message) == (True, None)
    assert len(gate) == 0


def test_a_cleared_gate_knows_nobody() -> None:
    """The router that knew the streams is gone."""
    gate = InboundGate()
    gate.admit(_open())
    gate.clear()
    assert gate.admit(_splice(1)) == (False, _resync(-1))


@dataclass
class _Router:
    """Sends from its log until all of it is acknowledged, as the router does."""

    log: list[Operation]
    acknowledged: int = -1

    def hear(self, reply: s.ServerToRouter | None) -> list[Operation]:
        match reply:
            case s.Received(seq=seq):
                self.acknowledged = max(self.acknowledged, seq)
            case s.ResyncRequest(have_seq=have_seq):
                return self.log[have_seq + 1 :]
        return []


@dataclass
class _Wire:
    """Duplicates, drops and reorders, as it is told."""

    gate: InboundGate = field(default_factory=InboundGate)
    under_way: list[Operation] = field(default_factory=list)
    delivered: list[Operation] = field(default_factory=list)


@given(data=st.data(), num_splices=st.integers(0, 6), losses=st.integers(0, 25))
def test_exactly_once_and_in_order_over_a_bad_wire(
    data: st.DataObject, num_splices: int, losses: int
) -> None:
    """A router that repeats what is not acknowledged gets every operation through, once."""
    log: list[Operation] = [
        _open(),
        *(_splice(seq) for seq in range(1, num_splices + 1)),
        _commit(num_splices + 1),
    ]
    router, wire = _Router(log), _Wire()
    while router.acknowledged < len(log) - 1:
        if not wire.under_way:
            wire.under_way += log[router.acknowledged + 1 :]
        index = 0
        is_bad = losses > 0 and data.draw(st.booleans())
        if is_bad:
            losses -= 1
            index = data.draw(st.integers(0, len(wire.under_way) - 1))
            fate = data.draw(st.sampled_from(["drop", "duplicate", "reorder", "lose reply"]))
        else:
            fate = "arrive"
        message = wire.under_way[index] if fate == "duplicate" else wire.under_way.pop(index)
        if fate == "drop":
            continue
        admission = wire.gate.admit(message)
        if admission.deliver:
            wire.delivered.append(message)
        if fate != "lose reply":
            wire.under_way += router.hear(admission.reply)
    assert wire.delivered == log
