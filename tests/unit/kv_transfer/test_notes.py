"""What two endpoints tell each other beside transfers: what is held of a prompt."""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import zmq

from streamfill.kv_transfer.interface import (
    Farewell,
    HeldReport,
    PeerAddress,
    Question,
    ReceiverLost,
    SenderLost,
    TransferStatus,
)
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.sender import KvSender
from tests.unit.kv_transfer.builders import (
    HOST,
    LAYOUT,
    PATIENCE_S,
    QUICK,
    address_of,
    arrivals_of,
    outcomes_of,
    transfer,
    wait_until,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

T = TypeVar("T")


def _some(endpoint: KvReceiver | KvSender, poll: Callable[[], list[T]]) -> list[T]:
    """What is said next, waited for through the file descriptor."""
    while not (said := poll()):
        assert select.select([endpoint.fileno()], [], [], PATIENCE_S)[0], "nothing is said"
        endpoint.poll()
    return said


def _next(endpoint: KvReceiver | KvSender, poll: Callable[[], list[T]]) -> T:
    """The next thing, and the only one, that is said."""
    (one,) = _some(endpoint, poll)
    return one


def test_a_question_is_answered_then_and_later(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """It needs no transfer; answers go to the one who asked."""
    receiver, sender, other = make_receiver(), make_sender("p0"), make_sender("p1")
    other.ask(address_of(receiver), 5, 0, [1])
    assert isinstance(_next(receiver, receiver.poll_notes), Question)
    sender.ask(address_of(receiver), 7, 2, [1, 2, 300_000])
    question = _next(receiver, receiver.poll_notes)
    assert isinstance(question, Question)
    assert (question.server_id, question.stream_id, question.version) == ("p0", 7, 2)
    assert list(question.token_ids) == [1, 2, 300_000]
    for num_tokens, missed in ((3, None), (0, 9)):
        told = HeldReport("d0", 7, 2, num_tokens, missed is not None, missed)
        receiver.tell("p0", told)
        assert _next(sender, sender.poll_held) == told
    assert other.poll_held() == []
    sender.let_go(address_of(receiver), 7)
    assert _next(receiver, receiver.poll_notes) == Farewell("p0", 7)
    receiver.tell("nobody", told)  # left already


def test_news_come_between_the_messages_of_a_transfer(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Neither is taken for the other."""
    receiver, sender = make_receiver(), make_sender(chunk_bytes=1000)
    for number in range(1, 30):
        sender.submit(address_of(receiver), transfer(number, 50))
        receiver.tell("p0", HeldReport("d0", number, 0, number))
        assert outcomes_of(sender)[number].ok
        receiver.release(arrivals_of(receiver)[number])
    assert sender.stats().num_stale_frames == 0


def test_who_was_told_hears_of_the_end_of_a_session(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """On both sides: what was said before is worth nothing any more."""
    receiver, sender = make_receiver(), make_sender("p0")
    sender.ask(address_of(receiver), 7, 0, [1])
    _next(receiver, receiver.poll_notes)
    again = make_sender("p0")  # a new incarnation takes over
    again.ask(address_of(receiver), 8, 0, [1])
    heard: list[Question | Farewell | SenderLost] = []
    while len(heard) < 2:  # together or one after the other
        heard += _some(receiver, receiver.poll_notes)
    lost, question = heard
    assert lost == SenderLost("p0")
    assert isinstance(question, Question)
    assert question.stream_id == 8
    assert _next(sender, sender.poll_held) == ReceiverLost("d0")


def test_an_unreachable_receiver_is_not_asked(make_sender: MakeSender) -> None:
    """Nothing is said, nothing breaks, and letting go opens no session."""
    sender = make_sender(timeouts=QUICK)
    nowhere = PeerAddress("d0", HOST, 1)
    sender.let_go(nowhere, 7)
    sender.ask(nowhere, 7, 0, [1])
    sender.let_go(nowhere, 7)
    assert _next(sender, sender.poll_held) == ReceiverLost("d0")
    sender.submit(nowhere, transfer(1, 4))
    assert not outcomes_of(sender)[1].ok


def test_early_kv_is_refused_beyond_its_room(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Other KV is not."""
    receiver, sender = make_receiver(), make_sender()
    receiver.allow_early(10 * LAYOUT.bytes_per_token)
    for number, num_tokens, is_early in ((1, 10, True), (2, 11, True), (3, 11, False)):
        sent = replace(transfer(number, num_tokens), is_early=is_early, version=4, replaces=2)
        sender.submit(address_of(receiver), sent)
        outcome = outcomes_of(sender)[number]
        assert outcome.ok == (number != 2)
        if not outcome.ok:
            assert outcome.status is TransferStatus.REFUSED
            assert "ahead of its commit" in outcome.reason
            continue
        incoming = arrivals_of(receiver)[number]
        assert (incoming.is_early, incoming.version, incoming.replaces) == (is_early, 4, 2)
        receiver.release(incoming)


def test_a_transfer_does_not_wait_for_every_question_to_an_unreachable_receiver(
    make_sender: MakeSender,
) -> None:
    """The KV that it lends out would stay locked meanwhile."""
    sender = make_sender(timeouts=replace(QUICK, session_s=0.4))
    nowhere = PeerAddress("d0", HOST, 1)
    for stream_id in range(100):
        sender.ask(nowhere, stream_id, 0, [1])
    sender.submit(nowhere, transfer(1, 4))
    begun_s = time.monotonic()
    outcome = outcomes_of(sender)[1]
    assert outcome.status is TransferStatus.FAILED
    assert "did not answer" in outcome.reason
    assert time.monotonic() - begun_s < 15  # a hundred questions of 0.4 s each are 40
    assert set(sender.poll_held()) == {ReceiverLost("d0")}


def test_a_question_for_which_there_is_no_socket_ends_no_link(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may be short of descriptors for a moment."""
    receiver, sender = make_receiver(), make_sender()
    make, errors = zmq.Context.socket, [zmq.ZMQError(errno.EMFILE)]

    def socket(context: zmq.Context[Any], kind: int) -> Any:
        if errors:
            raise errors.pop()
        return make(context, kind)

    monkeypatch.setattr(zmq.Context, "socket", socket)
    sender.ask(address_of(receiver), 7, 0, [1])
    wait_until(lambda: not errors)
    sender.submit(address_of(receiver), transfer(1, 4))
    assert outcomes_of(sender)[1].ok
    receiver.release(arrivals_of(receiver)[1])
