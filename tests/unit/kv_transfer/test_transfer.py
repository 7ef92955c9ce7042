"""Transfers between real endpoints over loopback."""

from __future__ import annotations

import array

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamfill.errors import ConfigError
from streamfill.kv_transfer.interface import KvReceiverInterface, KvSenderInterface
from tests.unit.kv_transfer.builders import (
    HOST,
    LAYOUT,
    address_of,
    arrivals_of,
    bytes_of,
    outcomes_of,
    transfer,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 400])
@pytest.mark.parametrize("with_checksum", [False, True])
def test_what_arrives_is_what_was_sent(
    make_receiver: MakeReceiver, make_sender: MakeSender, num_tokens: int, with_checksum: bool
) -> None:
    """No token, one chunk, many chunks: bytes, ids and offset are those of the sender."""
    receiver = make_receiver()
    sender = make_sender(chunk_bytes=10_000, with_checksum=with_checksum)
    sent = transfer(1, num_tokens, first_token=3)
    sender.submit(address_of(receiver), sent)
    outcome = outcomes_of(sender)[1]
    assert outcome.ok, outcome
    assert outcome.reason == ""
    assert outcome.num_bytes == num_tokens * LAYOUT.bytes_per_token
    assert (outcome.bytes_per_s is None) == (num_tokens == 0)
    incoming = arrivals_of(receiver)[1]
    assert torch.equal(incoming.staging, bytes_of(sent))
    assert incoming.token_ids == array.array("i", sent.token_ids)
    assert (incoming.first_token, incoming.stream_id) == (3, 7)
    assert incoming.source_server_id == "p0"
    receiver.release(incoming)
    assert receiver.stats().staging_used_bytes == 0


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8), chunk=st.integers(1000, 20000))
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_transfers_to_one_peer_arrive_in_order_and_whole(
    make_receiver: MakeReceiver, make_sender: MakeSender, sizes: list[int], chunk: int
) -> None:
    """Any sizes after each other, over one session."""
    receiver, sender = make_receiver(), make_sender(chunk_bytes=chunk)
    sent = [transfer(number, size) for number, size in enumerate(sizes)]
    for one in sent:
        sender.submit(address_of(receiver), one)
    outcomes = outcomes_of(sender, len(sent))
    assert all(outcome.ok for outcome in outcomes.values()), outcomes
    arrived = arrivals_of(receiver, len(sent))
    assert list(arrived) == [one.transfer_id for one in sent]
    for one in sent:
        assert torch.equal(arrived[one.transfer_id].staging, bytes_of(one))
        receiver.release(arrived[one.transfer_id])
    assert receiver.stats().staging_used_bytes == 0
    assert sender.stats().num_sessions == 1
    assert sender.stats().num_pending == 0
    sender.close()
    receiver.close()


def test_many_pairs_at_once(make_receiver: MakeReceiver, make_sender: MakeSender) -> None:
    """Two senders and two receivers, each to each, do not mix anything up."""
    receivers = {name: make_receiver(name) for name in ("d0", "d1")}
    senders = {name: make_sender(name, chunk_bytes=50_000) for name in ("p0", "p1")}
    sent = {}
    for index in range(6):
        for s, sender in enumerate(senders.values()):
            for r, (name, receiver) in enumerate(receivers.items()):
                number = 100 * s + 10 * r + index
                sent[number] = transfer(number, 100 + number)
                sender.submit(address_of(receiver, name), sent[number])
    for sender in senders.values():
        assert all(outcome.ok for outcome in outcomes_of(sender, 12).values())
        assert sender.stats().num_peers == 2
    for r, receiver in enumerate(receivers.values()):
        for number, incoming in arrivals_of(receiver, 12).items():
            assert number // 10 % 10 == r
            assert incoming.source_server_id == f"p{number // 100}"
            assert torch.equal(incoming.staging, bytes_of(sent[number]))
            receiver.release(incoming)
        assert receiver.stats().num_peers == 2
        assert receiver.stats().staging_used_bytes == 0


def test_a_sender_waits_for_a_peer_that_starts_later(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Small models load faster than their peers listen."""
    first = make_receiver()
    address = address_of(first)
    first.close()
    sender = make_sender()
    sender.submit(address, transfer(1, 4))
    assert sender.poll() == []
    make_receiver(port=address.control_port)
    assert outcomes_of(sender)[1].ok


def test_a_server_that_moved_is_found_at_its_new_address(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """A restarted server has the same id and another port; nothing goes to the old one."""
    sender = make_sender()
    for number in (1, 2):
        receiver = make_receiver()
        sender.submit(address_of(receiver), transfer(number, 4))
        assert outcomes_of(sender)[number].ok
        receiver.release(arrivals_of(receiver)[number])
    assert sender.stats().num_peers == 1


def test_pages_are_kept_whole(make_receiver: MakeReceiver, make_sender: MakeSender) -> None:
    """Half a page is of no use in a radix tree and is refused where the mistake was made."""
    layout = msgspec.structs.replace(LAYOUT, page_size=16)
    receiver, sender = make_receiver(layout=layout), make_sender(layout=layout)
    sender.submit(address_of(receiver), transfer(1, 32, first_token=16))
    assert outcomes_of(sender)[1].ok
    with pytest.raises(ValueError, match="whole pages"):
        sender.submit(address_of(receiver), transfer(2, 30, first_token=16))
    assert sender.stats().num_pending == 0


def test_a_pending_id_cannot_be_submitted_again(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Two transfers of one id could not be told apart in `poll`."""
    receiver, sender = make_receiver(), make_sender()
    sender.submit(address_of(receiver), transfer(1, 4))
    with pytest.raises(ValueError, match="pending already"):
        sender.submit(address_of(receiver), transfer(1, 4))
    assert outcomes_of(sender)[1].ok


def test_staging_is_given_back_once(make_receiver: MakeReceiver, make_sender: MakeSender) -> None:
    """The second time it may belong to another transfer."""
    receiver, sender = make_receiver(), make_sender()
    sender.submit(address_of(receiver), transfer(1, 4))
    incoming = arrivals_of(receiver)[1]
    receiver.release(incoming)
    with pytest.raises(ValueError, match="not out of this pool"):
        receiver.release(incoming)


def test_a_port_in_use_or_a_wildcard_without_a_name_stops_the_start(
    make_receiver: MakeReceiver,
) -> None:
    """With key, value and remedy."""
    taken = make_receiver().port
    with pytest.raises(ConfigError, match=f"{HOST}:{taken}"):
        make_receiver("d1", port=taken)
    with pytest.raises(ConfigError, match="advertise_host"):
        make_receiver("d1", bind_host="0.0.0.0")


def test_endpoints_keep_the_contract(make_receiver: MakeReceiver, make_sender: MakeSender) -> None:
    """The static types say so; close may be called again and poll still answers."""
    receiver: KvReceiverInterface = make_receiver()
    sender: KvSenderInterface = make_sender()
    sender.close()
    receiver.close()
    sender.close()
    receiver.close()
    assert sender.stats().num_pending == 0
    assert receiver.stats().num_peers == 0
