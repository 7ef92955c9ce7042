"""The transport over NCCL: two processes, each a rank, on one GPU or on two.

They need a GPU, torch, pyzmq and msgspec: ``pytest -m gpu tests/unit/kv_transfer/test_nccl.py``.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replace_layout

from streamfill.errors import TransportError
from streamfill.kv_transfer.bench import share_one_gpu
from streamfill.kv_transfer.group import SENDER_RANK, PairGroup
from streamfill.kv_transfer.interface import (
    OutgoingTransfer,
    PeerAddress,
    TransferOutcome,
    TransferStatus,
)
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.sender import KvSender
from streamfill.kv_transfer.source import StagedKv
from streamfill.kv_transfer.timeouts import TransportTimeouts
from tests.unit.kv_transfer.builders import HOST, LAYOUT, bytes_of, transfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand"),
]

TIMEOUTS = TransportTimeouts(chunk_s=3.0)
PATIENCE_S = 60.0
"""Far beyond every time-out, and beyond the start of a process with torch."""
MEMORY_BYTES = 1 << 30
WIDE = replace_layout(LAYOUT, num_kv_heads=8, head_dim=512, v_head_dim=512)
"""65 kB per token."""
HUGE_TOKENS = 12_000
"""786 MB: still under way long after its first chunk."""


def sender_gpu() -> torch.device:
    return torch.device("cuda", 0)


def receiver_gpu() -> torch.device:
    return torch.device("cuda", min(1, torch.cuda.device_count() - 1))


def _receive(pipe: Connection) -> None:
    """The other process: tells what arrives, until it is told anything."""
    if receiver_gpu() == sender_gpu():
        share_one_gpu("receiver")
    receiver = KvReceiver(
        "d0",
        WIDE,
        HOST,
        memory_limit_bytes=MEMORY_BYTES,
        device=receiver_gpu(),
        timeouts=TIMEOUTS,
    )
    pipe.send(receiver.port)
    while not pipe.poll():
        select.select([receiver.fileno(), pipe.fileno()], [], [], PATIENCE_S)
        for incoming in receiver.poll():
            assert incoming.staging.is_cuda
            pipe.send((incoming.transfer_id, _digest(incoming.staging)))
            receiver.release(incoming)
    receiver.close()


def _digest(staging: torch.Tensor) -> str:
    return hashlib.sha256(staging.cpu().numpy().data).hexdigest()


class Peer:
    """A receiving process."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_receive, args=(theirs,), daemon=True)
        self._process.start()
        self.address = PeerAddress(server_id="d0", host=HOST, control_port=self.word())

    def word(self) -> Any:
        assert self._pipe.poll(PATIENCE_S), "the other process says nothing"
        return self._pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        if self._process.is_alive():
            self._pipe.send("stop")
            self._process.join(10)
        self._process.kill()
        self._process.join(PATIENCE_S)


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    started: list[Peer] = []
    yield started
    for peer in started:
        peer.stop()


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> Iterator[KvSender]:
    if receiver_gpu() == sender_gpu():
        monkeypatch.setenv("NCCL_HOSTID", "sender")
    endpoint = KvSender(
        "p0",
        WIDE,
        device=sender_gpu(),
        timeouts=TIMEOUTS,
        chunk_bytes=1 << 20,
        same_host=False,
    )
    yield endpoint
    endpoint.close()


def on_gpu(number: int, num_tokens: int) -> OutgoingTransfer:
    made = transfer(number, num_tokens, layout=WIDE)
    return replace(made, kv=StagedKv(bytes_of(made).to(sender_gpu())))


def outcome_of(sender: KvSender) -> TransferOutcome:
    assert select.select([sender.fileno()], [], [], PATIENCE_S)[0], "it does not end"
    (outcome,) = sender.poll()
    return outcome


def deliver(sender: KvSender, peer: Peer, sent: OutgoingTransfer) -> None:
    sender.submit(peer.address, sent)
    outcome = outcome_of(sender)
    assert outcome.ok, outcome.reason
    assert peer.word() == (sent.transfer_id, _digest(bytes_of(sent)))


def _submit_huge(sender: KvSender, peer: Peer, number: int) -> None:
    """Returns while it is under way."""
    sender.submit(peer.address, on_gpu(number, HUGE_TOKENS))
    time.sleep(0.1)
    assert sender.stats().num_pending == 1, "too fast for this test"


def test_bytes_arrive_as_they_were_sent(sender: KvSender, peers: list[Peer]) -> None:
    peers.append(Peer())
    rand = random.Random(0)
    for number in range(20):
        deliver(sender, peers[0], on_gpu(number, rand.choice([1, 15, 16, 17, 500, 2_000])))
    assert sender.stats().num_sessions == 1


def test_a_cancelled_transfer_leaves_the_session(sender: KvSender, peers: list[Peer]) -> None:
    peers.append(Peer())
    deliver(sender, peers[0], on_gpu(1, 100))
    _submit_huge(sender, peers[0], 2)
    sender.cancel(2)
    assert outcome_of(sender).status is TransferStatus.CANCELLED
    deliver(sender, peers[0], on_gpu(3, 100))
    assert sender.stats().num_sessions == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_vanishes(sender: KvSender, peers: list[Peer], how: signal.Signals) -> None:
    """Its transfer fails in time, and a new process gets the next one."""
    peers.append(Peer())
    deliver(sender, peers[0], on_gpu(1, 100))
    _submit_huge(sender, peers[0], 2)
    peers[0].signal(how)
    begun_s = time.monotonic()
    assert outcome_of(sender).status is TransferStatus.FAILED
    assert time.monotonic() - begun_s < TIMEOUTS.join_s + TIMEOUTS.reply_s
    peers[0].signal(signal.SIGKILL)
    peers.append(Peer())
    deliver(sender, peers[1], on_gpu(3, 100))
    assert torch.ones(10, device=sender_gpu()).sum().item() == 10  # the device is not poisoned


def test_a_peer_that_is_gone_before_the_group(sender: KvSender, peers: list[Peer]) -> None:
    """The first transfer sets the communicator up, which its own time-outs do not bound."""
    peers.append(Peer())
    peers[0].signal(signal.SIGSTOP)
    sender.submit(peers[0].address, on_gpu(1, 100))
    assert outcome_of(sender).status is TransferStatus.FAILED
    peers[0].signal(signal.SIGKILL)
    peers.append(Peer())
    deliver(sender, peers[1], on_gpu(2, 100))


def test_a_peer_that_never_comes_to_the_group() -> None:
    """Setting a communicator up is given up too."""
    store = RendezvousStore(
        publish=lambda key, value: None, timeout_s=TIMEOUTS.group_setup_s, pump=time.sleep
    )
    begun_s = time.monotonic()
    with pytest.raises(TransportError):
        PairGroup(
            rank=SENDER_RANK,
            store=store,
            local_host=HOST,
            device=sender_gpu(),
            timeouts=TIMEOUTS,
        )
    assert time.monotonic() - begun_s < 2 * TIMEOUTS.join_s
