"""Peers that are silent, go away, or change their mind."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from streamfill.kv_transfer.inbound_lane import InboundLane
from streamfill.kv_transfer.interface import TransferStatus
from streamfill.messages.handoff import Abort, Accept, Complete, Hello, Offer, Reject, Welcome
from tests.unit.kv_transfer.builders import (
    CALM,
    LAYOUT,
    QUICK,
    RawReceiver,
    RawSender,
    address_of,
    arrivals_of,
    hello,
    offer,
    outcomes_of,
    send_all,
    slow_transfer,
    transfer,
    wait_until,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender


def test_nobody_listens(make_sender: MakeSender) -> None:
    """All that waits for that peer fails together, others are not concerned."""
    sender = make_sender(timeouts=QUICK)
    with RawReceiver() as gone:
        address = gone.address
    for number in (1, 2, 3):
        sender.submit(address, transfer(number, 4))
    for outcome in outcomes_of(sender, 3).values():
        assert outcome.status is TransferStatus.FAILED
        assert "did not answer" in outcome.reason


def test_no_answer_to_an_offer(make_sender: MakeSender) -> None:
    """The session ends: the next transfer asks for a new one."""
    sender = make_sender(timeouts=replace(CALM, reply_s=1.0))
    with RawReceiver() as peer:
        sender.submit(peer.address, transfer(1, 4))
        first = peer.welcome()
        assert isinstance(peer.receive(), Offer)
        outcome = outcomes_of(sender)[1]
        assert outcome.status is TransferStatus.FAILED
        assert "no reply within" in outcome.reason
        sender.submit(peer.address, transfer(2, 4))
        message = peer.receive()
        while not isinstance(message, Hello):  # the last words of the first session
            message = peer.receive()
        assert message.attempt == first.attempt + 1


def test_who_waited_behind_a_time_out_waits_for_no_other(make_sender: MakeSender) -> None:
    """Transfers to a peer that hangs fail after one time-out, not one each. What was submitted just
    before is carried, as is what is behind a failure that was noticed at once."""
    reply_s = 2.0
    sender = make_sender(timeouts=replace(CALM, reply_s=reply_s))
    with RawReceiver() as peer:
        begun_s = time.monotonic()
        for number in (1, 2, 3):
            sender.submit(peer.address, transfer(number, 0))
        peer.welcome()
        time.sleep(0.8 * reply_s)
        for number in (4, 5):
            sender.submit(peer.address, transfer(number, 0))
        ended = outcomes_of(sender, 3)
        assert time.monotonic() - begun_s < 2.5 * reply_s
        assert ended.keys() == {1, 2, 3}
        assert {outcome.status for outcome in ended.values()} == {TransferStatus.FAILED}
        assert "let the one before it wait: no reply within" in ended[3].reason
        _welcome_again(peer, epoch=2)
        peer.send(Abort(transfer_id=4, epoch=2, reason="broken"))
        assert outcomes_of(sender)[4].reason == "given up by the receiver: broken"
        _welcome_again(peer, epoch=3)
        peer.send(Accept(transfer_id=5, epoch=3))
        peer.send(Complete(transfer_id=5, epoch=3))
        assert outcomes_of(sender)[5].ok


def _welcome_again(peer: RawReceiver, *, epoch: int) -> None:
    """After the last words of the session before; up to the next offer."""
    while not isinstance(message := peer.receive(), Hello):
        pass
    peer.send(Welcome(server_id="d0", rank=0, incarnation=1, attempt=message.attempt, epoch=epoch))
    assert isinstance(peer.receive(), Offer)


def test_no_group_comes_up_at_the_sender(make_sender: MakeSender) -> None:
    """A receiver that accepts, and then hangs with all its connections open."""
    sender = make_sender(timeouts=replace(CALM, group_setup_s=1.0))
    with RawReceiver() as peer:
        sender.submit(peer.address, transfer(1, 4))
        peer.welcome()
        assert isinstance(peer.receive(), Offer)
        peer.send(Accept(transfer_id=1, epoch=1))
        outcome = outcomes_of(sender)[1]
        assert outcome.status is TransferStatus.FAILED
        assert "did not come within" in outcome.reason


def test_a_sender_that_goes_silent_in_mid_transfer(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Its staging is freed after the chunk's time-out, and meanwhile others are served."""
    receiver, other = make_receiver(timeouts=replace(CALM, chunk_s=2.0)), make_sender("p1")
    with RawSender(receiver.port) as peer:
        welcome = peer.open(hello())
        given = offer(1, epoch=welcome.epoch, num_tokens=100)
        peer.send(given)
        assert isinstance(peer.receive(), Accept)
        group = peer.join_group(welcome.epoch)
        assert receiver.stats().staging_used_bytes > 0
        other.submit(address_of(receiver), transfer(2, 100))
        assert outcomes_of(other)[2].ok
        answer = peer.receive()
        assert isinstance(answer, Abort)
        assert "Timed out" in answer.reason
        group.close()
        receiver.release(arrivals_of(receiver)[2])
        assert receiver.stats().staging_used_bytes == 0
        assert receiver.stats().num_failed == 1
        # The failed session is over; a new Hello opens one with a new epoch.
        peer.send(offer(3, epoch=welcome.epoch))
        assert isinstance(peer.receive(), Reject)
        assert peer.open(hello(attempt=2)).epoch > welcome.epoch


def test_a_sender_that_closes_in_mid_transfer(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """What was pending fails, and the receiver frees its staging."""
    receiver, sender = make_receiver(), make_sender(chunk_bytes=1000)
    for number in (1, 2):
        sender.submit(address_of(receiver), slow_transfer(number, 10_000))
    wait_until(lambda: receiver.stats().num_active == 1)
    sender.close()
    ended = sender.poll()
    assert [outcome.status for outcome in ended] == [TransferStatus.FAILED] * 2
    assert all("closed" in outcome.reason for outcome in ended)
    wait_until(lambda: receiver.stats().staging_used_bytes == 0)
    assert receiver.stats().num_failed == 1
    assert receiver.poll() == []


def test_a_receiver_that_closes_in_mid_transfer(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """The sender's chunk has nobody to take it: failed, and a new receiver is served."""
    timeouts = replace(CALM, chunk_s=2.0, reply_s=2.0)
    receiver, sender = make_receiver(), make_sender(chunk_bytes=1000, timeouts=timeouts)
    # Far more chunks than can be sent before the close.
    sender.submit(address_of(receiver), slow_transfer(1, 10_000))
    wait_until(lambda: receiver.stats().num_active == 1)
    receiver.close()
    assert outcomes_of(sender)[1].status is TransferStatus.FAILED
    assert receiver.stats().staging_used_bytes == 0
    again = make_receiver(port=receiver.port)
    sender.submit(address_of(again), transfer(2, 4))
    assert outcomes_of(sender)[2].ok


def test_a_receiver_that_restarts_while_idle_is_noticed(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """The next transfer goes to the new one without a failure, with an epoch of its own."""
    receiver, sender = make_receiver(), make_sender()
    sender.submit(address_of(receiver), transfer(1, 4))
    assert outcomes_of(sender)[1].ok
    receiver.close()
    again = make_receiver(port=receiver.port)
    sender.submit(address_of(again), transfer(2, 4))
    assert outcomes_of(sender)[2].ok
    assert list(arrivals_of(again)) == [2]
    assert sender.stats().num_sessions == 2


def test_a_sender_that_restarts_gets_a_new_epoch(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Under the same name; the old incarnation is not let in again."""
    receiver = make_receiver()
    old, new = make_sender(incarnation=1), make_sender(incarnation=2)
    epochs = []
    for number, sender in ((1, old), (2, new)):
        sender.submit(address_of(receiver), transfer(number, 4))
        assert outcomes_of(sender)[number].ok
        incoming = arrivals_of(receiver)[number]
        epochs.append(incoming.epoch)
        receiver.release(incoming)
    assert epochs[0] < epochs[1]
    assert receiver.stats().num_peers == 1
    old.submit(address_of(receiver), transfer(3, 4))
    outcome = outcomes_of(old)[3]
    assert outcome.status is TransferStatus.REFUSED
    assert "took over" in outcome.reason
    new.submit(address_of(receiver), transfer(4, 4))
    assert outcomes_of(new)[4].ok
    assert new.stats().num_sessions == 1


def test_a_wrong_server_at_the_address(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """A port that another server took over meanwhile must not get this KV."""
    receiver, sender = make_receiver("d9"), make_sender()
    sender.submit(address_of(receiver, "d0"), transfer(1, 4))
    outcome = outcomes_of(sender)[1]
    assert outcome.status is TransferStatus.REFUSED
    assert "d9" in outcome.reason
    assert "d0" in outcome.reason
    assert receiver.poll() == []


def test_silent_sessions_end_on_both_sides(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """A sender without pings loses its session; pings alone keep one for ever."""
    receiver, sender = make_receiver(timeouts=replace(CALM, silence_s=2.0)), make_sender()
    sender.submit(address_of(receiver), transfer(1, 4))
    assert outcomes_of(sender)[1].ok
    with RawSender(receiver.port) as peer:
        peer.open(hello(server_id="silent"))
        assert receiver.stats().num_peers == 2
        wait_until(lambda: receiver.stats().num_peers == 1)
    sender.submit(address_of(receiver), transfer(2, 4))
    assert outcomes_of(sender)[2].ok
    assert sender.stats().num_sessions == 1


def test_cancel_before_the_offer(make_sender: MakeSender) -> None:
    """Both the one that looks for its peer and those behind it end at once."""
    sender = make_sender()
    with RawReceiver() as peer:
        for number in (1, 2):
            sender.submit(peer.address, transfer(number, 4))
        assert isinstance(peer.receive(), Hello)
        sender.cancel(2)
        sender.cancel(1)
        sender.cancel(99)
        for outcome in outcomes_of(sender, 2).values():
            assert outcome.status is TransferStatus.CANCELLED
    assert sender.stats().num_pending == 0


def test_cancel_after_the_offer(make_receiver: MakeReceiver, make_sender: MakeSender) -> None:
    """The chunks still travel, nothing is delivered, and the same group serves the next one."""
    receiver, sender = make_receiver(), make_sender(chunk_bytes=1000)
    sender.submit(address_of(receiver), slow_transfer(1, 1_000))
    wait_until(lambda: receiver.stats().num_active == 1)
    sender.cancel(1)
    outcome = outcomes_of(sender)[1]
    assert outcome.status is TransferStatus.CANCELLED
    assert receiver.poll() == []
    assert receiver.stats().staging_used_bytes == 0
    assert receiver.stats().num_aborted == 1
    sender.submit(address_of(receiver), transfer(2, 4))
    assert outcomes_of(sender)[2].ok
    assert sender.stats().num_sessions == 1


def test_cancel_that_comes_too_late(make_sender: MakeSender) -> None:
    """What the receiver delivered is delivered; the outcome says so."""
    sender = make_sender()
    with RawReceiver() as peer:
        sender.submit(peer.address, transfer(1, 0))
        peer.welcome()
        assert isinstance(peer.receive(), Offer)
        sender.cancel(1)
        assert isinstance(peer.receive(), Abort)
        peer.send(Accept(transfer_id=1, epoch=1))
        peer.send(Complete(transfer_id=1, epoch=1))
        assert outcomes_of(sender)[1].ok


def test_a_wrong_checksum_is_not_delivered(make_receiver: MakeReceiver) -> None:
    """All bytes arrive, but they are not those that were offered."""
    receiver = make_receiver()
    with RawSender(receiver.port) as peer:
        welcome = peer.open(hello())
        given = offer(1, epoch=welcome.epoch, num_tokens=1)
        peer.send(msgspec.structs.replace(given, checksum=1))
        assert isinstance(peer.receive(), Accept)
        group = peer.join_group(welcome.epoch)
        send_all(group, torch.zeros(LAYOUT.bytes_per_token, dtype=torch.uint8))
        answer = peer.receive()
        assert isinstance(answer, Abort)
        assert "checksum" in answer.reason
        group.close()
    assert receiver.poll() == []
    wait_until(lambda: receiver.stats().staging_used_bytes == 0)


def test_staging_is_free_again_where_no_thread_could_be_started(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the limit of threads of a container. The sender hears of it at once."""
    receiver, sender = make_receiver(), make_sender()
    errors = [RuntimeError("can't start new thread")]

    def lane(*args: Any, **options: Any) -> InboundLane:
        if errors:
            raise errors.pop()
        return InboundLane(*args, **options)

    monkeypatch.setattr("streamfill.kv_transfer.inbound_control.InboundLane", lane)
    sender.submit(address_of(receiver), transfer(1, 4))
    outcome = outcomes_of(sender)[1]
    assert outcome.status is TransferStatus.FAILED
    assert "can't start new thread" in outcome.reason
    wait_until(lambda: receiver.stats().staging_used_bytes == 0)
    assert receiver.stats().num_active == 0
    sender.submit(address_of(receiver), transfer(2, 4))
    assert outcomes_of(sender)[2].ok
    receiver.release(arrivals_of(receiver)[2])
