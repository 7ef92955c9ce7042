"""The KV transport between processes that are killed in mid-transfer."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from streamfill.kv_transfer.interface import OutgoingTransfer, PeerAddress, TransferStatus
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.sender import KvSender
from streamfill.kv_transfer.source import StagedKv
from tests.support.children import child
from tests.unit.kv_transfer.builders import (
    CALM,
    HOST,
    LAYOUT,
    arrivals_of,
    bytes_of,
    outcomes_of,
    transfer,
    wait_until,
)

pytestmark = [pytest.mark.integration, pytest.mark.clusters, pytest.mark.timeout(120)]

_MANY_TOKENS = 400_000
"""77 MB in chunks of 1,000 bytes: seconds of transfer, so that the kill falls into it."""

_SMALL_CHUNK_BYTES = 1000
_MEMORY_BYTES = 256 << 20

_spawn = multiprocessing.get_context("spawn")


@pytest.fixture(params=[True, False], ids=["shared memory", "gloo"])
def same_host(request: pytest.FixtureRequest) -> bool:
    """Whether the two sides share memory."""
    wanted: bool = request.param
    return wanted


def _sender(*, same_host: bool) -> KvSender:
    return KvSender(
        "p0", LAYOUT, timeouts=CALM, chunk_bytes=_SMALL_CHUNK_BYTES, same_host=same_host
    )


def _send_without_end(ready: Connection, port: int) -> None:
    """Child: sends one long transfer, then short ones, and tells how each ended."""
    torch.set_num_threads(1)
    sender = _sender(same_host=True)
    address = PeerAddress(server_id="d0", host=HOST, control_port=port)
    while True:
        transfer_id, num_tokens = ready.recv()
        sender.submit(address, transfer(transfer_id, num_tokens))
        ready.send(outcomes_of(sender)[transfer_id].status.value)


def _receive_without_end(ready: Connection) -> None:
    """Child: says where it listens, then tells of each arrival."""
    torch.set_num_threads(1)
    receiver = KvReceiver("d0", LAYOUT, HOST, memory_limit_bytes=_MEMORY_BYTES, timeouts=CALM)
    ready.send(receiver.port)
    wait_until(lambda: receiver.stats().num_active + receiver.stats().num_completed > 0)
    ready.send("receiving")
    while True:
        for incoming in arrivals_of(receiver).values():
            ready.send((incoming.transfer_id, incoming.epoch, bytes(incoming.staging.numpy())))
            receiver.release(incoming)


def _kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_the_sender_is_killed_in_mid_transfer(*, same_host: bool) -> None:
    """The receiver frees the staging, delivers nothing of it, and serves the restarted sender."""
    receiver = KvReceiver(
        "d0",
        LAYOUT,
        HOST,
        memory_limit_bytes=_MEMORY_BYTES,
        timeouts=CALM,
        same_host=same_host,
    )
    try:
        with child(_spawn, _send_without_end, receiver.port) as (process, pipe):
            pipe.send((1, 10))
            assert pipe.recv() == "delivered"
            first = arrivals_of(receiver)[1]
            receiver.release(first)
            pipe.send((2, _MANY_TOKENS))
            wait_until(lambda: receiver.stats().num_active == 1)
            _kill(process)
        wait_until(lambda: receiver.stats().num_active == 0)
        assert receiver.stats().staging_used_bytes == 0
        assert receiver.stats().num_failed == 1
        assert receiver.poll() == []
        with child(_spawn, _send_without_end, receiver.port) as (_, pipe):
            pipe.send((3, 10))
            assert pipe.recv() == "delivered"
            again = arrivals_of(receiver)[3]
            assert torch.equal(again.staging, bytes_of(transfer(3, 10)))
            assert again.epoch > first.epoch
            receiver.release(again)
    finally:
        receiver.close()


def test_the_receiver_is_killed_in_mid_transfer(*, same_host: bool) -> None:
    """The sender reports the failure, and sends to the restarted receiver at its new port."""
    sender = _sender(same_host=same_host)
    try:
        with child(_spawn, _receive_without_end) as (process, pipe):
            address = PeerAddress(server_id="d0", host=HOST, control_port=pipe.recv())
            sender.submit(address, transfer(1, _MANY_TOKENS))
            assert pipe.recv() == "receiving"
            _kill(process)
        outcome = outcomes_of(sender)[1]
        assert outcome.status is TransferStatus.FAILED, outcome
        with child(_spawn, _receive_without_end) as (_, pipe):
            address = PeerAddress(server_id="d0", host=HOST, control_port=pipe.recv())
            sender.submit(address, transfer(2, 10))
            assert outcomes_of(sender)[2].ok
            assert pipe.recv() == "receiving"
            transfer_id, _epoch, content = pipe.recv()
            assert transfer_id == 2
            assert content == bytes(bytes_of(transfer(2, 10)).numpy())
    finally:
        sender.close()


def test_the_receiver_is_stopped_in_mid_transfer_and_others_go_on(*, same_host: bool) -> None:
    """A process that hangs keeps its connections: only the time-out helps, and only its own
    transfers wait for it."""
    sender = _sender(same_host=same_host)
    other = KvReceiver("d1", LAYOUT, HOST, memory_limit_bytes=_MEMORY_BYTES, timeouts=CALM)
    try:
        with child(_spawn, _receive_without_end) as (process, pipe):
            address = PeerAddress(server_id="d0", host=HOST, control_port=pipe.recv())
            sender.submit(address, transfer(1, _MANY_TOKENS))
            assert pipe.recv() == "receiving"
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            to_other = PeerAddress(server_id="d1", host=HOST, control_port=other.port)
            sender.submit(to_other, transfer(2, 10))
            ended = outcomes_of(sender)
            assert ended[2].ok, "the hanging peer delayed another"
            outcome = outcomes_of(sender)[1]
            assert outcome.status is TransferStatus.FAILED
    finally:
        sender.close()
        other.close()


def test_a_group_stands_beside_a_default_group(tmp_path: Path) -> None:
    """The server's process has torch.distributed in use already; neither disturbs the other."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        receiver = KvReceiver("d0", LAYOUT, HOST, memory_limit_bytes=_MEMORY_BYTES, timeouts=CALM)
        sender = KvSender("p0", LAYOUT, timeouts=CALM, same_host=False)
        sent = OutgoingTransfer(
            transfer_id=secrets.randbits(60),
            stream_id=1,
            token_ids=[5],
            first_token=0,
            kv=StagedKv(torch.ones(LAYOUT.bytes_per_token, dtype=torch.uint8)),
        )
        sender.submit(PeerAddress(server_id="d0", host=HOST, control_port=receiver.port), sent)
        assert outcomes_of(sender)[sent.transfer_id].ok
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total.item() == 1
        sender.close()
        receiver.close()
    finally:
        torch.distributed.destroy_process_group()
