"""The fake endpoints behave as the contract says."""

from __future__ import annotations

import select

import pytest
import torch

from streamfill.kv_transfer.fake import FakeKvReceiver, FakeKvSender, FakeNetwork
from streamfill.kv_transfer.interface import (
    KvReceiverInterface,
    KvSenderInterface,
    PeerAddress,
    TransferStatus,
)
from streamfill.kv_transfer.source import StagedKv
from tests.unit.kv_transfer.builders import bytes_of, transfer

_TO_D0 = PeerAddress(server_id="d0", host="nowhere", control_port=1)


def test_a_transfer_arrives_at_once() -> None:
    """With a copy of the bytes, and readable descriptors on both sides."""
    network = FakeNetwork()
    receiver: KvReceiverInterface = FakeKvReceiver("d0", network)
    sender: KvSenderInterface = FakeKvSender("p0", network)
    sent = transfer(1, 4, first_token=2)
    sender.submit(_TO_D0, sent)
    assert len(select.select([sender.fileno(), receiver.fileno()], [], [], 0)[0]) == 2
    assert [outcome.ok for outcome in sender.poll()] == [True]
    (incoming,) = receiver.poll()
    assert select.select([sender.fileno(), receiver.fileno()], [], [], 0)[0] == []
    assert torch.equal(incoming.staging, bytes_of(sent))
    assert isinstance(sent.kv, StagedKv)
    assert incoming.staging.data_ptr() != sent.kv.staging.data_ptr()
    assert list(incoming.token_ids) == list(sent.token_ids)
    receiver.release(incoming)
    assert receiver.stats().staging_used_bytes == 0
    sender.close()
    receiver.close()


def test_failures_can_be_ordered_and_happen_by_themselves() -> None:
    """Steered ones, duplicates, short memory, nobody there."""
    network = FakeNetwork()
    sender = FakeKvSender("p0", network)
    sender.submit(_TO_D0, transfer(1, 4))
    receiver = FakeKvReceiver("d0", network, memory_limit_bytes=1000)
    network.next_failures.append((TransferStatus.FAILED, "as the test wished"))
    for number in (2, 3, 4):
        sender.submit(_TO_D0, transfer(number, 4))
    assert [(o.transfer_id, o.status) for o in sender.poll()] == [
        (1, TransferStatus.FAILED),
        (2, TransferStatus.FAILED),
        (3, TransferStatus.DELIVERED),
        (4, TransferStatus.REFUSED),
    ]
    sender.submit(_TO_D0, transfer(3, 4))
    assert sender.poll()[0].status is TransferStatus.REFUSED
    assert sender.stats().num_pending == 0
    sender.close()
    receiver.close()


def test_held_transfers_can_be_cancelled() -> None:
    """What is held is pending, until it is delivered or cancelled."""
    network = FakeNetwork()
    receiver, sender = FakeKvReceiver("d0", network), FakeKvSender("p0", network)
    network.is_holding = True
    for number in (1, 2):
        sender.submit(_TO_D0, transfer(number, 4))
    with pytest.raises(ValueError, match="pending already"):
        sender.submit(_TO_D0, transfer(1, 4))
    sender.cancel(1)
    assert [outcome.status for outcome in sender.poll()] == [TransferStatus.CANCELLED]
    network.deliver_held()
    assert [outcome.transfer_id for outcome in sender.poll()] == [2]
    assert [incoming.transfer_id for incoming in receiver.poll()] == [2]
    sender.close()
    receiver.close()
