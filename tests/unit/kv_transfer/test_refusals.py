"""What a receiver does not take, and how it says so."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import zmq

from streamfill.kv_transfer.interface import TransferStatus
from streamfill.kv_transfer.source import MAX_CUTS
from streamfill.messages.handoff import (
    Abort,
    Accept,
    Complete,
    Offer,
    Ping,
    Pong,
    Refuse,
    Reject,
)
from tests.unit.kv_transfer.builders import (
    CALM,
    HOST,
    LAYOUT,
    RawReceiver,
    RawSender,
    address_of,
    arrivals_of,
    hello,
    offer,
    outcomes_of,
    transfer,
    wait_until,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender


def test_beyond_the_memory_limit_is_refused_and_later_taken(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """The reason names the numbers; the session and its group go on."""
    receiver, sender = make_receiver(memory_limit_bytes=100_000), make_sender()
    sender.submit(address_of(receiver), transfer(1, 400))
    first = outcomes_of(sender)[1]
    assert first.ok
    incoming = arrivals_of(receiver)[1]
    sender.submit(address_of(receiver), transfer(2, 400))
    second = outcomes_of(sender)[2]
    assert second.status is TransferStatus.REFUSED
    assert "76800 bytes wanted" in second.reason
    assert receiver.stats().num_refused == 1
    receiver.release(incoming)
    sender.submit(address_of(receiver), transfer(3, 400))
    assert outcomes_of(sender)[3].ok
    assert sender.stats().num_sessions == 1


def test_layouts_that_differ_are_refused_with_both_values(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Nothing is sent, and all that waits for that peer ends at once."""
    receiver = make_receiver(layout=msgspec.structs.replace(LAYOUT, page_size=16))
    sender = make_sender()
    for number in (1, 2):
        sender.submit(address_of(receiver), transfer(number, 16))
    for outcome in outcomes_of(sender, 2).values():
        assert outcome.status is TransferStatus.REFUSED
        assert "page_size is 16 here and 1 there" in outcome.reason
    assert receiver.stats().num_peers == 0


def test_a_duplicate_id_is_refused_also_from_another_sender(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """The router mints ids once; a repeated one is a late retry, and its KV is here already."""
    receiver, sender, other = make_receiver(), make_sender(), make_sender("p1")
    sender.submit(address_of(receiver), transfer(1, 4))
    assert outcomes_of(sender)[1].ok
    for again in (sender, other):
        again.submit(address_of(receiver), transfer(1, 4))
        outcome = outcomes_of(again)[1]
        assert outcome.status is TransferStatus.REFUSED
        assert "offered before" in outcome.reason
    assert receiver.stats().num_duplicates == 2
    assert list(arrivals_of(receiver)) == [1]


def test_a_full_queue_fails_at_once(make_sender: MakeSender) -> None:
    """The scheduler learns of it with the next poll instead of piling staging memory up."""
    sender = make_sender(max_queued=1)
    with RawReceiver() as nowhere:
        for number in range(4):
            sender.submit(nowhere.address, transfer(number, 1))
        full = outcomes_of(sender, 2)
        assert {outcome.status for outcome in full.values()} == {TransferStatus.FAILED}
        assert all("queued already" in outcome.reason for outcome in full.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"epoch": 77}, None),
        ({"num_bytes": 1}, "take 768 bytes, not 1"),
        ({"num_tokens": 5}, "do not add up"),
        ({"token_ids": b"abc"}, "whole 32-bit"),
        ({"num_tokens": 1 << 60, "first_token": 1 << 61}, "do not add up"),
    ],
)
def test_offers_that_make_no_sense(
    make_receiver: MakeReceiver, change: dict[str, object], complaint: str | None
) -> None:
    """Each is answered, nothing is reserved, and the session still works."""
    receiver = make_receiver()
    with RawSender(receiver.port) as peer:
        epoch = peer.open(hello()).epoch
        peer.send(msgspec.structs.replace(offer(1, epoch=epoch), **change))
        answer = peer.receive()
        if complaint is None:
            assert isinstance(answer, Reject)
            assert receiver.stats().num_stale_frames == 1
        else:
            assert isinstance(answer, Refuse)
            assert complaint in answer.reason
        assert receiver.stats().staging_used_bytes == 0
        peer.send(offer(2, epoch=epoch, num_tokens=0))
        assert peer.receive() == Accept(transfer_id=2, epoch=epoch)
        assert peer.receive() == Complete(transfer_id=2, epoch=epoch)
    assert arrivals_of(receiver)[2].staging.numel() == 0


def test_one_transfer_of_a_session_at_a_time(make_receiver: MakeReceiver) -> None:
    """The order on the group is agreed by Accept; a second one would have none."""
    receiver = make_receiver(timeouts=replace(CALM, group_setup_s=2.0))
    with RawSender(receiver.port) as peer:
        epoch = peer.open(hello()).epoch
        peer.send(offer(1, epoch=epoch))
        assert isinstance(peer.receive(), Accept)
        peer.send(offer(2, epoch=epoch))
        answer = peer.receive_reply()
        assert isinstance(answer, Refuse)
        assert "under way" in answer.reason
        # Nobody ever sets the group up: the receiver gives up by itself.
        answer = peer.receive_reply()
        assert isinstance(answer, Abort)
        assert answer.transfer_id == 1
    wait_until(lambda: receiver.stats().staging_used_bytes == 0)
    assert receiver.stats().num_failed == 1


def test_without_a_session_everything_is_rejected(make_receiver: MakeReceiver) -> None:
    """A sender that outlived its receiver's restart learns it by the first word."""
    receiver = make_receiver()
    with RawSender(receiver.port) as peer:
        for message in (offer(1, epoch=1), Ping(epoch=1)):
            peer.send(message)
            assert isinstance(peer.receive(), Reject)
        peer.send(Abort(transfer_id=1, epoch=1, reason="late"))
        wait_until(lambda: receiver.stats().num_stale_frames == 3)
        epoch = peer.open(hello()).epoch
        peer.send(Ping(epoch=epoch))
        assert peer.receive() == Pong(epoch=epoch)


def test_garbage_is_counted_and_everybody_else_goes_on(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Random, truncated, oversized and multi-part frames, and bytes that are not ZeroMQ at all."""
    receiver, sender = make_receiver(), make_sender()
    good = msgspec.msgpack.encode(offer(1, epoch=1))
    with RawSender(receiver.port) as peer:
        for frames in ([b"\xff" * 100], [b""], [good[:-1]], [good, good], [b"\x93\x01\x02\x03"]):
            peer.send_frames(*frames)
            assert isinstance(peer.receive(), Reject)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stream = context.socket(zmq.STREAM)
        stream.connect(f"tcp://{HOST}:{receiver.port}")
        stream.send_multipart([bytes(stream.getsockopt(zmq.IDENTITY)), b"GET / HTTP/1.1\r\n\r\n"])
        sender.submit(address_of(receiver), transfer(1, 100))
        assert outcomes_of(sender)[1].ok
        context.destroy(linger=0)
    assert receiver.stats().num_malformed_frames == 5
    assert list(arrivals_of(receiver)) == [1]


def test_garbage_from_a_receiver_is_counted_and_dropped(make_sender: MakeSender) -> None:
    """The sender goes on waiting for a real answer."""
    sender = make_sender()
    with RawReceiver() as receiver:
        sender.submit(receiver.address, transfer(1, 0))
        receiver.welcome()
        given = receiver.receive()
        assert isinstance(given, Offer)
        receiver.send_frames(b"\x00garbage")
        receiver.send_frames(b"a", b"b")
        receiver.send(Complete(transfer_id=99, epoch=1))
        receiver.send(Accept(transfer_id=1, epoch=1))
        receiver.send(Complete(transfer_id=1, epoch=1))
        assert outcomes_of(sender)[1].ok
    assert sender.stats().num_malformed_frames == 2
    assert sender.stats().num_stale_frames == 1


@pytest.mark.parametrize(
    ("cuts", "reason"),
    [
        ((0,), "do not ascend"),
        ((8, 8), "do not ascend"),
        ((16, 8), "do not ascend"),
        ((4 * LAYOUT.bytes_per_token,), "do not ascend"),
        (tuple(range(1, MAX_CUTS + 2)), "more than 4096"),
    ],
    ids=["at the beginning", "twice", "backwards", "at the end", "too many"],
)
def test_cuts_that_cannot_be_are_refused(
    make_receiver: MakeReceiver, cuts: tuple[int, ...], reason: str
) -> None:
    """Nothing is reserved for such an offer; one with other cuts is taken."""
    receiver = make_receiver()
    with RawSender(receiver.port) as sender:
        epoch = sender.open(hello()).epoch
        sender.send(msgspec.structs.replace(offer(1, epoch=epoch), cuts=cuts))
        answer = sender.receive()
        assert isinstance(answer, Refuse)
        assert reason in answer.reason
        assert receiver.stats().staging_used_bytes == 0
        sender.send(msgspec.structs.replace(offer(1, epoch=epoch), cuts=(8, 16)))
        assert isinstance(sender.receive(), Accept)
